"""The content of `report.md`."""

import pytest

from batch_orchestration.core.batches import BatchOptions, BatchStatus
from batch_orchestration.core.results import BatchRecord, BatchTotals, ChunkReport
from batch_orchestration.core.text import duration
from batch_orchestration.reports.rendering import CHUNKS_SHOWN, batch_report
from batch_orchestration_tests.support.builders import (
    NOW,
    make_failure,
    make_input,
    make_plan,
    make_provenance,
    make_settled,
)


def make_record(plan):
    return BatchRecord(
        batch_id=plan.batch_id,
        file_name=plan.file_name,
        identity=plan.identity,
        status=BatchStatus.IN_PROGRESS,
        total=plan.requests,
        completed=0,
        failed=0,
        chunks=len(plan.chunks),
        requests_per_chunk=10,
        chunks_committed=len(plan.chunks),
        prompt_tokens=0,
        completion_tokens=0,
        options=plan.options,
        settings_hash=plan.settings_hash,
        model="m",
        times={"in_progress": NOW},
    )


def make_report(number, *, seconds=4.0):
    return ChunkReport(
        batch_id="b",
        number=number,
        requests=10,
        completed=9,
        failed=1,
        prompt_tokens=70,
        completion_tokens=30,
        attempts=11,
        seconds=seconds,
        committed_at=NOW,
        run_id="r",
    )


def report_of(requests, *, chunks=1, options=None, **provenance):
    plan = make_plan(make_input(len(requests)), options=options)
    settings_hash = provenance.setdefault("settings_hash", plan.settings_hash)
    totals = BatchTotals()
    for request in requests:
        totals.count(request(make_provenance(**{**provenance, "settings_hash": settings_hash})))
    reports = {number: make_report(number, seconds=number) for number in range(chunks)}
    return batch_report(plan, make_record(plan), totals, reports, outbox="/data/outbox/b")


def answered(index):
    return lambda provenance: make_settled(index, provenance=provenance)


def failed(index, **fields):
    return lambda provenance: make_settled(index, make_failure(**fields), provenance=provenance)


def test_the_first_lines_have_the_totals():
    text = report_of([answered(0), answered(1), failed(2)], engine="vllm")

    assert text.splitlines()[2] == "2 of 3 requests answered, 1 failed."
    assert "Simulated engine" not in text


def test_answers_of_a_simulated_engine_are_marked():
    assert "**Simulated engine.**" in report_of([answered(0)], engine="simulated")


def test_failures_come_with_codes_examples_and_the_next_command():
    text = report_of([failed(4, message="a | b\n<script>")])

    assert "| `engine_refused` | 1 | request-4 | a \\| b &lt;script> |" in text
    assert "python -m batch_orchestration failures candidates-" in text


def test_engine_version_model_and_metadata_are_shown_and_no_failures_without_any():
    text = report_of(
        [answered(0)],
        options=BatchOptions(metadata={"team": "hiring"}),
        engine="vllm",
        engine_version="vllm 0.32.0",
        model="smollm2",
    )

    assert "| vllm | vllm 0.32.0 | smollm2 |" in text
    assert "| Metadata `team` | hiring |" in text
    assert "## Failures" not in text


def test_answers_under_other_settings_than_planned_are_marked():
    assert "the run was forced" in report_of([answered(0)], settings_hash="ffffffffffffffff")


def test_only_the_slowest_of_many_chunks_are_shown():
    text = report_of([answered(0)], chunks=CHUNKS_SHOWN + 5)

    assert f"The {CHUNKS_SHOWN} slowest" in text
    assert "| 00024 |" in text
    assert "| 00004 |" not in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (48.24, "48.2 s"),
        (59.96, "1 min 0 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
    ],
)
def test_durations_are_for_people(seconds, text):
    assert duration(seconds) == text
