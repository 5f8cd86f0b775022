"""Real vLLM on a CPU whose KV cache is too small for the model's context."""

from pathlib import Path

import pytest

from batch_orchestration.core.outcomes import Completion
from batch_orchestration.engines.memory_fallback import MemoryFallback
from batch_orchestration.engines.vllm.engine import VllmEngine
from batch_orchestration.engines.vllm.flags import top_level
from batch_orchestration_tests.support.workbench import SETTINGS, Workbench

pytestmark = pytest.mark.engine

#: Of the 2,048 tokens of the tiny model's context it holds 1,408, says vLLM.
SMALL_CACHE_BYTES = 800 * 1024


def test_a_cache_too_small_for_the_context_is_enough_for_what_the_batch_needs(
    tiny_model: Path, tmp_path: Path
) -> None:
    bench = Workbench(tmp_path)
    plan = bench.admitted(20, settings={**SETTINGS, "max_tokens_cap": 8})
    worked = []
    args = {"kv-cache-memory-bytes": SMALL_CACHE_BYTES}
    top = top_level(str(tiny_model), device="cpu", args=args, in_flight=1024)
    engine = VllmEngine(
        str(tiny_model),
        device="cpu",
        args=args,
        fallback=MemoryFallback(top, worked=worked.append),
        log_path=tmp_path / "engine.log",
    )

    try:
        bench.run(
            plan,
            engine,
            model_aliases={"*": "tiny"},
            max_tokens_cap=8,
            answer_settings=plan.settings,
        )
    finally:
        engine.stop()

    answers = [settled.outcome for settled in bench.store.settled(plan.batch_id)]
    assert len(answers) == 20
    assert all(isinstance(answer, Completion) for answer in answers)
    assert engine.starts == 2
    [[level]] = worked
    assert 1024 < level.max_model_len <= 1408
    reports = bench.store.chunk_reports(plan.batch_id).values()
    assert {r.memory_level for r in reports} == {f"max-model-len {level.max_model_len}"}
