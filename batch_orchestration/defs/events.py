"""Events about batches and chunks that Dagster receives, with metadata that plots."""

from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path

import dagster as dg

from batch_orchestration.core.batches import BatchPlan, chunk_key
from batch_orchestration.core.lifecycle import EarlyEnd, Halt
from batch_orchestration.core.results import ChunkReport
from batch_orchestration.delivery.assembly import AssemblyReport
from batch_orchestration.delivery.partial_files import PartialReport
from batch_orchestration.estimates.estimate import Estimate, estimate_rows, window_warning
from batch_orchestration.inference.run import CommittedChunk
from batch_orchestration.queue.halts import what_helps
from batch_orchestration.workers.utilization import Utilization

Metadata = dict[str, dg.MetadataValue | str | int | float | bool]

MANIFEST_KEY = dg.AssetKey("batch_manifest")
OUTPUT_KEY = dg.AssetKey("batch_output")
FAILURE_CHECK = "failure_rate_within_budget"


def manifest_materialization(
    plan: BatchPlan, input_file: Path, estimate: Estimate | None = None
) -> dg.AssetMaterialization:
    """Return the event of a batch's admission, with the figures of its file."""
    metadata: Metadata = {
        "requests": plan.requests,
        "faulty": plan.faulty,
        "chunks": len(plan.chunks),
        "size_bytes": plan.size_bytes,
        "priority": plan.options.priority,
        "completion_window": plan.options.completion_window,
        "file_name": plan.file_name,
        "sha256": plan.sha256,
        "settings_hash": plan.settings_hash,
        "input_file": dg.MetadataValue.path(input_file),
        "settings": dg.MetadataValue.json(plan.settings),
    }
    if plan.options.metadata:
        metadata["metadata"] = dg.MetadataValue.json(plan.options.metadata)
    if plan.options.model:
        metadata["model"] = plan.options.model
    if estimate is not None:
        metadata |= _expected(estimate)
    return dg.AssetMaterialization(MANIFEST_KEY, partition=plan.batch_id, metadata=metadata)


def _expected(estimate: Estimate) -> Metadata:
    metadata: Metadata = {
        "expected_prompt_tokens": round(estimate.prompt_tokens.mid),
        "expected_completion_tokens": round(estimate.completion_tokens.mid),
        "estimate": dg.MetadataValue.md(
            "\n".join(f"- {name}: {text}" for name, text in estimate_rows(estimate))
        ),
    }
    if estimate.seconds is not None:
        metadata["expected_seconds"] = estimate.seconds.mid
    if estimate.price is not None:
        metadata["expected_price"] = round(estimate.price.mid, 2)
    if warning := window_warning(estimate):
        metadata["warning"] = warning
    return metadata


def chunk_materialization(
    key: dg.AssetKey, commit: CommittedChunk, *, settings_hash: str, sizes: Metadata | None = None
) -> dg.AssetMaterialization:
    """Return the event of a committed chunk: each of its requests has an outcome.

    Args:
        sizes: Of the run that reports it (`sizes_metadata`).
    """
    report = commit.report
    metadata = _chunk_figures(report, settings_hash)
    if commit.reused:
        metadata["committed_by_run"] = report.run_id
    elif commit.engine is not None:
        metadata["engine"] = commit.engine.kind
        metadata["engine_version"] = commit.engine.version
        metadata["model"] = ", ".join(commit.engine.models)
        metadata |= sizes or {}
    partition = chunk_key(report.batch_id, report.number)
    return dg.AssetMaterialization(key, partition=partition, metadata=metadata)


def sizes_metadata(window: int, derivations: Iterable[str | None]) -> Metadata:
    """Return the width of a run's window, which plots, and the derivations of its sizes."""
    lines = [f"- {line}" for line in derivations if line is not None]
    metadata: Metadata = {"window": window}
    if lines:
        metadata["derivation"] = dg.MetadataValue.md("\n".join(lines))
    return metadata


def closed_chunk_materialization(
    key: dg.AssetKey, report: ChunkReport, early_end: EarlyEnd, *, plan: BatchPlan
) -> dg.AssetMaterialization:
    """Return the event of a committed chunk whose batch ends early."""
    metadata = _chunk_figures(report, plan.settings_hash)
    metadata |= {"batch_ended": str(early_end), "committed_by_run": report.run_id}
    partition = chunk_key(report.batch_id, report.number)
    return dg.AssetMaterialization(key, partition=partition, metadata=metadata)


def _chunk_figures(report: ChunkReport, settings_hash: str) -> Metadata:
    metadata: Metadata = {
        "dagster/partition_row_count": report.requests,
        "completed": report.completed,
        "failed": report.failed,
        "attempts": report.attempts,
        "prompt_tokens": report.prompt_tokens,
        "completion_tokens": report.completion_tokens,
        "duration_seconds": round(report.seconds, 3),
        "settings_hash": settings_hash,
        **_rates(report),
    }
    if report.failures_by_code:
        metadata["failures_by_code"] = _counts_table(report.failures_by_code)
    if report.memory_level is not None:
        metadata["memory_level"] = report.memory_level
    return metadata


def lost_materializations(
    key: dg.AssetKey, plan: BatchPlan, reports: Iterable[ChunkReport], known: Container[str]
) -> Iterator[dg.AssetMaterialization]:
    """Yield the events of committed chunks that Dagster does not know.

    Such a chunk was committed by another batch's run that was killed before it could report.
    """
    for report in reports:
        if chunk_key(report.batch_id, report.number) not in known:
            commit = CommittedChunk(
                report=report,
                reused=True,
                engine=None,
                done=plan.requests,
                total=plan.requests,
                completed=report.completed,
                failed=report.failed,
                output_tokens_per_second=0.0,
                eta_seconds=None,
            )
            yield chunk_materialization(key, commit, settings_hash=plan.settings_hash)


def progress_observation(commit: CommittedChunk) -> dg.AssetObservation:
    """Return the progress of a batch, which its partition of `batch_manifest` plots over time."""
    metadata: Metadata = {
        "done": commit.done,
        "total": commit.total,
        "percent": round(100 * commit.done / commit.total, 2),
        "completed": commit.completed,
        "failed": commit.failed,
        "output_tokens_per_second": round(commit.output_tokens_per_second, 3),
    }
    if commit.eta_seconds is not None:
        metadata["eta_seconds"] = round(commit.eta_seconds, 1)
    if commit.utilization is not None:
        metadata["utilization"] = round(commit.utilization, 4)
    return dg.AssetObservation(MANIFEST_KEY, partition=commit.report.batch_id, metadata=metadata)


def halt_events(
    batch_id: str, halt: Halt
) -> Iterator[dg.AssetObservation | dg.AssetCheckEvaluation]:
    """Yield the events of a paused batch: one beside its progress, one in its failure check."""
    examples = [
        dg.TableRecord({"custom_id": one.custom_id or "", "code": one.code, "message": one.message})
        for one in halt.examples
    ]
    metadata: Metadata = {
        "paused": halt.reason,
        "failed": halt.failed,
        "judged": halt.judged,
        "failure_rate": round(halt.failed / max(halt.judged, 1), 6),
        "max_failure_rate": halt.max_failure_rate,
        "paused_by_run": halt.actor,
        "next_step": what_helps(batch_id),
    }
    if examples:
        metadata["examples"] = dg.MetadataValue.table(examples)
    yield dg.AssetObservation(MANIFEST_KEY, partition=batch_id, metadata=metadata)
    yield dg.AssetCheckEvaluation(
        asset_key=OUTPUT_KEY,
        check_name=FAILURE_CHECK,
        passed=False,
        severity=dg.AssetCheckSeverity.WARN,
        description=str(halt),
        metadata=metadata,
        partition=batch_id,
    )


def output_metadata(report: AssemblyReport) -> Metadata:
    """Return the metadata of a delivered batch."""
    totals, files = report.totals, report.files
    metadata: Metadata = {
        "partial": False,
        "dagster/partition_row_count": totals.total,
        "completed": totals.completed,
        "failed": totals.failed,
        "failure_rate": round(totals.failure_rate, 6),
        "prompt_tokens": totals.prompt_tokens,
        "completion_tokens": totals.completion_tokens,
        "attempts": totals.attempts,
        "wall_seconds": round(totals.run_seconds, 3),
        "requests_per_second": round(totals.requests_per_second, 3),
        "output_tokens_per_second": round(totals.output_tokens_per_second, 3),
        "output_file": dg.MetadataValue.path(files.output),
        "error_file": dg.MetadataValue.path(files.errors),
        "report": dg.MetadataValue.md(report.text),
    }
    if totals.failures_by_code:
        metadata["failures_by_code"] = _counts_table(totals.failures_by_code)
    if report.early_end is not None:
        metadata["batch_ended"] = str(report.early_end)
    if report.kept is not None:
        metadata |= _kept_figures(report.kept)
    if (found := report.latencies) is not None:
        metadata |= {
            "latency_p50_seconds": round(found.p50, 3),
            "latency_p99_seconds": round(found.p99, 3),
        }
    return metadata


def _kept_figures(kept: Utilization) -> Metadata:
    """Return the utilization of the engine and each loss by name, as numbers, which plot."""
    metadata: Metadata = {
        "utilization": round(kept.fraction, 4),
        "accounted_seconds": round(kept.wall_seconds, 3),
        "lost_start_up_seconds": round(kept.start_up_seconds, 3),
        "lost_feed_gap_seconds": round(kept.feed_gap_seconds, 3),
        "lost_held_seconds": round(kept.held_seconds, 3),
        "lost_drain_seconds": round(kept.drain_seconds, 3),
        "lost_commit_seconds": round(kept.commit_seconds, 3),
        "narrow_window_seconds": round(kept.narrow_seconds, 3),
        "engine_busy_seconds": round(kept.engine_busy_seconds, 3),
    }
    if (rate := kept.full_tokens_per_second) is not None:
        metadata["output_tokens_per_second_while_full"] = round(rate, 3)
    return metadata


def partial_output_metadata(report: PartialReport) -> Metadata:
    """Return the metadata of the partial files of an unfinished batch."""
    totals, files = report.totals, report.files
    return {
        "partial": True,
        "done": totals.total,
        "total": report.total,
        "dagster/partition_row_count": totals.total,
        "completed": totals.completed,
        "failed": totals.failed,
        "status": str(report.status),
        "output_file": dg.MetadataValue.path(files.partial_output),
        "error_file": dg.MetadataValue.path(files.partial_errors),
    }


def _rates(report: ChunkReport) -> Metadata:
    if report.seconds <= 0:
        return {}
    return {
        "requests_per_second": round(report.requests / report.seconds, 3),
        "output_tokens_per_second": round(report.completion_tokens / report.seconds, 3),
    }


def _counts_table(counts: Mapping[str, int]) -> dg.MetadataValue:
    rows = sorted(counts.items(), key=lambda item: -item[1])
    return dg.MetadataValue.table(
        [dg.TableRecord({"code": code, "requests": count}) for code, count in rows]
    )
