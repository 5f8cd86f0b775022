"""Deployments within the test's process."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from batch_orchestration_tests.support.deployment import Deployment


@pytest.fixture
def deploy(tmp_path: Path) -> Iterator[Callable[..., Deployment]]:
    """Makes a deployment with these settings."""

    def made(**settings: Any) -> Deployment:
        return stack.enter_context(closing(Deployment(tmp_path, **settings)))

    with ExitStack() as stack:
        yield made


@pytest.fixture
def deployment(deploy: Callable[..., Deployment]) -> Deployment:
    return deploy()
