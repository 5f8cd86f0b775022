"""Chunk keys: what names a piece of a batch to Dagster."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_orchestration.core.batches import chunk_key, parse_chunk_key

BATCH_IDS = st.from_regex(r"[a-z0-9]+(-[a-z0-9]+)*", fullmatch=True)


@given(BATCH_IDS, st.integers(0, 99_999))
def test_a_chunk_key_gives_back_batch_and_number(batch_id: str, number: int) -> None:
    assert parse_chunk_key(chunk_key(batch_id, number)) == (batch_id, number)


@given(BATCH_IDS, st.integers(0, 99_999), st.integers(0, 99_999))
def test_chunk_keys_sort_in_file_order(batch_id: str, one: int, other: int) -> None:
    assert (chunk_key(batch_id, one) < chunk_key(batch_id, other)) == (one < other)


@pytest.mark.parametrize(
    "key",
    [
        "",
        "candidates",
        "candidates/",
        "candidates/1",
        "candidates/000001",
        "candidates/0000x",
        "candidates/00001\n",
        "/00001",
        "../00001",
        "a..b/00001",
        "a/b/00001",
        "candi dates/00001",
        "candidates...x/00001",
    ],
)
def test_a_key_that_was_not_made_here_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="not a chunk key"):
        parse_chunk_key(key)


def test_a_chunk_number_of_six_digits_is_refused() -> None:
    with pytest.raises(ValueError, match="not a chunk key"):
        chunk_key("candidates", 100_000)
