"""Our own path from an input file to committed answers, for the benchmarks to time."""

import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from batch_orchestration.admission.admission import AdmissionSettings, admit
from batch_orchestration.admission.inbox import Inbox
from batch_orchestration.admission.results import Admitted
from batch_orchestration.admission.submit import submit
from batch_orchestration.core.batches import MAX_LINE_BYTES
from batch_orchestration.core.requests import ANY_MODEL
from batch_orchestration.delivery.assembly import assemble
from batch_orchestration.engines.vllm.engine import VllmEngine
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.inference.faults.retries import RetryPolicy
from batch_orchestration.inference.policy import RunPolicy
from batch_orchestration.inference.run import run_chunks
from batch_orchestration.store.store import Store


def answer_file(file: Path, *, model: Path, flags: Mapping[str, Any], chunk: int) -> float:
    """Return seconds from the first request sent to the last chunk committed."""
    with _answered(file, model=model, flags=flags, chunk=chunk) as (seconds, _):
        return seconds


def answer_lines(file: Path, *, model: Path, flags: Mapping[str, Any], chunk: int) -> list[str]:
    """Return the lines of the output file."""
    with _answered(file, model=model, flags=flags, chunk=chunk) as (_, output):
        return output.read_text().splitlines()


@contextlib.contextmanager
def _answered(
    file: Path, *, model: Path, flags: Mapping[str, Any], chunk: int
) -> Iterator[tuple[float, Path]]:
    with tempfile.TemporaryDirectory(prefix="benchmark-ours-") as root:
        folder = DataFolder(Path(root))
        folder.create()
        store = Store(folder.duckdb)
        batch = _admit(file, folder, store, chunk)
        engine = VllmEngine(
            str(model), log_path=folder.logs / "engine.log", device="cpu", args=flags
        )
        try:
            asyncio.run(_warm_up(engine))
            seconds = _run(batch, engine, folder, store, model.name)
        finally:
            engine.stop()
        report = assemble(batch.batch_id, folder=folder, store=store, clock=time.time)
        assert report.totals.failed == 0, f"{report.totals.failed} requests failed"
        yield seconds, folder.outbox_path(batch.batch_id) / "output.jsonl"


def _run(
    batch: Admitted, engine: VllmEngine, folder: DataFolder, store: Store, served: str
) -> float:
    started = time.perf_counter()
    for _ in run_chunks(
        {batch.batch_id: range(batch.chunks)},
        engine=engine,
        folder=folder,
        store=store,
        run_id=f"benchmark-{os.getpid()}",
        policy=run_policy(served=served),
    ):
        pass
    return time.perf_counter() - started


def _admit(file: Path, folder: DataFolder, store: Store, chunk: int) -> Admitted:
    submit(file, None, folder)
    (claim,) = Inbox(folder, settle_seconds=0).claim_ready(now=time.time() + 1)
    settings = AdmissionSettings(
        requests_per_chunk=chunk,
        max_line_bytes=MAX_LINE_BYTES,
        model_required=False,
        answer_settings={},
    )
    verdict = admit(claim, folder=folder, store=store, settings=settings)
    assert isinstance(verdict, Admitted), verdict
    return verdict


def run_policy(*, served: str, max_tokens_cap: int | None = None) -> RunPolicy:
    """Return how the benchmarks feed: the default window, every model name meaning `served`."""
    return RunPolicy(
        in_flight=256,
        retry=RetryPolicy(),
        engine_restarts=0,
        model_aliases={ANY_MODEL: served},
        max_tokens_cap=max_tokens_cap,
        answer_settings={},
    )


async def _warm_up(engine: VllmEngine) -> None:
    """Let the engine answer once, as the other rivals do before they are timed."""
    identity = await engine.start()
    body = f'{{"model": "{identity.models[0]}", "prompt": "a", "max_tokens": 2}}'
    await engine.answer("/v1/completions", body.encode(), request_id="warm-up")
    await engine.disconnect()
