"""Assembly of a submission: the files of its parts as one, once the last of them ends."""

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from batch_orchestration.domain.batches import BatchPlan, BatchStatus
from batch_orchestration.domain.commits import BatchRecord
from batch_orchestration.domain.errors import AccountingError, Shortage
from batch_orchestration.domain.lifecycle import FINAL
from batch_orchestration.domain.submissions import Submission
from batch_orchestration.services.heart import holding
from batch_orchestration.services.outbox import (
    OutboxFiles,
    each_once,
    make_writable,
    unwritable,
    write_lines,
    write_report,
)
from batch_orchestration.services.recount import find_miscount
from batch_orchestration.services.reports import submission_report
from batch_orchestration.services.tallies import Tally
from batch_orchestration.storage.files import DataFolder, atomic_writer
from batch_orchestration.storage.sharing import shared_lock
from batch_orchestration.storage.store import Store

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SubmissionReport:
    """What was assembled of a whole submission; `text` is that of its `report.md`."""

    submission_id: str
    files: OutboxFiles
    completed: int
    failed: int
    text: str


@contextlib.contextmanager
def part_ending(
    plan: BatchPlan, status: BatchStatus, *, folder: DataFolder, store: Store
) -> Iterator[SubmissionReport | None]:
    """Deliver the submission if a part is the last to end; the body then makes its status final.

    The part's own files are written. Because all of this is under the submission's lock, of two
    parts that end at the same moment the second one sees the first; and because the status comes
    last, a crash leaves a part that is not final, whose next delivery does it again. Yields None
    for a batch that is no part, and while other parts are unfinished.

    Raises:
        AccountingError: Requests of the submission are missing; its files are as they were.
        OutboxUnwritable: No room or no permission; nothing is lost, do it again.
    """
    if plan.part is None:
        yield None
        return
    submission = folder.read_submission(plan.part.submission)
    lock = folder.submission_path(submission.submission_id).with_name("assembly.lock")
    with holding(shared_lock(lock)):
        records = _records(submission, store)
        if plan.batch_id in records:
            mine = msgspec.structs.replace(records[plan.batch_id], status=status)
            records[plan.batch_id] = mine
        ended = len(records) == len(submission.parts) and all(
            record.status in FINAL for record in records.values()
        )
        yield _assemble(submission, records, folder, store) if ended else None


def _records(submission: Submission, store: Store) -> dict[str, BatchRecord]:
    """Return the parts that were admitted, by id, in file order."""
    known = store.records(submission.parts)
    return {part_id: known[part_id] for part_id in submission.parts if part_id in known}


def _assemble(
    submission: Submission, records: Mapping[str, BatchRecord], folder: DataFolder, store: Store
) -> SubmissionReport:
    files = OutboxFiles(folder.outbox_path(submission.submission_id))
    make_writable(files)
    try:
        completed, failed = _write_files(submission, records, folder, store, files)
        failures: Counter[str] = Counter()
        for part_id in records:
            failures.update(store.failure_counts(part_id))
        text = submission_report(
            submission, list(records.values()), failures, outbox=str(files.folder)
        )
        write_report(submission.submission_id, text, files)
    except Shortage as error:
        raise unwritable(files, str(error)) from error
    logger.info(
        "%s: all %d parts have ended: %d answered, %d failed, in %s",
        submission.submission_id, len(records), completed, failed, files.folder,
    )  # fmt: skip
    return SubmissionReport(
        submission_id=submission.submission_id,
        files=files,
        completed=completed,
        failed=failed,
        text=text,
    )


def _write_files(
    submission: Submission,
    records: Mapping[str, BatchRecord],
    folder: DataFolder,
    store: Store,
    files: OutboxFiles,
) -> tuple[int, int]:
    """Write both files from the store and return their lines; they appear only if all is there.

    The files of the parts are no source: people may take them away, or edit them.
    """
    plans, tally = [folder.read_plan(part_id) for part_id in records], Tally()
    with atomic_writer(files.output) as output, atomic_writer(files.errors) as errors:
        for plan in plans:
            settled = each_once(plan, store.settled(plan.batch_id))
            write_lines(plan.batch_id, settled, output, errors, tally)
        if tally.completed + tally.failed != submission.requests:
            raise AccountingError(
                f"submission {submission.submission_id} has {submission.requests} requests, its"
                f" parts have outcomes of {tally.completed + tally.failed}"
            )
        # Whatever can fail shall fail before the first of the two is renamed.
        if (problem := find_miscount(plans, Path(output.name), Path(errors.name))) is not None:
            raise AccountingError(f"submission {submission.submission_id}: {problem}")
    return tally.completed, tally.failed
