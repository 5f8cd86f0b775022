"""What the documents, the dashboard and the alert rules say of metrics is what is exported."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from batch_orchestration.core.results import LATENCY_BOUNDS
from batch_orchestration.operations.metrics.collector import FRESH_SECONDS, MOST_NAMED, PARTS
from batch_orchestration.operations.metrics.names import BY_NAME, METRICS, PREFIX, MetricName
from batch_orchestration_tests.test_docs import table

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "metrics.md"
DASHBOARD = json.loads((DOCS / "grafana-dashboard.json").read_text())
#: Of PromQL.
WORDS = {
    *("sum", "min", "max", "by", "rate", "increase", "histogram_quantile", "time", "and", "le"),
    *("up", "job"),
}


def panels() -> Iterator[dict[str, Any]]:
    yield from (panel for panel in DASHBOARD["panels"] if panel["type"] != "row")


def queries() -> list[tuple[str, str, str]]:
    """Each query of the dashboard and of the alert rules: its name, itself, and its legend."""
    found = [
        (f"{panel['title']} {target['refId']}", target["expr"], target["legendFormat"])
        for panel in panels()
        for target in panel["targets"]
    ]
    rules = re.search(r"```yaml\n(groups:.*?)```", PAGE.read_text(), re.DOTALL)
    assert rules is not None
    for group in yaml.safe_load(rules[1])["groups"]:
        found += [(rule["alert"], rule["expr"], "") for rule in group["rules"]]
    return found


def type_of(metric: MetricName) -> str:
    return metric.new_family().type


def metric_of(series: str) -> MetricName:
    """The metric of a series that a query names."""
    name = series.removeprefix(PREFIX)
    parts = re.fullmatch(r"(.+)_(bucket|sum|count)", name)
    if parts and type_of(BY_NAME.get(parts[1], METRICS[0])) == "histogram":
        return BY_NAME[parts[1]]
    assert name in BY_NAME, f"there is no metric {series}"
    assert type_of(BY_NAME[name]) != "histogram", f"{series} has no series of that name"
    return BY_NAME[name]


@pytest.mark.parametrize(("name", "query", "legend"), queries(), ids=lambda text: text[:30])
def test_every_query_asks_for_what_is_exported(name: str, query: str, legend: str) -> None:
    """A typing mistake gives an empty panel, or an alert that never comes."""
    series = re.findall(rf"\b({PREFIX}\w+)", query)
    labels = {label for m in series for label in metric_of(m).labels} | {"le"}

    matched = {
        label for m in re.findall(r"\{(.*?)\}", query) for label in re.findall(r"(\w+)[=!]", m)
    }
    grouped = {word for m in re.findall(r"by \((.*?)\)", query) for word in re.findall(r"\w+", m)}
    shown = set(re.findall(r"\{\{(\w+)\}\}", legend))
    assert matched - {"job"} <= labels
    assert grouped <= labels
    assert shown <= (grouped if grouped else labels), "what is summed up has no such label any more"
    bare = re.sub(r'"[^"]*"|\[[^]]*\]|\b\d[\w.]*', "", query)
    assert set(re.findall(r"[a-zA-Z_]\w*", bare)) <= WORDS | labels | set(series)


@pytest.mark.parametrize(("name", "query", "legend"), queries(), ids=lambda text: text[:30])
def test_counters_are_asked_for_their_increase_and_nothing_else_is(
    name: str, query: str, legend: str
) -> None:
    for series in re.findall(rf"\b({PREFIX}\w+)", query):
        grows = type_of(metric_of(series)) in ("counter", "histogram")
        rated = re.search(rf"(rate|increase)\({series}\b(\{{[^}}]*\}})?\[", query) is not None
        assert grows == rated, series


def test_the_dashboard_shows_every_metric() -> None:
    shown = {
        metric_of(series).name
        for panel in panels()
        for target in panel["targets"]
        for series in re.findall(rf"\b({PREFIX}\w+)", target["expr"])
    }

    assert shown == BY_NAME.keys()


def test_the_dashboard_looks_at_every_side_and_its_panels_do_not_overlap() -> None:
    rows = {panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"}
    assert rows == {
        *("Overview", "Throughput", "Latency", "Queue", "Fraction of the engine kept"),
        *("Failures", "GPU", "Engine", "Health of the deployment"),
    }
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in panels())


def test_every_metric_is_documented_as_it_is_and_no_other() -> None:
    documented = [
        (name.strip("`"), kind, tuple(re.findall(r"`(\w+)`", labels)), meaning)
        for name, kind, labels, meaning in table(PAGE, "What each one means")
    ]

    assert documented == [(m.full_name, type_of(m), m.labels, m.help) for m in METRICS]


def test_the_page_knows_the_buckets_the_parts_and_the_limits() -> None:
    text = " ".join(PAGE.read_text().split())

    assert ", ".join(f"{bound:g}" for bound in LATENCY_BOUNDS) in text
    parts = [name.strip("`") for name, *_ in table(PAGE, "Utilization")]
    assert parts == list(PARTS)
    assert f"at most {MOST_NAMED} in all" in text
    assert f"silent for over {FRESH_SECONDS:.0f} s" in text
