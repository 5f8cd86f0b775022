"""The checks of a deployment's health: each is a function that yields findings, healthy or not."""

import contextlib
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path

from batch_orchestration.admission.settings import open_inbox
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
from batch_orchestration.queue.files import read_needs_attention, read_pause, read_queue
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


def dagster(look: CheckContext) -> Iterator[Finding]:
    """Check that daemon and code location are alive, by the age of the file of their ticks."""
    queue = read_queue(look.folder)
    sensor = sensor_link(look.settings, "dispatch_sensor")
    if queue is None:
        yield unhealthy(
            "dagster",
            "dispatch_sensor has never ended a tick: Dagster was not started here",
            RESTART,
        )
        return
    age = look.now - queue.at
    if age < -CLOCK_SECONDS:
        yield degraded(
            "dagster",
            f"queue.json is {duration(-age)} from the future: the clock was set back, and"
            " what is old cannot be told",
            "date",
        )
    elif age <= SLOW_SECONDS:
        yield healthy("dagster", f"dispatch_sensor ended a tick {duration(age)} ago")
    elif look.previous and look.now - look.previous.at <= HEALTH_STALE_SECONDS:
        yield Finding(
            check="dagster",
            level=Level.DEGRADED if age <= DEAD_SECONDS else Level.UNHEALTHY,
            reason=(
                f"the daemon runs, but dispatch_sensor has ended no tick for {duration(age)}:"
                " it was stopped, it fails, or the store is locked"
            ),
            next_command=f"look at its ticks: {sensor}",
        )
    elif age <= DEAD_SECONDS:
        yield degraded("dagster", f"no tick has ended for {duration(age)}", RESTART)
    else:
        yield unhealthy(
            "dagster",
            f"no tick has ended for {duration(age)}: daemon or code location do not run",
            RESTART,
        )


def disk(look: CheckContext) -> Iterator[Finding]:
    """Check the free space on the data folder's disk."""
    stats = os.statvfs(look.folder.root)
    free, reserve = stats.f_bavail * stats.f_frsize, look.settings.disk_reserve_bytes
    told = f"{free / _GIB:.1f} GiB are free, {reserve / _GIB:.1f} GiB stay reserved"
    command = f"du -xh --max-depth=2 {look.folder.root} | sort -h | tail"
    if free < max(reserve * DISK_SHARE, LEAST_BYTES):
        yield unhealthy("disk", f"{told}: commits and outputs may find no room", command)
    elif stats.f_files and stats.f_favail < LEAST_INODES:
        yield unhealthy("disk", f"only {stats.f_favail} more files can be made", command)
    elif free < reserve:
        yield degraded("disk", f"{told}: nothing more is admitted", command)
    else:
        yield healthy("disk", told)


def store(look: CheckContext) -> Iterator[Finding]:
    """Check folder and store by use: create and remove a file, and commit without a change."""
    probe = look.folder.root / f".health.{secrets.token_hex(6)}.tmp"
    try:
        with disk_errors(probe):
            probe.write_bytes(b"written\n")
            probe.unlink()
        if not look.folder.duckdb.exists() and look.folder.batch_ids():
            yield unhealthy("store", "batch.duckdb is gone", f"{CLI} recover")
        elif not look.folder.duckdb.exists():
            yield healthy("store", "there is none before the first batch; the folder is writable")
        else:
            look.store.check_writable()
            yield healthy("store", "was read and written")
    except StoreLocked as locked:
        before = look.before("store")
        since = before.since if before and before.since is not None else look.now
        lasting = look.now - since >= LOCKED_SECONDS
        yield Finding(
            check="store",
            level=Level.UNHEALTHY if lasting else Level.DEGRADED,
            reason=" ".join(str(locked).split()),  # the holder's command may have many lines
            next_command="end what holds it; commits wait, nothing is lost",
        )
    except StorageError as error:
        reason, _, hint = str(error).partition("\n")
        command = f"{CLI} recover" if hint else None
        yield unhealthy("store", reason, command or f"ls -ld {look.folder.root}/*")


def queue(look: CheckContext) -> Iterator[Finding]:
    """Check that the queue moves, if it can."""
    view = read_queue(look.folder)
    if view is None or abs(look.now - view.at) > DEAD_SECONDS:
        yield degraded("queue", "is not known: nobody keeps queue.json up to date", STATUS)
        return
    counts = f"{len(view.entries)} in the queue, {running_in(view)} of them at work"
    standing = standstill(look)
    if (paused := read_pause(look.folder)) is not None:
        why = f": {paused.reason}" if paused.reason else ""
        yield degraded(
            "queue",
            f"{paused.actor} paused it {duration(look.now - paused.at)} ago{why}",
            f"{CLI} resume",
        )
    elif (claim := _oldest_claim(look)) is not None:
        yield unhealthy(
            "queue",
            f"{claim} was taken from the inbox long ago and is not admitted: its admissions fail",
            f"look at the ticks of inbox_sensor: {sensor_link(look.settings, 'inbox_sensor')}",
        )
    elif standing is None:
        yield healthy("queue", counts)
    elif look.now - standing.since < look.settings.stalled_seconds:
        yield healthy("queue", f"{counts}; {standing.entry} is about to be served")
    else:
        yield unhealthy(
            "queue",
            f"{standing.entry} has waited for {duration(look.now - standing.since)} though"
            " nothing is at work and nothing keeps it",
            STATUS,
        )


def _oldest_claim(look: CheckContext) -> str | None:
    """Return the file that was claimed too long ago; an admission takes minutes at most."""
    for claim in open_inbox(look.settings, look.folder).claims():
        with contextlib.suppress(FileNotFoundError):
            since = claim.path.with_name("claim.json").stat().st_mtime  # written once, first
            if look.now - since > look.settings.stalled_seconds:
                return claim.file_name
    return None


def standstill(look: CheckContext) -> Standstill | None:
    """Return the entry that could be served while nothing is at work, and since when; else None.

    Raises:
        StorageError: A file of the queue is damaged.
        OSError: A heartbeat cannot be read.
    """
    view = read_queue(look.folder)
    if view is None or read_pause(look.folder) is not None or running_in(view):
        return None
    if any(
        is_alive(last_heartbeat, look)
        for last_heartbeat in read_last_heartbeats(look.folder).values()
    ):
        return None
    asked = {need.batch_id for need in read_needs_attention(look.folder) or ()}
    first = next((e for e in view.entries if e.reason is None and e.id not in asked), None)
    if first is None:
        return None
    return _since(first, look)


def _since(entry: QueueEntry, look: CheckContext) -> Standstill:
    before = look.previous.standstill if look.previous else None
    if before is not None and (before.entry, before.pending) == (entry.id, entry.pending):
        return before
    return Standstill(since=look.now, entry=entry.id, pending=entry.pending)


def gpu(look: CheckContext) -> Iterator[Finding]:
    """Check the devices as the gate does before each start of an engine."""
    check = gpu_health.check_gpu(look.settings)
    if check.no_gate is not None:
        yield healthy("gpu", check.no_gate)
    elif check.problem is not None:
        found = degraded if check.throttled else unhealthy
        yield found("gpu", check.problem, f"{CLI} gpu")
    else:
        yield healthy("gpu", ", ".join(f"GPU {d.index}: {d.name}" for d in check.devices))


def persons(look: CheckContext) -> Iterator[Finding]:
    """Report the batches that wait for a person."""
    needs = read_needs_attention(look.folder)
    if needs is None:
        yield degraded("persons", "is not known before dispatch_sensor has looked", RESTART)
        return
    for need in needs:
        page = run_link(look.settings, need.run_id) if need.run_id else STATUS
        yield degraded(f"person:{need.batch_id}", need.reason, page)
    if not needs:
        yield healthy("persons", "no batch waits for one")


def files(look: CheckContext) -> Iterator[Finding]:
    """Report our own unreadable files, of the deployment and of unfinished batches."""
    try:
        records = look.store.unfinished() if look.folder.duckdb.exists() else []
        unfinished = {record.batch_id for record in records}
    except StorageError:  # the store check reports the reason
        unfinished = set(look.folder.batch_ids())
    damaged = find_damage(look.folder, unfinished)
    for damage in damaged:
        check = f"file:{damage.path.relative_to(look.folder.root)}"
        yield degraded(check, damage.reason, damage.next_command)
    if not damaged:
        yield healthy("files", "all can be read")


def permissions(look: CheckContext) -> Iterator[Finding]:
    """Check that other users of this machine cannot read prompts, answers or keys.

    Files in a folder that others cannot enter are out of their reach, whatever the mode.
    """
    open_to_others = [
        (path, command)
        for path, command in (
            (look.folder.root, f"chmod o-rwx {look.folder.root}"),
            (Path(ENV_FILE).resolve(), f"chmod 600 {Path(ENV_FILE).resolve()}"),
        )
        if path.exists() and path.stat().st_mode & OTHERS
    ]
    for path, command in open_to_others:
        yield degraded("permissions", f"every user of this machine can look into {path}", command)
    if not open_to_others:
        yield healthy("permissions", "the data folder is for its owner and group")


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
