"""The journal of a chunk: a record of each submission, failed attempt and outcome as it happens.

Until a chunk is committed to the store, its journal is the source of truth.
"""

import contextlib
import fcntl
import os
import threading
from pathlib import Path
from typing import Self

from batch_orchestration.core.errors import JournalError, JournalInUse, UnstorableRecord
from batch_orchestration.core.outcomes import Failure, Outcome
from batch_orchestration.core.requests import Fault, Request, kept_body
from batch_orchestration.core.results import Attempt, Provenance
from batch_orchestration.files.atomic import disk_errors, make_folder, shortages, sync_folder
from batch_orchestration.files.journal_reading import (
    JournalEntry,
    JournalState,
    read_journal,
    replay_journal,
)
from batch_orchestration.files.journal_records import (
    FailedAttemptRecord,
    OutcomeRecord,
    PassRecord,
    Record,
    SubmittedRecord,
    SuspectedRecord,
    encode_record,
    read_records,
)

__all__ = [
    "Journal",
    "JournalEntry",
    "JournalState",
    "open_journals",
    "read_journal",
    "replay_journal",
]

#: Descriptors of the journals that this process has open for writing.
_open: set[int] = set()


def open_journals() -> int:
    """Return how many journals this process has open for writing."""
    return len(_open)


class Journal:
    """The journal of a chunk, opened for writing by this process alone.

    A record is handed to the operating system before its method returns, and so survives a crash
    of this process; after `sync`, it survives a power loss. If a method raises `Shortage`, nothing
    was recorded, and the call can be repeated. Threads may share a journal.

    Attributes:
        state: The state read from the journal, updated with the records of this pass.
    """

    def __init__(self, path: Path, descriptor: int, state: JournalState) -> None:
        self.state = state
        self._path = path
        self._descriptor: int | None = descriptor
        _open.add(descriptor)
        self._ordinal = state.passes + 1
        self._writing = threading.Lock()

    @classmethod
    def open(
        cls, path: Path, *, batch_id: str, number: int, provenance: Provenance, at: float
    ) -> Self:
        """Lock a journal, read it and begin a pass; missing files and folders are created.

        Raises:
            JournalInUse: Another writer has the journal open; the message names the process.
            StorageError: The journal cannot be written, or belongs to another chunk.
        """
        with disk_errors(path):
            make_folder(path.parent)
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o640)
            try:
                _lock(descriptor, path)
                if os.fstat(descriptor).st_size == 0:
                    sync_folder(path.parent)
                journal = cls(path, descriptor, replay_journal(path, batch_id, number))
                journal._begin_pass(batch_id, number, provenance, at)
            except BaseException:
                _open.discard(descriptor)
                os.close(descriptor)
                raise
        return journal

    @staticmethod
    def probe(path: Path) -> None:
        """Check that no writer has an existing journal open.

        Raises:
            JournalInUse: A writer has the journal open; the message names the process.
        """
        with shortages(path):
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            _lock(descriptor, path)
        finally:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def record_submitted(self, index: int, attempt: int, at: float) -> None:
        """Record that a request is about to be submitted for the `attempt`-th time, from 1."""
        self._append(SubmittedRecord(ordinal=self._ordinal, index=index, attempt=attempt, at=at))

    def record_failed_attempt(self, index: int, failure: Failure, attempt: int, at: float) -> None:
        """Record that an attempt failed and that another one will follow."""
        failed = Attempt(at=at, code=str(failure.code), message=failure.message)
        self._append(
            FailedAttemptRecord(
                ordinal=self._ordinal, index=index, attempt=attempt, at=at, failed=failed
            )
        )

    def record_suspected(self, index: int, group: str, attempt: int, at: float) -> None:
        """Record that the engine died with the request in flight, and its isolation group."""
        self._append(
            SuspectedRecord(ordinal=self._ordinal, index=index, attempt=attempt, at=at, group=group)
        )

    def record_outcome(
        self, request: Request | Fault, outcome: Outcome, attempt: int, at: float
    ) -> None:
        """Record the outcome of a request or faulty line, at most once per request.

        Args:
            request: The request, or the fault of a line that is no request.
            attempt: Number of the submission, from 1; 0 if the request was never submitted.

        Raises:
            UnstorableRecord: The outcome could not be read back; nothing was recorded.
            JournalError: The request has an outcome already.
        """
        body = kept_body(request.body) if isinstance(outcome, Failure) else b""
        self._append(
            OutcomeRecord(
                ordinal=self._ordinal,
                index=request.index,
                attempt=attempt,
                at=at,
                line=request.line,
                custom_id=request.custom_id,
                endpoint=request.endpoint,
                body=body.decode(errors="replace"),
                outcome=outcome,
            )
        )

    def sync(self) -> None:
        """Make all records so far durable across a power loss."""
        with self._writing, disk_errors(self._path):
            os.fdatasync(self._open_descriptor())

    def close(self) -> None:
        """Release the lock. Closing twice does nothing."""
        with self._writing:
            if self._descriptor is not None:
                _open.discard(self._descriptor)
                os.close(self._descriptor)
                self._descriptor = None

    def _begin_pass(self, batch_id: str, number: int, provenance: Provenance, at: float) -> None:
        self._append(
            PassRecord(
                ordinal=self._ordinal,
                batch_id=batch_id,
                number=number,
                pid=os.getpid(),
                at=at,
                provenance=provenance,
            )
        )

    def _append(self, record: Record) -> None:
        try:
            data = encode_record(record)
        except (ValueError, RecursionError) as error:
            raise UnstorableRecord(f"{self._path}: this could not be read back: {error}") from error
        with self._writing:
            if not isinstance(record, PassRecord) and record.index in self.state.settled:
                raise JournalError(f"{self._path}: request {record.index} has an outcome already")
            with disk_errors(self._path):
                _append_whole(self._open_descriptor(), data)
            self.state.apply(record)

    def _open_descriptor(self) -> int:
        if self._descriptor is None:
            raise JournalError(f"{self._path} is closed")
        return self._descriptor


def _lock(descriptor: int, path: Path) -> None:
    # Lock the journal itself, not a lock file beside it: the kernel releases the lock when the
    # process ends, and the latest pass record identifies the owner.
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = "another process"
        for record in read_records(path):
            if isinstance(record, PassRecord):
                owner = f"pid {record.pid} (run {record.provenance.run_id})"
        raise JournalInUse(f"{path} is being written by {owner}") from None


def _append_whole(descriptor: int, data: bytes) -> None:
    """Append all of `data` or nothing; as the only writer, this process may truncate the file."""
    size = os.fstat(descriptor).st_size
    try:
        written = os.write(descriptor, data)
        while written < len(data):
            # The disk is nearly or completely full; the next write shows which.
            written += os.write(descriptor, data[written:])
    except OSError:
        # If truncating fails, too, the torn record ends where the next record begins.
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, size)
        raise
