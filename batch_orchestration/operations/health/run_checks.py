"""Health checks of runs and their engines."""

import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException

from batch_orchestration.core.text import duration
from batch_orchestration.engines.processes.records import is_running
from batch_orchestration.operations.health.context import (
    STATUS,
    CheckContext,
    degraded,
    healthy,
    is_alive,
    unhealthy,
)
from batch_orchestration.operations.health.links import NoRedirects, run_link
from batch_orchestration.operations.health.report import Finding, Level
from batch_orchestration.queue.files import read_queue
from batch_orchestration.settings import EngineKind, Settings
from batch_orchestration.workers.cleanup import worker_of
from batch_orchestration.workers.heartbeat import (
    Heartbeat,
    IdleTimes,
    LastHeartbeat,
    WorkerState,
    judge_worker,
)
from batch_orchestration.workers.heartbeat_files import read_last_heartbeats
from batch_orchestration.workers.progress import read_progress
from batch_orchestration.workers.utilization_files import read_accounts

#: Dagster's run monitoring notices a dead worker within half a minute and then starts another.
NOTICED_SECONDS = 60.0
REMOTE_SECONDS = 5.0
#: Restarts of runs that ended longer ago do not count.
RESTARTS_SECONDS = 3600.0
#: Without a proxy, like the engine's own client.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), NoRedirects)
#: Not every server has a page `/health`.
_NO_SUCH_PAGE = (404, 405)


def workers(context: CheckContext) -> Iterator[Finding]:
    """Check each run by its heartbeat: gone, silent, stuck, or only slow."""
    last_heartbeats = read_last_heartbeats(context.folder)
    for run_id, last_heartbeat in last_heartbeats.items():
        yield _judged(run_id, last_heartbeat, context)
    if last_heartbeats:
        return
    if (busy := _batch_at_work(context)) is not None:
        yield degraded("workers", f"{busy} is being run, and no run shows a heartbeat", STATUS)
    else:
        yield healthy("workers", "no run is in progress")


def _batch_at_work(context: CheckContext) -> str | None:
    """Return a batch with fresh progress of a live run; the run's heartbeat outlives that."""
    view = read_queue(context.folder)
    for entry in view.entries if view else ():
        if entry.batch_id is not None:
            progress = read_progress(context.folder.progress_path(entry.batch_id))
            if progress is not None and progress.is_of_a_live_run(context.now):
                return entry.batch_id
    return None


def _judged(run_id: str, last_heartbeat: LastHeartbeat, context: CheckContext) -> Finding:
    check, page = f"worker:{run_id}", run_link(context.settings, run_id)
    beat, silent = last_heartbeat.heartbeat, context.now - last_heartbeat.at
    if beat is not None and not is_running(worker_of(beat)):
        level = Level.DEGRADED if silent <= NOTICED_SECONDS else Level.UNHEALTHY
        reason = f"its process {beat.pid} is gone; Dagster ends the run and starts another"
        return Finding(check=check, level=level, reason=reason, next_command=page)
    health = judge_worker(
        last_heartbeat,
        _idle_times(last_heartbeat, context.now),
        silent_seconds=context.settings.silent_seconds,
    )
    beat = last_heartbeat.current
    if health.state is not WorkerState.ALIVE:
        return unhealthy(check, f"{health.state}: {health.reason}", page)
    if beat is None:
        return degraded(check, health.reason, page)
    batch = f" of {beat.batch_id}" if beat.batch_id else ""
    return healthy(check, f"{beat.job}{batch}: {health.reason}")


def _idle_times(last_heartbeat: LastHeartbeat, now: float) -> IdleTimes:
    beat = last_heartbeat.heartbeat
    return IdleTimes(
        heartbeat=now - last_heartbeat.at,
        progress=now - beat.progress_at if beat else 0.0,
        loop=now - beat.loop_at if beat and beat.loop_at is not None else 0.0,
    )


def engine(context: CheckContext) -> Iterator[Finding]:
    """Check that engines answer: our own by their runs' heartbeats, a remote one by a request."""
    if context.settings.engine is EngineKind.REMOTE:
        yield _remote(context.settings)
    last_heartbeats = read_last_heartbeats(context.folder).values()
    beats = [
        last_heartbeat.current
        for last_heartbeat in last_heartbeats
        if last_heartbeat.current is not None and is_alive(last_heartbeat, context)
    ]
    limit = context.settings.alert_engine_restarts
    for beat in beats:
        check = f"engine:{beat.run_id}"
        if (restarts := _restarts(beat, context)) > limit:
            yield degraded(
                check,
                f"restarted {restarts} times within the last hour, more than {limit}",
                f"tail -n 50 {context.folder.logs}/engines/{beat.run_id}.log",
            )
        elif beat.in_flight and context.now - beat.progress_at > beat.patience_seconds:
            idle = duration(context.now - beat.progress_at)
            yield unhealthy(
                check,
                f"no sign of progress for {idle}; {_load(beat)}",
                f"tail -n 50 {context.folder.logs}/engines/{beat.run_id}.log",
            )
        elif beat.window or beat.engine is not None:
            yield healthy(check, _load(beat))
    if context.settings.engine is not EngineKind.REMOTE:
        yield healthy("engine", "checked for each run" if beats else "no run needs one")


def _restarts(beat: Heartbeat, context: CheckContext) -> int:
    """Count recent restarts of the run and of its batch's runs: each may have had only a few."""
    accounts = read_accounts(context.folder, beat.batch_id) if beat.batch_id else ()
    before = sum(
        account.engine_restarts
        for account in accounts
        if account.run_id != beat.run_id and context.now - account.updated_at < RESTARTS_SECONDS
    )
    return beat.restarts + int(before)


def _load(beat: Heartbeat) -> str:
    metrics = beat.engine
    parts = [f"{beat.in_flight} in flight of {beat.window}"]
    if metrics is not None and metrics.waiting is not None:
        parts.append(f"{metrics.waiting} waiting in the engine")
    if metrics is not None and metrics.kv_usage is not None:
        parts.append(f"KV cache {metrics.kv_usage:.0%}")
    return ", ".join(parts)


def _remote(settings: Settings) -> Finding:
    base = settings.base_url.rstrip("/").removesuffix("/v1")
    address = f"{base}/health"
    try:
        status = _status(settings, address)
        if status in _NO_SUCH_PAGE:
            address = f"{base}/v1/models"
            status = _status(settings, address)
    except (OSError, HTTPException) as error:
        return unhealthy("engine", f"{address} does not answer: {error}", f"curl -i {address}")
    except ValueError:  # its message may contain the key
        return unhealthy("engine", f"{address}, or its key, cannot be used", f"curl -i {address}")
    answer = f"{address} answers {status}"
    if status in (401, 403):
        return unhealthy("engine", f"{answer}: the key was refused", "set BATCH_API_KEY")
    if status == 429:
        return degraded("engine", f"{answer}: too many requests", f"curl -i {address}")
    if 200 <= status < 300:
        return healthy("engine", answer)
    return unhealthy("engine", answer, f"curl -i {address}")


def _status(settings: Settings, address: str) -> int:
    request = urllib.request.Request(address)
    if key := settings.api_key.get_secret_value():
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with _opener.open(request, timeout=REMOTE_SECONDS) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
