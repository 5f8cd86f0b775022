"""What the care for a device allows is kept to by a run: narrower, paused, ended."""

import asyncio
import time
from pathlib import Path

import pytest

from batch_orchestration.core.errors import DiskFull, EngineDied, GpuUnhealthy
from batch_orchestration.core.outcomes import Failure, FailureCode, Outcome
from batch_orchestration.gpu.thermal import Throttle
from batch_orchestration.inference.chunk_pass import PendingRequest
from batch_orchestration.inference.faults import transient_errors as obstacles
from batch_orchestration.inference.window import window as request_window
from batch_orchestration_tests.support.builders import make_failure
from batch_orchestration_tests.support.scripted_engine import Script, ScriptedEngine
from batch_orchestration_tests.support.workbench import Workbench


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_window, "LOOK_SECONDS", 0.002)


class SlowEngine(ScriptedEngine):
    """Takes a few turns of the loop for each answer, so that a window stays full."""

    def __init__(self, script: Script) -> None:
        super().__init__(script)
        self.cancelled = self._has = 0
        #: How many it had, with each new one.
        self.taken: list[int] = []

    async def answer(self, endpoint: str, body: bytes, *, request_id: str) -> Outcome:
        self._has += 1
        self.taken.append(self._has)
        try:
            await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        else:
            return await super().answer(endpoint, body, request_id=request_id)
        finally:
            self._has -= 1


class Device:
    """Its care changes when so many requests have been submitted."""

    def __init__(self, *changes: tuple[int, Throttle]) -> None:
        self.engine = SlowEngine(self._script)
        self.script: Script = lambda body, times: None
        self._changes = list(changes)
        self._throttle = Throttle()
        self.submitted = 0

    def _script(self, body: bytes, times: int):
        self.submitted += 1
        return self.script(body, times)

    def throttle(self) -> Throttle:
        if self._changes and self.submitted >= self._changes[0][0]:
            self._throttle = self._changes.pop(0)[1]
        return self._throttle


def run(bench: Workbench, device: Device, requests: int = 60, **policy):
    plan = bench.admitted(requests)
    policy = {"in_flight": 16, "throttle": device.throttle, **policy}
    return plan, bench.commits(plan, device.engine, **policy)


def test_a_smaller_share_narrows_the_window_and_cancels_nothing(tmp_path: Path) -> None:
    bench, device = Workbench(tmp_path), Device((20, Throttle(share=0.25)))

    plan, chunks = run(bench, device)
    list(chunks)

    assert bench.indices(plan) == list(range(60))
    assert device.engine.cancelled == 0
    assert set(device.engine.submissions.values()) == {1}
    # What was in flight when the share fell leaves first; nobody takes its place.
    assert max(device.engine.taken[-20:]) == 4


def test_a_pause_keeps_what_is_in_flight_and_goes_on_by_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bench, device = Workbench(tmp_path), Device((20, Throttle(share=0.0)))
    looks = 0

    def throttle() -> Throttle:
        nonlocal looks
        now = device.throttle()
        looks += now.share == 0 and not device.engine.in_flight
        return Throttle() if looks > 20 else now

    plan = bench.admitted(60)
    bench.run(plan, device.engine, in_flight=16, throttle=throttle)

    assert bench.indices(plan) == list(range(60))
    assert set(device.engine.submissions.values()) == {1}
    assert [r.message for r in caplog.records].count(
        "paused while the device cools; requests in flight go on"
    ) == 1


def test_a_stop_lets_what_is_in_flight_finish_and_then_ends_the_run(tmp_path: Path) -> None:
    bench, device = Workbench(tmp_path), Device((20, Throttle(stop="Xid 79 on GPU 0")))

    plan, chunks = run(bench, device)
    with pytest.raises(GpuUnhealthy, match="Xid 79 on GPU 0"):
        list(chunks)

    assert device.engine.cancelled == 0
    assert 20 <= device.submitted <= 20 + 16
    healthy = ScriptedEngine()
    bench.run(plan, healthy, run_id="run-2")
    assert healthy.submissions.total() == 60 - device.submitted


def test_after_a_stop_no_request_is_tried_again_and_none_is_a_dead_letter(tmp_path: Path) -> None:
    bench, device = Workbench(tmp_path), Device((10, Throttle(stop="ECC")))
    device.script = lambda body, times: Failure(
        code=FailureCode.ENGINE_ERROR, message="scripted", status=500
    )

    plan, chunks = run(bench, device)
    with pytest.raises(GpuUnhealthy, match="ECC"):
        list(chunks)

    assert bench.store.failures(plan.batch_id) == []
    healthy = ScriptedEngine()
    bench.run(plan, healthy, run_id="run-2")
    assert bench.indices(plan) == list(range(60))


def test_an_engine_that_dies_of_its_device_makes_no_request_suspect(tmp_path: Path) -> None:
    bench, device = Workbench(tmp_path), Device((12, Throttle(stop="GPU is lost")))
    device.script = lambda body, times: EngineDied("scripted") if device.submitted > 14 else None

    plan, chunks = run(bench, device)
    with pytest.raises(GpuUnhealthy, match="GPU is lost"):
        list(chunks)

    assert device.engine.starts == 1
    healthy = ScriptedEngine()
    bench.run(plan, healthy, run_id="run-2")
    assert healthy.most_in_flight == 8  # Suspects would be tested in halves.
    assert bench.indices(plan) == list(range(60))


def test_a_stop_when_everything_is_answered_changes_nothing(tmp_path: Path) -> None:
    bench, device = Workbench(tmp_path), Device((60, Throttle(stop="too late")))

    plan, chunks = run(bench, device)
    list(chunks)

    assert bench.indices(plan) == list(range(60))


def test_a_stop_does_not_wait_for_an_hour_that_the_engine_asked_for(tmp_path: Path) -> None:
    bench, device = Workbench(tmp_path), Device((10, Throttle(stop="ECC")))
    device.script = lambda body, times: make_failure(
        FailureCode.ENGINE_OVERLOADED, retry_after_seconds=3600.0
    )

    plan, chunks = run(bench, device)
    began = time.monotonic()
    with pytest.raises(GpuUnhealthy, match="ECC"):
        list(chunks)

    assert time.monotonic() - began < 5
    assert bench.store.failures(plan.batch_id) == []


def test_a_stop_does_not_wait_for_room_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(obstacles, "RETRY_POLL_SECONDS", 0.002)
    bench, device = Workbench(tmp_path), Device((10, Throttle(stop="ECC")))

    def no_room(*_: object) -> None:
        raise DiskFull("no space left")

    monkeypatch.setattr(PendingRequest, "settle", no_room)
    plan, chunks = run(bench, device)
    with pytest.raises(GpuUnhealthy, match="ECC"):
        list(chunks)

    monkeypatch.undo()
    bench.run(plan, ScriptedEngine(), run_id="run-2")
    assert bench.indices(plan) == list(range(60))


def test_a_pause_costs_a_request_that_waits_for_its_next_attempt_none(tmp_path: Path) -> None:
    bench, device = Workbench(tmp_path), Device((10, Throttle(share=0.0)))
    device.script = lambda body, times: (
        make_failure(FailureCode.ENGINE_OVERLOADED) if device.submitted <= 16 else None
    )
    plan, looks, during = bench.admitted(16), 0, set[int]()

    def throttle() -> Throttle:
        nonlocal looks
        now = device.throttle()
        looks += now.share == 0
        if looks > 200:
            return Throttle()
        if now.share == 0:
            during.add(len(device.engine.taken))
        return now

    bench.run(plan, device.engine, in_flight=16, throttle=throttle)

    assert bench.indices(plan) == list(range(16))
    assert len(during) == 1
