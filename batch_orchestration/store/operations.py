"""Dead-letter operations of a batch, stored as files; the store's dead letters follow from them.

The files lie in `dead_letters/` beside the journals of the batch: `00001-replay.json` with
`00001-replay.journal`, `00002-discard.json`, and so on in order. The file of an open replay is
named `00001-replay.open.json`, so that open replays are found without reading every file.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
from filelock import BaseFileLock

from batch_orchestration.core.dead_letters import Discard, Operation, Replay
from batch_orchestration.core.errors import DeadLetterError, FileDamaged, JournalInUse
from batch_orchestration.core.results import Provenance
from batch_orchestration.files.atomic import disk_errors, make_folder
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.journal import Journal, JournalEntry, read_journal
from batch_orchestration.files.sharing import share, shared_lock
from batch_orchestration.files.state_file import StateFile
from batch_orchestration.files.unfinished import mark, marked
from batch_orchestration.store.store import Store

_FOLDER = "dead_letters"
_OPEN = ".open.json"
_NAME = re.compile(r"[0-9]{5,}-(replay(\.open)?|discard)\.json")


class Operations:
    """The operations on the dead letters of one batch."""

    def __init__(self, folder: DataFolder, batch_id: str) -> None:
        self.batch_id = batch_id
        self._folder = folder
        self._path = folder.journal_path(batch_id, 0).parent / _FOLDER
        self._lock_path = folder.plan_path(batch_id).with_name("dead-letters.lock")

    def lock(self) -> BaseFileLock:
        """Return the lock to hold while operations are added, closed or applied."""
        return shared_lock(self._lock_path)

    def make_folder(self) -> None:
        """Create the folder of the operations, writable for the data folder's group."""
        with disk_errors(self._path):
            make_folder(self._path)
            share(self._path)

    def all(self) -> list[Operation]:
        """Return the operations in order.

        Raises:
            FileDamaged: An operation cannot be read.
        """
        found = {operation.number: operation for operation in map(_read, self._files())}
        return [found[number] for number in sorted(found)]

    def get(self, number: int) -> Replay:
        """Return a replay.

        Raises:
            DeadLetterError: The batch has no replay of that number.
        """
        for operation in self.all():
            if operation.number == number and isinstance(operation, Replay):
                return operation
        raise DeadLetterError(f"batch {self.batch_id} has no replay {number}")

    def apply_to(self, store: Store) -> None:
        """Apply the operations to the store; without operations, the store is not opened.

        If the lock is not held, an operation added meanwhile may be left for the next call.
        """
        if operations := self.all():
            store.apply_operations(self.batch_id, operations, self.outcomes)

    def next_number(self) -> int:
        """Return the number of the next operation; the caller holds the lock."""
        return max((_number(path) for path in self._files()), default=0) + 1

    def add(self, operation: Operation) -> None:
        """Write an operation durably."""
        if isinstance(operation, Replay):
            mark(self._folder, self.batch_id)
        ending = _OPEN if isinstance(operation, Replay) else ".json"
        StateFile(self._file(operation, ending), Operation).write(operation)

    def close(self, replay: Replay, *, at: float) -> None:
        """Record durably that a replay is over."""
        closed = msgspec.structs.replace(replay, closed_at=at)
        StateFile(self._file(replay, ".json"), Replay).write(closed)
        StateFile(self._file(replay, _OPEN), Replay).remove()

    def outcomes(self, replay: Replay) -> Iterator[JournalEntry]:
        """Yield the outcomes of a replay so far."""
        return read_journal(self._file(replay, ".journal"))

    def open_journal(self, replay: Replay, *, provenance: Provenance, at: float) -> Journal:
        """Open the journal of a replay for writing.

        Raises:
            JournalInUse: This replay is already running.
        """
        return Journal.open(
            self._file(replay, ".journal"),
            batch_id=f"{self.batch_id}/replay",
            number=replay.number,
            provenance=provenance,
            at=at,
        )

    def running(self, replay: Replay) -> bool:
        """Whether the replay is running now."""
        if not self._file(replay, ".journal").exists():
            return False
        try:
            Journal.probe(self._file(replay, ".journal"))
        except JournalInUse:
            return True
        return False

    def _file(self, operation: Operation, ending: str) -> Path:
        kind = "replay" if isinstance(operation, Replay) else "discard"
        return self._path / f"{operation.number:05d}-{kind}{ending}"

    def _files(self) -> list[Path]:
        # A replay that was just closed may have both files; the closed one comes last and counts.
        found = (path for path in self._path.glob("*.json") if _NAME.fullmatch(path.name))
        return sorted(found, key=lambda path: not path.name.endswith(_OPEN))


def open_replays(folder: DataFolder) -> list[tuple[str, int]]:
    """Return batch id and number of every open replay of the batches on the index."""
    return [
        (batch_id, number) for batch_id in marked(folder) for number in replays_of(batch_id, folder)
    ]


def replays_of(batch_id: str, folder: DataFolder) -> list[int]:
    """Return the numbers of a batch's open replays."""
    return sorted(
        _number(path)
        for path in _open_files(batch_id, folder)
        if not path.with_name(path.name.removesuffix(_OPEN) + ".json").exists()
    )


def replay_asked_since(folder: DataFolder, at: float) -> bool:
    """Whether any open replay was requested at or after the given time."""
    for path in open_files(folder):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime >= at:
                return True
    return False


def open_files(folder: DataFolder) -> Iterator[Path]:
    """Yield the files of open replays of the batches on the index."""
    return (path for batch_id in marked(folder) for path in _open_files(batch_id, folder))


def _open_files(batch_id: str, folder: DataFolder) -> Iterator[Path]:
    """Yield the files of a batch's open replays; other names that match the glob are ignored."""
    place = folder.journal_path(batch_id, 0).parent / _FOLDER
    return (path for path in place.glob(f"*-replay{_OPEN}") if _NAME.fullmatch(path.name))


def last_operation_at(folder: DataFolder, batch_id: str) -> float:
    """Return when the batch's dead-letter operations last changed; 0 if there are none.

    The time is an mtime, by the file system's clock.
    """
    changed = 0.0
    for path in (folder.journal_path(batch_id, 0).parent / _FOLDER).glob("*.json"):
        with contextlib.suppress(FileNotFoundError):
            changed = max(changed, path.stat().st_mtime)
    return changed


def _number(path: Path) -> int:
    return int(path.name.split("-")[0])


def _read(path: Path) -> Operation:
    # mypy does not accept a union as a `type`.
    operation: Operation | None = StateFile(path, Replay | Discard).read()  # type: ignore[arg-type]
    if operation is None:
        raise FileDamaged(path, "has just gone")
    return operation
