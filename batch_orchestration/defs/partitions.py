"""Partitions: a key per batch and a key per chunk, and the run tags that select them."""

from collections.abc import Mapping

import dagster as dg

from batch_orchestration.core.batches import BatchPlan, chunk_key, parse_chunk_key
from batch_orchestration.core.results import BatchRecord

batches = dg.DynamicPartitionsDefinition(name="batches")
chunks = dg.DynamicPartitionsDefinition(name="chunks")

#: Dagster has no public names for these tags. Only consecutive keys fit into one run.
PARTITION_TAG = "dagster/partition"
RANGE_START_TAG = "dagster/asset_partition_range_start"
RANGE_END_TAG = "dagster/asset_partition_range_end"
PRIORITY_TAG = "dagster/priority"
RUN_KEY_TAG = "dagster/run_key"
#: Our own tags; the runs page filters by them.
BATCH_TAG = "batch"
MODEL_TAG = "model"
SOURCE_TAG = "source"


def add_partitions(instance: dg.DagsterInstance, plan: BatchPlan) -> None:
    """Add the keys of a batch and its chunks to Dagster. Idempotent.

    The batch's key comes last: if it exists, so do those of its chunks.
    """
    # One call, because ranges are slices in insertion order.
    instance.add_dynamic_partitions(str(chunks.name), plan.chunk_keys)
    instance.add_dynamic_partitions(str(batches.name), [plan.batch_id])


def has_partitions(instance: dg.DagsterInstance, batch_id: str) -> bool:
    """Whether `add_partitions` has completed for the batch."""
    return instance.has_dynamic_partition(str(batches.name), batch_id)


def batch_tags(batch: BatchRecord, *, priority: int) -> dict[str, str]:
    """Return the tags of every run of this batch; higher priorities go first."""
    model = batch.options.model or batch.model
    return {
        **name_tags(batch),
        PRIORITY_TAG: str(priority),
        **({MODEL_TAG: model} if model else {}),
    }


def name_tags(batch: BatchPlan | BatchRecord) -> dict[str, str]:
    """Return the tags that name a batch and its source."""
    return {BATCH_TAG: batch.batch_id, SOURCE_TAG: batch.source}


def range_tags(batch_id: str, numbers: range) -> dict[str, str]:
    """Return the tags of a run over consecutive chunks."""
    return {
        RANGE_START_TAG: chunk_key(batch_id, numbers[0]),
        RANGE_END_TAG: chunk_key(batch_id, numbers[-1]),
    }


def chunks_by_batch(tags: Mapping[str, str]) -> dict[str, range]:
    """Return the chunks of a run, by its tags; empty if the run is not about chunks.

    A range across batches shows only the first batch, with an open end, and the last one.
    """
    first = tags.get(RANGE_START_TAG) or tags.get(PARTITION_TAG, "")
    last = tags.get(RANGE_END_TAG) or first
    try:
        first_batch, first_number = parse_chunk_key(first)
        last_batch, last_number = parse_chunk_key(last)
    except ValueError:
        return {}
    if first_batch == last_batch:
        return {first_batch: range(first_number, last_number + 1)}
    return {first_batch: range(first_number, 100_000), last_batch: range(last_number + 1)}
