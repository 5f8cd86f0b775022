"""How submissions are: their parts, those that wait included, and all of them summed up."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from batch_orchestration.domain.batches import BatchStatus
from batch_orchestration.domain.errors import StorageError
from batch_orchestration.domain.lifecycle import FINAL, Closing
from batch_orchestration.domain.members import Faults
from batch_orchestration.domain.submissions import Submission
from batch_orchestration.services.status import BatchView, view_batch, view_batches, view_planned
from batch_orchestration.storage.files import DataFolder
from batch_orchestration.storage.store import Store
from batch_orchestration.telemetry.progress import Progress


@dataclass(frozen=True, kw_only=True)
class SubmissionView:
    """One submission at one moment.

    Attributes:
        whole: The submission as if it were one batch: its figures are the sums of its parts'.
        parts: In file order, those that wait for room included.
    """

    submission: Submission
    whole: BatchView
    parts: tuple[BatchView, ...]


def view_submission(
    submission_id: str, *, folder: DataFolder, store: Store, now: float
) -> SubmissionView:
    """Return how a submission is.

    Raises:
        BatchNotFound: There is none.
    """
    submission = folder.read_submission(submission_id)
    views = view_batches(folder=folder, store=store, now=now, only=submission.parts)
    return _view(submission, {view.batch_id: view for view in views}, folder)


def view_submissions(views: Iterable[BatchView], *, folder: DataFolder) -> list[SubmissionView]:
    """Return all submissions that can be read, given the views of all batches."""
    known = {view.batch_id: view for view in views}
    found, faults = [], Faults()  # `services.damage` tells of the same
    for name in folder.submission_ids():
        with faults.of(name):
            found.append(_view(folder.read_submission(name), known, folder))
    return found


def view_any(name: str, *, folder: DataFolder, store: Store, now: float) -> BatchView:
    """Return how a batch is, or a submission as if it were one batch.

    Raises:
        BatchNotFound: There is neither.
    """
    if is_submission(name, folder=folder):
        return view_submission(name, folder=folder, store=store, now=now).whole
    return view_batch(name, folder=folder, store=store, now=now)


def is_submission(name: str, *, folder: DataFolder) -> bool:
    """Whether this is the id of a submission, not of a batch."""
    return folder.submission_path(name).exists()


def batches_named(name: str, *, folder: DataFolder, store: Store) -> list[str]:
    """Return the id of a batch, or of a submission those of its parts that are admitted.

    Raises:
        BatchNotFound: There is neither.
    """
    if is_submission(name, folder=folder):
        parts = folder.read_submission(name).parts
        known = store.records(parts)
        return [part for part in parts if part in known]
    folder.read_plan(name)
    store.batch(name)
    return [name]


def _view(
    submission: Submission, known: Mapping[str, BatchView], folder: DataFolder
) -> SubmissionView:
    parts, faults = [], Faults()
    for part_id in submission.parts:
        with faults.of(part_id):
            view = known.get(part_id) or view_planned(part_id, folder=folder)
            parts.append(view)
    if not parts:
        why = next(iter(faults))
        raise StorageError(f"nothing of {submission.submission_id} can be read: {why}")
    return SubmissionView(
        submission=submission, whole=_whole(submission, parts, folder), parts=tuple(parts)
    )


def _whole(submission: Submission, parts: Sequence[BatchView], folder: DataFolder) -> BatchView:
    outbox = folder.outbox_path(submission.submission_id)
    output, errors = outbox / "output.jsonl", outbox / "errors.jsonl"
    status = submission_status(parts, delivered=output.exists())
    plan = msgspec.structs.replace(
        parts[0].plan,
        batch_id=submission.submission_id,
        identity=submission.identity,
        requests=submission.requests,
        faulty=submission.faulty,
        chunks=tuple(chunk for part in parts for chunk in part.plan.chunks),
        part=None,
    )
    progress = _progress(submission, parts)
    return replace(
        parts[0],
        plan=plan,
        status=status,
        completed=sum(part.completed for part in parts),
        failed=sum(part.failed for part in parts),
        prompt_tokens=sum(part.prompt_tokens for part in parts),
        completion_tokens=sum(part.completion_tokens for part in parts),
        model=next((part.model for part in parts if part.model), ""),
        times=_times(parts, status),
        output_file=output if output.exists() else None,
        error_file=errors if errors.exists() else None,
        progress=progress,
        progress_age=None if progress is None else 0.0,
        closing=_closing(parts, status),
        halt=next((part.halt for part in parts if part.halt is not None), None),
        store_problem=next((part.store_problem for part in parts if part.store_problem), None),
    )


def submission_status(parts: Sequence[BatchView], *, delivered: bool) -> BatchStatus:
    """Return in one of the eight words how far a submission is."""
    statuses = {part.status for part in parts}
    if statuses <= FINAL and delivered:
        early = (BatchStatus.CANCELLED, BatchStatus.EXPIRED)
        return next((status for status in early if status in statuses), BatchStatus.COMPLETED)
    if statuses <= {*FINAL, BatchStatus.FINALIZING}:
        return BatchStatus.FINALIZING
    if statuses == {BatchStatus.VALIDATING}:
        return BatchStatus.VALIDATING
    if statuses <= {*FINAL, BatchStatus.FINALIZING, BatchStatus.CANCELLING}:
        return BatchStatus.CANCELLING
    return BatchStatus.IN_PROGRESS


def _closing(parts: Sequence[BatchView], status: BatchStatus) -> Closing | None:
    """Return the first decision about one of the parts; None while the submission goes on."""
    early = (BatchStatus.CANCELLING, BatchStatus.CANCELLED, BatchStatus.EXPIRED)
    if status not in early:
        return None
    closings = [part.closing for part in parts if part.closing is not None]
    return next((c for c in closings if c.status is status), closings[0] if closings else None)


def _times(parts: Sequence[BatchView], status: BatchStatus) -> dict[str, float]:
    """Return when the first part began, and when the last one ended."""
    begun = [part.times[word] for part in parts if (word := "in_progress") in part.times]
    times = {"in_progress": min(begun)} if begun else {}
    if status in FINAL:
        ended = [at for part in parts for word, at in part.times.items() if word in FINAL]
        times |= {str(status): max(ended)} if ended else {}
    return times


def _progress(submission: Submission, parts: Sequence[BatchView]) -> Progress | None:
    """Add up what the runs tell that are at work now; None if none is."""
    live = [(part.plan.part, said) for part in parts if (said := part.live) is not None]
    if not live:
        return None
    (part, said), told = live[0], [progress for _, progress in live]
    assert part is not None
    rate = sum(progress.requests_per_second for progress in told)
    completed, failed = sum(view.completed for view in parts), sum(view.failed for view in parts)
    return msgspec.structs.replace(
        said,
        batch_id=submission.submission_id,
        phase=f"part {part.number} of {part.of}, {said.phase}",
        total=submission.requests,
        completed=completed,
        failed=failed,
        in_flight=sum(progress.in_flight for progress in told),
        requests_per_second=rate,
        output_tokens_per_second=sum(progress.output_tokens_per_second for progress in told),
        eta_seconds=(submission.requests - completed - failed) / rate if rate else None,
    )
