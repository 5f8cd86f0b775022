"""A file without capacity returns to the inbox, keeps its place, and is read again later."""

import threading
from pathlib import Path
from typing import Any

import pytest

from batch_orchestration.admission.results import Admitted, Queued, Rejected
from batch_orchestration.admission.scans import FileScans
from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.dispatch.queue_building import build_queue
from batch_orchestration.queue import load
from batch_orchestration.queue import pause as queue_pause
from batch_orchestration.queue.entries import Pause, QueueEntry, WaitReason
from batch_orchestration_tests.support.builders import NOW, make_input, make_settings
from batch_orchestration_tests.support.workbench import LATER, Workbench


def bench_with(tmp_path: Path, **settings: Any) -> Workbench:
    most = settings.get("max_queued_requests", 50_000)
    return Workbench(tmp_path, max_requests_per_batch=most, **settings)


def tick(bench: Workbench) -> dict[str, QueueEntry]:
    """One tick of the sensor: claim the files that fit; return those that wait, by name."""
    return {entry.id: entry for entry in bench.claim_admissible()}


def finish(bench: Workbench, batch_id: str) -> None:
    for status in (BatchStatus.FINALIZING, BatchStatus.COMPLETED):
        bench.store.set_status(batch_id, status, at=NOW, actor="test", reason="")


def test_a_file_without_capacity_returns_and_its_figures_are_recorded(tmp_path):
    bench = bench_with(tmp_path, max_queued_requests=5)
    arrived_at = bench.drop("alice/first.jsonl", make_input(3)).stat().st_ctime
    first = bench.admit(bench.inbox.claim_ready(now=LATER)[0])
    claim = bench.claim("alice/second.jsonl", make_input(4), meta=b'{"priority": 2}')

    held = bench.admit(claim)

    assert isinstance(first, Admitted)
    assert isinstance(held, Queued)
    assert held.reason is WaitReason.REQUESTS_QUEUED
    assert "its 4 requests and the 3 queued are more than the 5" in held.detail
    assert bench.files_of(bench.folder.inbox) == {
        "alice/second.jsonl",
        "alice/second.jsonl.meta.json",
    }
    scan = FileScans(bench.folder).find((bench.folder.inbox / "alice/second.jsonl").stat())
    assert (scan.requests, scan.arrived_at) == (4, claim.origin.arrived_at)
    assert scan.arrived_at > arrived_at
    assert bench.folder.batch_ids() == [first.batch_id]


def test_a_returned_file_is_read_again_only_once_there_is_capacity(tmp_path):
    bench = bench_with(tmp_path, max_queued_requests=5)
    first = bench.admit_file("first.jsonl", make_input(3))
    bench.admit_file("second.jsonl", make_input(4))

    waiting = [tick(bench)["second.jsonl"] for _ in range(3)]

    assert {entry.reason for entry in waiting} == {WaitReason.REQUESTS_QUEUED}
    assert (waiting[0].requests, waiting[0].place) == (4, 2)
    assert bench.inbox.claims() == []
    finish(bench, first.batch_id)
    assert tick(bench) == {}
    [claim] = bench.inbox.claims()
    assert isinstance(bench.admit(claim), Admitted)
    tick(bench)
    assert FileScans(bench.folder).empty


def test_a_returned_file_keeps_its_place_before_later_files(tmp_path):
    bench = bench_with(tmp_path, max_queued_requests=5)
    bench.admit_file("first.jsonl", make_input(3))
    bench.admit_file("second.jsonl", make_input(4))
    bench.drop("third.jsonl", make_input(1))

    waiting = tick(bench)

    assert bench.inbox.claims() == []
    assert [waiting[name].place for name in ("second.jsonl", "third.jsonl")] == [2, 3]
    assert "comes after second.jsonl" in waiting["third.jsonl"].detail


def test_a_rewritten_file_is_another_file(tmp_path):
    bench = bench_with(tmp_path, max_queued_requests=5)
    bench.admit_file("first.jsonl", make_input(3))
    bench.admit_file("second.jsonl", make_input(4))
    bench.drop("second.jsonl", make_input(2))

    assert tick(bench) == {}

    [claim] = bench.inbox.claims()
    assert isinstance(bench.admit(claim), Admitted)


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"max_unfinished_batches": 1}, WaitReason.QUEUE_FULL),
        ({"max_requests_per_batch": 5, "max_queued_requests": 5}, WaitReason.REQUESTS_QUEUED),
        ({"max_queued_tokens": 1600}, WaitReason.TOKENS_QUEUED),
        ({"disk_reserve_bytes": 2**62}, WaitReason.DISK_LOW),
    ],
)
def test_each_limit_holds_a_file_and_lets_it_go_when_it_is_raised(tmp_path, limits, reason):
    bench = bench_with(tmp_path)
    bench.admit_file("first.jsonl", make_input(3))
    claim = bench.claim("second.jsonl", make_input(4))
    bench.settings = make_settings(**limits)

    held = bench.admit(claim)
    waits = tick(bench)["second.jsonl"]

    assert isinstance(held, Queued)
    assert held.reason is waits.reason is reason
    bench.settings = make_settings()
    assert tick(bench) == {}
    assert len(bench.inbox.claims()) == 1


def test_a_paused_queue_admits_nothing_not_even_a_claimed_file(tmp_path):
    bench = bench_with(tmp_path)
    claim = bench.claim("a.jsonl", make_input(3))
    queue_pause.pause(bench.folder, Pause(at=NOW, actor="ada", reason="maintenance"))

    held = bench.admit(claim)
    waits = tick(bench)["a.jsonl"]

    assert isinstance(held, Queued)
    assert held.reason is waits.reason is WaitReason.PAUSED
    assert waits.detail == "ada paused the queue: maintenance"
    assert queue_pause.unpause(bench.folder).actor == "ada"
    assert tick(bench) == {}
    assert len(bench.inbox.claims()) == 1


def test_an_unfit_device_keeps_files_in_the_inbox_until_it_is_fit(tmp_path, monkeypatch):
    problem = ["its memory has errors"]
    monkeypatch.setattr(load, "gpu_problem", lambda settings: problem[0])
    bench = bench_with(tmp_path)
    bench.drop("a.jsonl", make_input(3))

    waits = tick(bench)["a.jsonl"]

    assert (waits.reason, waits.detail) == (WaitReason.GPU_UNHEALTHY, "its memory has errors")
    problem[0] = None
    assert tick(bench) == {}


def test_a_source_above_its_rate_waits_and_no_other(tmp_path):
    bench = bench_with(tmp_path, source_submissions_per_hour=60, source_submissions_burst=1)
    bench.admit_file("alice/first.jsonl", make_input(3))
    second = bench.claim("alice/second.jsonl", make_input(4))
    other = bench.claim("bob/other.jsonl", make_input(5))

    held, admitted = bench.admit(second), bench.admit(other)

    assert isinstance(admitted, Admitted)
    assert isinstance(held, Queued)
    assert held.reason is WaitReason.SUBMISSION_RATE
    assert "may go in 60 s" in held.detail


def test_a_file_that_exceeds_an_empty_queue_is_rejected_with_the_numbers(tmp_path):
    bench = bench_with(tmp_path, max_queued_tokens=100)

    verdict = bench.admit_file("a.jsonl", make_input(3))

    assert isinstance(verdict, Rejected)
    assert "more than the 100 that may be queued" in verdict.reason
    assert (bench.folder.rejected / "a.jsonl").exists()


def test_of_several_admissions_at_once_one_takes_the_last_capacity(tmp_path):
    bench = bench_with(tmp_path, max_unfinished_batches=1)
    for number in range(4):
        bench.drop(f"{number}.jsonl", make_input(number + 1))
    claims = bench.inbox.claim_ready(now=LATER)
    verdicts = []

    def admit(claim):
        verdicts.append(bench.admit(claim))

    threads = [threading.Thread(target=admit, args=(claim,)) for claim in claims]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(type(verdict).__name__ for verdict in verdicts) == ["Admitted", *3 * ["Queued"]]
    assert len(bench.store.batches()) == 1
    assert len(bench.files_of(bench.folder.inbox)) == 3


def test_no_more_files_are_claimed_than_batches_may_be_unfinished(tmp_path):
    bench = bench_with(tmp_path, max_unfinished_batches=2)
    bench.admit_file("first.jsonl", make_input(3))
    for name in "abc":
        bench.drop(f"{name}.jsonl", make_input(2))

    waiting = tick(bench)
    again = tick(bench)

    assert len(bench.inbox.claims()) == 1
    assert {entry.reason for entry in waiting.values()} == {WaitReason.QUEUE_FULL}
    assert waiting.keys() == again.keys()


def test_the_queue_has_every_file_and_batch_in_the_order_of_service(tmp_path):
    bench = bench_with(tmp_path, max_unfinished_batches=1)
    plan = bench.plan_of("first.jsonl", make_input(3))
    bench.drop("later.jsonl", make_input(2))
    bench.drop("high/urgent.jsonl", make_input(2), meta=b'{"user": "alice"}')

    now = bench.folder.inbox.stat().st_ctime + 60
    entries = build_queue(
        bench.inbox.look(now=now), folder=bench.folder, store=bench.store, inbox=bench.inbox,
        settings=bench.settings, now=now,
    ).entries  # fmt: skip

    assert [entry.place for entry in entries] == [1, 2, 3]
    assert entries[0].id == "high/urgent.jsonl"
    assert {entry.id for entry in entries[1:]} == {plan.batch_id, "later.jsonl"}
    assert (entries[0].source, entries[0].priority, entries[0].reason) == (
        "alice",
        10,
        "queue_full",
    )
    assert not any(entry.admissible for entry in entries)
