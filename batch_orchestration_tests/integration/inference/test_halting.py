"""A batch of which too many requests fail pauses, and a person decides."""

import asyncio
import time
from pathlib import Path

import pytest

from batch_orchestration.core.errors import DiskFull, EngineDied, IllegalTransition
from batch_orchestration.core.lifecycle import Halt
from batch_orchestration.core.outcomes import Failure, FailureCode, Outcome
from batch_orchestration.dispatch.run_planning import KnownRun, RunState
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.state_file import StateFile
from batch_orchestration.inference.faults.failure_rate import FIRST_OUTCOMES
from batch_orchestration.inference.faults.retries import RetryPolicy
from batch_orchestration.queue.demand import Limits
from batch_orchestration.queue.load import read_load
from batch_orchestration_tests.support.scripted_engine import (
    REFUSAL,
    PacedEngine,
    ScriptedEngine,
    refusal_of,
    refusing,
)
from batch_orchestration_tests.support.workbench import Workbench, queued

WINDOW = 8


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    return Workbench(tmp_path, policy={"max_failure_rate": 0.5})


def test_one_wrong_parameter_costs_as_many_requests_as_are_judged_and_in_flight(
    bench: Workbench,
) -> None:
    plan = bench.admit_now(1000)

    bench.run(plan, refusing("question"))

    halt = bench.halt(plan)
    assert halt is not None
    assert (halt.actor, halt.failed, halt.judged) == ("run-1", FIRST_OUTCOMES, FIRST_OUTCOMES)
    assert halt.reason.endswith("20 of them as engine_refused: unknown parameter: 'tempreature'")
    assert len({one.custom_id for one in halt.examples}) == 3
    assert len(bench.settled(plan)) == bench.attempts(plan) < FIRST_OUTCOMES + WINDOW
    assert bench.status(plan) == "in_progress"


def test_a_batch_that_goes_bad_in_its_middle_pauses_there(bench: Workbench) -> None:
    plan = bench.admit_now(600)

    bench.run(
        plan, ScriptedEngine(lambda body, times: refusal_of(body, *map(str, range(200, 600))))
    )

    halt = bench.halt(plan)
    assert halt is not None
    assert len(bench.settled(plan)) < 300


@pytest.mark.parametrize(
    ("requests", "options"), [(19, {}), (200, {"max_failure_rate": 1.0})], ids=["few", "off"]
)
def test_a_small_batch_and_one_that_says_so_go_on_to_their_end(
    bench: Workbench, requests: int, options: dict[str, float]
) -> None:
    plan = bench.admit_now(requests, **options)

    bench.run(plan, refusing("question"))
    bench.deliver(plan)

    assert bench.halt(plan) is None
    assert bench.status(plan) == "completed"
    assert len(bench.lines(plan, "errors.jsonl")) == requests


def test_a_batch_of_which_everything_is_at_the_engine_is_not_paused_for_nothing(
    bench: Workbench,
) -> None:
    plan = bench.admit_now(25)

    bench.run(plan, refusing("question"), in_flight=25)
    bench.deliver(plan)

    assert bench.halt(plan) is None
    assert bench.status(plan) == "completed"


def test_the_author_and_the_deployment_say_how_much_may_fail(bench: Workbench) -> None:
    strict, lenient = bench.admit_now(100, max_failure_rate=0.05), bench.admit_now(101)
    every_third = ScriptedEngine(lambda body, times: refusal_of(body, "1.", "4", "7"))

    bench.run(strict, every_third)
    bench.run(lenient, every_third, max_failure_rate=0.9)

    assert bench.halt(strict) is not None
    assert bench.halt(lenient) is None


def test_attempts_that_another_one_follows_do_not_count(bench: Workbench) -> None:
    plan = bench.admit_now(60)
    failure = Failure(code=FailureCode.ENGINE_ERROR, message="try again", status=500)
    engine = ScriptedEngine(lambda body, times: failure if times < 1 else None)

    bench.run(plan, engine)

    assert bench.halt(plan) is None
    assert len(bench.indices(plan)) == 60


def test_requests_that_wait_for_another_attempt_are_not_sent_again(bench: Workbench) -> None:
    plan = bench.admit_now(200)
    overloaded = Failure(
        code=FailureCode.ENGINE_OVERLOADED, message="busy", status=429, retry_after_seconds=600
    )
    slow = [b'question 3"', b'question 5"']
    engine = ScriptedEngine(
        lambda body, times: overloaded if any(text in body for text in slow) else REFUSAL
    )

    began = time.monotonic()
    bench.run(plan, engine, retry=RetryPolicy(max_attempts=3, base_delay_seconds=600))

    assert time.monotonic() - began < 300
    assert bench.halt(plan) is not None
    assert all(engine.submissions[body] == 1 for body in engine.submissions)
    assert not {3, 5} & bench.journals(plan)[0].settled


def test_what_is_in_flight_is_answered_and_recorded(bench: Workbench) -> None:
    plan = bench.admit_now(200)

    class Slow(ScriptedEngine):
        async def answer(self, endpoint: str, body: bytes, *, request_id: str) -> Outcome:
            if b'"question 9"' in body:
                await asyncio.sleep(1.5)
            return await super().answer(endpoint, body, request_id=request_id)

    bench.run(plan, Slow(lambda body, times: None if b'"question 9"' in body else REFUSAL))

    assert bench.halt(plan) is not None
    assert 9 in bench.journals(plan)[0].settled
    assert len(bench.settled(plan)) == bench.attempts(plan)


def test_outcomes_of_earlier_runs_count(bench: Workbench) -> None:
    plan = bench.admit_now(100)
    for number in range(2):
        bench.run(plan, refusing("question"), numbers=[number], run_id=f"run-{number}")

    halt = bench.halt(plan)

    # The twentieth outcome came with the second run, whose own chunk had ten.
    assert halt is not None
    assert (halt.actor, halt.judged) == ("run-1", 20)
    assert all(one.custom_id == f"request-{one.index}" for one in halt.examples)


def test_a_paused_batch_is_left_alone_by_runs_that_were_asked_for_before(
    bench: Workbench,
) -> None:
    plan = bench.admit_now(100)
    bench.run(plan, refusing("question"))
    before, engine = bench.attempts(plan), ScriptedEngine()

    bench.run(plan, engine, run_id="run-2")

    assert (bench.attempts(plan), engine.starts) == (before, 0)


def test_another_run_of_the_batch_stops_as_well(bench: Workbench) -> None:
    plan = bench.admit_now(2000)
    decided = bench.admit_now(40)
    bench.run(decided, refusing("question"))
    halt = bench.halt(decided)
    assert halt is not None

    def answer(body: bytes, times: int) -> None:
        if b'"question 50"' in body:
            bench.folder.halt(plan.batch_id).write(halt)
        time.sleep(0.005)

    bench.run(plan, ScriptedEngine(answer))

    assert len(bench.settled(plan)) < 1500


def test_after_a_resumption_only_later_outcomes_are_judged(bench: Workbench) -> None:
    plan = bench.admit_now(300)
    bench.run(plan, refusing("question"))
    bench.resume(plan)

    bench.run(plan, refusing("question"), run_id="run-2")
    again = bench.halt(plan)
    bench.resume(plan)
    bench.run(plan, ScriptedEngine(), run_id="run-3")
    bench.deliver(plan)

    assert again is not None
    assert (again.actor, again.judged) == ("run-2", FIRST_OUTCOMES)
    assert bench.halt(plan) is None
    assert bench.status(plan) == "completed"
    failed = len(bench.lines(plan, "errors.jsonl"))
    assert 2 * FIRST_OUTCOMES <= failed < 2 * (FIRST_OUTCOMES + WINDOW)
    assert len(bench.lines(plan, "output.jsonl")) == 300 - failed


def test_a_rate_that_is_no_share_is_refused(bench: Workbench) -> None:
    plan = bench.admit_now(100)
    bench.run(plan, refusing("question"))

    for rate in (-0.1, 50.0, float("nan")):
        with pytest.raises(ValueError, match="a share from 0 to 1"):
            bench.resume(plan, max_failure_rate=rate)

    assert bench.halt(plan) is not None


def test_a_batch_that_is_not_paused_cannot_be_resumed(bench: Workbench) -> None:
    plan = bench.admit_now(100)

    with pytest.raises(IllegalTransition, match="is in_progress"):
        bench.resume(plan)


def test_a_paused_batch_can_be_cancelled(bench: Workbench) -> None:
    plan = bench.admit_now(100)
    bench.run(plan, refusing("question"))
    bench.cancel(plan)

    bench.deliver(plan)

    assert bench.halt(plan) is None
    assert bench.status(plan) == "cancelled"
    errors = bench.lines(plan, "errors.jsonl")
    unasked = [line for line in errors if line["response"] is None]
    assert len(errors) == 100
    assert len(errors) - FIRST_OUTCOMES - WINDOW < len(unasked) <= len(errors) - FIRST_OUTCOMES
    bench.resume(plan)
    assert bench.finish(plan).totals.total == 100
    assert bench.status(plan) == "completed"


def test_a_paused_batch_expires_when_its_window_is_over(bench: Workbench) -> None:
    plan = bench.admit_now(100)
    bench.run(plan, refusing("question"))
    bench.let_expire(plan)

    bench.end_overdue()
    bench.deliver(plan)

    assert bench.status(plan) == "expired"
    assert len(bench.lines(plan, "errors.jsonl")) == 100


def test_a_paused_batch_takes_no_room_from_others(bench: Workbench) -> None:
    doomed, good = bench.admit_now(100), bench.admit_now(50)
    bench.run(doomed, refusing("question"))

    load = read_load(bench.folder, bench.store.batches(), limits=Limits())

    assert (load.batches, load.requests) == (1, 50)
    bench.resume(doomed)
    assert read_load(bench.folder, bench.store.batches(), limits=Limits()).batches == 2
    assert bench.halt(good) is None


def test_it_asks_for_no_run_but_a_person(bench: Workbench) -> None:
    plan = bench.admit_now(100)
    bench.run(plan, refusing("question"))
    run = KnownRun(
        run_id="run-1",
        batch_id=plan.batch_id,
        chunks=range(10),
        state=RunState.SUCCEEDED,
        ended_at=time.time(),
    )

    paused = bench.dispatch(run, chunks_per_run=2)
    bench.resume(plan)
    resumed = bench.dispatch(run, chunks_per_run=2)

    assert paused.needed == ()
    (line,), (need,) = paused.waiting, paused.needs
    assert "unknown parameter" in line
    assert f"resume {plan.batch_id}" in need.reason
    assert (need.batch_id, need.run_id) == (plan.batch_id, "run-1")
    assert resumed.needed


def test_another_batch_of_the_same_run_goes_on(bench: Workbench) -> None:
    doomed, own = bench.admitted(400, "doomed"), bench.admitted(400, "own")
    bench.queue(queued(doomed, effective=5.0), queued(own))
    engine = PacedEngine(lambda body, times: refusal_of(body, "doomed"), seconds=0.02)

    bench.run(own, engine)

    assert bench.halt(doomed) is not None
    assert bench.halt(own) is None
    assert len(bench.settled(doomed)) == bench.attempts(doomed) < FIRST_OUTCOMES + WINDOW
    assert len(bench.indices(own)) == 400


def test_a_guest_goes_on_when_the_run_s_own_batch_pauses(bench: Workbench) -> None:
    guest, doomed = bench.admitted(100, "guest"), bench.admitted(400, "doomed")
    bench.queue(queued(guest), queued(doomed))
    engine = PacedEngine(lambda body, times: refusal_of(body, "doomed"), seconds=0.001)

    bench.run(doomed, engine)
    bench.run(guest, engine, run_id="run-2")

    assert bench.halt(doomed) is not None
    assert bench.halt(guest) is None
    assert len(bench.indices(guest)) == 100


def test_suspects_of_a_paused_batch_are_tested_by_the_run_after_its_resumption(
    bench: Workbench,
) -> None:
    plan = bench.admit_now(100)
    killer = b'"question 30"'

    def script(body: bytes, times: int) -> Outcome | BaseException | None:
        return EngineDied("killed") if killer in body else REFUSAL

    bench.run(plan, ScriptedEngine(script), max_failure_rate=0.5, in_flight=32)
    assert bench.halt(plan) is not None
    bench.resume(plan, max_failure_rate=1.0)
    bench.run(plan, ScriptedEngine(script), run_id="run-2", engine_restarts=30)
    bench.deliver(plan)

    assert len(bench.lines(plan, "errors.jsonl")) == 100


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe"])
def test_a_decision_that_is_damaged_stands(bench: Workbench, damage: bytes) -> None:
    plan = bench.admit_now(100)
    bench.run(plan, refusing("question"))
    bench.folder.halt(plan.batch_id).path.write_bytes(damage)
    engine = ScriptedEngine()

    bench.run(plan, engine, run_id="run-2")

    assert engine.starts == 0
    assert str(bench.folder.halt(plan.batch_id).path) in bench.dispatch().waiting[0]
    bench.resume(plan, at=time.time() + 1)
    assert bench.halt(plan) is None


class FullDisk(StateFile[Halt]):
    def write(self, value: Halt) -> None:
        raise DiskFull(f"no room to write {self.path}")


class FullFolder(DataFolder):
    """A data folder on a disk that has no room for decisions."""

    def halt(self, batch_id: str) -> StateFile[Halt]:
        return FullDisk(super().halt(batch_id).path, Halt)


def test_a_decision_that_cannot_be_written_ends_no_run(bench: Workbench) -> None:
    plan = bench.admit_now(60)
    bench.folder = FullFolder(bench.folder.root)

    bench.run(plan, refusing("question"))

    assert len(bench.indices(plan)) == 60
