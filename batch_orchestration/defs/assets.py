"""Assets: the products of a batch, from the admitted file to the delivered answers."""

import contextlib
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial

import dagster as dg
from pydantic import Field

from batch_orchestration import __version__
from batch_orchestration.core.batches import BatchPlan, parse_chunk_key, settings_hash
from batch_orchestration.core.crash_points import CrashPoint, crash_point
from batch_orchestration.core.fault_isolation import Faults
from batch_orchestration.defs.events import (
    MANIFEST_KEY,
    chunk_materialization,
    lost_materializations,
    output_metadata,
    progress_observation,
    sizes_metadata,
)
from batch_orchestration.defs.lifecycle import close_out_chunks, tag_early_end
from batch_orchestration.defs.metadata import Metadata
from batch_orchestration.defs.partitions import BATCH_TAG, batches, chunks
from batch_orchestration.defs.resources import (
    GpuResource,
    SettingsResource,
    data_folder,
    open_store,
    sample_taker,
)
from batch_orchestration.defs.runs import claim_batch, engine_errors, mark_partial
from batch_orchestration.delivery.assembly import deliver
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.gpu.sample_table import SampleTaker
from batch_orchestration.inference.run import CommittedChunk, run_chunks
from batch_orchestration.inference.sampler import RunSampler
from batch_orchestration.inference.window.sizing import Sizing
from batch_orchestration.queue.halts import halt_in_force, what_helps
from batch_orchestration.store.store import Store
from batch_orchestration.workers.reporter import report_phase
from batch_orchestration.workers.run_status import RunStatus

#: Planning a run costs Dagster 13 to 23 ms per partition before it can start.
CHUNKS_PER_BACKFILL_RUN = 200
#: For lineage only: Dagster would otherwise look for the same key in both partition sets and, not
#: finding it, refuse backfills.
ACROSS_SETS = dg.AllPartitionMapping()

batch_manifest = dg.AssetSpec(
    MANIFEST_KEY,
    description=(
        "**What was admitted**: a batch's file, read and cut into chunks.\n\n"
        "Materialized by the job `admit_batch` for each complete file in the inbox, never by hand. "
        "Each committed chunk adds an observation: done, total, tokens per second, ETA. A file "
        "that does not show here waits in the inbox (the ticks of `inbox_sensor` say why) or lies "
        "in `inbox/rejected` with its reasons beside it."
    ),
    group_name="inbox",
    kinds={"json"},
    partitions_def=batches,
)


class ChunkRunConfig(dg.Config):
    """Options for answering the chunks of a run."""

    force: bool = Field(
        False,
        description=(
            "Go on although settings differ from those that the batch was planned with; the "
            "answers then are a mix, and each says which settings it came from."
        ),
    )


@dg.asset(
    deps=[dg.AssetDep(batch_manifest, partition_mapping=ACROSS_SETS)],
    partitions_def=chunks,
    group_name="inference",
    kinds={"vllm", "duckdb"},
    pool="gpu",
    backfill_policy=dg.BackfillPolicy.multi_run(CHUNKS_PER_BACKFILL_RUN),
    # Each chunk is reported at its commit; an output would report all of them at the end.
    output_required=False,
)
def chunk_results(
    context: dg.AssetExecutionContext,
    config: ChunkRunConfig,
    gpu: GpuResource,
    settings: SettingsResource,
) -> Iterator[dg.MaterializeResult[None]]:
    """**Answers and failures of one chunk of requests**, committed to DuckDB.

    A chunk holds about a minute's work, or 1,000 requests if the engine was never measured, unless
    `BATCH_REQUESTS_PER_CHUNK` sets another size.

    A partition is green once each of its requests has an outcome, failures included; it turns green
    at its commit, not when its run ends. Failed requests are rows of `failed_requests`
    (`python -m batch_orchestration failures BATCH`), never a failed chunk.

    **If a partition is red or missing**, its run ended before the chunk was done. Nothing is lost:
    every answer so far is in the journal. `dispatch_sensor` starts it again by itself; after three
    failures it waits for you, and its ticks give the reason. Materializing any selection of
    partitions is always safe: requests with an outcome are not sent again.
    """
    force, present = config.force, gpu.in_force(settings)
    selection = _selection(context)
    by_person = BATCH_TAG not in context.run.tags
    claim_batch(context.instance, context.run, list(selection), data_folder(present))
    with gpu.sampling(context.run.run_id, present) as sampler:
        run = gpu.run_context(context.run.run_id, present, sampler, batch_ids=list(selection))
        commits = run_chunks(selection, run, force=force)
        commits = _with_samples(commits, sampler, sample_taker(present))
        # Closed at once if the run is terminated, so that the journals are flushed.
        with contextlib.closing(commits):
            present_hash = settings_hash(present.answer_settings())
            sizes = partial(_sizes, gpu.sizing, sampler.status)
            with engine_errors(context.op_execution_context, present):
                _report(context, commits, present_hash, sizes)
    faults = Faults()
    for batch_id in selection:
        with faults.of(batch_id):
            if ended := data_folder(present).early_end(batch_id).read():
                tag_early_end(context.instance, context.run.run_id, ended)
                context.log.warning(f"{batch_id}: {ended}. To go on: resume {batch_id}")
    for fault in faults:
        context.log.warning(str(fault))
    _log_paused(context, selection, data_folder(present), by_person=by_person)
    yield from ()


def _log_paused(
    context: dg.AssetExecutionContext,
    batch_ids: Iterable[str],
    folder: DataFolder,
    *,
    by_person: bool,
) -> None:
    """Log which of the batches are paused.

    If a person launched the run, a batch that was paused before fails it once the other batches are
    done. A run that `dispatch_sensor` launched before the pause ends well, because nothing failed.
    """
    refused = []
    for batch_id in batch_ids:
        if (halt := halt_in_force(folder, batch_id)) is not None:
            reason = f"batch {batch_id} is {halt}. To go on: {what_helps(batch_id)}"
            context.log.warning(reason)
            if halt.actor != context.run.run_id:
                refused.append(reason)
    if refused and by_person:
        raise dg.Failure(description="\n".join(refused), allow_retries=False)


def _with_samples(
    commits: Generator[CommittedChunk, None, None], sampler: RunSampler, taker: SampleTaker
) -> Generator[CommittedChunk, None, None]:
    """Pass on each commit, then store the device samples taken meanwhile, off the feed's path."""
    with contextlib.closing(commits):
        for commit in commits:
            yield commit
            if (
                sampler.watches_devices
                and (batch_id := sampler.status.primary_batch_id) is not None
            ):
                taker.after_commit(batch_id)


def _sizes(sizing: Sizing, status: RunStatus) -> Metadata:
    """Return the present window, and the derivations of the window and of the engine's sizes."""
    return sizes_metadata(status.window, [*map(str, sizing.derived), status.derivation])


def _selection(context: dg.AssetExecutionContext) -> dict[str, list[int]]:
    """Return chunk numbers by batch.

    A range is a slice of all keys in insertion order. In a run that belongs to a batch, only the
    batch's own keys count.
    """
    only = context.run.tags.get(BATCH_TAG)
    selection: dict[str, list[int]] = {}
    for key in context.partition_keys:
        batch_id, number = parse_chunk_key(key)
        if only in (None, batch_id):
            selection.setdefault(batch_id, []).append(number)
    return selection


def _report(
    context: dg.AssetExecutionContext,
    commits: Iterator[CommittedChunk],
    settings_hash: str,
    sizes: Callable[[], Metadata],
) -> None:
    """Report each chunk to Dagster at its commit.

    Chunks that an earlier run committed are reported too: Dagster planned them again and would
    otherwise call them failed.
    """
    for commit in commits:
        crash_point(CrashPoint.BEFORE_EVENT)
        context.log_event(
            chunk_materialization(
                context.asset_key, commit, settings_hash=settings_hash, sizes=sizes()
            )
        )
        context.log_event(progress_observation(commit))


@dg.asset(
    deps=[dg.AssetDep(chunk_results, partition_mapping=ACROSS_SETS)],
    partitions_def=batches,
    group_name="delivery",
    kinds={"json"},
    code_version=__version__,
)
def batch_output(
    context: dg.AssetExecutionContext, settings: SettingsResource
) -> dg.MaterializeResult[None]:
    """**The delivered files of a batch**: `output.jsonl`, `errors.jsonl` and a report.

    Written to `outbox/<batch>` when every request has an outcome, whole or not at all, in the order
    of the input. Materializing it again writes the same files.

    If the batch is unfinished, materializing it writes the outcomes so far to
    `output.partial.jsonl` and `errors.partial.jsonl`, marked by `partial` in the metadata. The
    batch continues undisturbed, and its delivery removes the partial files.

    If the batch was cancelled or has expired, requests without an answer are lines of
    `errors.jsonl`; `resume BATCH` sends them after all, and the files are written again.

    **If it failed**, nothing is lost: the answers are in DuckDB. Usually the outbox is full or not
    writable; fix that and materialize this partition.
    """
    batch_id = context.partition_key
    report_phase("delivering", batch_id)
    folder, store, run_id = data_folder(settings), open_store(settings), context.run.run_id
    claim_batch(context.instance, context.run, [batch_id], folder)
    for event in close_out_chunks(
        context.instance, batch_id, folder=folder, store=store, run_id=run_id
    ):
        context.log_event(event)
    sample_taker(settings).take_in(batch_id)
    _report_lost(context, folder.read_plan(batch_id), store)
    delivery = deliver(
        batch_id,
        folder=folder,
        store=store,
        clock=time.time,
        actor=run_id,
        on_partial=partial(mark_partial, context.instance, run_id),
    )
    return dg.MaterializeResult(metadata=output_metadata(delivery))


def _report_lost(context: dg.AssetExecutionContext, plan: BatchPlan, store: Store) -> None:
    """Report the committed chunks that Dagster does not know.

    Their run may have belonged to another batch and been killed before it could report them. The
    batch's own runs report all of their chunks whenever they are started again.
    """
    reports = store.chunk_reports(plan.batch_id)
    known = context.instance.get_materialized_partitions(chunk_results.key)
    for event in lost_materializations(chunk_results.key, plan, reports.values(), known):
        context.log_event(event)
