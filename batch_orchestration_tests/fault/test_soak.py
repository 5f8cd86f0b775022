"""Batches in an endless row while their workers and engines are killed at random."""

import os
import random
from pathlib import Path

import pytest

from batch_orchestration_tests.fault.soak import opened, soak

#: Seconds of chaos, for thirty accidents; longer ones, and those with Dagster's daemon among the
#: victims: `make soak`.
SECONDS = float(os.environ.get("SOAK_SECONDS", "75"))
SEED = int(os.environ.get("SEED", random.randrange(2**32)))


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 660)
def test_whatever_is_killed_at_random_every_request_has_the_one_outcome_it_would_have_had(
    tmp_path: Path,
) -> None:
    with opened("workers", tmp_path) as stage:
        figures = soak(stage, seconds=SECONDS, seed=SEED)

    assert (figures.lost, figures.duplicated) == (0, 0)
    assert figures.completed + figures.failed == figures.requests > 0
    assert figures.kills["worker"] > 0
    assert figures.kills["engine"] > 0
    assert figures.paused > 0
