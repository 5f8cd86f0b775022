"""Closing out a batch after its early end: every request without an outcome gets a failure.

These failures are never written to a journal. If the batch is resumed, its journals contain real
outcomes only, and the other requests are sent.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.core.crash_points import CrashPoint, crash_point
from batch_orchestration.core.errors import FileDamaged, JournalInUse, PlanMismatch, StorageError
from batch_orchestration.core.fault_isolation import Faults, concerns_everyone
from batch_orchestration.core.lifecycle import EarlyEnd
from batch_orchestration.core.outcomes import Failure, FailureCode
from batch_orchestration.core.requests import parse_line
from batch_orchestration.core.results import ChunkReport, Provenance, SettledRequest
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.input_lines import RawLine
from batch_orchestration.files.journal import Journal, JournalEntry, read_journal, replay_journal
from batch_orchestration.files.kept_input import ChunkRef, busy_seconds
from batch_orchestration.lifecycle.cancellation import early_end_in_force
from batch_orchestration.store.store import Store
from batch_orchestration.workers.reporter import report_progress

logger = logging.getLogger(__name__)

#: Run id of these failures; it is constant, so that closing out again writes the same rows.
EARLY_END_RUN_ID = "early-end"
#: A run notices an early end within a second; a request that is stuck may take a few more.
PATIENCE_SECONDS = 15.0
POLL_SECONDS = 0.25
_MESSAGES = {
    # OpenAI's wording.
    FailureCode.BATCH_EXPIRED: (
        "This request could not be executed before the completion window expired."
    ),
    FailureCode.BATCH_CANCELLED: (
        "This request was not executed because the batch was cancelled before its turn came."
    ),
}


def fail_unanswered(
    batch_id: str,
    *,
    folder: DataFolder,
    store: Store,
    run_id: str,
    clock: Callable[[], float],
    patience_seconds: float = PATIENCE_SECONDS,
) -> Iterator[ChunkReport]:
    """Commit each uncommitted chunk of a batch that ends early, and yield its report right after.

    A batch that does not end early is left unchanged. After a kill at any point, another call does
    the remaining work.

    Raises:
        BatchNotFound: There is no such batch.
        JournalInUse: A run still works on the batch after `patience_seconds`.
        StorageError: Some chunks cannot be committed; every other one is.
    """
    early_end = early_end_in_force(folder, store.batch(batch_id))
    if early_end is None:
        return
    plan = folder.read_plan(batch_id)
    missing = sorted(set(range(len(plan.chunks))) - store.chunk_reports(batch_id).keys())
    refs = [ChunkRef.of(plan, number, folder) for number in missing]
    _wait_for_writers(refs, patience_seconds)
    faults = Faults()
    for ref in refs:
        crash_point(CrashPoint.BEFORE_CLOSE_OUT)
        report_progress()
        with faults.of(ref.key):
            yield commit_ended(ref, early_end, store=store, run_id=run_id, at=clock())
    logger.info("%s: %d chunks closed out: %s", batch_id, len(refs), early_end)
    if left := list(faults):
        raise StorageError(
            f"{len(left)} of {len(refs)} chunks cannot be closed out, the others are: {left[0]}"
        )


def commit_ended(
    ref: ChunkRef, early_end: EarlyEnd, *, store: Store, run_id: str, at: float
) -> ChunkReport:
    """Commit a chunk with the outcomes of its journal and a failure for every other request.

    If its part of the kept input is gone or has changed, the other requests are identified by
    their index alone: an early end needs no input.
    """
    entries = {entry.index: entry for entry in read_journal(ref.journal_path)}
    commit = partial(
        store.commit_chunk,
        *(ref.plan.batch_id, ref.chunk.number),
        run_id=run_id,
        at=at,
        seconds=busy_seconds(entries.values()),
    )
    try:
        return commit(requests=_closed(ref, entries, early_end, ref.lines()))
    except (PlanMismatch, FileDamaged, OSError) as error:
        if concerns_everyone(error):
            raise
        logger.warning("%s is closed out without its input: %s", ref.key, error)
    return commit(requests=_closed(ref, entries, early_end, iter(())))


def _closed(
    ref: ChunkRef,
    entries: Mapping[int, JournalEntry],
    early_end: EarlyEnd,
    lines: Iterator[RawLine],
) -> Iterator[SettledRequest]:
    """Yield each request of a chunk, in file order; only lines without an outcome are parsed.

    Args:
        entries: Outcomes of the chunk, by index.
        lines: Of the chunk; none if they are lost.
    """
    state = replay_journal(ref.journal_path, ref.plan.batch_id, ref.chunk.number)
    unasked = (line for line in lines if line.index not in entries)
    for index in ref.indices:
        if (entry := entries.get(index)) is not None:
            yield entry.settled()
        else:
            attempts = state.attempts.get(index, 0)
            yield _unasked(ref, index, next(unasked, None), early_end, attempts)


def _unasked(
    ref: ChunkRef, index: int, raw: RawLine | None, early_end: EarlyEnd, attempts: int
) -> SettledRequest:
    """Return a request with the failure that it was not answered in time.

    A `custom_id` is lost with its line: the line now in its place may be that of another request.
    """
    lost = "" if raw else " Its line of the kept input is gone, and its custom_id with it."
    line = raw.line if raw else ref.chunk.first_line + index - ref.chunk.first_index
    request = parse_line(raw.data, index=index, line=line, model_required=False) if raw else None
    return SettledRequest(
        index=index,
        line=line,
        custom_id=request.custom_id if request else None,
        endpoint=request.endpoint if request else "",
        body=bytes(request.body) if request else b"",
        outcome=Failure(code=early_end.code, message=f"{_MESSAGES[early_end.code]}{lost}"),
        attempts=attempts,
        failed_attempts=(),
        settled_at=early_end.at,
        provenance=_provenance(ref.plan),
    )


def _provenance(plan: BatchPlan) -> Provenance:
    return Provenance(run_id=EARLY_END_RUN_ID, settings_hash=plan.settings_hash)


def _wait_for_writers(refs: Sequence[ChunkRef], patience_seconds: float) -> None:
    """Wait for a run of another batch that co-schedules this one and has not noticed the early end.

    A run that comes later sees the decision before it opens a journal.
    """
    deadline = time.monotonic() + patience_seconds
    for ref in refs:
        while ref.journal_path.exists():
            try:
                Journal.probe(ref.journal_path)
                break
            except JournalInUse:
                if time.monotonic() > deadline:
                    raise
                time.sleep(POLL_SECONDS)
