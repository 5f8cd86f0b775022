"""Events about batches and chunks that Dagster receives, with metadata that plots."""

from collections.abc import Container, Iterable, Iterator
from pathlib import Path

import dagster as dg

from batch_orchestration.core.batches import BatchPlan, chunk_key
from batch_orchestration.core.lifecycle import EarlyEnd, Halt
from batch_orchestration.core.results import ChunkReport
from batch_orchestration.defs.metadata import (
    ROW_COUNT,
    Metadata,
    counts_table,
    list_of,
    metadata_of,
    table_of,
)
from batch_orchestration.delivery.assembly import Delivery
from batch_orchestration.estimates.estimate import Estimate, estimate_rows, window_warning
from batch_orchestration.inference.run import CommittedChunk
from batch_orchestration.queue.halts import what_helps
from batch_orchestration.workers.utilization import Utilization

MANIFEST_KEY = dg.AssetKey("batch_manifest")
OUTPUT_KEY = dg.AssetKey("batch_output")
FAILURE_CHECK = "failure_rate_within_budget"


def manifest_materialization(
    plan: BatchPlan, input_file: Path, estimate: Estimate | None = None
) -> dg.AssetMaterialization:
    """Return the event of a batch's admission, with the figures of its file."""
    metadata = metadata_of(
        plan,
        *("requests", "faulty", "size_bytes", "file_name", "sha256", "settings", "settings_hash"),
        chunks=len(plan.chunks),
        input_file=input_file,
    )
    metadata |= metadata_of(plan.options, "priority", "completion_window", "metadata", "model")
    if estimate is not None:
        metadata |= _expected(estimate)
    return dg.AssetMaterialization(MANIFEST_KEY, partition=plan.batch_id, metadata=metadata)


def _expected(estimate: Estimate) -> Metadata:
    return metadata_of(
        expected_prompt_tokens=round(estimate.prompt_tokens.mid),
        expected_completion_tokens=round(estimate.completion_tokens.mid),
        expected_seconds=estimate.seconds and estimate.seconds.mid,
        expected_price=estimate.price and round(estimate.price.mid, 2),
        estimate=list_of(f"{name}: {text}" for name, text in estimate_rows(estimate)),
        warning=window_warning(estimate),
    )


def chunk_materialization(
    key: dg.AssetKey, commit: CommittedChunk, *, settings_hash: str, sizes: Metadata | None = None
) -> dg.AssetMaterialization:
    """Return the event of a committed chunk: each of its requests has an outcome.

    Args:
        sizes: Of the run that reports it (`sizes_metadata`).
    """
    more: Metadata = {}
    if commit.reused:
        more = {"committed_by_run": commit.report.run_id}
    elif commit.engine is not None:
        more = metadata_of(
            engine=commit.engine.kind,
            engine_version=commit.engine.version,
            model=", ".join(commit.engine.models),
            **(sizes or {}),
        )
    return _chunk_event(key, commit.report, settings_hash, more)


def sizes_metadata(window: int, derivations: Iterable[str | None]) -> Metadata:
    """Return the width of a run's window, which plots, and the derivations of its sizes."""
    return metadata_of(window=window, derivation=list_of(filter(None, derivations)))


def closed_out_materialization(
    key: dg.AssetKey, report: ChunkReport, early_end: EarlyEnd, *, plan: BatchPlan
) -> dg.AssetMaterialization:
    """Return the event of a committed chunk whose batch ends early."""
    more: Metadata = {"batch_ended": str(early_end), "committed_by_run": report.run_id}
    return _chunk_event(key, report, plan.settings_hash, more)


def lost_materializations(
    key: dg.AssetKey, plan: BatchPlan, reports: Iterable[ChunkReport], known: Container[str]
) -> Iterator[dg.AssetMaterialization]:
    """Yield the events of committed chunks that Dagster does not know.

    Such a chunk was committed by another batch's run that was killed before it could report.
    """
    for report in reports:
        if chunk_key(report.batch_id, report.number) not in known:
            yield _chunk_event(key, report, plan.settings_hash, {"committed_by_run": report.run_id})


def _chunk_event(
    key: dg.AssetKey, report: ChunkReport, settings_hash: str, more: Metadata
) -> dg.AssetMaterialization:
    metadata = metadata_of(
        report,
        *("completed", "failed", "attempts", "prompt_tokens", "completion_tokens", "memory_level"),
        duration_seconds=report.seconds,
        settings_hash=settings_hash,
        failures_by_code=counts_table(report.failures_by_code),
    )
    if report.seconds > 0:
        metadata["requests_per_second"] = round(report.requests / report.seconds, 3)
        metadata["output_tokens_per_second"] = round(report.completion_tokens / report.seconds, 3)
    partition = chunk_key(report.batch_id, report.number)
    return dg.AssetMaterialization(
        key, partition=partition, metadata={ROW_COUNT: report.requests, **metadata, **more}
    )


def progress_observation(commit: CommittedChunk) -> dg.AssetObservation:
    """Return the progress of a batch, which its partition of `batch_manifest` plots over time."""
    now = commit.progress
    metadata = metadata_of(
        now,
        *("done", "total", "completed", "failed", "output_tokens_per_second", "eta_seconds"),
        utilization=commit.utilization,
        percent=round(100 * now.done / now.total, 2),
    )
    return dg.AssetObservation(MANIFEST_KEY, partition=commit.report.batch_id, metadata=metadata)


def halt_events(
    batch_id: str, halt: Halt
) -> Iterator[dg.AssetObservation | dg.AssetCheckEvaluation]:
    """Yield the events of a paused batch: one beside its progress, one in its failure check."""
    metadata = metadata_of(
        halt,
        *("failed", "judged", "max_failure_rate"),
        paused=halt.reason,
        failure_rate=halt.failed / max(halt.judged, 1),
        paused_by_run=halt.actor,
        next_step=what_helps(batch_id),
        examples=table_of(halt.examples, "custom_id", "code", "message"),
    )
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


def output_metadata(delivery: Delivery) -> Metadata:
    """Return the metadata of a batch's files, complete or partial."""
    totals, latencies = delivery.totals, delivery.latencies
    metadata = metadata_of(
        totals,
        *("completed", "failed", "failure_rate", "prompt_tokens", "completion_tokens", "attempts"),
        *("requests_per_second", "output_tokens_per_second"),
        partial=delivery.files.partial,
        status=delivery.status,
        done=totals.total,
        total=delivery.total,
        wall_seconds=totals.run_seconds,
        output_file=delivery.files.output,
        error_file=delivery.files.errors,
        report=dg.MetadataValue.md(delivery.text) if delivery.text else None,
        failures_by_code=counts_table(totals.failures_by_code),
        batch_ended=delivery.early_end and str(delivery.early_end),
        latency_p50_seconds=latencies and latencies.p50,
        latency_p99_seconds=latencies and latencies.p99,
    )
    if delivery.utilization is not None:
        metadata |= _utilization(delivery.utilization)
    return {ROW_COUNT: totals.total, **metadata}


def _utilization(found: Utilization) -> Metadata:
    """Return the utilization of the engine and each loss by name, as numbers, which plot."""
    return metadata_of(
        found,
        "engine_busy_seconds",
        utilization=found.fraction,
        accounted_seconds=found.wall_seconds,
        lost_start_up_seconds=found.start_up_seconds,
        lost_feed_gap_seconds=found.feed_gap_seconds,
        lost_held_seconds=found.held_seconds,
        lost_drain_seconds=found.drain_seconds,
        lost_commit_seconds=found.commit_seconds,
        narrow_window_seconds=found.narrow_seconds,
        output_tokens_per_second_while_full=found.full_tokens_per_second,
    )
