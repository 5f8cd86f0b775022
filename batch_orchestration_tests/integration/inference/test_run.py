"""The chunk runner over real journals and a real store, with an engine that fails on cue."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest

from batch_orchestration.core.errors import EngineDied, EngineStartFailed, PlanMismatch
from batch_orchestration.core.outcomes import Completion, Failure, FailureCode
from batch_orchestration.files.journal import read_journal
from batch_orchestration.inference.faults.retries import RetryPolicy
from batch_orchestration.workers.progress import read_progress
from batch_orchestration_tests.support.builders import make_body
from batch_orchestration_tests.support.scripted_engine import ScriptedEngine, answer_to
from batch_orchestration_tests.support.workbench import Workbench


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    return Workbench(tmp_path)


def fails_on(text: bytes, code: FailureCode, *, times: int = 1_000):
    """A script: bodies with `text` fail so many times, everything else is answered."""

    def script(body: bytes, submitted: int):
        if text in body and submitted < times:
            status = 400 if code is FailureCode.ENGINE_REFUSED else 500
            return Failure(code=code, message="scripted", status=status)
        return None

    return script


def test_every_request_is_answered_once_and_every_chunk_committed(bench: Workbench) -> None:
    plan = bench.admitted(35)
    engine = ScriptedEngine()

    chunks = bench.run(plan, engine)

    assert [chunk.report.number for chunk in chunks] == [0, 1, 2, 3]
    assert bench.indices(plan) == list(range(35))
    assert set(engine.submissions.values()) == {1}
    assert (chunks[-1].progress.done, chunks[-1].progress.total) == (35, 35)


def test_each_answer_is_stored_with_the_request_that_it_answers(bench: Workbench) -> None:
    plan = bench.admitted(23)

    bench.run(plan, ScriptedEngine())

    for settled in bench.store.settled(plan.batch_id):
        asked = msgspec.json.encode(make_body(f"question {settled.index}"))
        assert isinstance(settled.outcome, Completion)
        assert settled.custom_id == f"request-{settled.index}"
        assert settled.outcome == answer_to(asked)


def test_the_window_runs_across_chunk_borders_and_is_never_exceeded(bench: Workbench) -> None:
    plan = bench.admitted(60, requests_per_chunk=3)
    engine = ScriptedEngine()

    bench.run(plan, engine, in_flight=16)

    assert engine.most_in_flight == 16


def test_a_second_run_submits_nothing_and_hands_out_the_chunks_again(bench: Workbench) -> None:
    plan = bench.admitted(25)
    bench.run(plan, ScriptedEngine())
    idle = ScriptedEngine()

    again = bench.run(plan, idle, run_id="run-2")

    assert [chunk.reused for chunk in again] == [True, True, True]
    assert [chunk.report.run_id for chunk in again] == ["run-1"] * 3
    assert idle.starts == 0
    assert again[-1].progress.done == 25


def test_a_refused_request_costs_one_row(bench: Workbench) -> None:
    plan = bench.admitted(20)
    engine = ScriptedEngine(fails_on(b"question 7", FailureCode.ENGINE_REFUSED))

    chunks = bench.run(plan, engine)

    (failed,) = bench.store.failures(plan.batch_id)
    assert failed.custom_id == "request-7"
    assert failed.attempts == 1
    assert sum(chunk.report.completed for chunk in chunks) == 19


def test_the_engines_trouble_is_retried_and_the_history_kept(bench: Workbench) -> None:
    plan = bench.admitted(5)
    engine = ScriptedEngine(fails_on(b"question 3", FailureCode.ENGINE_OVERLOADED, times=2))

    bench.run(plan, engine)

    settled = list(bench.store.settled(plan.batch_id))[3]
    assert isinstance(settled.outcome, Completion)
    assert settled.attempts == 3
    assert [attempt.code for attempt in settled.failed_attempts] == ["engine_overloaded"] * 2


def test_trouble_that_does_not_end_becomes_a_failure_with_its_attempts(bench: Workbench) -> None:
    plan = bench.admitted(5)
    engine = ScriptedEngine(fails_on(b"question 3", FailureCode.TIMEOUT))

    bench.run(plan, engine)

    (failed,) = bench.store.failures(plan.batch_id)
    assert isinstance(failed.outcome, Failure)
    assert failed.outcome.code == FailureCode.TIMEOUT
    assert failed.attempts == 3


def dies_once(at: bytes):
    state = {"died": False}

    def script(body: bytes, submitted: int):
        if at in body and not state["died"]:
            state["died"] = True
            return EngineDied("scripted")
        return None

    return script


def test_a_dead_engine_is_restarted_and_what_it_left_is_sent_again(bench: Workbench) -> None:
    plan = bench.admitted(40)
    engine = ScriptedEngine(dies_once(b"question 17"))

    bench.run(plan, engine)

    assert engine.starts == 2
    assert bench.indices(plan) == list(range(40))
    assert bench.store.failures(plan.batch_id) == []
    assert max(engine.submissions.values()) == 2


def test_an_engine_that_dies_too_often_ends_the_run_and_keeps_every_answer(
    bench: Workbench,
) -> None:
    plan = bench.admitted(40)

    def script(body: bytes, submitted: int):
        return EngineDied("scripted") if b"question 33" in body else None

    with pytest.raises(EngineDied, match="died 3 times"):
        bench.run(plan, ScriptedEngine(script))

    engine = ScriptedEngine()
    bench.run(plan, engine, run_id="run-2")
    assert bench.indices(plan) == list(range(40))
    assert engine.submissions.total() < 20


def test_an_engine_that_does_not_start_ends_the_run_with_its_reason(bench: Workbench) -> None:
    plan = bench.admitted(5)

    with pytest.raises(EngineStartFailed, match="does not become ready"):
        bench.run(plan, ScriptedEngine(starts_fail=1))

    progress = read_progress(bench.folder.progress_path(plan.batch_id))
    assert progress is not None
    assert progress.phase == "stopped"


def test_other_settings_stop_the_run_and_show_the_difference(bench: Workbench) -> None:
    plan = bench.admitted(5)
    engine = ScriptedEngine()
    present = {"engine": "simulated", "model": "another"}

    with pytest.raises(PlanMismatch, match=r"model: 'http://engine\.invalid/v1' → 'another'"):
        bench.run(plan, engine, answer_settings=present)

    assert engine.starts == 0
    assert bench.indices(plan) == []


def test_a_forced_run_marks_its_rows_with_the_settings_in_force(bench: Workbench) -> None:
    plan = bench.admitted(15)
    bench.run(plan, ScriptedEngine(), numbers=[0])

    bench.run(
        plan,
        ScriptedEngine(),
        numbers=[1],
        force=True,
        answer_settings={"engine": "simulated", "model": "another"},
    )

    hashes = [s.provenance.settings_hash for s in bench.store.settled(plan.batch_id)]
    assert set(hashes[:10]) == {plan.settings_hash}
    assert plan.settings_hash not in hashes[10:]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [(b"question 2", b"question 9", r"input\.jsonl"), (b"", b"{}\n", "still being written")],
    ids=["changed", "longer"],
)
def test_an_input_that_changed_after_admission_stops_the_run_before_anything_is_sent(
    bench: Workbench, old: bytes, new: bytes, reason: str
) -> None:
    plan = bench.admitted(5)
    path = bench.folder.input_path(plan.batch_id)
    content = path.read_bytes()
    path.write_bytes(content.replace(old, new) if old else content + new)
    engine = ScriptedEngine()

    with pytest.raises(PlanMismatch, match=reason):
        bench.run(plan, engine)

    assert engine.submissions.total() == 0
    assert bench.indices(plan) == []


def test_closing_the_iterator_stops_the_feed_and_keeps_what_arrived(bench: Workbench) -> None:
    plan = bench.admitted(200)
    chunks = bench.commits(plan, ScriptedEngine(), in_flight=4)

    first = next(chunks)
    chunks.close()

    assert not [thread for thread in threading.enumerate() if thread.name == "feed"]
    engine = ScriptedEngine()
    bench.run(plan, engine, run_id="run-2")
    assert first.report.number == 0
    assert bench.indices(plan) == list(range(200))


def test_a_chunk_is_handed_out_while_later_ones_are_still_being_fed(bench: Workbench) -> None:
    plan = bench.admitted(30)
    gate = threading.Event()

    def script(body: bytes, submitted: int):
        if b"question 29" in body and not gate.is_set():
            return Failure(code=FailureCode.TIMEOUT, message="not yet")
        return None

    patient = RetryPolicy(max_attempts=10**9, base_delay_seconds=0.0)
    chunks = bench.commits(plan, ScriptedEngine(script), retry=patient)

    assert [next(chunks).report.number, next(chunks).report.number] == [0, 1]
    assert len(bench.indices(plan)) == 20
    gate.set()
    assert [chunk.report.number for chunk in chunks] == [2]


STRANGER = """
import sys, time, duckdb
connection = duckdb.connect(sys.argv[1])
print("locked", flush=True)
time.sleep(float(sys.argv[2]))
"""


def test_a_stranger_who_locks_the_store_delays_commits_but_not_the_feed(tmp_path: Path) -> None:
    bench = Workbench(tmp_path, lock_seconds=1.0)
    plan = bench.admitted(40)
    engine = ScriptedEngine()
    command = [sys.executable, "-c", STRANGER, str(bench.folder.duckdb), "6"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as stranger:
        assert stranger.stdout is not None
        stranger.stdout.readline()
        answered_while_locked = []

        def watch() -> None:
            time.sleep(3)
            answered_while_locked.append(engine.submissions.total())

        watcher = threading.Thread(target=watch)
        watcher.start()

        bench.run(plan, engine)
        watcher.join()

    assert answered_while_locked == [40]
    assert bench.indices(plan) == list(range(40))


def test_a_failed_attempt_counts_in_the_next_run_too(bench: Workbench) -> None:
    """A request gets its number of attempts in all, not per run."""
    plan = bench.admitted(1)
    attempts = {"n": 0}

    def script(body: bytes, submitted: int):
        attempts["n"] += 1
        if attempts["n"] == 3:
            return EngineDied("scripted")
        return Failure(code=FailureCode.TIMEOUT, message="scripted")

    with pytest.raises(EngineDied):
        bench.run(plan, ScriptedEngine(script), engine_restarts=0)
    bench.run(plan, ScriptedEngine(script), run_id="run-2")

    (entry,) = read_journal(bench.folder.journal_path(plan.batch_id, 0))
    assert isinstance(entry.outcome, Failure)
    assert attempts["n"] == 4
    assert [attempt.code for attempt in entry.failed_attempts] == ["timeout", "timeout"]
