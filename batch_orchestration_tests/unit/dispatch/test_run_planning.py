"""Dispatch: which runs are asked for, and when a batch is left alone."""

from dataclasses import replace

import pytest

from batch_orchestration.core.batches import BatchOptions, BatchStatus
from batch_orchestration.core.results import BatchRecord, ChunkReport
from batch_orchestration.dispatch.run_planning import (
    BACKOFF_SECONDS,
    LONGEST_BACKOFF_SECONDS,
    MAX_FAILURES,
    MAX_NEW_RUNS,
    MAX_QUEUED_RUNS,
    UNFIT_SECONDS,
    KnownRun,
    RunState,
    backoff_left,
    dispatch,
)
from batch_orchestration_tests.support.builders import NOW

BATCH = "candidates-3f9a2c17"


def make_record(batch_id=BATCH, *, chunks=5, committed=0, priority=0, requests_per_chunk=1):
    return BatchRecord(
        batch_id=batch_id,
        file_name="candidates.jsonl",
        identity=batch_id,
        status=BatchStatus.IN_PROGRESS,
        total=chunks * requests_per_chunk,
        completed=committed,
        failed=0,
        chunks=chunks,
        requests_per_chunk=requests_per_chunk,
        chunks_committed=committed,
        prompt_tokens=0,
        completion_tokens=0,
        options=BatchOptions(priority=priority),
        settings_hash="",
        model="",
        times={"in_progress": NOW},
    )


def make_reports(numbers, *, at=NOW):
    return {
        number: ChunkReport(
            batch_id=BATCH,
            number=number,
            requests=1,
            completed=1,
            failed=0,
            prompt_tokens=0,
            completion_tokens=0,
            attempts=1,
            seconds=1.0,
            committed_at=at,
            run_id="run",
        )
        for number in numbers
    }


def make_run(chunks, state=RunState.FAILED, *, ended_at=NOW, **fields):
    numbers = None if chunks is None else range(*chunks)
    return KnownRun(
        run_id="0123456789",
        batch_id=BATCH,
        chunks=numbers,
        state=state,
        ended_at=ended_at,
        **fields,
    )


def decide(runs=(), *, chunks=5, committed=(), commits_at=NOW, per_run=200, now=NOW):
    record = make_record(chunks=chunks, committed=len(committed))
    reports = make_reports(committed, at=commits_at)
    return dispatch(
        [record],
        runs,
        reports=lambda _: reports,
        chunks_per_run=per_run,
        most_requests=1000,
        now=now,
    )


def ranges(verdict):
    return [
        needed.chunks and (needed.chunks.start, needed.chunks.stop) for needed in verdict.needed
    ]


def test_a_new_batch_is_cut_into_runs():
    assert ranges(decide(chunks=3, per_run=2)) == [(0, 2), (2, 3)]


@pytest.mark.parametrize(
    ("committed", "asked"),
    [
        ((), [(0, 4)]),
        ((0, 1, 3), [(2, 3)]),
        (range(4), [(4, 8)]),
        # Somebody has run a later one by hand; what is before it comes first all the same.
        ((0, 1, 2, 3, 9), [(4, 8)]),
        (range(8), [(8, 10)]),
        (range(10), [None]),
    ],
)
def test_a_long_batch_is_asked_for_window_by_window_in_file_order(committed, asked):
    """Of 10 chunks of 25 requests, 100 requests may be open at a time."""
    record = make_record(chunks=10, requests_per_chunk=25)
    reports = make_reports(committed)

    def decided(runs, **limits):
        limits = {"chunks_per_run": 200, "most_requests": 100, **limits}
        return dispatch([record], runs, reports=lambda _: reports, now=NOW, **limits)

    assert ranges(decided([])) == asked
    if asked != [None]:
        running = make_run(asked[0], RunState.LIVE)
        assert ranges(decided([running])) == [], "the next one begins when this one has ended"
        assert (
            ranges(decided([], chunks_per_run=1))
            == [(number, number + 1) for number in range(*asked[0])][:MAX_QUEUED_RUNS]
        )
    one_by_one = next((n for n in range(10) if n not in committed), None)
    least = [None] if one_by_one is None else [(one_by_one, one_by_one + 1)]
    assert ranges(decided([], most_requests=3)) == least, "at least one chunk is open"


def test_between_two_windows_whoever_is_more_urgent_goes_first():
    """A run that ends leaves nothing queued of its batch that would go before the newcomer."""
    long, urgent = make_record(chunks=10), make_record("urgent-00000001", chunks=2, priority=9)

    verdict = dispatch(
        [urgent, long],
        [make_run((0, 4), RunState.SUCCEEDED)],
        reports=lambda batch_id: make_reports(range(4)) if batch_id == BATCH else {},
        chunks_per_run=200,
        most_requests=4,
        now=NOW,
    )

    assert [(run.batch.batch_id, run.priority) for run in verdict.needed] == [
        ("urgent-00000001", 9),
        (BATCH, 0),
    ]
    assert ranges(verdict) == [(0, 2), (4, 8)]


def test_no_more_runs_wait_for_the_engine_than_are_useful():
    """What runs does not wait; what is queued does."""
    running = make_run((0, 1), RunState.LIVE)
    queued = make_run((1, 2), RunState.LIVE, queued=True)

    assert ranges(decide(chunks=100, per_run=1)) == [(0, 1), (1, 2)]
    assert ranges(decide([running, queued], chunks=100, per_run=1)) == [(2, 3)]
    assert ranges(decide([queued, queued], chunks=100, per_run=1)) == []


def test_an_urgent_batch_gets_its_run_however_many_others_are_queued():
    queued = [make_run((number, number + 1), RunState.LIVE, queued=True) for number in range(9)]
    urgent, big = make_record("urgent-00000001", chunks=9), make_record(chunks=100)

    verdict = dispatch(
        [urgent, big],
        queued,
        reports=lambda _: {},
        chunks_per_run=1,
        most_requests=1000,
        now=NOW,
        priorities={"urgent-00000001": 11},
    )

    assert [needed.batch.batch_id for needed in verdict.needed] == ["urgent-00000001"] * 2
    assert [needed.priority for needed in verdict.needed] == [11, 11]


def test_what_a_run_left_when_it_made_room_for_others_is_asked_for_at_once():
    """It succeeded; that chunks are missing is no failure, however often it happens."""
    made_room = [make_run((0, 5), RunState.SUCCEEDED, ended_at=NOW + n) for n in range(9)]

    assert ranges(decide(made_room, committed=[0, 1], now=NOW + 10)) == [(2, 5)]


def test_outputs_do_not_wait_behind_runs_that_wait_for_the_engine():
    records = [make_record(f"done-{number:08d}", chunks=1) for number in range(MAX_NEW_RUNS + 1)]
    queued = [make_run((0, 1), RunState.LIVE, queued=True)] * MAX_QUEUED_RUNS
    done = make_reports([0])

    verdict = dispatch(
        [make_record(chunks=9), *records],
        queued,
        reports=lambda batch_id: {} if batch_id == BATCH else done,
        chunks_per_run=1,
        most_requests=1000,
        now=NOW,
    )

    assert [needed.chunks for needed in verdict.needed] == [None] * MAX_NEW_RUNS


def test_a_run_has_no_gaps_and_keeps_to_the_grid_of_the_first_attempt():
    first = decide(chunks=9, committed=[0, 1, 5], per_run=4)
    live = [make_run((2, 4), RunState.LIVE), make_run((4, 5), RunState.LIVE)]

    assert ranges(first) == [(2, 4), (4, 5)]
    assert ranges(decide(live, chunks=9, committed=[0, 1, 5], per_run=4)) == [(6, 8), (8, 9)]


def test_what_a_live_run_is_about_is_not_asked_for_again():
    live = make_run((2, 4), RunState.LIVE)

    assert ranges(decide([live], chunks=5)) == [(0, 2), (4, 5)]


def test_the_output_is_asked_for_once_every_chunk_is_committed():
    assert ranges(decide(chunks=2, committed=[0, 1])) == [None]
    assert ranges(decide([make_run(None, RunState.LIVE)], chunks=2, committed=[0, 1])) == []


def test_a_live_run_over_committed_chunks_does_not_hold_up_the_output():
    live = make_run((0, 2), RunState.LIVE)

    assert ranges(decide([live], chunks=2, committed=[0, 1])) == [None]


def test_asking_twice_gives_the_same_key_and_an_ended_run_another():
    first, again = decide().needed[0], decide().needed[0]
    later = decide([make_run((0, 5))], now=NOW + 3600).needed[0]

    assert first.key == again.key == f"{BATCH}/00000-00004#0"
    assert later.key == f"{BATCH}/00000-00004#1"


def test_after_a_failure_the_next_attempt_waits_longer_each_time():
    once = decide([make_run((0, 5))], now=NOW + BACKOFF_SECONDS - 1)
    twice = [make_run((0, 5), ended_at=NOW - 100), make_run((0, 5))]

    assert not once.needed
    assert "next attempt in 1 s" in once.waiting[0]
    assert decide([make_run((0, 5))], now=NOW + BACKOFF_SECONDS).needed
    assert not decide(twice, now=NOW + BACKOFF_SECONDS).needed
    assert decide(twice, now=NOW + 2 * BACKOFF_SECONDS).needed


def test_the_wait_has_an_upper_bound():
    assert backoff_left(10_000, NOW, now=NOW) == LONGEST_BACKOFF_SECONDS


def test_a_batch_that_keeps_failing_waits_for_a_person():
    failures = [make_run((0, 5), ended_at=NOW + number) for number in range(MAX_FAILURES)]

    verdict = decide(failures, commits_at=0, now=NOW + 10**6)

    assert not verdict.needed
    assert "waits for a person" in verdict.waiting[0]
    assert "missing partitions of chunk_results" in verdict.waiting[0]


def test_failures_before_the_latest_commit_do_not_count():
    failures = [make_run((0, 5), ended_at=NOW - number) for number in range(1, MAX_FAILURES + 1)]

    assert ranges(decide(failures, committed=[0], commits_at=NOW)) == [(1, 5)]


def test_failures_of_the_output_do_not_count_against_chunks_nor_the_other_way_round():
    failed_output = [make_run(None, ended_at=NOW + 1) for _ in range(MAX_FAILURES)]

    assert decide(failed_output, chunks=2).needed
    assert not decide(failed_output, chunks=2, committed=[0, 1], now=NOW + 10**6).needed
    assert decide([make_run((0, 2), ended_at=NOW + 1)], chunks=2, committed=[0, 1]).needed


@pytest.mark.parametrize("later_failure", [0, -1])
def test_a_stopped_run_is_not_started_again(later_failure):
    stopped = make_run((0, 5), RunState.STOPPED, ended_at=NOW, reason="was terminated")
    earlier = make_run((0, 5), ended_at=NOW + later_failure - 1)

    verdict = decide([stopped, earlier], now=NOW + 10**6)

    assert not verdict.needed
    assert "was terminated" in verdict.waiting[0]


def test_stopping_one_run_leaves_the_others_of_its_batch_alone():
    stopped = make_run((0, 2), RunState.STOPPED, reason="was terminated")

    assert ranges(decide([stopped], chunks=4, per_run=2)) == [(2, 4)]


def test_a_window_whose_rest_waits_for_a_person_does_not_hold_back_the_next_ones():
    record = make_record(chunks=6)
    stopped = make_run((0, 2), RunState.STOPPED, reason="was terminated")

    def decided(*runs, committed=()):
        reports = make_reports(committed)
        return dispatch(
            [record],
            runs,
            reports=lambda _: reports,
            chunks_per_run=2,
            most_requests=2,
            now=NOW,
        )

    verdict = decided(stopped)
    assert ranges(verdict) == [(2, 4)]
    assert [need.run_id for need in verdict.needs] == [stopped.run_id]
    assert ranges(decided(stopped, make_run((2, 4), RunState.LIVE))) == []
    assert ranges(decided(stopped, committed=(1, 2, 3))) == [(4, 6)]
    verdict = decided(stopped, committed=(1, 2, 3, 4, 5))
    assert ranges(verdict) == [], "nothing is delivered while a chunk waits for a person"
    assert len(verdict.needs) == 1


def test_a_stopped_run_that_was_executed_again_no_longer_counts():
    stopped = make_run((0, 5), RunState.STOPPED, ended_at=NOW - 10)
    failed_since = replace(stopped, state=RunState.FAILED, ended_at=NOW)

    assert decide([stopped, failed_since], now=NOW + BACKOFF_SECONDS).needed


def test_batches_come_in_the_order_given():
    records = [make_record("b-00000001"), make_record("a-00000002")]

    verdict = dispatch(
        records, [], reports=lambda _: {}, chunks_per_run=200, most_requests=1000, now=NOW
    )

    assert [needed.batch.batch_id for needed in verdict.needed] == ["b-00000001", "a-00000002"]


def test_what_ended_before_the_last_commit_was_no_delivery():
    """It was to write partial files, and a person terminated it: that stops nothing."""
    stopped = make_run(None, RunState.STOPPED, ended_at=NOW - 1, reason="was terminated")
    later = replace(stopped, ended_at=NOW + 1)

    assert decide([stopped], chunks=2, committed=[0, 1], commits_at=NOW).needed
    assert not decide([later], chunks=2, committed=[0, 1], commits_at=NOW).needed


def test_an_unfit_device_is_tried_again_after_a_pause_however_often():
    unfit = [make_run((0, 5), RunState.UNFIT, ended_at=NOW - n) for n in range(9)]

    assert "found its device unfit" in decide(unfit, now=NOW + UNFIT_SECONDS - 1).waiting[0]
    assert ranges(decide(unfit, now=NOW + UNFIT_SECONDS)) == [(0, 5)]
