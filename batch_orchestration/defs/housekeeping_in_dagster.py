"""Dagster's share of housekeeping: partitions of delivered batches, runs, and tick logs.

`dispatch_sensor` decides from the runs of unfinished batches and recreates their missing
partitions, so a batch that is resumed later gets its partitions back.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import dagster as dg
from dagster._core.storage.event_log import SqliteEventLogStorage
from dagster._core.storage.local_compute_log_manager import LocalComputeLogManager

from batch_orchestration.core.batches import parse_chunk_key
from batch_orchestration.core.errors import BatchNotFound
from batch_orchestration.defs.partitions import (
    BATCH_TAG,
    PARTITION_TAG,
    batches,
    chunks,
    chunks_by_batch,
)
from batch_orchestration.defs.runs import ENDED_STATUSES, LIVE_STATUSES
from batch_orchestration.defs.sensors import CLAIM_TAG
from batch_orchestration.operations.housekeeping.clean import (
    Cleaner,
    Cleanup,
    Part,
    Removal,
    batches_to_retire,
)
from batch_orchestration.operations.housekeeping.retention import SECONDS_PER_DAY
from batch_orchestration.settings import Settings

#: Runs per query: each takes some kilobytes.
PAGE = 200
_BATCHES, _CHUNKS = str(batches.name), str(chunks.name)


def dagster_parts(instance: dg.DagsterInstance, settings: Settings) -> list[Part]:
    """Return the parts of housekeeping for an instance of Dagster."""
    # Partitions go by their number, too.
    partition_days = settings.partition_retention_days or bool(settings.max_chunk_partitions)
    days: list[tuple[str, float, Cleaner]] = [
        ("partitions", partition_days, partial(_clean_partitions, instance, settings)),
        ("runs", settings.run_retention_days, partial(_clean_runs, instance)),
        ("ticks", settings.log_retention_days, partial(_clean_ticks, instance)),
    ]
    return [Part(name, SECONDS_PER_DAY * kept, clean) for name, kept, clean in days]


def chunk_partitions(instance: dg.DagsterInstance) -> dict[str, list[str]]:
    """Return the keys of `chunks` by batch, each batch's in order."""
    found: dict[str, list[str]] = {}
    for key in instance.get_dynamic_partitions(_CHUNKS):
        with contextlib.suppress(ValueError):
            found.setdefault(parse_chunk_key(key)[0], []).append(key)
    return found


def _clean_partitions(
    instance: dg.DagsterInstance, settings: Settings, cleanup: Cleanup, _: float
) -> Iterator[Removal]:
    """Retire the partitions of settled batches: the old ones, and more if there are too many."""
    keys = chunk_partitions(instance)
    counts = Counter(dict.fromkeys(instance.get_dynamic_partitions(_BATCHES), 0))
    counts.update({name: len(of_batch) for name, of_batch in keys.items()})
    at_work = _batches_at_work(instance)
    ended = {name: since for name, since in cleanup.settled.items() if name not in at_work}
    kept = settings.partition_retention_days * SECONDS_PER_DAY
    before = cleanup.now - kept if kept else None
    most = settings.max_chunk_partitions or None
    for batch_id in batches_to_retire(counts, ended, before=before, most=most):
        if not cleanup.dry_run:
            _retire(instance, batch_id, keys.get(batch_id, []))
        yield Removal(subject=f"{batch_id} ({counts[batch_id]:,} chunks)")


def _retire(instance: dg.DagsterInstance, batch_id: str, chunk_keys: Sequence[str]) -> None:
    """Remove a batch's keys from the key space.

    The batch's own key, which marks the chunk keys as complete, goes first: after an interruption
    the keys are restored if the batch is needed. The chunk keys go from last to first, so that even
    then their order is kept.
    """
    instance.delete_dynamic_partition(_BATCHES, batch_id)
    for key in reversed(chunk_keys):
        instance.delete_dynamic_partition(_CHUNKS, key)


def _batches_at_work(instance: dg.DagsterInstance) -> set[str]:
    """Return the batches of all runs that have not ended."""
    live = instance.get_runs(dg.RunsFilter(statuses=LIVE_STATUSES))
    return {name for run in live for name in _names(run)}


def _names(run: dg.DagsterRun) -> set[str]:
    """Return the batches of a run."""
    names = {*chunks_by_batch(run.tags)}
    if name := run.tags.get(BATCH_TAG) or (run.tags.get(PARTITION_TAG) if not names else None):
        names.add(name)
    return names


def _clean_runs(
    instance: dg.DagsterInstance, cleanup: Cleanup, keep_seconds: float
) -> Iterator[Removal]:
    """Remove old runs, with events and logs, of settled batches and of no batch."""
    before = cleanup.now - keep_seconds
    for batch_id in cleanup.ended_before(before):
        yield from _clean_runs_of(instance, cleanup, batch_id, before)
    # Runs of batches that are left now must not be removed.
    for record in _old_runs(instance, before):
        if _is_needless(record.dagster_run, cleanup, before):
            yield _removed(instance, record.dagster_run.run_id, cleanup)


def _clean_runs_of(
    instance: dg.DagsterInstance, cleanup: Cleanup, batch_id: str, before: float
) -> Iterator[Removal]:
    """Remove all runs of a batch, the newest first, or none."""
    records = instance.get_run_records(dg.RunsFilter(tags={BATCH_TAG: batch_id}))
    if all(_ended_before(record, before) for record in records):
        for record in records:
            yield _removed(instance, record.dagster_run.run_id, cleanup)


def _old_runs(instance: dg.DagsterInstance, before: float) -> Iterator[dg.RunRecord]:
    """Yield ended runs, a page at a time."""
    moment = datetime.fromtimestamp(before, UTC)
    run_ids = instance.get_run_ids(dg.RunsFilter(statuses=ENDED_STATUSES, updated_before=moment))
    for at in range(0, len(run_ids), PAGE):
        page = instance.get_run_records(dg.RunsFilter(run_ids=list(run_ids[at : at + PAGE])))
        yield from (record for record in page if _ended_before(record, before))


def _ended_before(record: dg.RunRecord, before: float) -> bool:
    ended = record.dagster_run.status in ENDED_STATUSES
    return ended and (record.end_time or record.update_timestamp.timestamp()) < before


def _is_needless(run: dg.DagsterRun, cleanup: Cleanup, before: float) -> bool:
    """Whether a run has no batch, or only batches that were settled before `before`."""
    if (claim := run.tags.get(CLAIM_TAG)) and (cleanup.folder.claims / claim).exists():
        return False
    if run.tags.get(BATCH_TAG) in cleanup.settled:
        return False  # It goes with all runs of that batch, or not at all.
    return all(_ended_or_unknown(name, cleanup, before) for name in _names(run))


def _ended_or_unknown(name: str, cleanup: Cleanup, before: float) -> bool:
    if name in cleanup.settled:
        return cleanup.settled[name] < before
    try:
        planned = cleanup.folder.plan_path(name).exists()
    except BatchNotFound:  # not a possible batch id
        return True
    # Neither the store nor the disk knows the name: a person has mistyped it.
    return name not in cleanup.records and not planned


def _removed(instance: dg.DagsterInstance, run_id: str, cleanup: Cleanup) -> Removal:
    logs = _logs_of(instance, run_id)
    shard = _shard_of(instance, run_id)
    size_bytes = sum(path.stat().st_size for path in [*shard, *logs] if path.exists())
    if not cleanup.dry_run:
        instance.delete_run(run_id)
        # Some log managers cannot delete; logs without a run are then theirs to remove.
        with contextlib.suppress(NotImplementedError):
            instance.compute_log_manager.delete_logs(prefix=[run_id])
        for path in shard:
            path.unlink(missing_ok=True)
    return Removal(subject=run_id, size_bytes=size_bytes)


def _logs_of(instance: dg.DagsterInstance, run_id: str) -> list[Path]:
    manager = instance.compute_log_manager
    if not isinstance(manager, LocalComputeLogManager):
        return []
    return [path for path in (Path(manager._base_dir) / run_id).rglob("*") if path.is_file()]


def _shard_of(instance: dg.DagsterInstance, run_id: str) -> list[Path]:
    """Return the files of a run's own event log, which Dagster empties and never deletes."""
    storage = instance.event_log_storage
    if not isinstance(storage, SqliteEventLogStorage):
        return []
    path = Path(storage.path_for_shard(run_id))
    return [path.with_name(f"{path.name}{ending}") for ending in ("", "-wal", "-shm")]


def _clean_ticks(
    instance: dg.DagsterInstance, cleanup: Cleanup, keep_seconds: float
) -> Iterator[Removal]:
    """Remove the log files of sensor and schedule ticks, which Dagster never does."""
    manager = instance.compute_log_manager
    if not isinstance(manager, LocalComputeLogManager):
        return
    base = Path(manager._base_dir)
    for path in (base / "__repository__").rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            found = path.stat()
            if path.is_file() and found.st_mtime < cleanup.now - keep_seconds:
                if not cleanup.dry_run:
                    path.unlink()
                yield Removal(subject=str(path.relative_to(base)), size_bytes=found.st_size)
