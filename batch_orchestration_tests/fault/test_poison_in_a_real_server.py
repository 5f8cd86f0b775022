"""Requests that kill or stall the engine, with the simulated engine as a child process."""

import json
import os
import signal
import threading
import time
from collections.abc import Mapping
from math import ceil, log2
from pathlib import Path

import pytest

from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.core.outcomes import Failure, FailureCode
from batch_orchestration.files.journal import read_journal
from batch_orchestration_tests.fault.mixed_batches import simulated_engine
from batch_orchestration_tests.support.builders import make_body, make_line
from batch_orchestration_tests.support.workbench import Workbench

REQUESTS, WINDOW = 200, 32


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    return Workbench(tmp_path)


def admitted(bench: Workbench, faults: Mapping[int, object]) -> BatchPlan:
    """A batch some requests of which ask the engine to do something wrong."""
    inbox = Workbench(bench.folder.root, clock=time.time, requests_per_chunk=50)
    asked = {index: {"simulate": fault} for index, fault in faults.items()}
    lines = [
        make_line(number, body=make_body(f"question {number}", **asked.get(number, {})))
        for number in range(REQUESTS)
    ]
    # So slow that the window is full when the engine dies.
    (bench.folder.root / "simulated.json").write_text(json.dumps({"latency_seconds": 0.05}))
    return inbox.plan_of("poison.jsonl", b"".join(lines))


def failures(bench: Workbench, plan: BatchPlan) -> dict[int, Failure]:
    return {
        settled.index: settled.outcome
        for settled in bench.store.settled(plan.batch_id)
        if isinstance(settled.outcome, Failure)
    }


def test_two_requests_that_end_the_process_are_found_within_the_bound(bench: Workbench) -> None:
    plan = admitted(bench, {40: {"die": True}, 41: {"die": True}})
    engine = simulated_engine(bench.folder)
    bound = 2 * (ceil(log2(WINDOW)) + 1) + 1

    bench.run(plan, engine, in_flight=WINDOW, engine_restarts=bound)
    engine.stop()

    failed = failures(bench, plan)
    assert {index: failure.code for index, failure in failed.items()} == dict.fromkeys(
        (40, 41), FailureCode.ENGINE_KILLED
    )
    assert all("asked to die" in failure.message for failure in failed.values())
    assert engine.starts - 1 <= bound
    assert bench.indices(plan) == list(range(REQUESTS))


def test_an_engine_that_hangs_counts_as_dead_and_costs_no_request_its_answer(
    bench: Workbench,
) -> None:
    plan = admitted(bench, {40: {"hang": True, "fail_first": 1}})
    engine = simulated_engine(bench.folder)

    bench.run(plan, engine, in_flight=WINDOW, hang_seconds=2.0)
    engine.stop()

    assert failures(bench, plan) == {}
    assert engine.starts == 2
    assert bench.indices(plan) == list(range(REQUESTS))


def test_an_engine_that_is_stopped_is_killed_and_its_requests_are_asked_again(
    bench: Workbench,
) -> None:
    """SIGSTOP: it takes connections, says nothing, and does not act on SIGTERM either."""
    plan = admitted(bench, {})
    engine = simulated_engine(bench.folder)

    def stop_once() -> None:
        journal = bench.folder.journal_path(plan.batch_id, 0)
        while len(list(read_journal(journal))) < 20:
            time.sleep(0.02)
        os.kill(engine.process.pid, signal.SIGSTOP)

    stopper = threading.Thread(target=stop_once)
    stopper.start()
    bench.run(plan, engine, in_flight=WINDOW, hang_seconds=2.0)
    engine.stop()
    stopper.join()

    assert failures(bench, plan) == {}
    assert engine.starts == 2
    assert bench.indices(plan) == list(range(REQUESTS))
