"""The memory fallback goes down in every direction, ends, and leaves the batch what it needs."""

from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_orchestration.core.batches import MemoryDemand
from batch_orchestration.core.errors import Exhaustion, MemoryShortage
from batch_orchestration.engines.memory_fallback import MemoryFallback, MemoryLevel, next_level_down

MIB = 2**20
GPU = MemoryLevel(
    max_num_seqs=64,
    max_num_batched_tokens=2048,
    max_model_len=32_768,
    gpu_memory_utilization=0.9,
)
CPU = MemoryLevel(
    max_num_seqs=16,
    max_num_batched_tokens=2048,
    max_model_len=2048,
    kv_cache_memory_bytes=256 * MIB,
)
TEXT = MemoryDemand(longest_tokens=1500, prompts_can_be_cut=True)


def less(seqs: int, tokens: int, **memory) -> dict:
    """The flags of a level with less work at a time."""
    names = {name.replace("_", "-"): value for name, value in memory.items()}
    return {"max-num-seqs": seqs, "max-num-batched-tokens": tokens, **names}


def short_of(shortage: MemoryShortage, **fields) -> Exhaustion:
    return Exhaustion(shortage=shortage, evidence="a line of the log", **fields)


def fallback(top: MemoryLevel, exhaustion: Exhaustion, needs: MemoryDemand) -> list[MemoryLevel]:
    """All levels below the top, if memory is short of the same thing again and again."""
    levels, level = [], next_level_down(top, exhaustion, needs)
    while level is not None:
        levels.append(level)
        assert len(levels) < 100
        level = next_level_down(level, exhaustion, needs)
    return levels


@pytest.mark.parametrize(
    ("top", "shortage", "needs", "flags"),
    [
        pytest.param(
            GPU,
            MemoryShortage.WORK,
            TEXT,
            [
                less(32, 1024, gpu_memory_utilization=0.81),
                less(16, 512, gpu_memory_utilization=0.73),
                less(8, 512, gpu_memory_utilization=0.66),
                less(8, 512, gpu_memory_utilization=0.59),
                less(8, 512, gpu_memory_utilization=0.55),
            ],
            id="work on a gpu: less at a time, and a smaller share",
        ),
        pytest.param(
            GPU,
            MemoryShortage.CACHE,
            TEXT,
            [
                {"max-model-len": 1500},
                less(32, 1024, max_model_len=1500),
                less(16, 512, max_model_len=1500),
                less(8, 512, max_model_len=1500),
            ],
            id="cache on a gpu: shorter, then what the work does not take is the cache's",
        ),
        pytest.param(
            GPU,
            MemoryShortage.CLAIM,
            TEXT,
            [{"gpu-memory-utilization": f} for f in (0.81, 0.73, 0.66, 0.59, 0.55)],
            id="claim on a gpu: only the share matters",
        ),
        pytest.param(GPU, MemoryShortage.WEIGHTS, TEXT, [], id="nothing makes a model smaller"),
        pytest.param(
            CPU,
            MemoryShortage.WORK,
            TEXT,
            [
                less(8, 1024, kv_cache_memory_bytes=128 * MIB),
                less(8, 512, kv_cache_memory_bytes=64 * MIB),
            ],
            id="work on a cpu: less at a time, and a smaller cache",
        ),
        pytest.param(
            CPU, MemoryShortage.CACHE, TEXT, [{"max-model-len": 1500}], id="cache of a given size"
        ),
        pytest.param(
            CPU, MemoryShortage.CACHE, MemoryDemand(), [], id="of unknown needs nothing is cut"
        ),
        pytest.param(
            MemoryLevel(max_num_seqs=20),
            MemoryShortage.WORK,
            MemoryDemand(),
            [{"max-num-seqs": 10}, {"max-num-seqs": 8}],
            id="only what is ours to set",
        ),
        pytest.param(MemoryLevel(), MemoryShortage.WORK, TEXT, [], id="a server that is not ours"),
    ],
)
def test_the_level(
    top: MemoryLevel, shortage: MemoryShortage, needs: MemoryDemand, flags: list[dict]
) -> None:
    assert [level.flags(top) for level in fallback(top, short_of(shortage), needs)] == flags


def test_a_context_that_only_the_log_tells_is_cut_all_the_same() -> None:
    top = msgspec.structs.replace(CPU, max_model_len=None)

    told = next_level_down(top, short_of(MemoryShortage.CACHE, max_model_len=2048), TEXT)
    untold = next_level_down(top, short_of(MemoryShortage.CACHE), TEXT)

    assert told is not None
    assert told.max_model_len == 1500
    assert untold is None


def optional(strategy):
    return st.none() | strategy


tops = st.builds(
    MemoryLevel,
    max_num_seqs=optional(st.integers(1, 5000)),
    max_num_batched_tokens=optional(st.integers(1, 50_000)),
    max_model_len=optional(st.integers(1, 200_000)),
    gpu_memory_utilization=optional(st.floats(0.01, 1)),
    kv_cache_memory_bytes=optional(st.integers(1, 2**40)),
)
needs_of_batches = st.builds(
    MemoryDemand,
    longest_tokens=optional(st.integers(1, 200_000)),
    prompts_can_be_cut=st.booleans(),
)


def exhaustions(top: MemoryLevel):
    """What can happen to an engine; if the log tells a context, it is the one in force."""
    return st.builds(
        Exhaustion,
        shortage=st.sampled_from(MemoryShortage),
        evidence=st.just("a line"),
        max_model_len=st.just(top.max_model_len),
    )


@given(st.data(), tops, needs_of_batches)
def test_each_level_is_gentler_and_none_is_below_what_the_batch_needs(
    data, top: MemoryLevel, needs: MemoryDemand
) -> None:
    path, known = [top], MemoryFallback(top)
    known.expect(lambda: needs)
    shortages = data.draw(st.lists(exhaustions(top), max_size=60))

    path += filter(None, map(known.step_down, shortages))

    for above, below in pairwise(path):
        pairs = list(
            zip(msgspec.structs.astuple(above), msgspec.structs.astuple(below), strict=True)
        )
        assert all(a == b or (a is not None and b is not None and b < a) for a, b in pairs)
        assert above != below
    if path[-1].max_model_len != top.max_model_len:
        assert needs.longest_tokens is not None
        assert path[-1].max_model_len >= needs.longest_tokens
    if top.max_num_batched_tokens and top.max_num_seqs:
        batched, sequences = path[-1].max_num_batched_tokens, path[-1].max_num_seqs
        assert batched >= sequences or top.max_num_batched_tokens < top.max_num_seqs


@given(tops, needs_of_batches, st.sampled_from(MemoryShortage))
def test_every_descent_ends(
    top: MemoryLevel, needs: MemoryDemand, shortage: MemoryShortage
) -> None:
    levels = fallback(top, short_of(shortage, max_model_len=top.max_model_len), needs)

    assert len(levels) <= 20


def test_a_fallback_starts_from_what_is_configured() -> None:
    known = MemoryFallback(GPU)

    assert known.level == GPU
    assert known.flags == {}
    assert known.description == "as configured"


def test_of_an_engine_that_is_not_ours_there_is_nothing_to_say() -> None:
    assert MemoryFallback(MemoryLevel()).description is None


def test_a_culprit_found_takes_the_engine_back_to_where_the_run_began() -> None:
    first = next_level_down(GPU, short_of(MemoryShortage.WORK), TEXT)
    told: list[tuple[MemoryLevel, ...]] = []
    known = MemoryFallback(GPU, descent=[first], worked=told.append)
    known.expect(lambda: TEXT)

    below = [known.step_down(short_of(MemoryShortage.WORK)) for _ in range(2)]
    known.note_answer()
    known.step_back_up()

    assert known.level == first
    assert told == [(first, *below), (first,)]


def test_what_worked_is_told_once_and_again_when_it_changes() -> None:
    told: list[int] = []
    known = MemoryFallback(GPU, worked=lambda levels: told.append(len(levels)))

    known.note_answer()
    known.note_answer()
    known.step_down(short_of(MemoryShortage.WORK))
    known.step_down(short_of(MemoryShortage.WORK))
    known.note_answer()
    known.note_answer()

    assert told == [0, 2]


def test_a_context_cut_for_one_batch_is_long_enough_for_the_next() -> None:
    known = MemoryFallback(GPU)
    known.expect(lambda: TEXT)
    known.step_down(short_of(MemoryShortage.CACHE))
    assert known.fit()

    known.expect(lambda: MemoryDemand(longest_tokens=4000))

    assert not known.fit()
    assert known.level.max_model_len == 4000
    assert known.fit()


@pytest.mark.parametrize("longest", [None, 40_000])
def test_a_batch_of_any_length_gets_the_whole_context(longest: int | None) -> None:
    known = MemoryFallback(GPU)
    known.expect(lambda: TEXT)
    known.step_down(short_of(MemoryShortage.CACHE))

    known.expect(lambda: MemoryDemand(longest_tokens=longest))

    assert not known.fit()
    assert known.level == GPU
    known.step_back_up()
    assert known.level == GPU
