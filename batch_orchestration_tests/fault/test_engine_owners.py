"""However the process that started an engine ends, no process of the engine is left."""

import asyncio
import signal
from pathlib import Path

import pytest

from batch_orchestration.engines.processes.records import end_recorded
from batch_orchestration.engines.simulated.engine import SimulatedEngine
from batch_orchestration_tests.fault.processes import (
    ended_within,
    engine_owner,
    guarded_family,
    recorded,
    socket_of,
)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_is_left_when_the_owner_is_killed(
    tmp_path: Path, number: signal.Signals
) -> None:
    log_path = tmp_path / "engine.log"
    with engine_owner("simulated", log_path) as owner:
        processes, left = recorded(log_path), socket_of(log_path)

        owner.send_signal(number)
        owner.communicate()

    assert ended_within(60, processes)
    assert not end_recorded(log_path.with_suffix(".process.json"))
    assert not left.parent.exists()


@pytest.mark.parametrize("ending", ["exit", "raise"])
def test_no_process_is_left_when_the_owner_forgets_to_stop_its_engine(
    tmp_path: Path, ending: str
) -> None:
    log_path = tmp_path / "engine.log"
    with engine_owner("simulated", log_path, ending) as owner:
        owner.communicate()

    # The record goes when the group is known to be gone.
    assert not log_path.with_suffix(".process.json").exists()
    assert "Running on" in log_path.read_text()


def test_after_the_owners_death_the_next_engine_starts_in_its_place(tmp_path: Path) -> None:
    log_path = tmp_path / "engine.log"
    with engine_owner("simulated", log_path) as owner:
        owner.kill()
        owner.communicate()
    left = socket_of(log_path)
    engine = SimulatedEngine(log_path=log_path)

    try:
        assert left.is_socket()
        asyncio.run(engine.start())

        assert not left.parent.exists()
        assert socket_of(log_path) != left
    finally:
        engine.stop()

    assert not log_path.with_suffix(".process.json").exists()


@pytest.mark.engine
@pytest.mark.slow
def test_no_process_of_real_vllm_is_left_when_its_owner_is_killed(tmp_path: Path) -> None:
    log_path = tmp_path / "engine.log"
    with engine_owner("vllm", log_path) as owner:
        processes = recorded(log_path)

        owner.kill()
        owner.communicate()

    assert len(processes) >= 3  # the server, EngineCore, Worker
    assert ended_within(20, processes)


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_guarded_child_ends_soon_after_its_parent(method: str) -> None:
    with guarded_family(method, guarded=True) as (parent, child):
        parent.kill()
        parent.wait()

        assert ended_within(60, [child])


def test_the_guard_is_none_of_the_business_of_other_peoples_processes() -> None:
    with guarded_family("spawn", guarded=False) as (parent, child):
        parent.kill()
        parent.wait()

        assert not ended_within(1.5, [child])
