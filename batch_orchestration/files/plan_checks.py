"""Checks that a batch's settings and kept input still match its plan."""

import logging
from collections.abc import Mapping
from pathlib import Path

from batch_orchestration.core.batches import BatchPlan, settings_difference
from batch_orchestration.core.errors import PlanMismatch
from batch_orchestration.files.data_folder import DataFolder

logger = logging.getLogger(__name__)


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
