"""Identity and origin of a batch, its settings, and the keys of its chunks."""

import hashlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_orchestration.core.batches import (
    BatchOptions,
    batch_id,
    chunk_key,
    identity,
    parse_chunk_key,
    settings_difference,
    settings_hash,
    slug,
)


@pytest.mark.parametrize(
    ("file_name", "expected"),
    [
        ("candidates.jsonl", "candidates"),
        ("candidates.jsonl.gz", "candidates"),
        ("Candidates 2026 (final).JSONL", "candidates-2026-final"),
        ("../../etc/passwd.jsonl", "passwd"),
        (r"C:\users\anna\Bewerbungen.jsonl", "bewerbungen"),
        ("Übergröße.jsonl", "ubergroe"),
        ("日本.jsonl", "batch"),
        ("....jsonl", "batch"),
        ("x" * 200 + ".jsonl", "x" * 40),
    ],
)
def test_a_file_name_becomes_a_readable_slug(file_name: str, expected: str) -> None:
    assert slug(file_name) == expected


@given(st.text())
def test_any_file_name_makes_a_valid_chunk_key(file_name: str) -> None:
    key = chunk_key(batch_id(file_name, "3f9a2c17" * 8), 7)

    assert parse_chunk_key(key)[1] == 7


def test_the_same_content_with_the_same_options_is_the_same_batch() -> None:
    one = identity("ab" * 32, BatchOptions(metadata={"a": "1", "b": "2"}))
    other = identity("ab" * 32, BatchOptions(metadata={"b": "2", "a": "1"}))

    assert one == other


def test_options_that_came_later_leave_the_identity_of_older_batches_as_it_was() -> None:
    """Else a file that was answered before an upgrade would be answered once more after it."""
    said = b'{"completion_window":"24h","metadata":{},"model":null,"priority":0}'

    before = hashlib.sha256(b"ab" * 32 + said).hexdigest()

    assert identity("ab" * 32, BatchOptions()) == before


@pytest.mark.parametrize(
    "options",
    [
        BatchOptions(priority=1),
        BatchOptions(metadata={"run": "2"}),
        BatchOptions(completion_window="48h"),
        BatchOptions(model="other"),
        BatchOptions(user="alice"),
    ],
)
def test_other_options_make_another_batch(options: BatchOptions) -> None:
    assert identity("ab" * 32, options) != identity("ab" * 32, BatchOptions())


@pytest.mark.parametrize(
    "side_car",
    [
        b'{"priority": "high"}',
        b'{"priority": 100000}',
        b'{"metadata": {"a": 1}}',
        b'{"completion_window": "soon"}',
        b'{"prioritty": 1}',
        b'{"user": ""}',
        b'{"user": "a\\nb"}',
        msgspec.json.encode({"metadata": {str(n): "x" for n in range(17)}}),
    ],
)
def test_options_that_mean_nothing_are_refused(side_car: bytes) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(side_car, type=BatchOptions)


def test_the_settings_hash_does_not_depend_on_order_but_on_every_value() -> None:
    settings = {"model": "m", "engine_args": {"max-model-len": 2048, "dtype": "float32"}}
    reordered = {"engine_args": {"dtype": "float32", "max-model-len": 2048}, "model": "m"}
    other = {"model": "m", "engine_args": {"max-model-len": 4096, "dtype": "float32"}}

    assert settings_hash(settings) == settings_hash(reordered)
    assert settings_hash(settings) != settings_hash(other)


def test_a_difference_of_settings_names_both_values() -> None:
    lines = settings_difference({"model": "a", "cap": 1}, {"model": "b", "seed": 2})

    assert lines == [
        "cap: 1 → '(not set)'",
        "model: 'a' → 'b'",
        "seed: '(not set)' → 2",
    ]


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
