"""Reports of delivered batches: statistics, plots, and no harm to a delivery."""

import re
from pathlib import Path
from typing import Any

import pytest

from batch_orchestration.core.batches import BatchPlan, BatchStatus
from batch_orchestration.core.errors import StorageError
from batch_orchestration.delivery.assembly import assemble
from batch_orchestration.engines.metrics import EngineMetrics
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.gpu.facts import GpuFacts
from batch_orchestration.gpu.samples import RunSample, append_sample
from batch_orchestration.reports import gathering
from batch_orchestration.reports.statistics import (
    Latencies,
    read_latencies,
    read_outcomes,
    read_runs,
)
from batch_orchestration.store.store import Store
from batch_orchestration_tests.support.builders import (
    NOW,
    make_batch,
    make_completion,
    make_failure,
    make_provenance,
    make_settled,
)

REQUESTS, PER_CHUNK = 100, 10


@pytest.fixture
def folder(tmp_path: Path) -> DataFolder:
    return DataFolder(tmp_path / "data")


@pytest.fixture
def store(folder: DataFolder) -> Store:
    return Store(folder.duckdb, deadline_seconds=5)


def outcome(index: int) -> Any:
    """Request n takes n+1 hundredths of a second; one of ten fails, with hostile text."""
    if index % 10 == 3:
        return make_failure(message=f"<script>alert({index})</script> | ![x](http://evil.example)")
    return make_completion(latency_seconds=(index + 1) / 100)


def settle(folder: DataFolder, store: Store) -> BatchPlan:
    """A request a second; the first run is killed within chunk 4, which the second one commits."""
    plan = make_batch(folder, REQUESTS, requests_per_chunk=PER_CHUNK)
    store.add_batch(plan, at=NOW)
    for chunk in plan.chunks:
        settled = [
            make_settled(
                index,
                outcome(index),
                settled_at=NOW + 10 + index,
                provenance=make_provenance("first-run" if index < 45 else "second-run"),
            )
            for index in range(chunk.first_index, chunk.first_index + chunk.requests)
        ]
        run_id = "first-run" if chunk.number < 4 else "second-run"
        store.commit_chunk(
            plan.batch_id, chunk.number, settled, run_id=run_id, at=NOW + 200, seconds=10.0
        )
    return plan


def sample(folder: DataFolder, plan: BatchPlan) -> None:
    for second in range(0, 100, 5):
        gpu = GpuFacts(
            index=0, uuid="GPU-0", name="A", temperature_celsius=60, utilization_percent=9
        )
        taken = RunSample(
            at=NOW + 10 + second,
            run_id="first-run" if second < 45 else "second-run",
            in_flight=second,
            window=100,
            restarts=int(45 > second > 20),
            engine=EngineMetrics(kv_usage=0.5),
            gpus=(gpu,),
        )
        append_sample(folder, plan.batch_id, taken)


def deliver(folder: DataFolder, store: Store, plan: BatchPlan) -> dict[str, str]:
    assemble(plan.batch_id, folder=folder, store=store, clock=lambda: NOW + 300)
    outbox = folder.outbox_path(plan.batch_id)
    return {name: (outbox / name).read_text() for name in ("report.md", "report.html")}


def test_latencies_are_those_of_answered_requests(folder: DataFolder, store: Store) -> None:
    plan = settle(folder, store)

    found = read_latencies(store, plan.batch_id)

    answered = sorted((n + 1) / 100 for n in range(REQUESTS) if n % 10 != 3)
    middle = (answered[44] + answered[45]) / 2
    assert found == Latencies(
        answered=90,
        p50=pytest.approx(middle),
        p90=pytest.approx(0.90, abs=0.01),
        p95=pytest.approx(0.96, abs=0.01),
        p99=pytest.approx(0.99, abs=0.01),
        longest=1.0,
    )


def test_throughput_has_every_outcome_once(folder: DataFolder, store: Store) -> None:
    plan = settle(folder, store)

    found = read_outcomes(store, plan.batch_id, most=20)

    assert found is not None
    assert found.width_seconds == 5
    assert len(found.intervals) <= 20
    assert sum(interval.answered for interval in found.intervals) == 90
    assert sum(interval.failed for interval in found.intervals) == 10
    assert sum(interval.output_tokens for interval in found.intervals) == 90 * 3
    assert found.since == pytest.approx(NOW + 9.99)


def test_a_run_that_ended_before_its_chunks_is_shown(folder: DataFolder, store: Store) -> None:
    plan = settle(folder, store)

    first, second = read_runs(store, plan.batch_id)

    assert (first.run_id, first.outcomes, first.handed_on) == ("first-run", 45, 5)
    assert (second.run_id, second.outcomes, second.handed_on) == ("second-run", 55, 0)
    assert (second.first_at, second.last_at) == (NOW + 54.54, NOW + 109)


def test_a_batch_without_outcomes_has_no_statistics(folder: DataFolder, store: Store) -> None:
    plan = make_batch(folder, 3)
    store.add_batch(plan, at=NOW)

    assert read_latencies(store, plan.batch_id) is None
    assert read_outcomes(store, plan.batch_id, most=20) is None
    assert read_runs(store, plan.batch_id) == []


def test_the_timeline_reaches_from_admission_to_delivery(folder: DataFolder, store: Store) -> None:
    plan = settle(folder, store)
    sample(folder, plan)

    text = deliver(folder, store, plan)["report.md"]

    events = re.findall(r"^\| 20.*? \| \+(.*?) \| (.*?) \|$", text, re.MULTILINE)
    assert [event for _, event in events] == [
        "Admitted by admission: 100 requests, 0 of them faulty",
        "Run first-ru: first submission",
        "Run first-ru: first sample",
        "Run first-ru: engine restarted",
        "Run first-ru: last outcome; 45 in all, 5 of them failures. It ended before its chunks were"
        " complete: 5 of its outcomes were committed by a later run",
        "Run second-r: first submission",
        "Run second-r: first sample",
        "Run second-r: last outcome; 55 in all, 5 of them failures",
        "Ready for delivery: every request has an outcome",
    ]
    assert events[-1][0] == "5 min 0 s"
    assert "| 90 | 0.505 s |" in text


def test_the_pictures_are_in_both_files(folder: DataFolder, store: Store) -> None:
    plan = settle(folder, store)
    sample(folder, plan)

    files = deliver(folder, store, plan)

    named = re.findall(r"^!\[\w+\]\[(\w+)\]$", files["report.md"], re.MULTILINE)
    defined = re.findall(r"^\[(\w+)\]: (data:image/svg\S+)$", files["report.md"], re.MULTILINE)
    assert named == [name for name, _ in defined] == ["throughput", "engine", "gpu"]
    assert re.findall(r'src="([^"]+)"', files["report.html"]) == [uri for _, uri in defined]
    assert len(files["report.md"]) < 100_000


def test_foreign_text_is_text_in_both_files(folder: DataFolder, store: Store) -> None:
    plan = settle(folder, store)

    files = deliver(folder, store, plan)

    assert "<script" not in files["report.md"] + files["report.html"]
    assert "&lt;script>alert(3)" in files["report.md"]
    assert "&lt;script&gt;alert(3)" in files["report.html"]
    assert "](http" not in files["report.md"].replace("\\]", "")


def test_delivering_again_gives_the_same_bytes_though_samples_have_come(
    folder: DataFolder, store: Store
) -> None:
    plan = settle(folder, store)
    sample(folder, plan)
    first = deliver(folder, store, plan)
    late = RunSample(at=NOW + 110, run_id="second-run", in_flight=1, window=100)
    append_sample(folder, plan.batch_id, late)

    assert deliver(folder, store, plan) == first


def test_a_report_is_delivered_without_the_parts_that_cannot_be_drawn_or_read(
    folder: DataFolder, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(error: Exception) -> Any:
        def fail(*_: object, **__: object) -> None:
            raise error

        return fail

    for name, error in {
        "draw": ImportError("no module named matplotlib"),
        "read_samples": OSError(5, "Input/output error"),
        "read_latencies": StorageError("not now"),
        "read_runs": OSError(5, "Input/output error"),
    }.items():
        monkeypatch.setattr(gathering, name, failing(error))
    plan = settle(folder, store)

    files = deliver(folder, store, plan)

    assert store.batch(plan.batch_id).status is BatchStatus.COMPLETED
    assert "data:image" not in files["report.md"] + files["report.html"]
    assert "## Latency" not in files["report.md"]
    assert "## Timeline" in files["report.md"]
