"""Real vLLM is started with derived sizes, tells its figures, and answers through a window."""

from pathlib import Path

import pytest

from batch_orchestration.engines.openai_server import ServerOptions
from batch_orchestration.engines.vllm.engine import VllmEngine
from batch_orchestration.inference.policy import RunContext
from batch_orchestration.inference.run import run_chunks
from batch_orchestration.inference.window import window as engine_poll
from batch_orchestration.inference.window.sizing import Sizing, size_run
from batch_orchestration.settings import Settings
from batch_orchestration.workers.run_status import RunStatus
from batch_orchestration_tests.support.workbench import make_policy
from batch_orchestration_tests.unit.inference.test_sizing import Site

pytestmark = pytest.mark.engine
ARGS = {"max-model-len": 512, "kv-cache-memory-bytes": 8 * 2**20}


def derive(site: Site) -> Sizing:
    settings = Settings(
        engine="vllm",
        device="cpu",
        model=str(site.model),
        engine_args=ARGS,
        data_dir=site.folder.root,
        _env_file=None,
    )
    batches = [site.plan.batch_id]
    return size_run(settings, folder=site.folder, store=site.store, batch_ids=batches)


def answer(site: Site, engine: VllmEngine, sizing: Sizing, status: RunStatus) -> int:
    """Answer the batch; return how many of its requests are."""
    policy = make_policy(
        bounds=sizing.bounds,
        derive=sizing.window,
        model_aliases={"*": "model"},
        max_tokens_cap=64,
    )
    chunks = run_chunks(
        {site.plan.batch_id: range(len(site.plan.chunks))},
        RunContext(
            engine=engine,
            folder=site.folder,
            store=site.store,
            run_id="run-1",
            policy=policy,
            status=status,
        ),
    )
    return sum(chunk.report.completed for chunk in chunks)


def test_a_batch_is_answered_through_derived_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_poll, "POLL_SECONDS", 0.05)
    site, status = Site(tmp_path, requests=40), RunStatus()
    sizing = derive(site)
    engine = VllmEngine(
        str(site.model),
        device="cpu",
        args={**sizing.flags, **ARGS},
        log_path=tmp_path / "engine.log",
        options=ServerOptions(connections=sizing.most_in_flight),
    )

    try:
        answered = answer(site, engine, sizing, status)
    finally:
        engine.stop()

    assert answered == 40
    # 8 MiB at 512 bytes a token, of which vLLM keeps a block of 128 to itself.
    assert 16_000 <= engine.info.kv_cache_tokens <= 16_384
    assert sizing.flags == {"max-num-seqs": 40}
    assert engine.info.max_num_seqs == 40
    assert status.derivation is not None
    assert status.derivation.startswith("window 37 = 31 running")
    assert status.engine is not None
    assert status.engine.generation_tokens
    assert status.engine.kv_cache_tokens == engine.info.kv_cache_tokens
