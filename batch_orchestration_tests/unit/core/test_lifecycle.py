from itertools import product

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_orchestration.core.batches import BatchOptions, BatchStatus
from batch_orchestration.core.errors import IllegalTransition
from batch_orchestration.core.lifecycle import (
    FINAL,
    LONGEST_WINDOW_SECONDS,
    RESUMABLE,
    TRANSITIONS,
    Resumption,
    check_transition,
    deadline,
    times_after,
    window_seconds,
)
from batch_orchestration_tests.support.builders import NOW, make_input, make_plan

#: Row: the status that is left. Column, in this order: the status that is wanted.
#: `x` legal, `.` illegal, `=` no change.
EVERY_PAIR = """
              validating failed in_progress finalizing completed expired cancelling cancelled
validating             =      x           x          .         .       .          .         x
failed                 .      =           .          .         .       .          .         .
in_progress            .      .           =          x         .       .          x         .
finalizing             .      .           .          =         x       x          x         .
completed              .      .           .          .         =       .          .         .
expired                .      .           x          .         .       =          .         .
cancelling             .      .           .          .         .       .          =         x
cancelled              .      .           x          .         .       .          .         =
"""


def every_pair() -> list[tuple[BatchStatus, BatchStatus, str]]:
    header, *lines = (line.split() for line in EVERY_PAIR.strip().splitlines())
    return [
        (BatchStatus(old), BatchStatus(new), mark)
        for old, *marks in lines
        for new, mark in zip(header, marks, strict=True)
    ]


def test_the_table_of_this_test_has_every_pair() -> None:
    pairs = [(old, new) for old, new, _ in every_pair()]

    assert sorted(pairs) == sorted(product(BatchStatus, repeat=2))


@pytest.mark.parametrize(("old", "new", "mark"), every_pair())
def test_each_pair_is_as_the_table_says(old: BatchStatus, new: BatchStatus, mark: str) -> None:
    assert (new in TRANSITIONS[old]) == (mark == "x")
    if mark == ".":
        with pytest.raises(IllegalTransition, match=f"{old} cannot become {new}"):
            check_transition(old, new)
    else:
        check_transition(old, new)


def test_only_what_can_be_resumed_leaves_a_final_status() -> None:
    assert {old for old in FINAL if TRANSITIONS[old]} == RESUMABLE


def test_every_status_can_be_reached() -> None:
    reached = {BatchStatus.VALIDATING}
    for _ in BatchStatus:
        reached |= {new for old in reached for new in TRANSITIONS[old]}

    assert reached == set(BatchStatus)


@given(st.lists(st.sampled_from(BatchStatus), max_size=25))
def test_times_are_those_of_the_last_way_into_each_status(wanted: list[BatchStatus]) -> None:
    """Any wishes: the legal ones happen, the others change nothing."""
    status, times = BatchStatus.VALIDATING, {"validating": NOW}
    history = [(BatchStatus.VALIDATING, NOW)]
    for second, new in enumerate(wanted, start=1):
        try:
            check_transition(status, new)
        except IllegalTransition:
            continue
        if new is not status:
            status, times = new, times_after(times, new, NOW + second)
            history.append((new, NOW + second))

    began = [place for place, (word, _) in enumerate(history) if word is BatchStatus.IN_PROGRESS]
    since_resumed = history[:1] + history[began[-1] :] if began else history
    assert times == {str(word): at for word, at in since_resumed}
    assert times[status] == history[-1][1] == max(times.values())
    assert list(times.values()) == sorted(times.values())


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("24h", 86400), ("7d", 604800), ("1h30m", 5400), ("1d1s", 86401)],
)
def test_a_window_may_be_any_duration(text: str, seconds: int) -> None:
    assert window_seconds(text) == seconds
    assert msgspec.convert({"completion_window": text}, BatchOptions).completion_window == text


@pytest.mark.parametrize(
    "text", ["", "24", "h", "0h", "-1h", "1.5h", "24 h", "1w", "1h30", "24h\n"]
)
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        window_seconds(text)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"completion_window": text}, BatchOptions)


def test_a_window_without_end_ends_in_a_hundred_years() -> None:
    assert window_seconds("999999999d") == LONGEST_WINDOW_SECONDS == window_seconds("36500d")


@given(st.lists(st.tuples(st.integers(1, 1000), st.sampled_from("smhd")), min_size=1, max_size=5))
def test_a_window_is_the_sum_of_its_parts(parts: list[tuple[int, str]]) -> None:
    whole = "".join(f"{number}{unit}" for number, unit in parts)

    assert window_seconds(whole) == sum(window_seconds(f"{n}{unit}") for n, unit in parts)


def test_a_batch_expires_its_window_after_admission_or_when_its_resumption_says() -> None:
    plan = make_plan(make_input(1), options=BatchOptions(completion_window="1h"))
    resumed = Resumption(at=NOW + 9000, actor="tester")
    with_window = Resumption(at=NOW + 9000, actor="tester", deadline=NOW + 9900)

    assert deadline(plan) == deadline(plan, resumed) == NOW + 3600
    assert deadline(plan, with_window) == NOW + 9900
