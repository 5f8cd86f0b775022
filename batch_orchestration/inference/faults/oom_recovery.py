"""Memory ladders that outlive a run, and what the chunks of a run need of them."""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec

from batch_orchestration.core.batches import settings_hash
from batch_orchestration.core.errors import EngineDied, EngineError, EngineStartFailed
from batch_orchestration.core.requests import Request, parse_line
from batch_orchestration.engines.memory_demand import Needs, needs_of
from batch_orchestration.engines.memory_ladder import Ladder, Rung
from batch_orchestration.engines.memory_level_file import RungMemory
from batch_orchestration.files.kept_input import ChunkRef

logger = logging.getLogger(__name__)


def remembered_ladder(
    top: Rung,
    *,
    memory: RungMemory,
    model: str,
    device: str,
    args: Mapping[str, Any],
    retry_seconds: float,
    derived: Collection[str] = (),
    clock: Callable[[], float] = time.time,
) -> Ladder:
    """Return a ladder that begins where the last run of the same engine found that it works.

    After `retry_seconds` there it begins one rung higher: what filled the memory may be gone.

    Args:
        derived: Flags that differ from run to run with what is free. What worked is remembered
            whatever they are, and never raises them.
    """
    fixed = {
        name: value
        for name, value in msgspec.to_builtins(top).items()
        if name.replace("_", "-") not in derived
    }
    configured = {"args": dict(args), "top": fixed}
    engine = f"{model} on {device} ({settings_hash(configured)})"
    descent = memory.recall(engine)
    rungs = () if descent is None else descent.rungs
    if descent is not None and clock() - descent.since >= retry_seconds:
        # If the trial fails, the next one waits for its time again.
        memory.note_trial(engine, at=clock())
        rungs = rungs[:-1]
    rungs = tuple(rung for rung in (_below(each, top) for each in rungs) if rung != top)
    ladder = Ladder(top, descent=rungs, worked=partial(_remember, memory, engine, clock))
    if descent is not None:
        logger.info("memory settings by what worked before: %s", ladder.description)
    return ladder


def _below(rung: Rung, top: Rung) -> Rung:
    """Return a rung with nothing higher than at the top."""
    lower = {
        name: min(value, highest)
        for name, value in msgspec.structs.asdict(rung).items()
        if value is not None and (highest := getattr(top, name)) is not None
    }
    return msgspec.structs.replace(rung, **lower)


def chunk_needs(refs: Sequence[ChunkRef], *, max_tokens_cap: int | None) -> Needs:
    """Read the chunks and return what their requests need."""
    return needs_of(_requests(refs), max_tokens_cap=max_tokens_cap)


def _requests(refs: Iterable[ChunkRef]) -> Iterator[Request]:
    for ref in refs:
        for line in ref.lines():
            request = parse_line(line.data, index=line.index, line=line.line, model_required=False)
            if isinstance(request, Request):
                yield request


def _remember(
    memory: RungMemory, engine: str, clock: Callable[[], float], rungs: Iterable[Rung]
) -> None:
    memory.remember(engine, tuple(rungs), at=clock())


class Easing:
    """Goes down an engine's ladder, and back up when the reason is gone.

    Attributes:
        in_flight: How many requests to give to the engine at a time.
    """

    def __init__(self, ladder: Ladder, *, in_flight: int) -> None:
        self._ladder = ladder
        self._configured = in_flight
        self._trusted = True
        self.in_flight = in_flight

    async def ease(self, error: EngineError) -> bool:
        """Make things easier for the engine; return whether a restart may help now."""
        if error.exhaustion is None:
            return isinstance(error, EngineStartFailed) and self._distrust()
        if await asyncio.to_thread(self._ladder.step_down, error.exhaustion):
            logger.warning(
                "the engine ran out of memory (%s); one rung gentler: %s",
                error.exhaustion.evidence,
                self._ladder.description,
            )
            return True
        logger.warning("the engine ran out of memory on its lowest rung")
        return isinstance(error, EngineDied) and self._narrow()

    def note_culprit(self) -> None:
        """Take note that a single request exhausts the memory: the others do without the ladder."""
        self._ladder.climb_back()
        self.in_flight = self._configured

    def _narrow(self) -> bool:
        sequences = self._ladder.rung.max_num_seqs
        if sequences is None or sequences >= self.in_flight:
            return False
        logger.warning("from now on %d requests in flight", sequences)
        self.in_flight = sequences
        return True

    def _distrust(self) -> bool:
        """Give up a rung that does not even start: it may be of another version's engine. Once."""
        if not self._trusted or not self._ladder.climb_to_top():
            return False
        self._trusted = False
        logger.warning("the engine does not start on its rung; trying what is configured")
        return True
