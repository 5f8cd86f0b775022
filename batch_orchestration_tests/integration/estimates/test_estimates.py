"""Estimates from end to end, with the simulated engine: measured, estimated, run, scored."""

from contextlib import closing

import dagster as dg
import pytest

from batch_orchestration.defs.partitions import BATCH_TAG, range_tags
from batch_orchestration.estimates.batch_estimates import read_estimate
from batch_orchestration.estimates.estimate import Basis
from batch_orchestration.estimates.tables import EstimateTables
from batch_orchestration_tests.support.builders import make_body, make_line
from batch_orchestration_tests.support.deployment import Deployment

CALIBRATION = {"ops": {"measure_engine": {"config": {"requests": 12, "seconds": 20.0}}}}


@pytest.fixture
def deployment(tmp_path):
    with closing(Deployment(tmp_path, price_per_gpu_hour=36.0)) as deployed:
        yield deployed


def make_file(first=0, *, requests=20):
    return b"".join(
        make_line(n, body=make_body(f"question {n}", max_tokens=30))
        for n in range(first, first + requests)
    )


def calibrate(deployment):
    return deployment.run(dg.RunRequest(job_name="benchmark_engine"), run_config=CALIBRATION)


def complete(deployment, name, content):
    batch_id = deployment.admit(name, content)
    chunks = range(len(deployment.folder.read_plan(batch_id).chunks))
    tags = {BATCH_TAG: batch_id, **range_tags(batch_id, chunks)}
    assert deployment.run(dg.RunRequest(job_name="answer_chunks", tags=tags)).success
    delivery = dg.RunRequest(job_name="deliver_batch", partition_key=batch_id)
    assert deployment.run(delivery).success
    return batch_id


def report_of(deployment, batch_id):
    return (deployment.folder.outbox_path(batch_id) / "report.md").read_text()


def test_a_calibration_gives_the_first_batch_a_time_and_stores_engine_info(
    deployment,
):
    result = calibrate(deployment)

    (output,) = [e for e in result.all_events if e.event_type_value == "STEP_OUTPUT"]
    metadata = output.step_output_data.metadata
    assert "made up" in metadata["engine"].value
    batch_id = deployment.admit("a.jsonl", make_file())
    estimate = read_estimate(deployment.folder, batch_id)
    assert estimate.seconds.low < estimate.seconds.high
    assert estimate.price.mid == pytest.approx(estimate.seconds.mid / 100)
    assert estimate.start_seconds > 0
    _, rows = deployment.store.query("SELECT DISTINCT engine, source FROM benchmarks")
    assert rows == [("simulated", "calibration")]
    ((models, longest, start),) = deployment.store.query(
        "SELECT models, max_model_len, start_seconds FROM engine_facts"
    )[1]
    assert models == ["simulated-model"]
    assert longest == 8192
    assert start > 0


def test_without_a_measurement_only_the_time_is_unknown(deployment):
    batch_id = deployment.admit("a.jsonl", make_file())

    estimate = read_estimate(deployment.folder, batch_id)
    assert estimate.seconds is None
    assert estimate.basis is Basis.CHARACTERS
    assert estimate.tokens > 0
    assert deployment.store.query("SELECT count(*) FROM estimates")[1] == [(1,)]


def test_a_finished_batch_is_scored_and_used_for_the_next_estimate(deployment):
    calibrate(deployment)
    first = complete(deployment, "first.jsonl", make_file())
    report = report_of(deployment, first)

    second = complete(deployment, "second.jsonl", make_file(100, requests=40))

    again = dg.RunRequest(job_name="deliver_batch", partition_key=first)
    assert deployment.run(again).success
    assert "Over the last 1 batches up to this one" in report
    assert report_of(deployment, first) == report
    score = EstimateTables(deployment.store).score_of(first)
    learned = read_estimate(deployment.folder, second)
    assert score.actual_seconds > 0
    assert score.error is not None
    assert learned.basis is Basis.LEARNED
    assert learned.from_history == 1.0
    assert learned.measurements > read_estimate(deployment.folder, first).measurements
    # The simulated engine answers with 4 to 24 words; a prompt of n words has n + 3 tokens.
    assert learned.prompt_tokens.mid == pytest.approx(40 * 5, rel=0.2)
    assert 40 * 8 < learned.completion_tokens.mid < 40 * 20


def test_the_materialization_of_an_admitted_batch_has_its_estimate(deployment):
    calibrate(deployment)
    deployment.drop("a.jsonl", make_file())
    (request,) = deployment.requests("inbox_sensor")

    result = deployment.run(request)

    (event,) = [e for e in result.all_events if e.is_step_materialization]
    metadata = event.materialization.metadata
    assert metadata["expected_seconds"].value > 0
    assert metadata["expected_prompt_tokens"].value > 0
    assert "Expected time" in metadata["estimate"].value
