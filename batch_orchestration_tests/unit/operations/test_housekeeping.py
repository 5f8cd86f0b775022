"""Which batches leave Dagster's key space."""

from hypothesis import given
from hypothesis import strategies as st

from batch_orchestration.operations.housekeeping.clean import batches_to_retire

KEYS = {"a": 40, "b": 30, "c": 20, "d": 10}
ENDED = {"c": 1.0, "a": 2.0, "b": 3.0}


def test_what_ended_long_ago_goes_whatever_room_there_is() -> None:
    assert batches_to_retire(KEYS, ENDED, before=2.5, most=None) == ["c", "a"]
    assert batches_to_retire(KEYS, ENDED, before=2.5, most=1000) == ["c", "a"]


def test_below_the_bound_nothing_goes_before_its_time() -> None:
    assert batches_to_retire(KEYS, ENDED, before=0.5, most=100) == []
    assert batches_to_retire(KEYS, ENDED, before=None, most=100) == []


def test_above_the_bound_the_first_that_ended_go_until_there_is_room() -> None:
    assert batches_to_retire(KEYS, ENDED, before=0.5, most=90) == ["c"]
    assert batches_to_retire(KEYS, ENDED, before=None, most=80) == ["c", "a"]


def test_what_has_not_ended_stays_although_there_is_no_room() -> None:
    assert batches_to_retire(KEYS, ENDED, before=None, most=1) == ["c", "a", "b"]


def test_an_ended_batch_without_keys_is_passed_over() -> None:
    assert batches_to_retire({"a": 1}, {"a": 1.0, "z": 0.0}, before=9.0, most=None) == ["a"]


names = st.text("abcdefgh", min_size=1, max_size=2)


@given(
    st.dictionaries(names, st.integers(0, 50)),
    st.dictionaries(names, st.floats(0, 100)),
    st.none() | st.floats(0, 100),
    st.none() | st.integers(1, 200),
)
def test_whatever_there_is_the_bound_holds_unless_all_that_may_go_has_gone(
    keys: dict[str, int], ended: dict[str, float], before: float | None, most: int | None
) -> None:
    retired = batches_to_retire(keys, ended, before=before, most=most)

    assert set(retired) <= keys.keys() & ended.keys()
    assert len(set(retired)) == len(retired)
    left = sum(count for name, count in keys.items() if name not in retired)
    assert most is None or left <= most or set(retired) == keys.keys() & ended.keys()
    kept = (ended.keys() & keys.keys()) - {*retired}
    assert before is None or all(ended[name] >= before for name in kept)
