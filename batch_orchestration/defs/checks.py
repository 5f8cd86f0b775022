"""Asset checks: conditions that a delivered batch must meet."""

from collections.abc import Iterator

import dagster as dg

from batch_orchestration.defs.assets import batch_output
from batch_orchestration.defs.metadata import Metadata, metadata_of
from batch_orchestration.defs.partitions import batches
from batch_orchestration.defs.resources import SettingsResource, data_folder
from batch_orchestration.delivery.outbox import OutboxFiles
from batch_orchestration.delivery.recount import Recount, recount
from batch_orchestration.settings import Settings


@dg.asset_check(asset=batch_output, partitions_def=batches, blocking=True)
def every_request_has_an_outcome(
    context: dg.AssetCheckExecutionContext, settings: SettingsResource
) -> dg.AssetCheckResult:
    """Each request of the batch has exactly one line, in `output.jsonl` or in `errors.jsonl`.

    The files on disk are recounted against the plan. Partial files pass if no request has more than
    one line. **If it fails**, do not use the files: materialize this partition of `batch_output`
    again; if it still fails, that is a bug.
    """
    return _accounts(_recount(context.partition_key, settings))


def _accounts(counts: Recount) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        passed=counts.problem is None,
        description=counts.problem or _sum(counts),
        metadata=_metadata(counts),
    )


def _sum(counts: Recount) -> str:
    if counts.partial:
        return (
            f"partial: {counts.completed:,} + {counts.failed:,} = {counts.done:,}"
            f" of {counts.total:,}"
        )
    return f"{counts.completed:,} + {counts.failed:,} = {counts.total:,}"


@dg.asset_check(asset=batch_output, partitions_def=batches)
def failure_rate_within_budget(
    context: dg.AssetCheckExecutionContext, settings: SettingsResource
) -> dg.AssetCheckResult:
    """No more requests failed than the setting `BATCH_FAILURE_BUDGET` allows.

    Requests that a cancelled or expired batch left unsent do not count as failures.

    **If it warns**, look at the failures by code in the batch's report, or run
    `python -m batch_orchestration failures BATCH`.
    """
    return _failure_rate(_recount(context.partition_key, settings), settings)


def check_again(batch_id: str, settings: Settings) -> Iterator[dg.AssetCheckEvaluation]:
    """Yield the present results of both checks, for a run that changed the files itself."""
    counts = _recount(batch_id, settings)
    for check, result in (
        (every_request_has_an_outcome, _accounts(counts)),
        (failure_rate_within_budget, _failure_rate(counts, settings)),
    ):
        (key,) = check.check_keys
        yield dg.AssetCheckEvaluation(
            asset_key=key.asset_key,
            check_name=key.name,
            passed=result.passed,
            metadata=result.metadata,
            severity=result.severity,
            description=result.description,
            partition=batch_id,
        )


def _failure_rate(counts: Recount, settings: Settings) -> dg.AssetCheckResult:
    rate = counts.failure_rate
    description = f"{rate:.2%} failed, {settings.failure_budget:.2%} allowed"
    if counts.unasked:
        description += f"; {counts.unasked:,} are not counted: the batch ended before their turn"
    return dg.AssetCheckResult(
        passed=rate <= settings.failure_budget,
        severity=dg.AssetCheckSeverity.WARN,
        description=description,
        metadata=_metadata(counts) | {"failure_rate": rate},
    )


def _recount(batch_id: str, settings: Settings) -> Recount:
    folder = data_folder(settings)
    files = OutboxFiles.present(folder.outbox_path(batch_id))
    return recount(folder.read_plan(batch_id), files)


def _metadata(counts: Recount) -> Metadata:
    return metadata_of(counts, "total", "completed", "failed", "unasked", "partial")
