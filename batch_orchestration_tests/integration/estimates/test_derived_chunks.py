"""A dropped file is cut by what its engine was measured to cost, if nobody says otherwise."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from batch_orchestration.estimates.costs import Source
from batch_orchestration.estimates.engine import engine_in_force
from batch_orchestration.estimates.tables import EngineRun, EstimateTables
from batch_orchestration_tests.support.builders import NOW, make_input
from batch_orchestration_tests.support.deployment import Deployment


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    with closing(Deployment(tmp_path, requests_per_chunk=None)) as deployed:
        yield deployed


def measure(deployment: Deployment, *, seconds_a_request: float) -> None:
    """Let the engine have been measured with requests like those of `make_input`."""
    in_force = engine_in_force(deployment.settings)
    run = EngineRun(
        run_id="measured",
        engine=in_force.kind,
        memory_level="as configured",
        source=Source.CALIBRATION,
        requests=100,
        prompt_tokens=100 * 33,
        completion_tokens=100 * 380,
        longest=1200,
        at_a_time=256,
        seconds=100 * seconds_a_request,
        measured_at=NOW,
    )
    EstimateTables(deployment.store).add_runs([run], model=in_force.model, device=in_force.device)


def chunks_of(deployment: Deployment, requests: int) -> list[int]:
    batch_id = deployment.admit("a.jsonl", make_input(requests))
    return [chunk.requests for chunk in deployment.folder.read_plan(batch_id).chunks]


def test_without_a_measurement_a_chunk_has_a_thousand(deployment: Deployment) -> None:
    assert chunks_of(deployment, 1100) == [1000, 100]


def test_chunks_of_a_slow_engine_are_small(
    deployment: Deployment, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="batch_orchestration")
    measure(deployment, seconds_a_request=0.4)

    chunks = chunks_of(deployment, 400)

    # A minute's work is 150; what nobody knows yet is how long the answers will be.
    assert 75 <= chunks[0] <= 300
    assert sum(chunks) == 400
    assert any(
        line.startswith(f"chunk {chunks[0]} = 60 s between commits") for line in caplog.messages
    )


def test_chunks_of_a_fast_engine_are_large(deployment: Deployment) -> None:
    measure(deployment, seconds_a_request=0.001)

    assert chunks_of(deployment, 1100) == [1100]
