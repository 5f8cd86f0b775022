"""The kept input: its chunks, the original lines of requests, and checks against the plan."""

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from batch_orchestration.core.batches import BatchPlan, Chunk, chunk_key, settings_difference
from batch_orchestration.core.errors import PlanMismatch, StorageError
from batch_orchestration.core.requests import (
    Fault,
    Request,
    override_line,
    parse_line,
    too_long_fault,
)
from batch_orchestration.core.results import SettledRequest
from batch_orchestration.files.atomic import shortages
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.input_lines import RawLine, read_chunk
from batch_orchestration.files.journal import JournalEntry

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ChunkRef:
    """A chunk with the paths of its input and journal."""

    plan: BatchPlan
    chunk: Chunk
    input_path: Path
    journal_path: Path

    @classmethod
    def of(cls, plan: BatchPlan, number: int, folder: DataFolder) -> "ChunkRef":
        """Return the reference to a chunk of a plan.

        Raises:
            PlanMismatch: The plan has no chunk of that number.
        """
        if not 0 <= number < len(plan.chunks):
            raise PlanMismatch(
                f"batch {plan.batch_id} has {len(plan.chunks)} chunks; there is no chunk {number}"
            )
        return cls(
            plan=plan,
            chunk=plan.chunks[number],
            input_path=folder.input_path(plan.batch_id),
            journal_path=folder.journal_path(plan.batch_id, number),
        )

    @property
    def key(self) -> str:
        """The chunk's partition key."""
        return chunk_key(self.plan.batch_id, self.chunk.number)

    def lines(self) -> Iterator[RawLine]:
        """Yield the chunk's non-blank lines from the kept input.

        Raises:
            Shortage: No descriptor is left; raised before the first line.
            PlanMismatch: The lines differ from the admitted ones.
        """
        with shortages(self.input_path):
            yield from read_chunk(self.input_path, self.chunk, self.plan.max_line_bytes)

    @property
    def indices(self) -> range:
        """Indices of the chunk's requests."""
        return range(self.chunk.first_index, self.chunk.first_index + self.chunk.requests)


def settled_requests(ref: ChunkRef, entries: dict[int, JournalEntry]) -> Iterator[SettledRequest]:
    """Yield the requests of a chunk with their outcomes from the journal, in file order.

    Raises:
        StorageError: A request of the chunk has no outcome in the journal.
    """
    for index in ref.indices:
        if (entry := entries.get(index)) is None:
            raise StorageError(
                f"{ref.journal_path} has no outcome of request {index}; run chunk {ref.key} again"
            )
        yield entry.settled()


def busy_seconds(entries: Iterable[JournalEntry]) -> float:
    """Return the seconds from first submission to last outcome, summed over the passes."""
    spans: dict[str, tuple[float, float]] = {}
    for entry in entries:
        if entry.first_submitted_at is None:
            continue
        run_id = entry.provenance.run_id
        first, last = spans.get(run_id, (entry.first_submitted_at, entry.settled_at))
        spans[run_id] = (min(first, entry.first_submitted_at), max(last, entry.settled_at))
    return sum(last - first for first, last in spans.values())


@dataclass(frozen=True, kw_only=True)
class OriginalLine:
    """An admitted line, and the same line parsed with some fields of its body replaced."""

    raw: RawLine
    parsed: Request | Fault


def original_lines(
    plan: BatchPlan,
    indices: Collection[int],
    folder: DataFolder,
    *,
    overrides: Mapping[str, object] | None = None,
    model_required: bool = False,
) -> Iterator[OriginalLine]:
    """Yield the lines of the given requests in file order; only their chunks are read.

    Raises:
        PlanMismatch: The kept input differs from the admitted one.
    """
    check_input_kept(plan, folder)
    size = plan.chunks[0].requests  # of every chunk but the last
    wanted = sorted(set(indices))
    for number, members in groupby(wanted, key=lambda index: index // size):
        of_chunk = set(members)
        for raw in ChunkRef.of(plan, number, folder).lines():
            if raw.index in of_chunk:
                parsed = _parse(raw, plan, overrides or {}, model_required=model_required)
                yield OriginalLine(raw=raw, parsed=parsed)


def _parse(
    raw: RawLine, plan: BatchPlan, overrides: Mapping[str, object], *, model_required: bool
) -> Request | Fault:
    if raw.too_long:
        return too_long_fault(
            raw.data,
            index=raw.index,
            line=raw.line,
            size_bytes=raw.end - raw.start,
            max_line_bytes=plan.max_line_bytes,
        )
    data = override_line(raw.data, overrides)
    return parse_line(data, index=raw.index, line=raw.line, model_required=model_required)


def check_input_size(plan: BatchPlan, folder: DataFolder) -> None:
    """Check that the kept input has the size in the plan.

    The bytes of each chunk are verified when they are read. This check finds bytes after the last
    chunk, added by a copy that had stalled for longer than the inbox waits.

    Raises:
        PlanMismatch: Bytes were appended or cut off after admission.
    """
    check_input_kept(plan, folder)
    path = folder.input_path(plan.batch_id)
    present = path.stat().st_size
    if present != plan.size_bytes:
        raise PlanMismatch(
            f"{path} has {present:,} bytes, but {plan.size_bytes:,} when it was admitted: it was"
            " still being written. Drop the complete file again; it will be a batch of its own."
        )


def input_removed_path(plan: BatchPlan, folder: DataFolder) -> Path:
    """Return the path of the marker for a kept input that housekeeping has removed."""
    return folder.input_path(plan.batch_id).with_name("input-removed.json")


def check_input_kept(plan: BatchPlan, folder: DataFolder) -> None:
    """Raise `PlanMismatch` if housekeeping has removed the kept input of a batch."""
    if input_removed_path(plan, folder).exists():
        raise PlanMismatch(
            f"the kept input of {plan.batch_id} was removed by its age"
            f" (BATCH_INPUT_RETENTION_DAYS). Its answers are in the store and in the outbox; to ask"
            f" anything again, submit {plan.file_name} with another option, such as metadata"
        )


def check_settings(plan: BatchPlan, present: Mapping[str, object], *, force: bool) -> None:
    """Check that the settings in force equal those in the plan.

    Raises:
        PlanMismatch: The settings differ and the run is not forced; the message lists them.
    """
    difference = settings_difference(plan.settings, dict(present))
    if not difference:
        return
    shown = "\n  ".join(difference)
    if force:
        logger.warning("batch %s runs with other settings:\n  %s", plan.batch_id, shown)
        return
    raise PlanMismatch(
        f"settings differ from those that batch {plan.batch_id} was planned with"
        f" (planned → present):\n  {shown}\n"
        "Restore them, or launch the chunks with `force: true` to mix answers of both."
    )
