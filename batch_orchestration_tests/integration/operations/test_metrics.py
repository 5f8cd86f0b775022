"""The page that Prometheus reads: its form, its values, and what it says in trouble."""

import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import duckdb
import pytest
from click.testing import CliRunner

from batch_orchestration.cli import main
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.operations.metrics import collector as metrics
from batch_orchestration.operations.metrics import sources as metric_sources
from batch_orchestration.operations.metrics.collector import (
    MetricsCollector,
    metrics_text,
    serve_metrics,
    write_textfile,
)
from batch_orchestration.operations.metrics.names import METRICS
from batch_orchestration.store.store import Store
from batch_orchestration.workers.utilization_files import account_path
from batch_orchestration_tests.support.builders import NOW
from batch_orchestration_tests.support.letter_bench import LetterBench
from batch_orchestration_tests.support.metrics_bench import (
    PREFIX,
    MetricsBench,
    entry,
    families,
    value,
    waiting_file,
)
from batch_orchestration_tests.support.scripted_engine import ScriptedEngine, StickingEngine
from batch_orchestration_tests.support.workbench import Workbench

STRANGER = """
import sys, time, duckdb
connection = duckdb.connect(sys.argv[1])
print("locked", flush=True)
time.sleep(60)
"""
#: What a name ends with says what it counts; see Prometheus's page "Metric and label naming".
UNITS = (
    *("_seconds", "_bytes", "_celsius", "_ratio", "_watts", "_hertz", "_tokens"),
    *("_info", "_total", "_per_second"),
)


@pytest.fixture
def bench(tmp_path: Path) -> MetricsBench:
    return MetricsBench(tmp_path)


@pytest.fixture(autouse=True)
def _reads_the_store_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metric_sources, "STORE_SECONDS", 0.0)


class Exporter:
    """One exporter that is scraped again and again."""

    def __init__(self, folder: DataFolder) -> None:
        self.folder = folder
        self._collector = MetricsCollector(folder)

    def value(self, name: str, **labels: str) -> float | None:
        """Scrape, and return one value."""
        for family in self._collector.collect():
            for sample in family.samples:
                if sample.name == PREFIX + name and sample.labels == labels:
                    return sample.value
        return None


# --- form -----------------------------------------------------------------------------------------


def test_every_metric_has_a_series_here_and_no_other_is_exported(bench: MetricsBench) -> None:
    exported = families(bench.page())

    assert set(exported) == {metric.full_name for metric in METRICS}
    for metric in METRICS:
        family = exported[metric.full_name]
        assert (family.type, family.documentation) == (metric.new_family().type, metric.help)
        labels = {label for sample in family.samples for label in sample.labels}
        assert labels - {"le"} == set(metric.labels)


def test_no_series_is_there_twice_and_names_keep_to_the_conventions(bench: MetricsBench) -> None:
    page = bench.page()

    series = [line.rpartition(" ")[0] for line in page.splitlines() if not line.startswith("#")]
    assert len(series) == len(set(series)) > len(METRICS)
    for metric in METRICS:
        assert re.fullmatch(r"[a-z][a-z0-9_]*[a-z]", metric.name)
        assert (metric.new_family().type == "counter") == metric.name.endswith("_total")
        assert metric.help.endswith(".")
        assert "_" + metric.new_family().type not in metric.name
        for label in metric.labels:
            assert label not in ("le", "quantile", "job", "instance"), "these are Prometheus's own"
        if re.search("second|byte|temperature|power|clock|usage|utilization|kept", metric.name):
            assert metric.name.endswith(UNITS), metric.name


def test_buckets_are_cumulative_and_end_with_all(bench: MetricsBench) -> None:
    samples = families(bench.page())[f"{PREFIX}request_latency_seconds"].samples

    buckets = [(s.labels["le"], s.value) for s in samples if s.name.endswith("_bucket")]
    counts = [count for _, count in buckets]
    assert counts == sorted(counts)
    assert buckets[0] == ("0.1", 0.0)
    assert dict(buckets)["0.25"] == 9.0, "a bound is within its bucket"
    assert buckets[-1] == ("+Inf", 9.0)
    assert [s.value for s in samples if s.name.endswith("_sum")] == [9 * 0.25]


# --- values ---------------------------------------------------------------------------------------


def test_the_page_says_what_is_in_the_data_folder(bench: MetricsBench) -> None:
    page = bench.page()

    batch = bench.plan.batch_id
    assert value(page, "requests_total", state="completed") == 9
    assert value(page, "requests_total", state="failed") == 1
    assert value(page, "failures_total", code="engine_refused") == 1
    assert value(page, "dead_letters", code="engine_refused", state="dead") == 1
    assert value(page, "requests_pending") == 10
    assert value(page, "batch_requests", batch=batch, state="pending") == 10
    assert value(page, "prompt_tokens_total") == 9 * 7
    assert value(page, "completion_tokens_total") == 9 * 3
    assert value(page, "commits_total") == 1
    assert value(page, "batch_utilization_ratio", batch=batch) == pytest.approx(0.8)
    assert value(page, "run_seconds_total", part="start_up") == 20
    assert value(page, "engine_restarts_total") == 1
    assert value(page, "queue_entries", state="waiting", reason="queue_full") == 1
    assert value(page, "queue_entries", state="running", reason="none") == 1
    since = "queue_oldest_entry_timestamp_seconds"
    assert value(page, since, state="running", reason="none") == NOW
    waits_since = value(page, since, state="waiting", reason="queue_full")
    assert waits_since == pytest.approx(time.time(), abs=60)
    assert value(page, "requests_in_flight") == 208
    assert value(page, "gpu_utilization_ratio", gpu="0", uuid="GPU-0") == 0.98
    assert value(page, "engine_kv_cache_usage_ratio", run_id="run-1") == 0.75
    assert value(page, "health_check_level", check="store") == 0
    assert value(page, "store_up") == 1


def test_a_worker_that_fell_silent_is_told_by_its_age_and_no_more(bench: MetricsBench) -> None:
    """What it had in flight when it was killed nobody has any more."""
    bench.beat(in_flight=208, window=256, at=bench.now - 300)

    page = bench.page()

    run = {"run_id": "run-1", "dagster_job": "answer_chunks"}
    assert value(page, "worker_heartbeat_timestamp_seconds", **run) == bench.now - 300
    assert value(page, "requests_in_flight") == 0
    assert f"{PREFIX}engine_requests_running" not in families(page)


def test_labels_stay_few_however_many_batches_and_runs_there_are(bench: MetricsBench) -> None:
    with duckdb.connect(bench.folder.duckdb) as db:
        for status in ("in_progress", "completed"):
            db.execute(
                "INSERT INTO batches SELECT batches.* REPLACE"
                f" (batch_id || i AS batch_id, '{status}' AS status) FROM batches, range(100) t(i)"
            )
    for number in range(100):
        bench.beat(f"run-{number}", at=bench.now - number)

    exported = families(bench.page())

    def labels(name: str, label: str) -> set[str]:
        return {sample.labels[label] for sample in exported[PREFIX + name].samples}

    assert len(labels("batch_requests", "batch")) == 25
    assert len(labels("worker_heartbeat_timestamp_seconds", "run_id")) == 25
    assert "custom_id" not in {label for metric in METRICS for label in metric.labels}


# --- counters -------------------------------------------------------------------------------------


def counters(bench: LetterBench | Workbench) -> dict[tuple[str, str], float]:
    """Every series of the page that must not fall."""
    return {
        (sample.name, str(sorted(sample.labels.items()))): sample.value
        for family in families(metrics_text(bench.folder).decode()).values()
        if family.type in ("counter", "histogram")
        for sample in family.samples
    }


def fallen(before: dict[tuple[str, str], float], after: dict[tuple[str, str], float]) -> object:
    return {series: value for series, value in before.items() if after.get(series, -1) < value}


def test_no_counter_falls_when_a_batch_is_resumed(tmp_path: Path) -> None:
    """The answers of the chunks that are asked again leave the store until they are committed."""
    bench = Workbench(tmp_path / "data")
    plan, engine = bench.admit_now(60), StickingEngine(answers=23)
    bench.run_until_stuck(plan, engine, lambda: bench.cancel(plan))
    bench.deliver(plan)
    before = counters(bench)

    bench.resume(plan)

    assert counters(bench) == before, "though each page is that of an exporter that began just now"
    before_finish = metrics_text(bench.folder).decode()
    assert value(before_finish, "request_latency_seconds_count") == 23
    assert value(before_finish, "requests_total", state="completed") == 23
    bench.finish(plan, ScriptedEngine())
    after = metrics_text(bench.folder).decode()
    assert fallen(before, counters(bench)) == {}
    assert value(after, "requests_total", state="completed") == 60, "each request once"
    assert value(after, "request_latency_seconds_count") == 60
    assert value(after, "commits_total") == 6
    assert value(after, "failures_total", code="batch_cancelled") == 37


def test_no_counter_falls_when_a_replay_answers_a_dead_letter(tmp_path: Path) -> None:
    bench = LetterBench(tmp_path, failing=(3, 7))
    before, counted = metrics_text(bench.folder).decode(), counters(bench)

    bench.replay(bench.ask().replays[0].number)

    after = metrics_text(bench.folder).decode()
    assert value(before, "requests_total", state="failed") == 2
    assert value(after, "requests_total", state="failed") == 2
    assert value(after, "dead_letters", code="engine_refused", state="resolved") == 2
    completed = value(before, "requests_total", state="completed")
    assert completed is not None
    assert value(after, "requests_total", state="completed") == completed + 2
    assert value(after, "request_latency_seconds_count") == completed + 2
    assert fallen(counted, counters(bench)) == {}


def test_a_torn_account_lowers_no_counter(bench: MetricsBench) -> None:
    bench.account("run-2")
    exporter, busy = Exporter(bench.folder), ("run_seconds_total", {"part": "busy"})
    assert exporter.value(busy[0], **busy[1]) == 160

    account_path(bench.folder, bench.plan.batch_id, "run-2").write_bytes(b"{")
    bench.account("run-3", busy_seconds=1.0)

    assert exporter.value(busy[0], **busy[1]) == 161
    restarted = bench.page()
    assert value(restarted, busy[0], **busy[1]) is None
    assert value(restarted, "source_up", source="accounts") == 0


def test_what_a_run_did_is_not_undone_when_its_batch_is_removed(bench: MetricsBench) -> None:
    exporter = Exporter(bench.folder)
    assert exporter.value("engine_restarts_total") == 1

    shutil.rmtree(bench.folder.batches)

    assert exporter.value("engine_restarts_total") == 1
    assert exporter.value("run_seconds_total", part="busy") == 80


# --- trouble --------------------------------------------------------------------------------------


def test_a_scrape_while_a_stranger_has_the_store_tells_what_was_known(bench: MetricsBench) -> None:
    exporter = Exporter(bench.folder)
    assert exporter.value("requests_pending") == 10
    bench.commit(1)
    command = [sys.executable, "-c", STRANGER, str(bench.folder.duckdb)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as stranger:
        assert stranger.stdout is not None
        stranger.stdout.readline()
        began = time.monotonic()

        up, completed = (
            exporter.value("store_up"),
            exporter.value("requests_total", state="completed"),
        )

        took = time.monotonic() - began
        stranger.kill()

    assert (up, completed) == (0, 9)
    assert took < 2 * metric_sources.LOCK_SECONDS + 60
    assert exporter.value("store_up") == 1
    assert exporter.value("requests_total", state="completed") == 19


def test_a_textfile_that_is_written_without_the_store_has_no_counter_rather_than_a_lower_one(
    bench: MetricsBench, tmp_path: Path
) -> None:
    """Prometheus bridges a gap; a counter that begins at 0 again is a spike."""
    path = tmp_path / "batch.prom"
    path.write_bytes(b"not a page \xff")
    bench.folder.duckdb.rename(tmp_path / "away")

    write_textfile(bench.folder, path)

    page = path.read_text()
    assert value(page, "store_up") == 0
    for name in ("requests_total", "commits_total", "request_latency_seconds"):
        assert PREFIX + name not in families(page)
    assert value(page, "requests_pending") is None, "of what is now, nothing is known"


def test_a_store_is_opened_only_if_it_has_changed_and_not_at_each_scrape(
    bench: MetricsBench, monkeypatch
) -> None:
    exporter = Exporter(bench.folder)
    exporter.value("store_up")
    monkeypatch.delattr(metric_sources, "read_figures")
    assert exporter.value("store_up") == 1

    monkeypatch.setattr(metric_sources, "STORE_SECONDS", 3600.0)
    bench.commit(1)

    assert exporter.value("requests_pending") == 10, "as of the last reading"
    assert exporter.value("store_up") == 1


def test_a_scrape_of_20_000_chunks_takes_less_than_a_second(bench: MetricsBench) -> None:
    with duckdb.connect(bench.folder.duckdb) as db:
        db.execute(
            "INSERT INTO chunks SELECT one.* REPLACE (i AS chunk)"
            " FROM (FROM chunks WHERE committed_at IS NOT NULL) one, range(1, 20_000) t(i)"
        )
    took = []
    for _ in range(3):
        began = time.process_time()
        page = bench.page()
        took.append(time.process_time() - began)

    assert min(took) < 1.0
    assert value(page, "request_latency_seconds_count") == 9 * 20_000


@pytest.mark.parametrize("left", ["nothing", "an empty folder", "no store"])
def test_a_folder_without_a_store_is_exported_and_none_is_made(
    bench: MetricsBench, tmp_path: Path, left: str
) -> None:
    folder = DataFolder(tmp_path / "elsewhere")
    if left == "an empty folder":
        folder.root.mkdir()
    elif left == "no store":
        folder.create()
    before = sorted(folder.root.rglob("*"))

    page = metrics_text(folder).decode()

    assert value(page, "store_up") == 0
    assert value(page, "requests_total", state="completed") is None
    assert sorted(folder.root.rglob("*")) == before
    assert folder.root.exists() == (left != "nothing")


@pytest.mark.parametrize("left", [b"{", b'{"batch_id": "\xff"}', b"\0" * 64])
def test_damaged_files_have_no_series_and_hide_no_others(bench: MetricsBench, left: bytes) -> None:
    for path in (
        bench.folder.queue,
        bench.folder.health,
        bench.folder.root / "heartbeats/run-1.json",
        bench.folder.progress_path(bench.plan.batch_id),
        *bench.folder.batches.glob("*/accounts/*.json"),
    ):
        path.write_bytes(left)

    page = bench.page()

    assert value(page, "health_level") is None
    assert value(page, "requests_pending") == 10
    assert value(page, "gpu_fenced", uuid="GPU-1") == 1
    for source in ("accounts", "queue", "health"):
        assert value(page, "source_up", source=source) == 0
    assert value(page, "run_seconds_total", part="busy") is None, "rather than a lower one"
    assert value(page, "source_up", source="store") == 1


def test_a_source_that_breaks_costs_its_own_series_only(bench: MetricsBench, monkeypatch) -> None:
    def broken(*_: object) -> None:
        raise RecursionError("a file that is nothing but brackets")

    monkeypatch.setattr(metrics, "read_last_heartbeats", broken)

    page = bench.page()

    assert value(page, "source_up", source="workers") == 0
    assert value(page, "requests_in_flight") is None
    assert value(page, "commits_total") == 1
    assert value(page, "health_check_level", check="store") == 0


@pytest.mark.parametrize("damage", ["nonsense", "another version"])
def test_a_store_that_cannot_be_read_is_not_up_and_stays_as_it_is(
    bench: MetricsBench, damage: str
) -> None:
    if damage == "nonsense":
        bench.folder.duckdb.write_bytes(b"nonsense" * 1_000)
    else:
        with duckdb.connect(bench.folder.duckdb) as db:
            db.execute("ALTER TABLE chunks RENAME TO portions")
    before = bench.folder.duckdb.read_bytes()

    assert value(bench.page(), "store_up") == 0
    assert bench.folder.duckdb.read_bytes() == before


# --- ways out -------------------------------------------------------------------------------------


def test_it_is_served_and_survives_a_folder_that_comes_and_goes(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path / "data")
    server, thread = serve_metrics(folder, host="127.0.0.1", port=0)

    def scrape() -> str:
        url = f"http://127.0.0.1:{server.server_port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain")
            return answer.read().decode()

    try:
        assert value(scrape(), "store_up") == 0
        MetricsBench(tmp_path)
        assert value(scrape(), "requests_pending") == 10
        shutil.rmtree(folder.root)
        assert value(scrape(), "store_up") == 0
        assert value(scrape(), "commits_total") == 1
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_the_textfile_appears_whole_and_for_everyone(bench: MetricsBench, tmp_path: Path) -> None:
    path = tmp_path / "textfiles" / "batch.prom"
    path.parent.mkdir()

    result = CliRunner().invoke(
        main, ["metrics", "--textfile", str(path)], env={"BATCH_DATA_DIR": str(bench.folder.root)}
    )

    assert result.exit_code == 0, result.output
    assert value(path.read_text(), "store_up") == 1
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o444 == 0o444


def test_a_port_that_is_taken_is_said_so(bench: MetricsBench) -> None:
    server, thread = serve_metrics(bench.folder, host="127.0.0.1", port=0)
    try:
        taken = str(server.server_port)
        result = CliRunner().invoke(main, ["metrics", "--serve", "--port", taken])
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

    assert result.exit_code == 1
    assert f"cannot serve on 127.0.0.1:{taken}" in result.output


def test_a_waiting_file_has_an_age_only_while_it_is_there(bench: MetricsBench) -> None:
    gone = entry("gone.jsonl", **waiting_file(reason=None))
    bench.tick(gone)

    page = bench.page()

    assert value(page, "queue_entries", state="waiting", reason="none") == 1
    since = "queue_oldest_entry_timestamp_seconds"
    assert value(page, since, state="waiting", reason="none") is None
    assert Store(bench.folder.duckdb).batch(bench.plan.batch_id).pending == 10
