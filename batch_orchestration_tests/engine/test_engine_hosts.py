"""Real vLLM in an engine host: the second run finds it warm, and nothing outlives a killed host."""

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from batch_orchestration.core.outcomes import Completion
from batch_orchestration.engines.processes.records import group_members
from batch_orchestration.engines.vllm.engine import VllmEngine
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.hosting.hosted_process import HostedProcess
from batch_orchestration.hosting.hosts import end_engines, running_engines
from batch_orchestration.hosting.records import EngineSpec
from batch_orchestration_tests.engine.conftest import TINY_ARGS
from batch_orchestration_tests.support.engine_contract import ask, chat

pytestmark = pytest.mark.engine

#: `parent_guard` looks twice a second.
GONE_SECONDS = 10.0


def hosted_engine(folder: DataFolder, model: Path, run_id: str) -> VllmEngine:
    log_path = folder.logs / "engines" / f"{run_id}.log"
    return VllmEngine(
        str(model),
        device="cpu",
        args=TINY_ARGS,
        log_path=log_path,
        process=HostedProcess(
            name="vllm engine",
            log_path=log_path,
            folder=folder,
            spec=lambda: EngineSpec(
                kind="vllm", model=str(model), device="cpu", configured={}, memory_level={}
            ),
            keep_alive_seconds=600,
        ),
    )


def test_vllm_stays_warm_for_the_next_run_and_dies_with_its_host(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = DataFolder(tmp_path / "data")
    folder.create()
    try:
        first = hosted_engine(folder, tiny_model, "first")
        asyncio.run(first.start())
        assert isinstance(ask(first, chat("one"))[0], Completion)
        group = first.process.pid
        assert group is not None
        first.release()

        second, began = hosted_engine(folder, tiny_model, "second"), time.monotonic()
        identity = asyncio.run(second.start())
        assert time.monotonic() - began < first.info.start_seconds / 4
        assert isinstance(ask(second, chat("two"))[0], Completion)
        assert identity.models == ("tiny",)
        assert second.info == first.info
        assert second.process.pid == group

        [running] = running_engines(folder)
        assert len(group_members(group)) > 1
        os.kill(running.record.host.pid, signal.SIGKILL)
        deadline = time.monotonic() + GONE_SECONDS
        while group_members(group):
            assert time.monotonic() < deadline, "vLLM outlives its host"
            time.sleep(0.1)
        second.release()
    finally:
        end_engines(folder, only_idle=False)
