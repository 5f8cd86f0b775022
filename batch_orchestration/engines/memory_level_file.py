"""Remembers working memory levels from run to run, in one small file in the data folder."""

import logging
from pathlib import Path

import msgspec

from batch_orchestration.core.errors import StorageError
from batch_orchestration.engines.memory_fallback import MemoryLevel
from batch_orchestration.files.state_file import StateFile

logger = logging.getLogger(__name__)


def engine_name(model: str, device: str, settings: str) -> str:
    """Return the name under which the descent of an engine is kept; settings are its hash."""
    return f"{model} on {device} ({settings}" + (")" if settings else "")


class Descent(msgspec.Struct, frozen=True, kw_only=True):
    """The levels that an engine had to step down.

    Attributes:
        levels: All levels below the configured settings; the last is the one that worked.
        since: When that level first worked, or when a higher one was last tried.
    """

    levels: tuple[MemoryLevel, ...]
    since: float


class MemoryLevelFile:
    """Descents by engine. Only a hint: without it, an engine finds its memory level again.

    If two processes write at once, the record of one may be lost.
    """

    def __init__(self, path: Path) -> None:
        self._file = StateFile(path, dict[str, Descent])

    def recall(self, engine: str) -> Descent | None:
        """Return an engine's descent; None if it is not known to need one."""
        return self._read().get(engine)

    def remember(self, engine: str, levels: tuple[MemoryLevel, ...], *, at: float) -> None:
        """Record that an engine works at the last of the levels, or as configured without any.

        If that is already recorded, its time is kept.
        """
        descents = self._read()
        known = descents.pop(engine, None)
        if levels == (() if known is None else known.levels):
            return
        if levels:
            descents[engine] = Descent(levels=levels, since=at)
        self._write(descents)

    def note_trial(self, engine: str, *, at: float) -> None:
        """Record that the next higher level is about to be tried."""
        descents = self._read()
        if known := descents.get(engine):
            self._write(descents | {engine: Descent(levels=known.levels, since=at)})

    def let_retry(self, model: str, device: str) -> None:
        """Let the next start of each engine of a model try a higher level, however late it is."""
        begin = engine_name(model, device, "")
        self._write(
            {
                engine: msgspec.structs.replace(descent, since=0.0)
                if engine.startswith(begin)
                else descent
                for engine, descent in self._read().items()
            }
        )

    def _read(self) -> dict[str, Descent]:
        try:
            return self._file.read() or {}
        except StorageError as error:
            logger.warning("the record of memory levels will be replaced: %s", error)
            return {}

    def _write(self, descents: dict[str, Descent]) -> None:
        try:
            self._file.write(descents)
        except StorageError as error:
            logger.warning("the next run will have to find its memory settings again: %s", error)
