"""Partial results: the outcomes so far, from the store and journals, while a run continues."""

import csv
import io
import json
import threading
import time

import duckdb
import msgspec
import pytest

from batch_orchestration.admission.admission import admit
from batch_orchestration.admission.inbox import Inbox
from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.core.lifecycle import UNASKED_CODES, EarlyEnd
from batch_orchestration.delivery.assembly import assemble, deliver
from batch_orchestration.delivery.lines import output_line
from batch_orchestration.delivery.outbox import OutboxFiles
from batch_orchestration.delivery.recount import recount
from batch_orchestration.delivery.snapshot import read_snapshot, take_snapshot
from batch_orchestration.engines.simulated.engine import SimulatedEngine
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.journal import Journal
from batch_orchestration.files.kept_input import ChunkRef
from batch_orchestration.lifecycle.close_out import commit_ended
from batch_orchestration.settings import Settings
from batch_orchestration_tests.support.builders import (
    NOW,
    make_body,
    make_completion,
    make_failure,
    make_line,
    make_provenance,
    make_request,
    make_settled,
    make_settled_chunk,
)
from batch_orchestration_tests.support.command_line import CommandLine
from batch_orchestration_tests.support.workbench import Workbench


@pytest.fixture
def bench(tmp_path):
    return Workbench(tmp_path / "data")


def journal(bench, plan, number):
    path = bench.folder.journal_path(plan.batch_id, number)
    return Journal.open(
        path, batch_id=plan.batch_id, number=number, provenance=make_provenance(), at=NOW
    )


def commit(bench, plan, number, *, failing=()):
    settled = make_settled_chunk(plan.chunks[number], failing=failing)
    bench.store.commit_chunk(plan.batch_id, number, settled, run_id="r", at=NOW, seconds=1.0)


def half_done(bench):
    """Chunk 0 is committed, chunk 1 has three outcomes, chunk 2 none."""
    plan = bench.admitted(30)
    commit(bench, plan, 0, failing=(4,))
    with journal(bench, plan, 1) as begun:
        begun.record_outcome(make_request(index=17), make_completion("late"), 1, NOW)
        begun.record_outcome(make_request(index=11), make_completion("early"), 1, NOW)
        begun.record_outcome(make_request(index=12), make_failure(), 2, NOW)
        begun.record_submitted(13, 1, NOW)
    return plan


def now_finished(bench, plan):
    finished = take_snapshot(plan.batch_id, folder=bench.folder, store=bench.store)
    return finished, list(read_snapshot(finished, folder=bench.folder, store=bench.store))


def final_lines(bench, plan):
    """Lines of both delivered files, in input order."""
    files = OutboxFiles(bench.folder.outbox_path(plan.batch_id))
    lines = files.output.read_bytes().splitlines(True) + files.errors.read_bytes().splitlines(True)
    return {json.loads(line)["id"]: line for line in lines}


def test_committed_rows_and_those_of_journals_come_in_input_order(bench):
    plan = half_done(bench)

    finished, settled = now_finished(bench, plan)

    assert [request.index for request in settled] == [*range(10), 11, 12, 17]
    assert (finished.done, finished.total, finished.partial) == (13, 30, True)
    assert finished.status is BatchStatus.IN_PROGRESS


def test_outcomes_after_the_snapshot_are_left_for_the_next_one(bench):
    """Otherwise the count that is printed first would not match the rows."""
    plan = half_done(bench)
    finished = take_snapshot(plan.batch_id, folder=bench.folder, store=bench.store)
    with journal(bench, plan, 1) as begun:
        begun.record_outcome(make_request(index=13), make_completion(), 2, NOW)
    commit(bench, plan, 2)

    rows = list(read_snapshot(finished, folder=bench.folder, store=bench.store))

    assert len(rows) == finished.done == 13


def test_a_chunk_that_a_resumption_takes_back_meanwhile_comes_from_its_journal(bench):
    plan = half_done(bench)
    early_end = EarlyEnd(status=BatchStatus.CANCELLED, at=NOW, actor="tester", reason="")
    ref = ChunkRef.of(plan, 1, bench.folder)
    commit_ended(ref, early_end, store=bench.store, run_id="r", at=NOW)
    snapshot = take_snapshot(plan.batch_id, folder=bench.folder, store=bench.store)
    codes = UNASKED_CODES.values()
    bench.store.reopen_batch(plan.batch_id, codes, at=NOW, actor="tester", reason="")

    rows = list(read_snapshot(snapshot, folder=bench.folder, store=bench.store))

    assert [request.index for request in rows] == [*range(10), 11, 12, 17]


def test_a_record_that_is_being_written_is_not_there_yet(bench):
    plan = half_done(bench)
    path = bench.folder.journal_path(plan.batch_id, 1)
    path.write_bytes(path.read_bytes() + b"\x1e0123abcd {half a rec")

    _, settled = now_finished(bench, plan)

    assert len(settled) == 13


def test_reading_needs_no_lock_and_takes_none(bench):
    plan = half_done(bench)

    with journal(bench, plan, 1) as held:
        _, settled = now_finished(bench, plan)
        held.record_outcome(make_request(index=19), make_completion(), 1, NOW)

    assert len(settled) == 13
    assert len(now_finished(bench, plan)[1]) == 14


def test_odd_text_is_the_same_before_and_after_its_commit(bench):
    """The store replaces what is not Unicode; so does what is read before it has it."""
    body = msgspec.Raw(b'{"choices": [{"message": {"content": "h\xfflf \\u0000 \xc3\xbc"}}]}')
    plan = bench.admitted(1)
    with journal(bench, plan, 0) as begun:
        begun.record_outcome(
            make_request(index=0), make_completion(body=body, latency_seconds=0.1), 1, NOW + 1e-7
        )
    before = now_finished(bench, plan)[1]

    settled = make_settled(0, make_completion(body=body, latency_seconds=0.1))
    settled = msgspec.structs.replace(settled, settled_at=NOW + 1e-7)
    bench.store.commit_chunk(plan.batch_id, 0, [settled], run_id="r", at=NOW, seconds=1.0)

    after = now_finished(bench, plan)[1]
    assert [output_line("b", r) for r in before] == [output_line("b", r) for r in after]
    assert before[0].settled_at == after[0].settled_at


# --- while a run is at work -----------------------------------------------------------------------


def admitted_mixture(bench, *, requests):
    """Every kind of outcome, in the order that makes chunks finish at different times."""
    simulate = {3: {"status": 422}, 5: {"status": 400}}
    lines = [
        make_line(n, body=make_body(f"question {n}", simulate=simulate[n % 10]))
        if n % 10 in simulate
        else make_line(n)
        for n in range(requests)
    ]
    lines[7] = b"not json\n"
    (bench.folder.inbox / "mixed.jsonl").write_bytes(b"".join(lines))
    values = {"requests_per_chunk": 20, "model_aliases": {"*": "simulated-model"}}
    settings = Settings(data_dir=bench.folder.root, engine="simulated", **values, _env_file=None)
    (claim,) = Inbox(bench.folder, settings).claim_ready(now=time.time() + 60)
    verdict = admit(claim, folder=bench.folder, store=bench.store, settings=settings)
    return bench.folder.read_plan(verdict.batch_id), settings


def test_every_row_read_while_a_run_feeds_is_byte_equal_to_its_final_row(bench, tmp_path):
    plan, settings = admitted_mixture(bench, requests=200)
    control = tmp_path / "control.json"
    control.write_text('{"latency_seconds": 0.1, "latency_sigma": 1.0, "statuses": {"500": 0.02}}')
    engine = SimulatedEngine(log_path=tmp_path / "engine.log", control_path=control)
    policy = {
        "model_aliases": settings.model_aliases,
        "answer_settings": settings.answer_settings(),
    }
    run = threading.Thread(target=bench.run, args=(plan, engine), kwargs=policy)
    looks = []

    run.start()
    while run.is_alive():
        finished, settled = now_finished(bench, plan)
        looks.append((finished, [output_line(plan.batch_id, request) for request in settled]))
    run.join()
    engine.stop()
    assemble(plan.batch_id, folder=bench.folder, store=bench.store, clock=lambda: NOW)

    final = final_lines(bench, plan)
    assert len(final) == 200
    partial = [lines for finished, lines in looks if 1 < finished.done < 200]
    assert len({len(lines) for lines in partial}) >= 3
    assert any(finished.committed and finished.journal_ends for finished, _ in looks)
    for finished, lines in looks:
        assert len(lines) == finished.done
        ids = [json.loads(line)["id"] for line in lines]
        assert len(set(ids)) == len(ids)
        assert all(final[line_id] == line for line_id, line in zip(ids, lines, strict=True))


def test_reading_all_the_time_does_not_keep_the_run_from_committing(bench, tmp_path):
    plan = bench.admitted(40, requests_per_chunk=2)
    control = tmp_path / "control.json"
    control.write_text('{"latency_seconds": 0.02}')
    engine = SimulatedEngine(
        log_path=tmp_path / "engine.log", models=["demo-model"], control_path=control
    )
    run = threading.Thread(target=bench.run, args=(plan, engine))
    stop = threading.Event()

    def read():
        while not stop.is_set():
            now_finished(bench, plan)

    reader = threading.Thread(target=read)
    reader.start()
    started = time.monotonic()
    run.start()
    run.join()
    seconds = time.monotonic() - started
    stop.set()
    reader.join()
    engine.stop()

    assert bench.indices(plan) == list(range(40))
    assert seconds < 40


# --- files in the outbox --------------------------------------------------------------------------


def deliver_now(bench, plan):
    return deliver(
        plan.batch_id, folder=bench.folder, store=bench.store, clock=lambda: NOW + 9, actor="run-1"
    )


def test_an_unfinished_batch_leaves_partial_files_and_goes_on_as_it_was(bench):
    plan = half_done(bench)
    before = bench.store.batch(plan.batch_id)

    report = deliver_now(bench, plan)

    assert report.files.partial
    assert (report.totals.completed, report.totals.failed, report.total) == (11, 2, 30)
    assert not OutboxFiles(report.files.folder).output.exists()
    assert bench.store.batch(plan.batch_id) == before
    counts = recount(plan, report.files)
    assert (counts.partial, counts.completed, counts.failed, counts.problem) == (True, 11, 2, None)


def test_the_next_delivery_replaces_or_removes_the_partial_files(bench):
    plan = half_done(bench)
    deliver_now(bench, plan)
    commit(bench, plan, 2)
    report = deliver_now(bench, plan)
    assert report.totals.total == 23
    assert len(bench.lines(plan, "output.partial.jsonl")) == 21
    commit(bench, plan, 1)

    deliver_now(bench, plan)

    folder = bench.folder.outbox_path(plan.batch_id)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["errors.jsonl", "output.jsonl", "report.html", "report.md"]
    assert bench.store.batch(plan.batch_id).status is BatchStatus.COMPLETED


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def cli(tmp_path, monkeypatch, bench):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BATCH_DATA_DIR", str(bench.folder.root))
    return CommandLine(DataFolder(bench.folder.root))


def test_without_the_flag_an_unfinished_batch_says_how_far_it_is(bench, cli):
    plan = half_done(bench)

    result = cli.run("results", plan.batch_id, exit_code=1)

    assert "is in_progress: 13 of 30 (43.3 %) requests have an outcome; --partial" in result.stderr
    assert result.stdout == ""


def test_partial_lines_are_announced_on_stderr_first(bench, cli):
    plan = half_done(bench)

    result = cli.run("results", plan.batch_id, "--partial")

    assert result.stderr.splitlines()[0].startswith("partial: 13 of 30 (43.3 %) requests of ")
    ids = [json.loads(line)["custom_id"] for line in result.stdout.splitlines()]
    assert ids == [f"request-{index}" for index in (*range(10), 11, 12, 17)]


def test_a_finished_batch_gives_every_line_of_both_files(bench, cli):
    plan = bench.admitted(25)
    cli.settle(plan, failing=(3, 12))
    cli.assemble(plan)

    result = cli.run("results", plan.batch_id)

    assert result.stderr == ""
    lines = result.stdout_bytes.splitlines(True)
    assert len(lines) == 25
    assert {json.loads(line)["id"]: line for line in lines} == final_lines(bench, plan)


def test_csv_has_a_flat_row_per_request(bench, cli):
    plan = half_done(bench)

    text = cli.run("results", plan.batch_id, "--partial", "--format", "csv").stdout

    rows = list(csv.DictReader(io.StringIO(text)))
    assert [int(row["index"]) for row in rows] == [*range(10), 11, 12, 17]
    answered, failed = rows[10], rows[11]
    assert (answered["status"], answered["text"], answered["code"]) == ("completed", "early", "")
    assert (answered["prompt_tokens"], answered["finish_reason"]) == ("7", "stop")
    assert (answered["engine"], answered["simulated"]) == ("simulated", "true")
    assert (failed["status"], failed["code"]) == ("failed", "engine_refused")
    assert (failed["message"], failed["attempts"]) == ("the engine said no", "2")


def test_parquet_says_in_itself_that_it_is_partial(bench, cli, tmp_path):
    plan = half_done(bench)
    file = tmp_path / "new folder" / "it's.parquet"

    words = ("results", plan.batch_id, "--partial", "--format", "parquet", "--output", file)
    summary = cli.json(*words)

    assert summary == {
        "batch_id": plan.batch_id,
        "status": "in_progress",
        "partial": True,
        "done": 13,
        "total": 30,
        "format": "parquet",
        "output": str(file),
    }
    with duckdb.connect() as db:
        table = db.execute("SELECT index, text FROM read_parquet(?)", [str(file)]).fetchall()
        pairs = db.execute("SELECT key, value FROM parquet_kv_metadata(?)", [str(file)]).fetchall()
    assert [index for index, _ in table] == [*range(10), 11, 12, 17]
    assert table[10] == (11, "early")
    assert dict(pairs)[b"partial"] == b"true"
    assert (dict(pairs)[b"done"], dict(pairs)[b"total"]) == (b"13", b"30")
    assert [path.name for path in file.parent.iterdir()] == ["it's.parquet"]


def test_a_file_that_cannot_be_written_leaves_no_rest(bench, cli, tmp_path):
    plan = half_done(bench)
    (tmp_path / "file").touch()

    for kind in ("jsonl", "csv"):
        words = ("results", plan.batch_id, "--partial", "--format", kind, "--output")
        result = cli.run(*words, tmp_path / "file" / "x", exit_code=1)
        assert "cannot write" in result.stderr


@pytest.mark.parametrize("words", [["--json"], ["--format", "xlsx"]])
def test_wrong_usage_and_unknown_batches_are_refused(bench, cli, words):
    plan = half_done(bench)

    cli.run("results", plan.batch_id, "--partial", *words, exit_code=2)
    assert "no batch" in cli.run("results", "nothing-00000000", exit_code=1).stderr


def test_the_view_has_one_row_per_committed_request(bench):
    plan = half_done(bench)

    columns, rows = bench.store.query(
        "SELECT status, count(*), min(code), bool_and(simulated) FROM request_outcomes"
        f" WHERE batch_id = '{plan.batch_id}' GROUP BY status ORDER BY status"
    )

    assert columns[0] == "status"
    assert rows == [("completed", 9, None, True), ("failed", 1, "engine_refused", True)]


def test_a_delivery_says_that_it_is_partial_before_it_writes_and_only_if_it_is(bench):
    """Dispatch passes over a run that is marked so, however it ends."""
    plan = half_done(bench)
    outbox = bench.folder.outbox_path(plan.batch_id)
    seen = []

    def deliver_now():
        return deliver(
            plan.batch_id,
            folder=bench.folder,
            store=bench.store,
            clock=lambda: NOW,
            actor="r",
            on_partial=lambda: seen.append(sorted(path.name for path in outbox.glob("*"))),
        )

    assert deliver_now().files.partial
    assert seen == [[]]
    for number in (1, 2):
        commit(bench, plan, number)
    assert not deliver_now().files.partial
    assert len(seen) == 1
