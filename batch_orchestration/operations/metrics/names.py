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
    _gauge("store_read_timestamp_seconds", "When the store was last read."),
    _gauge("source_up", "0 if a source is damaged: its series are missing.", "source"),
    _gauge("scrape_duration_seconds", "How long it took to gather all this."),
    # Requests, from the store
    _counter("requests_total", "Outcomes that were committed, by kind of outcome.", "state"),
    _counter("failures_total", "Failures that were final when they were committed.", "code"),
    _counter("request_attempts_total", "Submissions of the requests that have an outcome."),
    _counter("prompt_tokens_total", "Tokens read for committed answers."),
    _counter("completion_tokens_total", "Tokens written in committed answers."),
    _counter("commits_total", "Chunks that were committed, each once."),
    MetricName(
        "request_latency_seconds",
        HistogramMetricFamily,
        "How long the engine took for each committed answer.",
    ),
    _gauge("dead_letters", "Failed requests in the queue of dead letters.", "code", "state"),
    # Batches
    _gauge("batches", "Batches in the store.", "status"),
    _gauge("requests_pending", "Requests of unfinished batches that have no outcome yet."),
    _gauge("batch_requests", "Requests of unfinished and of the last batches.", "batch", "state"),
    _gauge(
        "batch_utilization_ratio", "Share of its runs' time in which the engine was full.", "batch"
    ),
    _counter("run_seconds_total", "Wall time of runs, by what it went into.", "part"),
    _counter("engine_restarts_total", "Engines that died and were started again."),
    # The queue
    _gauge("queue_entries", "What waits or is at work.", "state", "reason"),
    _gauge(
        "queue_oldest_entry_timestamp_seconds",
        "Since when the oldest of them is here.",
        *("state", "reason"),
    ),
    _gauge("queue_paused", "1 while a person has paused the queue."),
    _gauge("queue_timestamp_seconds", "When the dispatch sensor last wrote the queue."),
    # Runs at work, from their heartbeats
    _gauge("worker_info", "Always 1; what a run does.", *_RUN, "phase", "batch"),
    _gauge("worker_heartbeat_timestamp_seconds", "When a run last gave a sign of life.", *_RUN),
    _gauge("worker_progress_timestamp_seconds", "When its work last went on.", *_RUN),
    _gauge("worker_patience_seconds", "Without progress for so long it is stuck.", *_RUN),
    _gauge("requests_in_flight", "Requests that engines have now."),
    _gauge("window_requests", "How many requests they may have now."),
    _gauge("requests_per_second", "Outcomes per second over the last half minute."),
    _gauge("completion_tokens_per_second", "Tokens written per second, over the same time."),
    # Their engines
    _gauge("engine_requests_running", "Requests that the engine computes.", "run_id"),
    _gauge("engine_requests_waiting", "Requests that it has taken and lets wait.", "run_id"),
    _gauge("engine_kv_cache_usage_ratio", "Share of its KV cache in use.", "run_id"),
    _gauge("engine_kv_cache_tokens", "What its KV cache holds in all.", "run_id"),
    _of_engine("engine_preemptions_total", "Requests put back for want of KV cache."),
    _of_engine("engine_prompt_tokens_total", "Tokens that the engine read."),
    _of_engine("engine_generation_tokens_total", "Tokens that the engine wrote."),
    _counter(
        "engine_prefix_cache_queries_total", "Tokens looked up in the prefix cache.", "run_id"
    ),
    _of_engine("engine_prefix_cache_hits_total", "Tokens that were found there."),
    # Their GPUs
    _gauge("gpu_info", "Always 1; what a device is.", *_GPU, "name"),
    _gauge("gpu_memory_used_bytes", "Memory in use by anybody.", *_GPU),
    _gauge("gpu_memory_total_bytes", "Memory in all.", *_GPU),
    _gauge("gpu_temperature_celsius", "Temperature.", *_GPU),
    _gauge("gpu_slowdown_temperature_celsius", "At which the device slows itself down.", *_GPU),
    _gauge("gpu_utilization_ratio", "Share of the time in which anything was computed.", *_GPU),
    _gauge("gpu_power_watts", "Power drawn.", *_GPU),
    _gauge("gpu_sm_clock_hertz", "Clock of the processors.", *_GPU),
    _gauge("gpu_ecc_uncorrectable_errors", "Memory errors since the driver was loaded.", *_GPU),
    _gauge("gpu_throttle", "1 for each reason why its clock is held down.", *_GPU, "reason"),
    _gauge("gpu_fenced", "1 for each device that is fenced after a fault.", "uuid"),
    # Health, from the health sensor
    _gauge("health_level", "0 healthy, 1 degraded, 2 unhealthy."),
    _gauge("health_check_level", "The same of each check, the worst of its kind.", "check"),
    _gauge("health_timestamp_seconds", "When health was last looked at."),
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
