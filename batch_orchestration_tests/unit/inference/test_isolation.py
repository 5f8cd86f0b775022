"""Finding the requests that kill the engine: how many deaths it costs, and that it finds them."""

from math import ceil, log2

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_orchestration.inference.faults.isolation import Isolation, is_confirmation, to_confirm


def search(window: list[int], guilty: set[int]) -> tuple[list[int], int]:
    """Play the search after a death with this window; return the convicted and all deaths."""
    isolation: Isolation[int] = Isolation()
    isolation.split("w" if len(window) > 1 else to_confirm("w"), window)
    convicted, deaths = [], 1
    while isolation:
        label, group = isolation.next_group()
        if guilty.isdisjoint(group):
            continue
        deaths += 1
        if len(group) > 1:
            isolation.split(label, group)
        elif is_confirmation(label):
            convicted += group
        else:
            isolation.split(to_confirm(label), group)
    return convicted, deaths


@given(st.data(), st.integers(1, 600))
def test_the_guilty_are_found_within_the_promised_number_of_restarts(data, size: int) -> None:
    window = list(range(size))
    guilty = data.draw(st.sets(st.sampled_from(window), min_size=1, max_size=min(size, 9)))

    convicted, deaths = search(window, guilty)

    assert set(convicted) == guilty
    assert len(convicted) == len(guilty)
    assert deaths <= len(guilty) * (ceil(log2(size)) + 1) + 1


@given(st.lists(st.integers(), unique=True, min_size=1))
def test_an_innocent_window_is_tested_in_two_groups_and_nobody_is_lost(window: list[int]) -> None:
    isolation: Isolation[int] = Isolation()
    labels = isolation.split("w", window)

    groups = [isolation.next_group() for _ in range(min(2, len(window)))]

    assert sorted(member for _, group in groups for member in group) == sorted(window)
    assert all(labels[member] == label for label, group in groups for member in group)
    assert not isolation


def test_groups_that_come_back_from_a_journal_keep_their_label() -> None:
    isolation: Isolation[str] = Isolation()
    for label, suspect in [("a0", "x"), ("b1", "y"), ("a0", "z")]:
        isolation.add(label, suspect)

    assert len(isolation) == 3
    assert isolation.next_group() == ("a0", ["x", "z"])
    assert isolation.next_group() == ("b1", ["y"])


def test_with_no_group_left_there_is_no_next_one() -> None:
    with pytest.raises(IndexError):
        Isolation[int]().next_group()


def test_a_half_that_came_back_from_a_journal_meanwhile_is_joined_and_loses_nobody() -> None:
    """Suspects of one group can be in several chunks, whose journals are read one by one."""
    isolation: Isolation[str] = Isolation()
    isolation.add("a", "v")
    label, group = isolation.next_group()
    isolation.add("b", "w")
    isolation.add("a0", "x")

    isolation.split(label, [*group, "y"])

    assert len(isolation) == 4
    assert isolation.next_group() == ("a0", ["x", "v"])
    assert isolation.next_group() == ("a1", ["y"])
    assert isolation.next_group() == ("b", ["w"])
    assert not isolation


def test_an_engine_that_killed_itself_without_a_culprit_has_to_do_it_more_often() -> None:
    isolation: Isolation[str] = Isolation()
    isolation.split("a-", ["x", "y"])
    for label, _ in (isolation.next_group(), isolation.next_group()):
        isolation.note_answered(label)

    assert not isolation.is_certain("b-0000"), "the death of x and y was nobody's"
    assert isolation.is_certain("b-0000!")
    assert not isolation.is_certain("b-00!")
    assert isolation.is_certain("b-00!0!")


def test_innocent_neighbours_of_a_culprit_raise_no_doubt() -> None:
    isolation: Isolation[str] = Isolation()
    isolation.split("a-", ["x", "y"])
    guilty, innocent = isolation.next_group(), isolation.next_group()
    isolation.note_culprit(guilty[0])
    isolation.note_answered(innocent[0])

    assert isolation.is_certain("b-0000")
    assert isolation.is_certain("b-!")
