"""The memory ladder: ever gentler settings for an engine that runs out of memory.

A rung is the part of an engine's settings that memory depends on. Which of them is lowered next
depends on what memory was short of; none is ever raised on the way down, and the context never
goes below what the batch needs.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from batch_orchestration.core.errors import Exhaustion, MemoryShortage
from batch_orchestration.engines.memory_demand import Needs

#: With fewer sequences at a time no GPU is busy; if even these exhaust it, one of them does.
FEWEST_SEQUENCES = 8
#: vLLM's own smallest default; below it reading prompts takes most of the time.
FEWEST_BATCHED_TOKENS = 512
#: Of the device. From vLLM's default it is as many steps away as 8 sequences are from 256; what
#: lacks more than that is taken by somebody else.
SMALLEST_FRACTION = 0.55
FRACTION_STEP = 0.9
#: A thousand tokens of a small model.
SMALLEST_KV_CACHE_BYTES = 64 * 2**20


class Rung(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Settings that memory depends on, named as vLLM's flags; None is not ours to lower.

    `gpu_memory_utilization` is None where `kv_cache_memory_bytes` is given, as it is without
    effect there.
    """

    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_model_len: int | None = None
    gpu_memory_utilization: float | None = None
    kv_cache_memory_bytes: int | None = None

    def flags(self, top: "Rung") -> dict[str, Any]:
        """Return what differs from the configured settings, as engine arguments."""
        return {
            name.replace("_", "-"): value
            for name, value in msgspec.structs.asdict(self).items()
            if value is not None and value != getattr(top, name)
        }


def gentler(rung: Rung, exhaustion: Exhaustion, needs: Needs) -> Rung | None:
    """Return the next rung down; None at the bottom."""
    match exhaustion.shortage:
        case MemoryShortage.WORK:
            easier = _less_memory(_less_work(rung, needs))
        case MemoryShortage.CACHE:
            easier = _shorter(rung, exhaustion.max_model_len, needs)
            if easier == rung and rung.kv_cache_memory_bytes is None:
                # What the work does not take is the cache's.
                easier = _less_work(rung, needs)
        case MemoryShortage.CLAIM:
            easier = _less_memory(rung)
        case MemoryShortage.WEIGHTS:
            easier = rung
    return None if easier == rung else easier


def _less_work(rung: Rung, needs: Needs) -> Rung:
    """Halve what is computed at a time: sequences, and tokens where prompts can be cut."""
    tokens = rung.max_num_batched_tokens
    return msgspec.structs.replace(
        rung,
        max_num_seqs=_halved(rung.max_num_seqs, FEWEST_SEQUENCES),
        max_num_batched_tokens=(
            _halved(tokens, FEWEST_BATCHED_TOKENS) if needs.prompts_can_be_cut else tokens
        ),
    )


def _less_memory(rung: Rung) -> Rung:
    fraction = rung.gpu_memory_utilization
    if fraction is not None and fraction > SMALLEST_FRACTION:
        fraction = max(SMALLEST_FRACTION, round(fraction * FRACTION_STEP, 2))
    return msgspec.structs.replace(
        rung,
        gpu_memory_utilization=fraction,
        kv_cache_memory_bytes=_halved(rung.kv_cache_memory_bytes, SMALLEST_KV_CACHE_BYTES),
    )


def _shorter(rung: Rung, in_force: int | None, needs: Needs) -> Rung:
    """Cut the context to what the batch needs; unless both are known it stays as it is."""
    present = rung.max_model_len or in_force
    if present is None or needs.longest_tokens is None or needs.longest_tokens >= present:
        return rung
    return msgspec.structs.replace(rung, max_model_len=needs.longest_tokens)


def _halved(value: int | None, floor: int) -> int | None:
    return value if value is None or value <= floor else max(floor, value // 2)


class Ladder:
    """Where an engine stands on its ladder; the engine reads it whenever it starts.

    Args:
        top: The settings as configured; all None for an engine whose memory is not ours to set.
        descent: The rungs below the top that an earlier run went down, the last one in force.
        worked: Told the whole descent when its last rung has answered something; again when
            another one has.
    """

    def __init__(
        self,
        top: Rung,
        *,
        descent: Sequence[Rung] = (),
        worked: Callable[[tuple[Rung, ...]], None] = lambda descent: None,
    ) -> None:
        self._top = top
        self._descent = tuple(descent)
        #: How far down it was before anything was short in this run.
        self._began = len(self._descent)
        self._worked = worked
        self._told: tuple[Rung, ...] | None = None
        self._needs: Callable[[], Needs] = Needs

    @property
    def rung(self) -> Rung:
        """The rung in force."""
        return self._descent[-1] if self._descent else self._top

    @property
    def flags(self) -> dict[str, Any]:
        """The engine arguments by which the rung differs from what was configured."""
        return self.rung.flags(self._top)

    @property
    def description(self) -> str | None:
        """The rung in force, for people; None if memory is not ours to set."""
        if self._top == Rung():
            return None
        return ", ".join(f"{name} {value}" for name, value in self.flags.items()) or "as configured"

    @property
    def context_is_cut(self) -> bool:
        """Whether the context was cut to what the requests expected need: others may not fit."""
        return self.rung.max_model_len != self._top.max_model_len

    def expect(self, needs: Callable[[], Needs]) -> None:
        """Say what the next requests need; asked, at some cost, only when that matters."""
        self._needs = functools.cache(needs)

    def fit(self) -> bool:
        """Make the context long enough for the requests expected; return whether it was."""
        present = self.rung.max_model_len
        if present == self._top.max_model_len or present is None:
            return True
        longest = self._needs().longest_tokens
        if longest is not None and longest <= present:
            return True
        self._lengthen(longest)
        return False

    def step_down(self, exhaustion: Exhaustion) -> Rung | None:
        """Go one rung down and return it; None, and nothing changes, at the bottom."""
        easier = gentler(self.rung, exhaustion, self._needs())
        if easier is not None:
            self._descent = (*self._descent, easier)
        return easier

    def climb_back(self) -> None:
        """Go back to where this run began: what brought it down is explained and gone."""
        self._descent = self._descent[: self._began]
        self.note_answer()

    def climb_to_top(self) -> bool:
        """Go back to what is configured; return whether that is a change."""
        changed = bool(self._descent)
        self._descent, self._began = (), 0
        return changed

    def note_answer(self) -> None:
        """Take note that the rung in force works."""
        if self._descent != self._told:
            self._told = self._descent
            self._worked(self._descent)

    def _lengthen(self, longest: int | None) -> None:
        given = self._top.max_model_len
        length = given if longest is None or (given is not None and longest > given) else longest
        rungs: list[Rung] = []
        for rung in self._descent:
            longer = msgspec.structs.replace(rung, max_model_len=length)
            if longer != (rungs[-1] if rungs else self._top):
                rungs.append(longer)
        self._descent = tuple(rungs)
        self._began = min(self._began, len(rungs))
