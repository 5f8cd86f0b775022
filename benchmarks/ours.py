"""Our own path from an input file to its output, for the benchmarks to time."""

import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from batch_orchestration.admission.admission import admit
from batch_orchestration.admission.inbox import Inbox
from batch_orchestration.admission.results import Admitted
from batch_orchestration.admission.submit import submit
from batch_orchestration.core.batches import BatchOptions
from batch_orchestration.core.requests import ANY_MODEL
from batch_orchestration.delivery.assembly import Delivery, assemble
from batch_orchestration.engines.base import Engine
from batch_orchestration.engines.vllm.engine import VllmEngine
from batch_orchestration.estimates.derivation import DEFAULT_IN_FLIGHT
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.inference.faults.retries import RetryPolicy
from batch_orchestration.inference.policy import RunContext, RunPolicy
from batch_orchestration.inference.run import run_chunks
from batch_orchestration.settings import Device, EngineKind, Settings
from batch_orchestration.store.store import Store


class Answered(NamedTuple):
    """A batch that was answered.

    Attributes:
        seconds: From the first request sent to the last chunk committed.
    """

    delivery: Delivery
    seconds: float


def deployment(root: Path, model: Path, **settings: Any) -> Settings:
    """Return the settings of vLLM on this CPU in a folder; every model name means `model`."""
    values: dict[str, Any] = {
        "engine": EngineKind.VLLM,
        "device": Device.CPU,
        "model": str(model),
        "model_aliases": {ANY_MODEL: model.name},
        "in_flight": DEFAULT_IN_FLIGHT,
        "settle_seconds": 0,
    }
    return Settings(data_dir=root, **{**values, **settings})


def answer(
    file: Path,
    engine: Engine,
    settings: Settings,
    store: Store,
    *,
    options: BatchOptions | None = None,
) -> Answered:
    """Answer one file from inbox to outbox."""
    folder = DataFolder(settings.data_dir)
    submit(file, options, folder)
    (claim,) = Inbox(folder, settings).claim_ready(now=time.time() + 1)
    batch = admit(claim, folder=folder, store=store, settings=settings)
    assert isinstance(batch, Admitted), batch
    run = RunContext(
        engine=engine,
        folder=folder,
        store=store,
        run_id=f"benchmark-{os.getpid()}",
        policy=run_policy(settings),
    )
    started = time.perf_counter()
    for _ in run_chunks({batch.batch_id: range(batch.chunks)}, run):
        pass
    seconds = time.perf_counter() - started
    delivery = assemble(batch.batch_id, folder=folder, store=store, clock=time.time)
    return Answered(delivery, seconds)


def run_policy(settings: Settings) -> RunPolicy:
    """Return how the benchmarks feed: with the fixed window of the settings, without restarts."""
    return RunPolicy(
        in_flight=settings.in_flight or DEFAULT_IN_FLIGHT,
        retry=RetryPolicy(),
        engine_restarts=0,
        model_aliases=settings.model_aliases,
        max_tokens_cap=settings.max_tokens_cap,
        answer_settings=settings.answer_settings(),
    )


def answer_file(file: Path, *, model: Path, flags: Mapping[str, Any], chunk: int) -> float:
    """Return seconds from the first request sent to the last chunk committed."""
    with _answered(file, model=model, flags=flags, chunk=chunk) as answered:
        return answered.seconds


def answer_lines(file: Path, *, model: Path, flags: Mapping[str, Any], chunk: int) -> list[str]:
    """Return the lines of the output file."""
    with _answered(file, model=model, flags=flags, chunk=chunk) as answered:
        return answered.delivery.files.output.read_text().splitlines()


@contextlib.contextmanager
def _answered(
    file: Path, *, model: Path, flags: Mapping[str, Any], chunk: int
) -> Iterator[Answered]:
    with tempfile.TemporaryDirectory(prefix="benchmark-ours-") as root:
        settings = deployment(Path(root), model, engine_args=dict(flags), requests_per_chunk=chunk)
        folder = DataFolder(settings.data_dir)
        folder.create()
        engine = VllmEngine(
            str(model), log_path=folder.logs / "engine.log", device="cpu", args=flags
        )
        try:
            asyncio.run(_warm_up(engine))
            answered = answer(file, engine, settings, Store(folder.duckdb))
        finally:
            engine.stop()
        failed = answered.delivery.totals.failed
        assert failed == 0, f"{failed} requests failed"
        yield answered


async def _warm_up(engine: VllmEngine) -> None:
    """Let the engine answer once, as the other rivals do before they are timed."""
    info = await engine.start()
    body = f'{{"model": "{info.models[0]}", "prompt": "a", "max_tokens": 2}}'
    await engine.answer("/v1/completions", body.encode(), request_id="warm-up")
    await engine.disconnect()
