"""The checks of a deployment's health: each a function that says what it found, healthy or not."""

import contextlib
import os
import secrets
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from batch_orchestration.domain.errors import StorageError, StoreLocked
from batch_orchestration.domain.health import Finding, HealthReport, Level, Standstill
from batch_orchestration.domain.heartbeats import Condition, Heartbeat, Pulse, Quiet, judge
from batch_orchestration.domain.queueing import EntryState, QueueEntry, QueueView
from batch_orchestration.engines.process_records import is_running
from batch_orchestration.services import gpu_health
from batch_orchestration.services.configuration import open_inbox
from batch_orchestration.services.dagster_links import RESTART, run_link, sensor_link
from batch_orchestration.services.run_workers import worker_of
from batch_orchestration.services.wording import duration
from batch_orchestration.settings import EngineKind, Settings
from batch_orchestration.storage.files import DataFolder, disk_errors
from batch_orchestration.storage.heartbeat_files import heartbeat_paths, read_pulse
from batch_orchestration.storage.queue_files import read_needs, read_pause, read_queue
from batch_orchestration.storage.store import Store

#: `dispatch_sensor` writes `queue.json` every 5 s, and a tick may take a minute.
SLOW_SECONDS = 60.0
#: Two of the longest ticks without one that came to its end.
DEAD_SECONDS = 150.0
#: `health_sensor` looks every 30 s.
HEALTH_STALE_SECONDS = 90.0
#: Clocks are set by so much without anybody having meant to.
CLOCK_SECONDS = 60.0
#: Dagster's run monitoring notices a dead worker within half a minute and then starts another.
NOTICED_SECONDS = 60.0
#: Locked for so long it is no commit any more, whoever holds it.
LOCKED_SECONDS = 300.0
REMOTE_SECONDS = 5.0
#: Below this share of the reserve even what was admitted may not find room.
DISK_SHARE = 0.25
#: Whatever the reserve: SQLite, DuckDB and logs all need some.
LEAST_BYTES = 64 * 2**20
LEAST_INODES = 1000
_GIB = 2**30
#: The engine's own client takes no proxy either.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_STATUS = "python -m batch_orchestration status"


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a check may look at.

    Attributes:
        now: POSIX seconds.
        previous: The report before this one; None if there is none of late.
    """

    settings: Settings
    folder: DataFolder
    store: Store
    now: float
    previous: HealthReport | None = None

    def before(self, check: str) -> Finding | None:
        """Return what the check found last time."""
        found = self.previous.findings if self.previous else ()
        return next((finding for finding in found if finding.check == check), None)


Check = Callable[[Look], Iterable[Finding]]


def dagster(look: Look) -> Iterator[Finding]:
    """Judge whether daemon and code location are alive: by the age of what they write each tick."""
    queue = read_queue(look.folder)
    sensor = sensor_link(look.settings, "dispatch_sensor")
    if queue is None:
        yield _unhealthy(
            "dagster",
            "dispatch_sensor has never ended a tick: Dagster was not started here",
            RESTART,
        )
        return
    age = look.now - queue.at
    if age < -CLOCK_SECONDS:
        yield _degraded(
            "dagster",
            f"queue.json is {duration(-age)} from the future: the clock was set back, and"
            " what is old cannot be told",
            "date",
        )
    elif age <= SLOW_SECONDS:
        yield _healthy("dagster", f"dispatch_sensor ended a tick {duration(age)} ago")
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
        yield _degraded("dagster", f"no tick has ended for {duration(age)}", RESTART)
    else:
        yield _unhealthy(
            "dagster",
            f"no tick has ended for {duration(age)}: daemon or code location do not run",
            RESTART,
        )


def disk(look: Look) -> Iterator[Finding]:
    """Judge the room on the disk of the data folder."""
    stats = os.statvfs(look.folder.root)
    free, reserve = stats.f_bavail * stats.f_frsize, look.settings.disk_reserve_bytes
    told = f"{free / _GIB:.1f} GiB are free, {reserve / _GIB:.1f} GiB stay reserved"
    command = f"du -xh --max-depth=2 {look.folder.root} | sort -h | tail"
    if free < max(reserve * DISK_SHARE, LEAST_BYTES):
        yield _unhealthy("disk", f"{told}: commits and outputs may find no room", command)
    elif stats.f_files and stats.f_favail < LEAST_INODES:
        yield _unhealthy("disk", f"only {stats.f_favail} more files can be made", command)
    elif free < reserve:
        yield _degraded("disk", f"{told}: nothing more is admitted", command)
    else:
        yield _healthy("disk", told)


def store(look: Look) -> Iterator[Finding]:
    """Judge folder and store by doing it: a file is made and removed, a commit changes nothing."""
    probe = look.folder.root / f".health.{secrets.token_hex(6)}.tmp"
    try:
        with disk_errors(probe):
            probe.write_bytes(b"written\n")
            probe.unlink()
        if not look.folder.duckdb.exists() and look.folder.batch_ids():
            yield _unhealthy(
                "store", "batch.duckdb is gone", "python -m batch_orchestration recover"
            )
        elif not look.folder.duckdb.exists():
            yield _healthy("store", "there is none before the first batch; the folder is writable")
        else:
            look.store.check_writable()
            yield _healthy("store", "was read and written")
    except StoreLocked as locked:
        before = look.before("store")
        since = before.since if before and before.since is not None else look.now
        lasting = look.now - since >= LOCKED_SECONDS
        yield Finding(
            check="store",
            level=Level.UNHEALTHY if lasting else Level.DEGRADED,
            reason=f"{locked}; so since {duration(look.now - since)}",
            next_command="end what holds it; commits wait, nothing is lost",
        )
    except StorageError as error:
        reason, _, hint = str(error).partition("\n")
        command = "python -m batch_orchestration recover" if hint else None
        yield _unhealthy("store", reason, command or f"ls -ld {look.folder.root}/*")


def queue(look: Look) -> Iterator[Finding]:
    """Judge whether what could go on does."""
    view = read_queue(look.folder)
    if view is None or abs(look.now - view.at) > DEAD_SECONDS:
        yield _degraded("queue", "is not known: nobody keeps queue.json up to date", _STATUS)
        return
    counts = f"{len(view.entries)} in the queue, {_running(view)} of them at work"
    standing = standstill(look)
    if (paused := read_pause(look.folder)) is not None:
        why = f": {paused.reason}" if paused.reason else ""
        yield _degraded(
            "queue",
            f"{paused.actor} paused it {duration(look.now - paused.at)} ago{why}",
            "python -m batch_orchestration resume",
        )
    elif (claim := _oldest_claim(look)) is not None:
        yield _unhealthy(
            "queue",
            f"{claim} was taken from the inbox long ago and is not admitted: its admissions fail",
            f"look at the ticks of inbox_sensor: {sensor_link(look.settings, 'inbox_sensor')}",
        )
    elif standing is None:
        yield _healthy("queue", counts)
    elif look.now - standing.since < look.settings.stalled_seconds:
        yield _healthy("queue", f"{counts}; {standing.entry} is about to be served")
    else:
        yield _unhealthy(
            "queue",
            f"{standing.entry} has waited for {duration(look.now - standing.since)} though"
            " nothing is at work and nothing keeps it",
            _STATUS,
        )


def _oldest_claim(look: Look) -> str | None:
    """Return the file that was claimed too long ago; the admission of any takes minutes at most."""
    for claim in open_inbox(look.settings, look.folder).claims():
        with contextlib.suppress(FileNotFoundError):
            since = claim.path.with_name("claim.json").stat().st_mtime  # written once, first
            if look.now - since > look.settings.stalled_seconds:
                return claim.file_name
    return None


def standstill(look: Look) -> Standstill | None:
    """Return what could be worked at, and since when nothing is; None if something is.

    Raises:
        StorageError: A file about the queue is damaged.
        OSError: A heartbeat cannot be read.
    """
    view = read_queue(look.folder)
    if view is None or read_pause(look.folder) is not None or _running(view):
        return None
    if any(_is_alive(pulse, look) for pulse in _pulses(look.folder).values()):
        return None
    asked = {need.batch_id for need in read_needs(look.folder) or ()}
    first = next((e for e in view.entries if e.reason is None and e.id not in asked), None)
    if first is None:
        return None
    return _since(first, look)


def _since(entry: QueueEntry, look: Look) -> Standstill:
    before = look.previous.standstill if look.previous else None
    if before is not None and (before.entry, before.pending) == (entry.id, entry.pending):
        return before
    return Standstill(since=look.now, entry=entry.id, pending=entry.pending)


def workers(look: Look) -> Iterator[Finding]:
    """Judge each run by its heartbeat: gone, silent, stuck, or only slow."""
    pulses = _pulses(look.folder)
    for run_id, pulse in pulses.items():
        yield _judged(run_id, pulse, look)
    view = read_queue(look.folder)
    if pulses:
        return
    if view is not None and look.now - view.at <= SLOW_SECONDS and _running(view):
        busy = next(entry.id for entry in view.entries if entry.state is EntryState.RUNNING)
        yield _degraded("workers", f"{busy} is at work, and no run shows a heartbeat", _STATUS)
    else:
        yield _healthy("workers", "no run is at work")


def _judged(run_id: str, pulse: Pulse, look: Look) -> Finding:
    check, page = f"worker:{run_id}", run_link(look.settings, run_id)
    beat, silent = pulse.heartbeat, look.now - pulse.at
    if beat is not None and not is_running(worker_of(beat)):
        level = Level.DEGRADED if silent <= NOTICED_SECONDS else Level.UNHEALTHY
        reason = f"its process {beat.pid} is gone; Dagster ends the run and starts it again"
        return Finding(check=check, level=level, reason=reason, next_command=page)
    judgement = judge(pulse, _quiet(pulse, look.now), silent_seconds=look.settings.silent_seconds)
    told = pulse.told
    if judgement.condition is not Condition.ALIVE:
        return _unhealthy(check, f"{judgement.condition}: {judgement.reason}", page)
    if told is None:
        return _degraded(check, judgement.reason, page)
    of = f" of {told.batch_id}" if told.batch_id else ""
    return _healthy(check, f"{told.job}{of}: {judgement.reason}")


def _quiet(pulse: Pulse, now: float) -> Quiet:
    beat = pulse.heartbeat
    return Quiet(
        heartbeat=now - pulse.at,
        progress=now - beat.progress_at if beat else 0.0,
        loop=now - beat.loop_at if beat and beat.loop_at is not None else 0.0,
    )


def engine(look: Look) -> Iterator[Finding]:
    """Judge whether engines answer: our own by what their runs say, a remote one by asking it."""
    if look.settings.engine is EngineKind.REMOTE:
        yield _remote(look.settings)
    pulses = _pulses(look.folder).values()
    beats = [pulse.told for pulse in pulses if pulse.told is not None and _is_alive(pulse, look)]
    limit = look.settings.alert_engine_restarts
    for beat in beats:
        check = f"engine:{beat.run_id}"
        if beat.restarts > limit:
            yield _degraded(
                check,
                f"was started again {beat.restarts} times in this run, more than {limit}",
                f"tail -n 50 {look.folder.logs}/engines/{beat.run_id}.log",
            )
        elif beat.in_flight and _is_stuck(beat, look.now):
            idle = duration(look.now - beat.progress_at)
            yield _unhealthy(
                check,
                f"has given no sign for {idle}; {_figures(beat)}",
                f"tail -n 50 {look.folder.logs}/engines/{beat.run_id}.log",
            )
        elif beat.window or beat.engine is not None:
            yield _healthy(check, _figures(beat))
    if not beats and look.settings.engine is not EngineKind.REMOTE:
        yield _healthy("engine", "no run needs one now")
    elif look.settings.engine is not EngineKind.REMOTE:
        yield _healthy("engine", "its runs say how it is")


def _figures(beat: Heartbeat) -> str:
    told = beat.engine
    parts = [f"{beat.in_flight} in flight of {beat.window}"]
    if told is not None and told.waiting is not None:
        parts.append(f"{told.waiting} waiting in it")
    if told is not None and told.kv_usage is not None:
        parts.append(f"KV cache {told.kv_usage:.0%}")
    return ", ".join(parts)


def _remote(settings: Settings) -> Finding:
    address = settings.base_url.rstrip("/").removesuffix("/v1") + "/health"
    command = f"curl -i {address}"
    request = urllib.request.Request(address)
    if key := settings.api_key.get_secret_value():
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with _opener.open(request, timeout=REMOTE_SECONDS) as answer:
            return _healthy("engine", f"{address} answers {answer.status}")
    except urllib.error.HTTPError as error:
        with error:
            if error.code < 500:  # it has no such page, and has said so
                return _healthy("engine", f"{address} answers {error.code}")
            return _unhealthy("engine", f"{address} answers {error.code}", command)
    except OSError as error:
        return _unhealthy("engine", f"{address} does not answer: {error}", command)
    except ValueError:  # its words may be those of the key
        return _unhealthy("engine", f"{address}, or its key, cannot be used", command)


def gpu(look: Look) -> Iterator[Finding]:
    """Judge the devices as the gate before each start of an engine does."""
    verdict = gpu_health.examine(look.settings)
    if verdict.no_gate is not None:
        yield _healthy("gpu", verdict.no_gate)
    elif verdict.problem is not None:
        yield _unhealthy("gpu", verdict.problem, "python -m batch_orchestration gpu")
    else:
        yield _healthy("gpu", ", ".join(f"GPU {d.index}: {d.name}" for d in verdict.devices))


def persons(look: Look) -> Iterator[Finding]:
    """Name the batches that go on only after a person has done something."""
    needs = read_needs(look.folder)
    if needs is None:
        yield _degraded("persons", "is not known before dispatch_sensor has looked", RESTART)
        return
    for need in needs:
        yield _degraded(
            f"person:{need.batch_id}", need.reason, run_link(look.settings, need.run_id)
        )
    if not needs:
        yield _healthy("persons", "no batch waits for one")


CHECKS: Mapping[str, Check] = {
    "dagster": dagster,
    "store": store,
    "disk": disk,
    "queue": queue,
    "workers": workers,
    "engine": engine,
    "gpu": gpu,
    "persons": persons,
}


def _pulses(folder: DataFolder) -> dict[str, Pulse]:
    """Return what lies there of heartbeats, by run id."""
    found = ((path.stem, read_pulse(path)) for path in heartbeat_paths(folder))
    return {run_id: pulse for run_id, pulse in found if pulse is not None}


def _is_alive(pulse: Pulse, look: Look) -> bool:
    silent = look.now - pulse.at > look.settings.silent_seconds
    return not silent and (pulse.heartbeat is None or is_running(worker_of(pulse.heartbeat)))


def _is_stuck(beat: Heartbeat, now: float) -> bool:
    return now - beat.progress_at > beat.patience_seconds


def _running(view: QueueView) -> int:
    return sum(entry.state is EntryState.RUNNING for entry in view.entries)


def _healthy(check: str, reason: str) -> Finding:
    return Finding(check=check, level=Level.HEALTHY, reason=reason)


def _degraded(check: str, reason: str, next_command: str) -> Finding:
    return Finding(check=check, level=Level.DEGRADED, reason=reason, next_command=next_command)


def _unhealthy(check: str, reason: str, next_command: str) -> Finding:
    return Finding(check=check, level=Level.UNHEALTHY, reason=reason, next_command=next_command)
