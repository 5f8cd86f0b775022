"""The time breakdowns of runs whose losses are known."""

import asyncio
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from batch_orchestration.core.errors import EngineDied
from batch_orchestration.core.outcomes import FailureCode, Outcome
from batch_orchestration.defs.events import output_metadata
from batch_orchestration.delivery.assembly import assemble
from batch_orchestration.engines.base import EngineInfo
from batch_orchestration.gpu.thermal import Throttle
from batch_orchestration.store.connection import writing
from batch_orchestration.workers.utilization import Utilization
from batch_orchestration.workers.utilization_files import (
    accounts_path,
    read_accounts,
    utilization_of,
)
from batch_orchestration_tests.support.builders import NOW, make_failure
from batch_orchestration_tests.support.scripted_engine import ScriptedEngine
from batch_orchestration_tests.support.workbench import Workbench, queued

#: A look is a tenth of a second; the machine that runs the tests may have other things to do.
NEARLY = 0.4


class KnownEngine(ScriptedEngine):
    """Takes the same time for every request, but for those that are named."""

    def __init__(
        self, *arguments: Any, start: float = 0.0, each: float = 0.0, slow: Any = None
    ) -> None:
        super().__init__(*arguments)
        self._start, self._each, self._slow = start, each, slow or {}

    async def start(self) -> EngineInfo:
        if not self.alive:
            await asyncio.sleep(self._start)
        return await super().start()

    async def answer(self, endpoint: str, body: bytes, *, request_id: str) -> Outcome:
        own = [seconds for text, seconds in self._slow.items() if text in body]
        await asyncio.sleep(own[0] if own else self._each)
        return await super().answer(endpoint, body, request_id=request_id)


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    return Workbench(tmp_path)


def found(bench: Workbench, batch_id: str) -> Utilization:
    total = utilization_of(bench.folder, batch_id)
    assert total is not None
    return total


def test_the_start_of_the_engine_is_start_up_each_time_that_it_starts(bench: Workbench) -> None:
    def dies_once(body: bytes, submitted: int) -> EngineDied | None:
        return EngineDied("scripted") if b"one 3." in body and submitted == 0 else None

    plan = bench.admitted(10, "one")

    bench.run(plan, KnownEngine(dies_once, start=0.8))

    assert found(bench, plan.batch_id).start_up_seconds == pytest.approx(1.6, abs=NEARLY)
    (account,) = read_accounts(bench.folder, plan.batch_id)
    assert account.engine_restarts == 1


def test_a_place_that_waits_for_its_next_attempt_is_a_gap(bench: Workbench) -> None:
    """Nine more requests could be given, and the engine has nothing to do meanwhile."""

    def refuses_once(body: bytes, submitted: int) -> Outcome | None:
        first = b"one 0." in body and submitted == 0
        overloaded = make_failure(FailureCode.ENGINE_OVERLOADED, retry_after_seconds=1.0)
        return overloaded if first else None

    plan = bench.admitted(10, "one")

    bench.run(plan, KnownEngine(refuses_once, each=0.01), in_flight=1)

    total = found(bench, plan.batch_id)
    assert total.feed_gap_seconds == pytest.approx(1.0, abs=NEARLY)
    assert total.drain_seconds < NEARLY


def test_a_device_that_needs_half_the_window_loses_half_by_its_name(bench: Workbench) -> None:
    plan = bench.admitted(40, "one")

    bench.run(plan, KnownEngine(each=0.2), throttle=lambda: Throttle(share=0.5))

    total = found(bench, plan.batch_id)
    assert total.held_seconds == pytest.approx(40 * 0.2 / 8, abs=NEARLY)
    assert total.used_seconds == pytest.approx(40 * 0.2 / 8, abs=NEARLY)
    assert total.feed_gap_seconds < NEARLY


def test_a_locked_store_after_the_last_answer_is_commit(bench: Workbench) -> None:
    plan, locked = bench.admitted(10, "one"), threading.Event()

    def hold() -> None:
        with writing(bench.folder.duckdb):
            locked.set()
            time.sleep(1.0)

    def lock(body: bytes, submitted: int) -> None:
        if b"one 9." in body:
            threading.Thread(target=hold).start()
            locked.wait(5.0)

    bench.run(plan, KnownEngine(lock))

    assert found(bench, plan.batch_id).commit_seconds == pytest.approx(1.0, abs=NEARLY)


def test_a_batch_whose_answers_lay_in_journals_has_no_time_but_commits(bench: Workbench) -> None:
    plan = bench.admitted(10, "one")
    bench.run(plan, KnownEngine(each=0.2))

    bench.run(plan, KnownEngine(), run_id="run-2")

    second = list(read_accounts(bench.folder, plan.batch_id))[-1]
    assert second.run_id == "run-2"
    assert second.wall_seconds == pytest.approx(second.commit_seconds + second.start_up_seconds)
    assert found(bench, plan.batch_id).runs == 2


def test_a_step_that_is_tried_again_goes_on_with_the_account_of_its_run(bench: Workbench) -> None:
    plan = bench.admitted(20, "one")
    bench.run(plan, KnownEngine(each=0.2), numbers=[0])
    first = found(bench, plan.batch_id)

    bench.run(plan, KnownEngine(each=0.2), numbers=[1])

    both = found(bench, plan.batch_id)
    assert both.runs == 1
    assert both.wall_seconds > first.wall_seconds
    assert both.used_seconds > first.used_seconds + 0.1


def test_a_guest_that_ends_early_is_charged_no_longer(bench: Workbench) -> None:
    own, guest = bench.admitted(60, "own"), bench.admitted(30, "guest")
    bench.queue(queued(guest, effective=10), queued(own))
    early_end = bench.folder.early_end(guest.batch_id).path

    def closes(body: bytes, submitted: int) -> None:
        if b"guest 4." in body:
            early_end.touch()

    bench.run(own, KnownEngine(closes, each=0.2), in_flight=4)

    (theirs,) = read_accounts(bench.folder, guest.batch_id)
    (ours,) = read_accounts(bench.folder, own.batch_id)
    assert theirs.wall_seconds < 2.5
    assert ours.updated_at - theirs.updated_at > 0.5


def test_a_guest_is_charged_for_its_share_and_nothing_is_charged_twice(bench: Workbench) -> None:
    own, guest = bench.admitted(30, "own"), bench.admitted(30, "guest")
    bench.queue(queued(guest, effective=10), queued(own))
    began = time.monotonic()

    bench.run(own, KnownEngine(each=0.1, start=0.3), in_flight=4)

    took = time.monotonic() - began
    ours, theirs = found(bench, own.batch_id), found(bench, guest.batch_id)
    assert ours.wall_seconds + theirs.wall_seconds == pytest.approx(took, abs=NEARLY)
    assert theirs.used_seconds == pytest.approx(30 * 0.1 / 4, abs=NEARLY)
    assert (theirs.start_up_seconds, theirs.commit_seconds) == (0.0, 0.0)
    assert ours.start_up_seconds >= 0.3


def test_the_time_of_a_killed_run_is_known_to_the_second(tmp_path: Path) -> None:
    """Nobody can write anything after a SIGKILL."""
    code = (
        "import sys; from pathlib import Path\n"
        "from batch_orchestration_tests.integration.workers.test_utilization import *\n"
        "bench = Workbench(Path(sys.argv[1])); plan = bench.admitted(20, 'one')\n"
        "bench.run(plan, KnownEngine(each=600.0), in_flight=4)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    bench = Workbench(tmp_path)
    try:
        deadline = time.monotonic() + 60
        while not (files := list(tmp_path.glob("batches/*/accounts/*.json"))):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()

    total = found(bench, files[0].parents[1].name)
    assert total.wall_seconds >= 0.9
    assert total.used_seconds >= 0.5


def test_a_damaged_account_is_no_account_and_stops_nobody(bench: Workbench) -> None:
    plan = bench.admitted(10, "one")
    accounts_path(bench.folder, plan.batch_id).mkdir()
    accounts_path(bench.folder, plan.batch_id).joinpath("run-1.json").write_bytes(b'{"batch')
    assert utilization_of(bench.folder, plan.batch_id) is None

    bench.run(plan, KnownEngine())

    assert found(bench, plan.batch_id).runs == 1


def test_accounts_that_cannot_be_written_stop_no_run(bench: Workbench) -> None:
    plan = bench.admitted(10, "one")
    accounts_path(bench.folder, plan.batch_id).write_bytes(b"a file where the folder should be")

    bench.run(plan, KnownEngine())

    assert bench.indices(plan) == list(range(10))
    assert utilization_of(bench.folder, plan.batch_id) is None


def test_a_delivery_reports_the_utilization(bench: Workbench) -> None:
    plan = bench.admitted(10, "one")
    bench.run(plan, KnownEngine(each=0.1))

    report = assemble(plan.batch_id, folder=bench.folder, store=bench.store, clock=lambda: NOW)

    metadata = output_metadata(report)
    losses = ("start_up", "feed_gap", "held", "drain", "commit")
    lost = [metadata[f"lost_{name}_seconds"] for name in losses]
    # Dagster plots numbers, and only them.
    assert all(type(value) is float for value in (*lost, metadata["utilization"]))
    assert report.utilization == utilization_of(bench.folder, plan.batch_id)
    assert metadata["accounted_seconds"] == pytest.approx(
        sum(lost) + report.utilization.used_seconds, abs=0.01
    )
