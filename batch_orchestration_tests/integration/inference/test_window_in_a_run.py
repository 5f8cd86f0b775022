"""A run against the simulated server with a KV cache: its window follows the server's metrics."""

from pathlib import Path

import pytest

from batch_orchestration.engines.simulated.engine import SimulatedEngine
from batch_orchestration.inference.window import control as window_control
from batch_orchestration.inference.window import window as engine_poll
from batch_orchestration.inference.window.control import Bounds
from batch_orchestration.workers.run_status import RunStatus
from batch_orchestration_tests.support.workbench import Workbench

#: A token takes 8 ms for few sequences and for many; 20 of them run, and more of them wait.
MACHINE = (
    '{"machine": {"cache_tokens": 4000, "max_num_seqs": 20, "step_seconds": 0.008,'
    ' "sequence_seconds": 0.00001, "prompt_token_seconds": 0}}'
)


@pytest.fixture(autouse=True)
def _quick_decisions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_poll, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(window_control, "LEAST_SECONDS", 0.15)


def test_a_window_that_is_too_narrow_grows_to_what_the_engine_can_use(tmp_path: Path) -> None:
    (control := tmp_path / "control.json").write_text(MACHINE)
    engine = SimulatedEngine(log_path=tmp_path / "engine.log", control_path=control)
    bench, status = Workbench(tmp_path / "data"), RunStatus()
    plan = bench.admitted(600, requests_per_chunk=50)
    policy = {"bounds": Bounds(least=2, most=64), "model_aliases": {"*": "simulated-model"}}

    try:
        chunks = bench.commits(plan, engine, status=status, in_flight=4, **policy)
        windows = [status.window for _ in chunks]
    finally:
        engine.stop()

    assert bench.indices(plan) == list(range(600))
    # On a busy machine answers travel slowly, and more must be on their way.
    assert 20 <= windows[-1] < 64
    assert status.engine is not None
    assert status.engine.kv_cache_tokens == 4000
