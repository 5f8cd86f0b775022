"""Admission: strictly head first, and every reason with its numbers."""

from typing import Any

import pytest

from batch_orchestration.queue.capacity import Blocker, Load
from batch_orchestration.queue.decision import decide
from batch_orchestration.queue.demand import Limits
from batch_orchestration.queue.entries import EntryKind, EntryState, QueueEntry, WaitReason
from batch_orchestration.queue.rate_limits import Rate, SourceRates, SubmissionEvent

LIMITS = Limits(
    unfinished_batches=3, queued_requests=1000, queued_tokens=1_000_000, open_requests=500
)
TWO_AN_HOUR = SourceRates(submissions=Rate(per_hour=60, burst=2))
NOW = 1000.0


def entry(name: str, requests: int | None = 100, **fields: Any) -> QueueEntry:
    values: dict[str, Any] = {
        "kind": EntryKind.FILE,
        "id": name,
        "source": "inbox",
        "priority": 0,
        "state": EntryState.WAITING,
        "pending": requests,
        "tokens": requests and 10 * requests,
        "size_bytes": 100_000,
    }
    return QueueEntry(**{**values, **fields})


def decided(
    *queue: QueueEntry,
    load: Load | None = None,
    rates: SourceRates | None = None,
    gate: Blocker | None = None,
) -> tuple[QueueEntry, ...]:
    return decide(
        queue, load=load or Load(), rates=rates or SourceRates(), limits=LIMITS, gate=gate, now=NOW
    )


def reasons(entries: tuple[QueueEntry, ...]) -> list[str | None]:
    return [entry.reason for entry in entries]


def admissible(entries: tuple[QueueEntry, ...]) -> list[str]:
    return [entry.id for entry in entries if entry.admissible]


def test_the_files_that_fit_are_admitted_and_the_others_come_after_the_first_that_waits() -> None:
    entries = decided(*map(entry, "abcde"), load=Load(batches=1))

    assert admissible(entries) == ["a", "b"]
    assert reasons(entries) == [None, None, "queue_full", "queue_full", "queue_full"]
    assert "comes after c" in entries[3].detail


def test_no_file_overtakes_a_head_that_waits_for_capacity() -> None:
    """Small files could take the capacity of a large one without end."""
    entries = decided(entry("large", 500), entry("small", 1), load=Load(requests=600))

    assert reasons(entries) == ["requests_queued", "requests_queued"]


@pytest.mark.parametrize("reason", [WaitReason.PAUSED, WaitReason.GPU_UNHEALTHY])
def test_a_gate_holds_up_every_entry_that_is_not_running(reason: WaitReason) -> None:
    entries = decided(
        entry("running", kind=EntryKind.BATCH, state=EntryState.RUNNING),
        entry("admitted", kind=EntryKind.BATCH, state=EntryState.ADMITTED),
        entry("file"),
        gate=Blocker(reason, "because"),
    )

    assert reasons(entries) == [None, reason, reason]


def test_an_entry_with_a_reason_of_its_own_keeps_it_and_holds_up_no_other() -> None:
    growing = entry("growing", None, reason=WaitReason.SETTLING, detail="changed 1 s ago")

    entries = decided(growing, entry("a"))

    assert entries[0] == growing
    assert admissible(entries) == ["a"]


def test_a_source_above_its_rate_holds_up_only_itself() -> None:
    events = tuple(SubmissionEvent("alice", NOW, 1) for _ in range(2))
    rates = SourceRates(submissions=TWO_AN_HOUR.submissions, events=events)

    entries = decided(entry("a", source="alice"), entry("b", source="bob"), rates=rates)

    assert reasons(entries) == ["submission_rate", None]
    assert "in 60 s" in entries[0].detail


def test_the_files_admitted_by_one_decision_count_against_the_rate() -> None:
    entries = decided(*map(entry, "abc"), rates=TWO_AN_HOUR)

    assert reasons(entries) == [None, None, "submission_rate"]


def test_a_file_that_was_not_read_is_admitted_if_it_is_the_first() -> None:
    assert admissible(decided(entry("a", None), load=Load(requests=1000))) == ["a"]


def test_behind_a_file_that_was_not_read_only_a_file_that_fits_in_any_case_is_admitted() -> None:
    """Otherwise it could take the capacity that the first one turns out to need."""
    queue = (entry("a", None), entry("b", 500), entry("c", 1))

    entries = decided(*queue, load=Load(requests=100))

    assert reasons(entries) == [None, "requests_queued", "requests_queued"]
    assert "guessed" in entries[1].detail
    assert admissible(decided(*queue)) == ["a", "b"]


@pytest.mark.parametrize("failing", [False, True])
def test_a_claimed_file_takes_capacity_unless_it_fails_and_is_not_claimed_again(
    failing: bool,
) -> None:
    reading = entry("a", None, claimed=True, failing=failing, detail="is being read")

    entries = decided(reading, entry("b", 500), load=Load(batches=1, requests=100))

    assert entries[0] == reading
    assert admissible(entries) == (["b"] if failing else [])


def test_a_long_file_counts_whole_against_the_rate_and_with_its_window_against_the_limits() -> None:
    long = entry("a", 250_000)
    rates = SourceRates(events=(SubmissionEvent("inbox", NOW, 1),))

    assert reasons(decided(long, rates=rates)) == ["submission_rate"]
    assert admissible(decided(long, load=Load(requests=500))) == ["a"]
