"""The top memory level of vLLM: as configured, or the least that vLLM would choose itself."""

from pathlib import Path

import pytest

from batch_orchestration.engines.memory_fallback import MemoryLevel
from batch_orchestration.engines.vllm.flags import top_level


def top(device: str = "cuda", in_flight: int = 1024, **args) -> MemoryLevel:
    return top_level("some/model", device=device, args=args, in_flight=in_flight)


def test_without_flags_vllms_least_defaults_hold() -> None:
    assert top() == MemoryLevel(
        max_num_seqs=256, max_num_batched_tokens=2048, gpu_memory_utilization=0.9
    )
    assert top("cpu") == MemoryLevel(
        max_num_seqs=128, max_num_batched_tokens=2048, kv_cache_memory_bytes=2**30
    )


def test_flags_are_the_starting_point() -> None:
    given = top(
        **{"max_num_seqs": 512, "max-num-batched-tokens": "16k", "gpu-memory-utilization": "0.8"},
        **{"max-model-len": "4K"},
    )

    assert given == MemoryLevel(
        max_num_seqs=512,
        max_num_batched_tokens=16_000,
        max_model_len=4096,
        gpu_memory_utilization=0.8,
    )


def test_no_more_sequences_run_than_requests_are_in_flight() -> None:
    assert top(in_flight=32).max_num_seqs == 32


def test_a_cache_of_a_given_size_makes_the_share_meaningless() -> None:
    given = top(**{"kv-cache-memory-bytes": 2**30, "gpu-memory-utilization": 0.9})

    assert (given.kv_cache_memory_bytes, given.gpu_memory_utilization) == (2**30, None)


def test_a_cpu_without_a_cache_size_goes_by_the_share() -> None:
    given = top("cpu", **{"kv-cache-memory-bytes": None})

    assert (given.kv_cache_memory_bytes, given.gpu_memory_utilization) == (None, 0.9)


@pytest.mark.parametrize("args", [{"runner": "pooling"}, {"enable-chunked-prefill": False}])
def test_where_prompts_are_read_whole_their_tokens_stay_as_they_are(args) -> None:
    assert top(**args).max_num_batched_tokens is None


@pytest.mark.parametrize("length", ["auto", -1, None])
def test_the_context_of_a_model_in_a_folder_is_its_own(tmp_path: Path, length) -> None:
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 8192}')

    level = top_level(str(tmp_path), device="cpu", args={"max-model-len": length}, in_flight=8)

    assert level.max_model_len == 8192


@pytest.mark.parametrize("config", ["", "[]", "{}"])
def test_a_context_that_is_not_known_is_left_to_vllm(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)

    assert top_level(str(tmp_path), device="cpu", args={}, in_flight=8).max_model_len is None
