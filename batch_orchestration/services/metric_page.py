"""One page of metrics: collects values under the names that there are, and lets no counter fall."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from batch_orchestration.services.metric_names import BY_NAME, METRICS, Kind, MetricName
from batch_orchestration.storage.regular import read_regular

#: Name of the series, and its labels.
Series = tuple[str, tuple[tuple[str, str], ...]]


class Floor:
    """What lasting counters have been: they are never less, and never gone.

    A resume removes answers from the store until they are committed anew, and Prometheus takes a
    counter that falls for one that has begun at 0: a spike of everything that ever happened.
    """

    def __init__(self) -> None:
        self._values: dict[Series, float] = {}

    def raise_to(self, series: Series, value: float) -> None:
        """Take note of a value; the highest one counts."""
        self._values[series] = max(value, self._values.get(series, value))

    def of(self, metric: MetricName) -> dict[Series, float]:
        """Return all series of a metric, at their highest."""
        names = _names_of_series(metric)
        return {series: value for series, value in self._values.items() if series[0] in names}

    def read(self, path: Path) -> None:
        """Take note of a page that was written before; one that cannot be read tells nothing."""
        lasting = [metric for metric in METRICS if metric.is_lasting]
        names = {name for metric in lasting for name in _names_of_series(metric)}
        try:
            families = list(text_string_to_metric_families(read_regular(path).decode()))
        except (OSError, ValueError, IndexError):
            # The last one is how the library says that a line ends too early.
            return
        for sample in (sample for family in families for sample in family.samples):
            if sample.name in names:
                self.raise_to((sample.name, tuple(sorted(sample.labels.items()))), sample.value)


class MetricPage:
    """The values of one scrape."""

    def __init__(self) -> None:
        self._values: dict[str, dict[Series, float]] = {metric.name: {} for metric in METRICS}

    def put(self, name: str, value: float | None, /, **labels: str) -> None:
        """Set a value; None is nothing. Labels are those of the metric, all of them.

        Raises:
            KeyError: There is no such metric, or it has other labels.
        """
        metric = BY_NAME[name]
        if set(labels) != set(metric.labels):
            raise KeyError(f"{name} has the labels {metric.labels}, not {sorted(labels)}")
        if value is not None:
            series = (metric.full_name, tuple(sorted(labels.items())))
            self._values[name][series] = value

    def put_histogram(
        self, name: str, bounds: Iterable[float], counts: Iterable[int], total: float
    ) -> None:
        """Set a histogram: how many are at most each bound, then all of them; and their sum."""
        full, values = BY_NAME[name].full_name, self._values[name]
        *bucket_counts, count = counts
        edges = [*map(_edge, bounds), "+Inf"]
        for edge, so_many in zip(edges, [*bucket_counts, count], strict=True):
            values[f"{full}_bucket", (("le", edge),)] = so_many
        values[f"{full}_count", ()] = count
        values[f"{full}_sum", ()] = total

    def metrics(self, floor: Floor) -> list[Metric]:
        """Return what there is to export; lasting counters are at least what they have been."""
        return [
            family
            for metric in METRICS
            if (family := _family(metric, self._lasting(metric, floor))).samples
        ]

    def _lasting(self, metric: MetricName, floor: Floor) -> Mapping[Series, float]:
        values = self._values[metric.name]
        if not metric.is_lasting:
            return values
        for series, value in values.items():
            floor.raise_to(series, value)
        return floor.of(metric)


def _family(metric: MetricName, values: Mapping[Series, float]) -> Metric:
    # The library adds the suffix of counters by itself.
    name = (
        metric.full_name.removesuffix("_total") if metric.kind is Kind.COUNTER else metric.full_name
    )
    family = Metric(name, metric.help, str(metric.kind))
    for (series, labels), value in sorted(values.items(), key=_in_order):
        family.add_sample(series, dict(labels), value)
    return family


def _in_order(item: tuple[Series, float]) -> tuple[str, float, tuple[tuple[str, str], ...]]:
    (name, labels), _ = item
    return name, float(dict(labels).get("le", 0)), labels


def _edge(bound: float) -> str:
    return str(float(bound))


def _names_of_series(metric: MetricName) -> set[str]:
    full = metric.full_name
    if metric.kind is Kind.HISTOGRAM:
        return {f"{full}_{part}" for part in ("bucket", "count", "sum")}
    return {full}
