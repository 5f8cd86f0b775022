"""200 submissions on a fake clock: limits are kept, nothing starves, deadlines are kept."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_orchestration.queue.demand import Limits
from batch_orchestration.queue.entries import QueueEntry
from batch_orchestration.queue.rate_limits import Rate, SourceRates
from batch_orchestration_tests.support.queue_simulation import (
    AGEING_SECONDS,
    REQUESTS_PER_SECOND,
    START,
    History,
    Simulation,
    by_the_rules,
    crowd,
    fair_share_alone,
    feasible,
    first_in_first_out,
    late_by_choice,
    make_job,
    priority_without_ageing,
    random_jobs,
    starvation_bound,
)

LIMITS = Limits(unfinished_batches=5, queued_requests=40_000, queued_tokens=15_000_000)
RATES = SourceRates(
    submissions=Rate(per_hour=60, burst=20), requests=Rate(per_hour=300_000, burst=60_000)
)
NO_LIMITS = Limits(unfinished_batches=10**6, queued_requests=10**12, queued_tokens=10**15)


def simulated(jobs, ordering=by_the_rules, *, limits=LIMITS, rates=RATES) -> History:
    return Simulation(jobs, ordering, limits=limits, rates=rates).run()


@pytest.fixture(scope="module")
def history() -> History:
    return simulated(random_jobs(1))


def starved(history: History) -> list[str]:
    """Who was passed over by somebody that arrived later than the bound allows."""
    served = [(quantum.served, quantum.waiting) for quantum in history.quanta]
    admitted = [(job, passed_over) for _, job, passed_over in history.admitted]
    return [
        other.id
        for chosen, others in [*served, *admitted]
        for other in others
        if chosen.arrived_at - other.arrived_at
        > starvation_bound(other.priority, chosen.priority, ageing_seconds=AGEING_SECONDS)
    ]


def made_late(history: History) -> set[str]:
    return {job_id for quantum in history.quanta for job_id in late_by_choice(quantum)}


def test_everybody_is_served_to_the_end(history: History) -> None:
    assert len(history.ended) == 200
    assert len(history.quanta) > 400, "the scenario is worth its name"


def test_no_limit_is_exceeded_at_any_instant(history: History) -> None:
    assert max(load.batches for load in history.loads) == LIMITS.unfinished_batches
    assert max(load.requests for load in history.loads) <= LIMITS.queued_requests
    assert max(load.tokens for load in history.loads) <= LIMITS.queued_tokens


def test_no_source_submits_more_than_its_rate_in_any_hour(history: History) -> None:
    by_source: dict[str, list[float]] = {}
    for at, job, _ in history.admitted:
        by_source.setdefault(job.source, []).append(at)
    for moments in by_source.values():
        for first in moments:
            within = sum(first <= moment < first + 3600 for moment in moments)
            assert within <= RATES.submissions.burst + RATES.submissions.per_hour


def test_nobody_is_passed_over_longer_than_the_bound_says(history: History) -> None:
    assert starved(history) == []


def test_no_quantum_makes_somebody_late_who_could_be_in_time(history: History) -> None:
    assert made_late(history) == set()


def test_priority_without_ageing_would_starve_somebody() -> None:
    """The negative control of the bound."""
    assert starved(simulated(random_jobs(1, 120), priority_without_ageing))


@pytest.mark.parametrize("ordering", [first_in_first_out, fair_share_alone])
def test_an_order_that_is_deaf_to_deadlines_would_miss_some(ordering) -> None:
    """The negative control of the deadlines."""
    jobs = crowd(1)

    assert made_late(simulated(jobs, ordering, limits=NO_LIMITS, rates=None))
    ours = simulated(jobs, limits=NO_LIMITS, rates=None)
    assert made_late(ours) == set()
    assert all(ours.ended[job.id] <= job.deadline for job in jobs)


def test_first_in_first_out_would_let_urgent_work_wait_for_old_work() -> None:
    """The negative control of the priorities: how long the urgent wait, in seconds."""
    jobs = [job for job in random_jobs(1, 80) if job.requests <= 1000 or job.priority < 10]

    def longest(ordering) -> float:
        ended = simulated(jobs, ordering, limits=NO_LIMITS, rates=None).ended
        return max(ended[job.id] - job.arrived_at for job in jobs if job.priority == 10)

    assert longest(by_the_rules) < longest(first_in_first_out) / 3


at_once = st.lists(
    st.builds(
        lambda number, source, requests, slack: make_job(
            f"job-{number}",
            source=source,
            requests=requests,
            deadline=START + requests / REQUESTS_PER_SECOND + slack,
        ),
        st.integers(0, 10**6),
        st.sampled_from("abc"),
        st.integers(1, 4000),
        st.integers(0, 59),
    ),
    min_size=1,
    max_size=5,
    unique_by=lambda job: job.id,
)


@settings(max_examples=60, deadline=None)
@given(at_once)
def test_where_some_order_keeps_every_deadline_ours_does(jobs: list[QueueEntry]) -> None:
    if not feasible(jobs):
        return

    # All deadlines lie within a minute: nobody gains a point on the others.
    ended = simulated(jobs, limits=NO_LIMITS, rates=None).ended

    assert all(ended[job.id] <= job.deadline + 1e-6 for job in jobs)
