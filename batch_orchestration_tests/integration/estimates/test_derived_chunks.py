"""Without a setting, chunks are sized by the measured costs of the engine."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from batch_orchestration.estimates.engine import engine_in_force
from batch_orchestration.estimates.tables import EstimateTables
from batch_orchestration_tests.support.builders import make_input
from batch_orchestration_tests.support.deployment import Deployment
from batch_orchestration_tests.support.estimates import make_measurement


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    with closing(Deployment(tmp_path, requests_per_chunk=None)) as deployed:
        yield deployed


def measure(deployment: Deployment, *, seconds_a_request: float) -> None:
    """Store a measurement of the engine with requests like those of `make_input`."""
    run = make_measurement(
        **engine_in_force(deployment.settings).key,
        requests=100,
        prompt_tokens=100 * 33,
        completion_tokens=100 * 380,
        longest=1200,
        at_a_time=256,
        seconds=100 * seconds_a_request,
    )
    EstimateTables(deployment.store).add_measurements([run])


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

    # A minute's work is 150; the lengths of the answers are only estimated.
    assert 75 <= chunks[0] <= 300
    assert sum(chunks) == 400
    assert any(
        line.startswith(f"chunk {chunks[0]} = 60 s between commits") for line in caplog.messages
    )


def test_chunks_of_a_fast_engine_are_large(deployment: Deployment) -> None:
    measure(deployment, seconds_a_request=0.001)

    assert chunks_of(deployment, 1100) == [1100]
