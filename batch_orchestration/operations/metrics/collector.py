"""Collects all metrics from the data folder alone, without Dagster, NVML or a run."""

import contextlib
import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from math import fsum, inf
from pathlib import Path
from wsgiref.simple_server import WSGIServer

from msgspec.structs import replace
from prometheus_client import CollectorRegistry, Metric, generate_latest, start_http_server
from prometheus_client.registry import Collector

from batch_orchestration import __version__
from batch_orchestration.core.lifecycle import FINAL
from batch_orchestration.core.results import LATENCY_BOUNDS, BatchRecord
from batch_orchestration.files.atomic import atomic_writer
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.state_file import StateFile
from batch_orchestration.gpu.facts import GpuFacts
from batch_orchestration.gpu.fences import read_fences
from batch_orchestration.operations.health.report import HealthReport
from batch_orchestration.operations.metrics.names import MetricPage
from batch_orchestration.operations.metrics.sources import (
    AccountsSource,
    StoreFigures,
    StoreSource,
)
from batch_orchestration.queue.entries import EntryState, QueueEntry
from batch_orchestration.queue.files import read_queue
from batch_orchestration.queue.pause import read_pause
from batch_orchestration.workers.heartbeat import Heartbeat, LastHeartbeat
from batch_orchestration.workers.heartbeat_files import read_last_heartbeats
from batch_orchestration.workers.progress import read_progress
from batch_orchestration.workers.utilization import Utilization

#: Most batches and runs with their own series.
MOST_NAMED = 25
#: Only the times of an older heartbeat are exported.
FRESH_SECONDS = 60.0
#: The parts of a run's wall time, with their fields in `TimeBreakdown`.
PARTS = {
    "start_up": "start_up_seconds",
    "busy": "busy_seconds",
    "feed_gap": "feed_gap_seconds",
    "held": "held_seconds",
    "drain": "drain_seconds",
    "commit": "commit_seconds",
}
#: Node exporter runs as another user.
_READABLE_BY_ALL = 0o644
logger = logging.getLogger(__name__)


class MetricsCollector(Collector):
    """Collects a page at each scrape; simultaneous scrapes take turns.

    Missing or damaged data has no series and does not affect other series. Nothing is raised, and
    nothing is written.

    Args:
        folder: The data folder, which need not exist.
    """

    def __init__(self, folder: DataFolder, *, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._clock = clock
        self._store = StoreSource(folder.duckdb)
        self._accounts = AccountsSource(folder)
        self._turn = threading.Lock()
        #: By the name of the source; each puts its series on the page, in this order.
        self._sources: dict[str, Callable[[MetricPage], None]] = {
            "accounts": self._put_accounts,
            "store": self._put_store,
            "queue": lambda page: _put_queue(page, folder, self._store.figures),
            "workers": lambda page: _put_workers(page, folder, clock()),
            "fences": lambda page: _put_fences(page, folder),
            "health": lambda page: _put_health(page, folder),
        }
        self._broken: set[str] = set()

    def collect(self) -> Iterable[Metric]:
        """Return every metric that has series now."""
        with self._turn:
            began, page = time.monotonic(), MetricPage()
            self._put_all(page)
            page.put("scrape_duration_seconds", time.monotonic() - began)
            return page.families()

    def _put_all(self, page: MetricPage) -> None:
        page.put("build_info", 1, version=__version__)
        for source, put in self._sources.items():
            try:
                put(page)
                self._broken.discard(source)
            except Exception as error:  # noqa: BLE001 - it costs its own series, not the page
                if source not in self._broken:
                    self._broken.add(source)
                    logger.warning("series of %s are missing: %r", source, error)
            page.put("source_up", int(source not in self._broken), source=source)

    def _put_store(self, page: MetricPage) -> None:
        self._store.refresh()
        page.put("store_up", int(self._store.is_up))
        page.put("store_read_timestamp_seconds", self._store.read_at)
        if (figures := self._store.figures) is not None:
            _put_totals(page, figures)
            _put_batches(page, figures, self._accounts, self._folder)

    def _put_accounts(self, page: MetricPage) -> None:
        self._accounts.refresh()
        every = list(self._accounts.all())
        for part, field in PARTS.items():
            spent = fsum(getattr(account, field) for account in every)
            page.put("run_seconds_total", spent, part=part)
        page.put("engine_restarts_total", fsum(account.engine_restarts for account in every))


def _put_totals(page: MetricPage, figures: StoreFigures) -> None:
    """Add the totals over all batches in the store."""
    page.put("requests_total", figures.completed, state="completed")
    page.put("requests_total", sum(figures.failures_by_code.values()), state="failed")
    for code, count in figures.failures_by_code.items():
        page.put("failures_total", count, code=code)
    page.put("request_attempts_total", figures.attempts)
    page.put("prompt_tokens_total", figures.prompt_tokens)
    page.put("completion_tokens_total", figures.completion_tokens)
    page.put("commits_total", figures.committed_chunks)
    page.put_histogram(
        "request_latency_seconds", LATENCY_BOUNDS, figures.latency_counts, figures.latency_seconds
    )
    for (code, state), count in figures.dead_letters.items():
        page.put("dead_letters", count, code=code, state=state)
    for status, count in figures.batches_by_status.items():
        page.put("batches", count, status=status)


def _put_batches(
    page: MetricPage, figures: StoreFigures, accounts: AccountsSource, folder: DataFolder
) -> None:
    """Add the batches with their own series, and the pending requests of all batches."""
    pending = 0
    for place, batch in enumerate((*figures.unfinished, *figures.finished)):
        completed, failed = _outcomes(batch, folder)
        pending += 0 if batch.status in FINAL else batch.total - completed - failed
        if place < MOST_NAMED:
            left = batch.total - completed - failed
            for state, count in (("completed", completed), ("failed", failed), ("pending", left)):
                page.put("batch_requests", count, batch=batch.batch_id, state=state)
            if (share := Utilization.of(accounts.of(batch.batch_id))) is not None:
                page.put("batch_utilization_ratio", share.fraction, batch=batch.batch_id)
    page.put("requests_pending", pending)


def _outcomes(batch: BatchRecord, folder: DataFolder) -> tuple[int, int]:
    """Return the committed counts, or those of the batch's run if they are further."""
    if batch.status not in FINAL:
        progress = read_progress(folder.progress_path(batch.batch_id))
        if progress is not None and progress.completed + progress.failed > (
            batch.completed + batch.failed
        ):
            return progress.completed, progress.failed
    return batch.completed, batch.failed


def _put_queue(page: MetricPage, folder: DataFolder, figures: StoreFigures | None) -> None:
    """Add the length of the queue and the arrival of its oldest entry, by state and reason."""
    page.put("queue_paused", int(read_pause(folder) is not None))
    if (view := read_queue(folder)) is None:
        return
    page.put("queue_timestamp_seconds", view.at)
    created_at = {b.batch_id: b.created_at for b in figures.unfinished} if figures else {}
    groups: dict[tuple[str, str], list[QueueEntry]] = defaultdict(list)
    groups.update({(str(state), "none"): [] for state in EntryState})
    for entry in view.entries:
        groups[str(entry.state), str(entry.reason or "none")].append(entry)
    for (state, reason), entries in groups.items():
        page.put("queue_entries", len(entries), state=state, reason=reason)
        since = [at for entry in entries if (at := _since(entry, folder, created_at)) is not None]
        oldest = min(since, default=None)
        page.put("queue_oldest_entry_timestamp_seconds", oldest, state=state, reason=reason)


def _since(entry: QueueEntry, folder: DataFolder, created_at: dict[str, float]) -> float | None:
    """Return the time at which an entry arrived; None if unknown."""
    if entry.batch_id is not None:
        return created_at.get(entry.batch_id)
    with contextlib.suppress(OSError):
        return (folder.inbox / entry.id).stat().st_mtime
    return None


def _put_workers(page: MetricPage, folder: DataFolder, now: float) -> None:
    """Add the runs with their engines and devices, from heartbeats, the newest first."""
    newest = sorted(read_last_heartbeats(folder).values(), key=lambda last: -last.at)
    fresh = []
    for beat in [beat for last in newest if (beat := _heartbeat(last)) is not None][:MOST_NAMED]:
        run = {"run_id": beat.run_id, "dagster_job": beat.job}
        page.put("worker_heartbeat_timestamp_seconds", beat.at, **run)
        page.put("worker_progress_timestamp_seconds", beat.progress_at, **run)
        page.put("worker_patience_seconds", beat.patience_seconds, **run)
        if now - beat.at <= FRESH_SECONDS:
            fresh.append(beat)
            page.put("worker_info", 1, phase=beat.phase, batch=beat.batch_id or "", **run)
            _put_engine(page, beat)
    page.put("requests_in_flight", sum(beat.in_flight for beat in fresh))
    page.put("window_requests", sum(beat.window for beat in fresh))
    page.put("requests_per_second", fsum(beat.requests_per_second for beat in fresh))
    page.put("completion_tokens_per_second", fsum(beat.output_tokens_per_second for beat in fresh))
    devices = [device for beat in reversed(fresh) for device in beat.gpus]
    for device in {device.uuid: device for device in devices}.values():
        _put_device(page, device)


def _heartbeat(last: LastHeartbeat) -> Heartbeat | None:
    """Return a worker's last heartbeat; of an outdated one, the progress is unknown."""
    beat = last.heartbeat
    if beat is None:
        return None
    return replace(
        beat, at=last.at, patience_seconds=inf if last.outdated else beat.patience_seconds
    )


def _put_engine(page: MetricPage, beat: Heartbeat) -> None:
    engine, run_id = beat.engine, beat.run_id
    if engine is None:
        return
    page.put("engine_requests_running", engine.running, run_id=run_id)
    page.put("engine_requests_waiting", engine.waiting, run_id=run_id)
    page.put("engine_kv_cache_usage_ratio", engine.kv_usage, run_id=run_id)
    page.put("engine_kv_cache_tokens", engine.kv_cache_tokens, run_id=run_id)
    page.put("engine_preemptions_total", engine.preemptions, run_id=run_id)
    page.put("engine_prompt_tokens_total", engine.prompt_tokens, run_id=run_id)
    page.put("engine_generation_tokens_total", engine.generation_tokens, run_id=run_id)
    page.put("engine_prefix_cache_queries_total", engine.prefix_queries, run_id=run_id)
    page.put("engine_prefix_cache_hits_total", engine.prefix_hits, run_id=run_id)


def _put_device(page: MetricPage, device: GpuFacts) -> None:
    names = {"gpu": str(device.index), "uuid": device.uuid}
    used, clock = device.utilization_percent, device.sm_clock_mhz
    page.put("gpu_info", 1, name=device.name, **names)
    page.put("gpu_memory_used_bytes", device.memory_used_bytes, **names)
    page.put("gpu_memory_total_bytes", device.memory_total_bytes, **names)
    page.put("gpu_temperature_celsius", device.temperature_celsius, **names)
    page.put("gpu_slowdown_temperature_celsius", device.slowdown_celsius, **names)
    page.put("gpu_utilization_ratio", None if used is None else used / 100, **names)
    page.put("gpu_power_watts", device.power_watts, **names)
    page.put("gpu_sm_clock_hertz", None if clock is None else clock * 1e6, **names)
    page.put("gpu_ecc_uncorrectable_errors", device.ecc_uncorrectable_errors, **names)
    for reason in device.throttle_reasons or ():
        page.put("gpu_throttle", 1, reason=reason, **names)


def _put_fences(page: MetricPage, folder: DataFolder) -> None:
    for uuid in read_fences(folder):
        page.put("gpu_fenced", 1, uuid=uuid)


def _put_health(page: MetricPage, folder: DataFolder) -> None:
    """Add the last health report; the checks of all runs, or of all devices, count as one."""
    if (report := StateFile(folder.health, HealthReport).read()) is None:
        return
    page.put("health_timestamp_seconds", report.at)
    page.put("health_level", report.level)
    levels: dict[str, int] = {}
    for finding in report.findings:
        check = finding.check.partition(":")[0]
        levels[check] = max(finding.level, levels.get(check, finding.level))
    for check, level in levels.items():
        page.put("health_check_level", level, check=check)


def metrics_text(folder: DataFolder) -> bytes:
    """Return one page in Prometheus's text format."""
    return generate_latest(_registry(folder))


def write_textfile(folder: DataFolder, path: Path) -> None:
    """Write a page for node exporter's textfile collector, atomically.

    Raises:
        StorageError: The page cannot be written; an existing one stays.
    """
    page = metrics_text(folder)
    with atomic_writer(path) as file:
        os.fchmod(file.fileno(), _READABLE_BY_ALL)
        file.write(page)


def serve_metrics(
    folder: DataFolder, *, host: str, port: int
) -> tuple[WSGIServer, threading.Thread]:
    """Start to answer scrapes, each with the present state; return server and thread.

    Raises:
        OSError: The address is taken or not ours.
    """
    return start_http_server(port, addr=host, registry=_registry(folder))


def _registry(folder: DataFolder) -> CollectorRegistry:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(MetricsCollector(folder))
    return registry
