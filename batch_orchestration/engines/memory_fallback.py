"""The memory fallback: ever lower memory levels for an engine that runs out of memory.

A memory level is the part of an engine's settings that memory depends on. The kind of shortage
determines which of them is lowered next. Stepping down never raises a setting, and never cuts the
context below the batch's demand.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from batch_orchestration.core.batches import MemoryDemand
from batch_orchestration.core.errors import Exhaustion, MemoryShortage

#: Fewer sequences at a time keep no GPU busy; if even these exhaust it, a single one does.
FEWEST_SEQUENCES = 8
#: vLLM's own smallest default; below it, reading prompts takes most of the time.
FEWEST_BATCHED_TOKENS = 512
#: Share of the device. It is as many steps below vLLM's default as 8 sequences are below 256;
#: a larger shortage is caused by other processes.
SMALLEST_FRACTION = 0.55
FRACTION_STEP = 0.9
#: A thousand tokens of a small model.
SMALLEST_KV_CACHE_BYTES = 64 * 2**20


class MemoryLevel(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Settings that memory depends on, named as vLLM's flags; None marks one not to be lowered.

    `gpu_memory_utilization` is None if `kv_cache_memory_bytes` is given, which makes it
    ineffective.
    """

    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_model_len: int | None = None
    gpu_memory_utilization: float | None = None
    kv_cache_memory_bytes: int | None = None

    def flags(self, top: "MemoryLevel") -> dict[str, Any]:
        """Return the settings that differ from the configured ones, as engine arguments."""
        return {
            name.replace("_", "-"): value
            for name, value in msgspec.structs.asdict(self).items()
            if value is not None and value != getattr(top, name)
        }


def next_level_down(
    level: MemoryLevel, exhaustion: Exhaustion, needs: MemoryDemand
) -> MemoryLevel | None:
    """Return the next memory level down; None at the bottom."""
    match exhaustion.shortage:
        case MemoryShortage.WORK:
            easier = _less_memory(_less_work(level, needs))
        case MemoryShortage.CACHE:
            easier = _shorter(level, exhaustion.max_model_len, needs)
            if easier == level and level.kv_cache_memory_bytes is None:
                # Memory that the work does not take is left to the cache.
                easier = _less_work(level, needs)
        case MemoryShortage.CLAIM:
            easier = _less_memory(level)
        case MemoryShortage.WEIGHTS:
            easier = level
    return None if easier == level else easier


def _less_work(level: MemoryLevel, needs: MemoryDemand) -> MemoryLevel:
    """Halve the work at a time: sequences, and tokens if prompts can be cut."""
    tokens = level.max_num_batched_tokens
    return msgspec.structs.replace(
        level,
        max_num_seqs=_halved(level.max_num_seqs, FEWEST_SEQUENCES),
        max_num_batched_tokens=(
            _halved(tokens, FEWEST_BATCHED_TOKENS) if needs.prompts_can_be_cut else tokens
        ),
    )


def _less_memory(level: MemoryLevel) -> MemoryLevel:
    fraction = level.gpu_memory_utilization
    if fraction is not None and fraction > SMALLEST_FRACTION:
        fraction = max(SMALLEST_FRACTION, round(fraction * FRACTION_STEP, 2))
    return msgspec.structs.replace(
        level,
        gpu_memory_utilization=fraction,
        kv_cache_memory_bytes=_halved(level.kv_cache_memory_bytes, SMALLEST_KV_CACHE_BYTES),
    )


def _shorter(level: MemoryLevel, in_force: int | None, needs: MemoryDemand) -> MemoryLevel:
    """Cut the context to the batch's demand; leave it as it is unless both are known."""
    present = level.max_model_len or in_force
    if present is None or needs.longest_tokens is None or needs.longest_tokens >= present:
        return level
    return msgspec.structs.replace(level, max_model_len=needs.longest_tokens)


def _halved(value: int | None, floor: int) -> int | None:
    return value if value is None or value <= floor else max(floor, value // 2)


class MemoryFallback:
    """The current memory level of an engine, read at each of its starts.

    Args:
        top: The configured settings; all None for an engine whose memory is not ours to set.
        descent: Levels below the top to which an earlier run stepped down; the last is in force.
        worked: Called with the whole descent once its last level has answered a request, and again
            once another level has.
    """

    def __init__(
        self,
        top: MemoryLevel,
        *,
        descent: Sequence[MemoryLevel] = (),
        worked: Callable[[tuple[MemoryLevel, ...]], None] = lambda descent: None,
    ) -> None:
        self._top = top
        self._descent = tuple(descent)
        #: Depth at which this run began, before any shortage in it.
        self._began = len(self._descent)
        self._worked = worked
        self._told: tuple[MemoryLevel, ...] | None = None
        self._needs: Callable[[], MemoryDemand] = MemoryDemand

    @property
    def level(self) -> MemoryLevel:
        """The memory level in force."""
        return self._descent[-1] if self._descent else self._top

    @property
    def flags(self) -> dict[str, Any]:
        """The engine arguments by which the level differs from the configured settings."""
        return self.level.flags(self._top)

    @property
    def description(self) -> str | None:
        """The level in force, for display; None if memory is not ours to set."""
        if self._top == MemoryLevel():
            return None
        return ", ".join(f"{name} {value}" for name, value in self.flags.items()) or "as configured"

    @property
    def context_is_cut(self) -> bool:
        """Whether the context was cut to the expected requests: others may not fit."""
        return self.level.max_model_len != self._top.max_model_len

    def expect(self, needs: Callable[[], MemoryDemand]) -> None:
        """Set the demand of the next requests; `needs` is costly and called only if it matters."""
        self._needs = functools.cache(needs)

    def fit(self) -> bool:
        """Make the context long enough for the expected requests; return whether it already was."""
        present = self.level.max_model_len
        if present == self._top.max_model_len or present is None:
            return True
        longest = self._needs().longest_tokens
        if longest is not None and longest <= present:
            return True
        self._lengthen(longest)
        return False

    def step_down(self, exhaustion: Exhaustion) -> MemoryLevel | None:
        """Step down one level and return it; at the bottom, change nothing and return None."""
        easier = next_level_down(self.level, exhaustion, self._needs())
        if easier is not None:
            self._descent = (*self._descent, easier)
        return easier

    def step_back_up(self) -> None:
        """Return to the level at which this run began: the cause of its descent is gone."""
        self._descent = self._descent[: self._began]
        self.note_answer()

    def step_to_top(self) -> bool:
        """Return to the configured settings; return whether that is a change."""
        changed = bool(self._descent)
        self._descent, self._began = (), 0
        return changed

    def note_answer(self) -> None:
        """Record that the level in force works."""
        if self._descent != self._told:
            self._told = self._descent
            self._worked(self._descent)

    def _lengthen(self, longest: int | None) -> None:
        given = self._top.max_model_len
        length = given if longest is None or (given is not None and longest > given) else longest
        levels: list[MemoryLevel] = []
        for level in self._descent:
            longer = msgspec.structs.replace(level, max_model_len=length)
            if longer != (levels[-1] if levels else self._top):
                levels.append(longer)
        self._descent = tuple(levels)
        self._began = min(self._began, len(levels))
