"""Who may be admitted: strictly head first, and every reason with its numbers."""

import pytest

from batch_orchestration.queue.capacity import Blocker, Demand, Limits, Load
from batch_orchestration.queue.decision import Rules, Standing, decide
from batch_orchestration.queue.entries import EntryKind, EntryState, QueueEntry, WaitReason
from batch_orchestration.queue.rate_limits import Rate, RateLimits, SourceRates, SubmissionEvent

LIMITS = Limits(
    unfinished_batches=3, queued_requests=1000, queued_tokens=1_000_000, open_requests=500
)
RATES = SourceRates(limits=RateLimits())
NOW = 1000.0


def standing(
    name: str,
    requests: int | None = 100,
    *,
    kind: EntryKind = EntryKind.FILE,
    source: str = "inbox",
    state: EntryState = EntryState.WAITING,
    size_bytes: int = 100_000,
    **fields,
) -> Standing:
    return Standing(
        entry=QueueEntry(
            kind=kind, id=name, source=source, priority=0, effective_priority=0,
            state=state, place=0,
        ),
        demand=Demand(
            requests=requests, tokens=requests and 10 * requests, size_bytes=size_bytes
        ),
        **fields,
    )  # fmt: skip


def decided(*queue: Standing, load: Load | None = None, rates: SourceRates = RATES, gate=None):
    rules = Rules(limits=LIMITS, gate=gate)
    return decide(queue, load=load or Load(), rates=rates, rules=rules, now=NOW)


def reasons(decision) -> list[str | None]:
    return [entry.reason for entry in decision.entries]


def test_as_many_are_admitted_as_there_is_room_for_and_the_rest_comes_after_the_head():
    decision = decided(*(standing(name) for name in "abcde"), load=Load(batches=1))

    assert decision.admissible == ("a", "b")
    assert reasons(decision) == [None, None, "queue_full", "queue_full", "queue_full"]
    assert [entry.place for entry in decision.entries] == [1, 2, 3, 4, 5]
    assert "comes after c" in decision.entries[3].detail


def test_nobody_overtakes_a_head_that_waits_for_room():
    """Small ones would take the room of a large one for ever."""
    decision = decided(standing("large", 500), standing("small", 1), load=Load(requests=600))

    assert decision.admissible == ()
    assert reasons(decision) == ["requests_queued", "requests_queued"]


@pytest.mark.parametrize("reason", [WaitReason.PAUSED, WaitReason.GPU_UNHEALTHY])
def test_a_gate_holds_up_all_that_is_not_running(reason):
    decision = decided(
        standing("running", kind=EntryKind.BATCH, state=EntryState.RUNNING),
        standing("admitted", kind=EntryKind.BATCH, state=EntryState.ADMITTED),
        standing("file"),
        gate=Blocker(reason, "because"),
    )

    assert decision.admissible == ()
    assert reasons(decision) == [None, reason, reason]


def test_who_is_still_being_written_holds_up_nobody():
    decision = decided(standing("growing", None, settling="changed 1 s ago"), standing("a"))

    assert decision.admissible == ("a",)
    assert reasons(decision) == ["settling", None]


def test_a_source_that_submitted_too_much_holds_up_only_itself():
    events = tuple(SubmissionEvent("alice", NOW, 1) for _ in range(2))
    limits = RateLimits(submissions=Rate(per_hour=60, burst=2))
    decision = decided(
        standing("a", source="alice"),
        standing("b", source="bob"),
        rates=SourceRates(limits=limits, events=events),
    )

    assert decision.admissible == ("b",)
    assert reasons(decision) == ["submission_rate", None]
    assert "in 60 s" in decision.entries[0].detail


def test_what_is_admitted_in_one_decision_counts_against_the_rate():
    limits = RateLimits(submissions=Rate(per_hour=60, burst=2))

    decision = decided(*map(standing, "abc"), rates=SourceRates(limits=limits))

    assert decision.admissible == ("a", "b")
    assert reasons(decision)[2] == "submission_rate"


def test_a_file_that_nobody_has_read_goes_in_if_it_is_the_first_to_be_read():
    decision = decided(standing("a", None), load=Load(requests=1000))

    assert decision.admissible == ("a",)


def test_behind_a_file_that_nobody_has_read_only_what_fits_in_any_case_goes_in():
    """Else it might take what the one before it turns out to need."""
    queue = (standing("a", None), standing("b", 500), standing("c", 1))

    decision = decided(*queue, load=Load(requests=100))

    assert decision.admissible == ("a",)
    assert reasons(decision) == [None, "requests_queued", "requests_queued"]
    assert "guessed" in decision.entries[1].detail
    assert decided(*queue).admissible == ("a", "b")


def test_what_is_being_read_counts_and_is_not_asked_for_again():
    load = Load(batches=1, requests=100)

    decision = decided(standing("a", None, claimed=True), standing("b", 500), load=load)

    assert decision.admissible == ()
    assert reasons(decision) == [None, "requests_queued"]
    assert "being read" in decision.entries[0].detail
    assert decided(
        standing("a", claimed=True), standing("b"), load=Load(batches=2)
    ).entries[1].reason is WaitReason.QUEUE_FULL  # fmt: skip


def test_a_long_file_is_rated_by_all_of_it_and_asks_room_for_its_window():
    long = standing("a", 250_000)
    events = (SubmissionEvent("inbox", NOW, 1),)

    waits = decided(long, rates=SourceRates(limits=RateLimits(), events=events))
    goes = decided(long, load=Load(requests=500))

    assert reasons(waits) == ["submission_rate"]
    assert goes.admissible == ("a",)
