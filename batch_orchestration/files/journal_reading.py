"""Reading a journal: the state of its chunk, and its outcomes."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from batch_orchestration.core.errors import StorageError
from batch_orchestration.core.outcomes import Completion, Outcome
from batch_orchestration.core.results import Attempt, Place, Provenance, SettledRequest
from batch_orchestration.files.journal_records import (
    FailedAttemptRecord,
    OutcomeRecord,
    PassRecord,
    Record,
    SubmittedRecord,
    SuspectedRecord,
    read_placed_records,
    read_records,
    record_at,
)

#: Provenance of outcomes whose pass record is damaged; attributing them to another run is worse.
UNKNOWN_PROVENANCE = Provenance(run_id="unknown")
#: Limit on outcome records in memory, by their bytes in the journal. Records beyond it are read
#: again one by one when needed. A chunk of a thousand answers of 4,000 tokens stays below it.
HELD_BYTES = 16 * 2**20


@dataclass
class JournalState:
    """The recorded state of a chunk's requests.

    Attributes:
        settled: Indices with an outcome.
        completed: Number of settled requests that are completions.
        attempts: Submissions so far, by index.
        failed_attempts: Failed attempts that were to be repeated, by index. Attempts that ended
            because the engine died do not count.
        suspects: Isolation group by index, for requests in flight when an engine died.
        in_flight: Indices that an earlier pass submitted and left without a result; this pass does
            not change them.
        passes: Number of the latest pass.
    """

    settled: set[int] = field(default_factory=set)
    completed: int = 0
    attempts: dict[int, int] = field(default_factory=dict)
    failed_attempts: dict[int, int] = field(default_factory=dict)
    suspects: dict[int, str] = field(default_factory=dict)
    in_flight: set[int] = field(default_factory=set)
    passes: int = 0

    def apply(self, record: Record) -> None:
        """Update the state with a record; records of a settled request change nothing."""
        self.passes = max(self.passes, record.ordinal)
        if isinstance(record, PassRecord) or record.index in self.settled:
            return
        self.attempts[record.index] = max(self.attempts.get(record.index, 0), record.attempt)
        if isinstance(record, OutcomeRecord):
            self.settled.add(record.index)
            self.suspects.pop(record.index, None)
            self.completed += isinstance(record.outcome, Completion)
        elif isinstance(record, FailedAttemptRecord):
            self.failed_attempts[record.index] = self.failed_attempts.get(record.index, 0) + 1
        elif isinstance(record, SuspectedRecord):
            self.suspects[record.index] = record.group

    def replay(self, record: Record) -> None:
        """Update the state with a record of an earlier pass."""
        self.apply(record)
        if isinstance(record, SubmittedRecord) and record.index not in self.settled:
            self.in_flight.add(record.index)
        elif not isinstance(record, PassRecord):
            self.in_flight.discard(record.index)


class JournalEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A settled request, as read from its journal.

    Attributes:
        held: The outcome record; None if it is read from the journal at each access.
        place: Location of the outcome record.
        attempts: Number of submissions.
        failed_attempts: Failed attempts before the last attempt, oldest first.
        first_submitted_at: None if the request was never submitted.
    """

    index: int
    held: OutcomeRecord | None
    place: Place
    attempts: int
    failed_attempts: tuple[Attempt, ...]
    settled_at: float
    provenance: Provenance
    first_submitted_at: float | None

    @property
    def outcome(self) -> Outcome:
        """The outcome.

        Raises:
            FileDamaged: The record is not held and no longer in the journal.
        """
        return self._record.outcome

    def settled(self) -> SettledRequest:
        """Return the request with its outcome, in the form for a commit.

        Raises:
            FileDamaged: The record is not held and no longer in the journal.
        """
        record = self._record
        return SettledRequest(
            index=self.index,
            line=record.line,
            custom_id=record.custom_id,
            endpoint=record.endpoint,
            body=record.body.encode(),
            outcome=record.outcome,
            attempts=self.attempts,
            failed_attempts=self.failed_attempts,
            settled_at=self.settled_at,
            provenance=self.provenance,
            place=self.place,
        )

    @property
    def _record(self) -> OutcomeRecord:
        return self.held or record_at(self.place, self.index)


class _Settled(msgspec.Struct, frozen=True):
    """The head of an outcome record, and the whole record if it is held in memory."""

    ordinal: int
    at: float
    held: OutcomeRecord | None
    place: Place


def replay_journal(
    path: Path, batch_id: str, number: int, *, end: int | None = None
) -> JournalState:
    """Return the state of a chunk from its journal; the initial state if the journal is missing.

    Needs no lock. For `end`, see `read_records`.

    Raises:
        StorageError: The journal belongs to another chunk.
    """
    state = JournalState()
    for record in read_records(path, end=end) if path.exists() else ():
        if record is None:
            continue
        if isinstance(record, PassRecord) and (record.batch_id, record.number) != (
            batch_id,
            number,
        ):
            raise StorageError(
                f"{path} is the journal of {record.batch_id}/{record.number:05d}, "
                f"not of {batch_id}/{number:05d}"
            )
        state.replay(record)
    return state


def read_journal(path: Path, *, end: int | None = None) -> Iterator[JournalEntry]:
    """Yield the settled requests of a journal in index order, each with its first outcome.

    Needs no lock. A missing journal has no entries. Outcome records in memory are limited to
    `HELD_BYTES` plus one record. For `end`, see `read_records`.
    """
    provenances: dict[int, Provenance] = {}
    submitted: dict[int, float] = {}
    failed: dict[int, list[FailedAttemptRecord]] = {}
    outcomes: dict[int, _Settled] = {}
    attempts = JournalState()
    room = HELD_BYTES
    for record, place in read_placed_records(path, end=end) if path.exists() else ():
        if record is None:
            continue
        if isinstance(record, PassRecord):
            provenances[record.ordinal] = record.provenance
        elif isinstance(record, SubmittedRecord):
            submitted.setdefault(record.index, record.at)
        elif isinstance(record, FailedAttemptRecord):
            failed.setdefault(record.index, []).append(record)
        elif isinstance(record, OutcomeRecord) and record.index not in outcomes:
            # A text takes up to four times its bytes in the file.
            size = place.size_bytes + sys.getsizeof(record.body or "")
            held = record if size <= room else None
            room -= size if held else 0
            outcomes[record.index] = _Settled(record.ordinal, record.at, held, place)
        attempts.apply(record)
    for index in sorted(outcomes):
        settled = outcomes.pop(index)
        yield JournalEntry(
            index=index,
            held=settled.held,
            place=settled.place,
            attempts=attempts.attempts[index],
            failed_attempts=tuple(
                record.failed
                for record in failed.get(index, ())
                if record.attempt < attempts.attempts[index]
            ),
            settled_at=settled.at,
            provenance=provenances.get(settled.ordinal, UNKNOWN_PROVENANCE),
            first_submitted_at=submitted.get(index),
        )
