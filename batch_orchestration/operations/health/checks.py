"""The checks of a deployment's health: each is a function that yields findings, healthy or not."""

import contextlib
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path

from batch_orchestration.admission.inbox import Inbox
from batch_orchestration.core.errors import StorageError, StoreLocked
from batch_orchestration.core.text import duration
from batch_orchestration.files.atomic import disk_errors
from batch_orchestration.files.sharing import OTHERS
from batch_orchestration.gpu import health as gpu_health
from batch_orchestration.operations.health.context import (
    SLOW_SECONDS,
    STATUS,
    Check,
    CheckContext,
    degraded,
    healthy,
    is_alive,
    running_in,
    unhealthy,
)
from batch_orchestration.operations.health.damage import find_damage
from batch_orchestration.operations.health.links import CLI, RESTART, run_link, sensor_link
from batch_orchestration.operations.health.report import Finding, Level, Standstill
from batch_orchestration.operations.health.run_checks import engine, workers
from batch_orchestration.queue.entries import QueueEntry
from batch_orchestration.queue.files import read_needs_attention, read_queue
from batch_orchestration.queue.pause import read_pause
from batch_orchestration.settings import ENV_FILE
from batch_orchestration.workers.heartbeat_files import read_last_heartbeats

#: Two of the longest ticks: if none has ended for this long, Dagster is dead.
DEAD_SECONDS = 150.0
#: `health_sensor` runs every 30 s.
HEALTH_STALE_SECONDS = 90.0
#: Ordinary clock corrections stay below this.
CLOCK_SECONDS = 60.0
#: A lock held this long is no commit any more, whichever process holds it.
LOCKED_SECONDS = 300.0
#: Below this share of the reserve, even admitted batches may run out of space.
DISK_SHARE = 0.25
#: Whatever the reserve: SQLite, DuckDB and logs all need some.
LEAST_BYTES = 64 * 2**20
LEAST_INODES = 1000
_GIB = 2**30


def dagster(context: CheckContext) -> Iterator[Finding]:
    """Check that daemon and code location are alive, by the age of the file of their ticks."""
    view = read_queue(context.folder)
    if view is None:
        reason = "dispatch_sensor has never completed a tick: Dagster was not started here"
        yield unhealthy("dagster", reason, RESTART)
        return
    age = context.now - view.at
    overdue = degraded if age <= DEAD_SECONDS else unhealthy
    if age < -CLOCK_SECONDS:
        reason = f"queue.json is {duration(-age)} from the future: the clock was set back"
        yield degraded("dagster", reason, "date")
    elif age <= SLOW_SECONDS:
        yield healthy("dagster", f"dispatch_sensor completed a tick {duration(age)} ago")
    elif context.previous and context.now - context.previous.at <= HEALTH_STALE_SECONDS:
        yield overdue(
            "dagster",
            f"the daemon runs, but dispatch_sensor has completed no tick for {duration(age)}: it"
            " was stopped, it fails, or the store is locked",
            f"see its ticks: {sensor_link(context.settings, 'dispatch_sensor')}",
        )
    else:
        yield overdue(
            "dagster",
            f"no tick has been completed for {duration(age)}: the daemon or the code location"
            " seems dead",
            RESTART,
        )


def disk(context: CheckContext) -> Iterator[Finding]:
    """Check the free space on the data folder's disk."""
    stats = os.statvfs(context.folder.root)
    free, reserve = stats.f_bavail * stats.f_frsize, context.settings.disk_reserve_bytes
    space = f"{free / _GIB:.1f} GiB are free, {reserve / _GIB:.1f} GiB are reserved"
    command = f"du -xh --max-depth=2 {context.folder.root} | sort -h | tail"
    if free < max(reserve * DISK_SHARE, LEAST_BYTES):
        yield unhealthy("disk", f"{space}: commits and outputs may fail", command)
    elif stats.f_files and stats.f_favail < LEAST_INODES:
        yield unhealthy("disk", f"only {stats.f_favail} more files can be created", command)
    elif free < reserve:
        yield degraded("disk", f"{space}: no file is admitted", command)
    else:
        yield healthy("disk", space)


def store(context: CheckContext) -> Iterator[Finding]:
    """Check folder and store by use: create and remove a file, and commit without a change."""
    probe = context.folder.root / f".health.{secrets.token_hex(6)}.tmp"
    try:
        with disk_errors(probe):
            probe.write_bytes(b"written\n")
            probe.unlink()
        if not context.folder.duckdb.exists() and context.folder.batch_ids():
            yield unhealthy("store", "batch.duckdb is gone", f"{CLI} recover")
        elif not context.folder.duckdb.exists():
            yield healthy("store", "no batch was admitted yet; the folder is writable")
        else:
            context.store.check_writable()
            yield healthy("store", "can be read and written")
    except StoreLocked as locked:
        before = context.before("store")
        since = before.since if before and before.since is not None else context.now
        lasting = context.now - since >= LOCKED_SECONDS
        yield Finding(
            check="store",
            level=Level.UNHEALTHY if lasting else Level.DEGRADED,
            reason=" ".join(str(locked).split()),  # the holder's command may have many lines
            next_command="end the process that locks it; commits wait, nothing is lost",
        )
    except StorageError as error:
        reason, _, hint = str(error).partition("\n")
        command = f"{CLI} recover" if hint else None
        yield unhealthy("store", reason, command or f"ls -ld {context.folder.root}/*")


def queue(context: CheckContext) -> Iterator[Finding]:
    """Check that the queue moves, if it can."""
    view = read_queue(context.folder)
    if view is None or abs(context.now - view.at) > DEAD_SECONDS:
        yield degraded("queue", "its state is unknown: queue.json is out of date", STATUS)
        return
    counts = f"{len(view.entries)} in the queue, {running_in(view)} of them running"
    standing = standstill(context)
    if (paused := read_pause(context.folder)) is not None:
        reason = f": {paused.reason}" if paused.reason else ""
        yield degraded(
            "queue",
            f"{paused.actor} paused it {duration(context.now - paused.at)} ago{reason}",
            f"{CLI} resume",
        )
    elif (claim := _oldest_claim(context)) is not None:
        yield unhealthy(
            "queue",
            f"{claim} was taken from the inbox long ago and is not admitted: its admissions fail",
            f"see the ticks of inbox_sensor: {sensor_link(context.settings, 'inbox_sensor')}",
        )
    elif standing is None:
        yield healthy("queue", counts)
    elif context.now - standing.since < context.settings.stalled_seconds:
        yield healthy("queue", f"{counts}; {standing.entry} will be served next")
    else:
        yield unhealthy(
            "queue",
            f"{standing.entry} has waited for {duration(context.now - standing.since)}, although"
            " no run is in progress and the entry has no reason to wait",
            STATUS,
        )


def _oldest_claim(context: CheckContext) -> str | None:
    """Return the file that was claimed too long ago; an admission takes minutes at most."""
    for claim in Inbox(context.folder, context.settings).claims():
        with contextlib.suppress(FileNotFoundError):
            since = claim.path.with_name("claim.json").stat().st_mtime  # written once, first
            if context.now - since > context.settings.stalled_seconds:
                return claim.file_name
    return None


def standstill(context: CheckContext) -> Standstill | None:
    """Return the entry that could be served while nothing is at work, and since when; else None.

    Raises:
        StorageError: A file of the queue is damaged.
        OSError: A heartbeat cannot be read.
    """
    view = read_queue(context.folder)
    if view is None or read_pause(context.folder) is not None or running_in(view):
        return None
    if any(
        is_alive(last_heartbeat, context)
        for last_heartbeat in read_last_heartbeats(context.folder).values()
    ):
        return None
    asked = {need.batch_id for need in read_needs_attention(context.folder) or ()}
    first = next((e for e in view.entries if e.reason is None and e.id not in asked), None)
    if first is None:
        return None
    return _since(first, context)


def _since(entry: QueueEntry, context: CheckContext) -> Standstill:
    before = context.previous.standstill if context.previous else None
    if before is not None and (before.entry, before.pending) == (entry.id, entry.pending):
        return before
    return Standstill(since=context.now, entry=entry.id, pending=entry.pending)


def gpu(context: CheckContext) -> Iterator[Finding]:
    """Check the devices as the gate does before each start of an engine."""
    check = gpu_health.check_gpu(context.settings)
    if check.no_gate is not None:
        yield healthy("gpu", check.no_gate)
    elif check.problem is not None:
        found = degraded if check.throttled else unhealthy
        yield found("gpu", check.problem, f"{CLI} gpu")
    else:
        yield healthy("gpu", ", ".join(f"GPU {d.index}: {d.name}" for d in check.devices))


def persons(context: CheckContext) -> Iterator[Finding]:
    """Report the batches that wait for a person."""
    needs = read_needs_attention(context.folder)
    if needs is None:
        yield degraded("persons", "unknown until dispatch_sensor has run", RESTART)
        return
    for need in needs:
        page = run_link(context.settings, need.run_id) if need.run_id else STATUS
        yield degraded(f"person:{need.batch_id}", need.reason, page)
    if not needs:
        yield healthy("persons", "no batch waits for a person")


def files(context: CheckContext) -> Iterator[Finding]:
    """Report our own unreadable files, of the deployment and of unfinished batches."""
    try:
        records = context.store.unfinished() if context.folder.duckdb.exists() else []
        unfinished = {record.batch_id for record in records}
    except StorageError:  # the store check reports the reason
        unfinished = set(context.folder.batch_ids())
    damaged = find_damage(context.folder, unfinished)
    for damage in damaged:
        check = f"file:{damage.path.relative_to(context.folder.root)}"
        yield degraded(check, damage.reason, damage.next_command)
    if not damaged:
        yield healthy("files", "all files can be read")


def permissions(context: CheckContext) -> Iterator[Finding]:
    """Check that other users of this machine cannot read prompts, answers or keys.

    Files in a folder that others cannot enter are out of their reach, whatever the mode.
    """
    open_to_others = [
        (path, command)
        for path, command in (
            (context.folder.root, f"chmod o-rwx {context.folder.root}"),
            (Path(ENV_FILE).resolve(), f"chmod 600 {Path(ENV_FILE).resolve()}"),
        )
        if path.exists() and path.stat().st_mode & OTHERS
    ]
    for path, command in open_to_others:
        yield degraded("permissions", f"every user of this machine can read {path}", command)
    if not open_to_others:
        yield healthy("permissions", "only owner and group can read the data folder")


CHECKS: Mapping[str, Check] = {
    "dagster": dagster,
    "store": store,
    "disk": disk,
    "files": files,
    "permissions": permissions,
    "queue": queue,
    "workers": workers,
    "engine": engine,
    "gpu": gpu,
    "persons": persons,
}
