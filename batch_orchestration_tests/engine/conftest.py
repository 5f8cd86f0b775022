"""Servers that are shared, because starting vLLM takes most of a minute."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from batch_orchestration.engines.openai_server import ServerOptions
from batch_orchestration.engines.simulated.engine import SimulatedEngine
from batch_orchestration.engines.vllm.engine import VllmEngine
from batch_orchestration_tests.support.engine_contract import CONTEXT_TOKENS
from batch_orchestration_tests.support.tiny_model import make_tiny_model

#: 64 MiB, plenty for a model whose tokens take 1 KiB each.
TINY_ARGS = {"max-model-len": CONTEXT_TOKENS, "kv-cache-memory-bytes": 64 * 2**20}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def vllm_engine(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    """Real vLLM with the tiny model; a test that kills it must start it again."""
    log_path = tmp_path_factory.mktemp("vllm") / "engine.log"
    engine = VllmEngine(str(tiny_model), device="cpu", args=TINY_ARGS, log_path=log_path)
    asyncio.run(engine.start())
    yield engine
    engine.stop()


@pytest.fixture
def simulated_engine(tmp_path: Path) -> Iterator[SimulatedEngine]:
    """A simulated engine that is not started yet; its control file is `tmp_path/control.json`."""
    engine = SimulatedEngine(
        log_path=tmp_path / "engine.log",
        control_path=tmp_path / "control.json",
        context_tokens=CONTEXT_TOKENS,
        options=ServerOptions(timeout_seconds=2.0),
    )
    yield engine
    engine.stop()
