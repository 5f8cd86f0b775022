"""Remembers which memory settings worked, from run to run: one small file in the data folder."""

import logging
from pathlib import Path

import msgspec

from batch_orchestration.core.errors import StorageError
from batch_orchestration.engines.memory_ladder import MemoryLevel
from batch_orchestration.files.atomic import write_atomically
from batch_orchestration.files.regular import read_regular

logger = logging.getLogger(__name__)


class Descent(msgspec.Struct, frozen=True, kw_only=True):
    """How far down its ladder an engine had to go.

    Attributes:
        rungs: All below the configured settings, the one that worked last.
        since: POSIX seconds at which that one worked first, or a higher one was last tried.
    """

    levels: tuple[MemoryLevel, ...]
    since: float


class MemoryLevelFile:
    """Descents by engine. It is a hint, not a truth: without it an engine finds its rung again.

    Of two processes that write at once, one may forget what the other learnt.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def recall(self, engine: str) -> Descent | None:
        """Return the descent of an engine; None if it works as configured, for all we know."""
        return self._read().get(engine)

    def remember(self, engine: str, levels: tuple[MemoryLevel, ...], *, at: float) -> None:
        """Note that an engine works on the last of the rungs, or as configured if there is none.

        If that is known already, the time stands at which it was found.
        """
        descents = self._read()
        known = descents.pop(engine, None)
        if levels == (() if known is None else known.levels):
            return
        if levels:
            descents[engine] = Descent(levels=levels, since=at)
        self._write(descents)

    def note_trial(self, engine: str, *, at: float) -> None:
        """Note that one rung higher is about to be tried."""
        descents = self._read()
        if known := descents.get(engine):
            self._write(descents | {engine: Descent(levels=known.levels, since=at)})

    def _read(self) -> dict[str, Descent]:
        try:
            return msgspec.json.decode(read_regular(self._path), type=dict[str, Descent])
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            logger.warning("%s is of no use and will be replaced: %s", self._path, error)
            return {}

    def _write(self, descents: dict[str, Descent]) -> None:
        content = msgspec.json.format(msgspec.json.encode(descents)) + b"\n"
        try:
            write_atomically(self._path, content)
        except StorageError as error:
            logger.warning("the next run will have to find its memory settings again: %s", error)
