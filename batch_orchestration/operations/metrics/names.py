"""Every metric as in `docs/metrics.md`: name, type, labels and meaning; and a page of values."""

from collections.abc import Iterable
from dataclasses import dataclass

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

PREFIX = "batch_orchestration_"

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


@dataclass(frozen=True)
class MetricName:
    """One metric.

    Attributes:
        name: Without `PREFIX`.
        kind: The library's class for its type.
        help: One sentence, shown by Prometheus.
        labels: Of every series.
    """

    name: str
    kind: type[Family]
    help: str
    labels: tuple[str, ...] = ()

    @property
    def full_name(self) -> str:
        """The exported name; a histogram's series have suffixes."""
        return PREFIX + self.name

    def new_family(self) -> Family:
        """Return a family without series."""
        return self.kind(self.full_name, self.help, labels=self.labels)


def _counter(name: str, text: str, *labels: str) -> MetricName:
    return MetricName(name, CounterMetricFamily, text, labels)


def _of_engine(name: str, text: str) -> MetricName:
    return _counter(name, text, "run_id")


def _gauge(name: str, text: str, *labels: str) -> MetricName:
    return MetricName(name, GaugeMetricFamily, text, labels)


_GPU = ("gpu", "uuid")
_RUN = ("run_id", "dagster_job")

METRICS: tuple[MetricName, ...] = (
    # The exporter
    _gauge("build_info", "Always 1; the version of the exporter.", "version"),
    _gauge("store_up", "1 if the store could be read; 0 if its figures are the last known ones."),
    _gauge("store_read_timestamp_seconds", "Time of the last read of the store."),
    _gauge("source_up", "0 if a source is damaged: its series are missing.", "source"),
    _gauge("scrape_duration_seconds", "Time that this scrape took."),
    # Requests, from the store
    _counter("requests_total", "Committed outcomes, by state.", "state"),
    _counter("failures_total", "Failures that were final when they were committed.", "code"),
    _counter("request_attempts_total", "Submissions of the requests that have an outcome."),
    _counter("prompt_tokens_total", "Tokens read for committed answers."),
    _counter("completion_tokens_total", "Tokens written in committed answers."),
    _counter("commits_total", "Chunks that were committed, each once."),
    MetricName(
        "request_latency_seconds",
        HistogramMetricFamily,
        "Latency of committed answers at the engine.",
    ),
    _gauge("dead_letters", "Failed requests in the queue of dead letters.", "code", "state"),
    # Batches
    _gauge("batches", "Batches in the store.", "status"),
    _gauge("requests_pending", "Requests of unfinished batches that have no outcome yet."),
    _gauge("batch_requests", "Requests of unfinished and of the last batches.", "batch", "state"),
    _gauge(
        "batch_utilization_ratio", "Share of its runs' time in which the engine was full.", "batch"
    ),
    _counter("run_seconds_total", "Wall time of runs, by part.", "part"),
    _counter("engine_restarts_total", "Engines that died and were started again."),
    # The queue
    _gauge("queue_entries", "Entries of the queue, waiting or running.", "state", "reason"),
    _gauge(
        "queue_oldest_entry_timestamp_seconds",
        "Arrival of the oldest of these entries.",
        *("state", "reason"),
    ),
    _gauge("queue_paused", "1 while a person has paused the queue."),
    _gauge("queue_timestamp_seconds", "Time at which dispatch_sensor last wrote the queue."),
    # Runs at work, from their heartbeats
    _gauge("worker_info", "Always 1; the phase and the batch of a run.", *_RUN, "phase", "batch"),
    _gauge("worker_heartbeat_timestamp_seconds", "Time of a run's last heartbeat.", *_RUN),
    _gauge("worker_progress_timestamp_seconds", "Time of a run's last progress.", *_RUN),
    _gauge("worker_patience_seconds", "Time without progress that makes a run stuck.", *_RUN),
    _gauge("requests_in_flight", "Requests in flight."),
    _gauge("window_requests", "Requests that may be in flight."),
    _gauge("requests_per_second", "Outcomes per second over the last half minute."),
    _gauge("completion_tokens_per_second", "Tokens written per second, over the same time."),
    # Their engines
    _gauge("engine_requests_running", "Requests that the engine computes.", "run_id"),
    _gauge("engine_requests_waiting", "Requests that wait in the engine.", "run_id"),
    _gauge("engine_kv_cache_usage_ratio", "Share of the engine's KV cache in use.", "run_id"),
    _gauge("engine_kv_cache_tokens", "Capacity of the engine's KV cache.", "run_id"),
    _of_engine("engine_preemptions_total", "Requests preempted because the KV cache was full."),
    _of_engine("engine_prompt_tokens_total", "Tokens that the engine read."),
    _of_engine("engine_generation_tokens_total", "Tokens that the engine wrote."),
    _counter(
        "engine_prefix_cache_queries_total", "Tokens looked up in the prefix cache.", "run_id"
    ),
    _of_engine("engine_prefix_cache_hits_total", "Tokens found in the prefix cache."),
    # Their GPUs
    _gauge("gpu_info", "Always 1; the name of a device.", *_GPU, "name"),
    _gauge("gpu_memory_used_bytes", "Device memory in use, by all processes.", *_GPU),
    _gauge("gpu_memory_total_bytes", "Device memory in total.", *_GPU),
    _gauge("gpu_temperature_celsius", "Temperature.", *_GPU),
    _gauge(
        "gpu_slowdown_temperature_celsius",
        "Temperature at which it throttles itself.",
        *_GPU,
    ),
    _gauge("gpu_utilization_ratio", "Share of the time in which it computed anything.", *_GPU),
    _gauge("gpu_power_watts", "Power drawn.", *_GPU),
    _gauge("gpu_sm_clock_hertz", "Clock of the processors.", *_GPU),
    _gauge("gpu_ecc_uncorrectable_errors", "Memory errors since the driver was loaded.", *_GPU),
    _gauge("gpu_throttle", "1 for each reason why the device is throttled.", *_GPU, "reason"),
    _gauge("gpu_fenced", "1 for each device that is fenced after a fault.", "uuid"),
    # Health, from the health sensor
    _gauge("health_level", "0 healthy, 1 degraded, 2 unhealthy."),
    _gauge("health_check_level", "The same for each check, or the worst of its kind.", "check"),
    _gauge("health_timestamp_seconds", "Time of the last health report."),
)

BY_NAME = {metric.name: metric for metric in METRICS}


class MetricPage:
    """The values of one scrape."""

    def __init__(self) -> None:
        self._families = {metric.name: metric.new_family() for metric in METRICS}
        self._series: set[tuple[str, ...]] = set()

    def put(self, name: str, value: float | None, /, **labels: str) -> None:
        """Set the value of a series, which needs all labels; None and second values are ignored.

        Raises:
            KeyError: There is no such metric, or it has other labels.
        """
        metric, family = BY_NAME[name], self._families[name]
        if set(labels) != set(metric.labels) or isinstance(family, HistogramMetricFamily):
            raise KeyError(f"{name} has the labels {metric.labels}, not {sorted(labels)}")
        values = [labels[label] for label in metric.labels]
        # Prometheus rejects a page with a duplicate series.
        if value is not None and (series := (name, *values)) not in self._series:
            self._series.add(series)
            family.add_metric(values, value)

    def put_histogram(
        self, name: str, bounds: Iterable[float], counts: Iterable[int], total: float
    ) -> None:
        """Set a histogram: the cumulative count of each bound, the count of all, and the sum."""
        family = self._families[name]
        assert isinstance(family, HistogramMetricFamily)
        edges = [*(str(float(bound)) for bound in bounds), "+Inf"]
        family.add_metric([], list(zip(edges, counts, strict=True)), total)

    def families(self) -> list[Metric]:
        """Return the metrics that have series."""
        return [family for family in self._families.values() if family.samples]
