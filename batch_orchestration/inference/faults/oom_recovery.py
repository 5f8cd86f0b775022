"""Steps an engine down when memory runs out; memory levels that outlive a run."""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

import msgspec

from batch_orchestration.core.batches import settings_hash
from batch_orchestration.core.errors import EngineDied, EngineError, EngineStartFailed
from batch_orchestration.engines.memory_fallback import MemoryFallback, MemoryLevel
from batch_orchestration.engines.memory_level_file import MemoryLevelFile, engine_name

logger = logging.getLogger(__name__)


def remembered_fallback(
    top: MemoryLevel,
    *,
    memory: MemoryLevelFile,
    model: str,
    device: str,
    args: Mapping[str, Any],
    retry_seconds: float,
    derived: Collection[str] = (),
    clock: Callable[[], float] = time.time,
) -> MemoryFallback:
    """Return a fallback that begins at the memory level that worked for the same engine before.

    After `retry_seconds` there, it begins one level higher: the cause of the shortage may be gone.

    Args:
        derived: Flags that differ from run to run with the free memory. A remembered level applies
            whatever their values, and never raises them.
    """
    fixed = {
        name: value
        for name, value in msgspec.to_builtins(top).items()
        if name.replace("_", "-") not in derived
    }
    configured = {"args": dict(args), "top": fixed}
    engine = engine_name(model, device, settings_hash(configured))
    descent = memory.recall(engine)
    levels = () if descent is None else descent.levels
    if descent is not None and clock() - descent.since >= retry_seconds:
        # If the trial fails, the next one waits another `retry_seconds`.
        memory.note_trial(engine, at=clock())
        levels = levels[:-1]
    levels = tuple(level for level in (_below(each, top) for each in levels) if level != top)
    fallback = MemoryFallback(top, descent=levels, worked=partial(_remember, memory, engine, clock))
    if descent is not None:
        logger.info(
            "the engine starts with the memory settings that worked before: %s",
            fallback.description,
        )
    return fallback


def _below(level: MemoryLevel, top: MemoryLevel) -> MemoryLevel:
    """Return the level, with no value higher than at the top level."""
    lower = {
        name: min(value, highest)
        for name, value in msgspec.structs.asdict(level).items()
        if value is not None and (highest := getattr(top, name)) is not None
    }
    return msgspec.structs.replace(level, **lower)


def _remember(
    memory: MemoryLevelFile, engine: str, clock: Callable[[], float], levels: Iterable[MemoryLevel]
) -> None:
    memory.remember(engine, tuple(levels), at=clock())


class OomRecovery:
    """Steps an engine down its memory levels, and back up when the cause is gone.

    Attributes:
        in_flight: The most requests to give to the engine at a time.
    """

    def __init__(self, fallback: MemoryFallback, *, in_flight: int) -> None:
        self._fallback = fallback
        self._configured = in_flight
        self._trusted = True
        self.in_flight = in_flight

    async def ease(self, error: EngineError) -> bool:
        """Reduce the engine's memory use; return whether a restart may help now."""
        if error.exhaustion is None:
            return isinstance(error, EngineStartFailed) and self._distrust()
        if await asyncio.to_thread(self._fallback.step_down, error.exhaustion):
            logger.warning(
                "the engine ran out of memory (%s); one memory level lower: %s",
                error.exhaustion.evidence,
                self._fallback.description,
            )
            return True
        logger.warning("the engine ran out of memory on its lowest memory level")
        return isinstance(error, EngineDied) and self._narrow()

    def note_culprit(self) -> None:
        """Record that a single request exhausts the memory, and undo the steps down of this run."""
        self._fallback.step_back_up()
        self.in_flight = self._configured

    def _narrow(self) -> bool:
        sequences = self._fallback.level.max_num_seqs
        if sequences is None or sequences >= self.in_flight:
            return False
        logger.warning("at most %d requests are in flight from now on", sequences)
        self.in_flight = sequences
        return True

    def _distrust(self) -> bool:
        """Drop, once, a remembered level at which the engine does not even start.

        It may stem from another version of the engine.
        """
        if not self._trusted or not self._fallback.step_to_top():
            return False
        self._trusted = False
        logger.warning("the engine does not start on its memory level; trying the configured one")
        return True
