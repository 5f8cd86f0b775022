import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_orchestration.core.foreign_json import (
    MAX_DEPTH,
    BadJson,
    check_depth,
    decode,
    has_too_many_values,
)

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def verdict(text: bytes) -> tuple[str, str | None] | None:
    try:
        decode(text)
    except BadJson as error:
        return error.reason, error.field
    return None


@pytest.mark.parametrize(
    ("text", "field"),
    [
        (b'{"temperature": 1e999}', "temperature"),
        (b'{"temperature": -1e400}', "temperature"),
        (b'{"seed": %s}' % (b"9" * 5000), "seed"),
        (b'{"messages": [{}, {"weight": 1%s}]}' % (b"0" * 400), "messages[1].weight"),
        (b'{"n": 18446744073709551616}', "n"),
        (b'{"n": -9223372036854775809}', "n"),
        (b"9" * 50, "body"),
    ],
)
def test_a_number_out_of_range_is_named_by_its_field(text: bytes, field: str) -> None:
    reason, named = verdict(text) or ("", None)

    assert named == field
    assert f"`{field}` is out of range" in reason


@pytest.mark.parametrize(
    "text",
    [
        b'{"n": 18446744073709551615}',
        b'{"n": -9223372036854775808}',
        b'{"text": "1e999 and %s"}' % (b"9" * 50),
        b'{"temperature": 1e308}',
        b'{"temperature": 0.%s}' % (b"1" * 400),
    ],
)
def test_a_number_in_range_and_digits_in_a_text_are_left_alone(text: bytes) -> None:
    assert decode(text) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"a": NaN}', "NaN is no JSON value"),
        (b"[1, -Infinity]", "Infinity is no JSON value"),
        (b'{"a": nan}', "nan is no JSON value"),
        (b'{"a": "\\ud83d"}', "half of a surrogate pair"),
        (b'{"a": "\\ud83d and more"}', "half of a surrogate pair"),
        (b'{"a": "\\ude00"}', "half of a surrogate pair"),
        (b'{"a": "\xff"}', "not UTF-8: byte 8"),
        (b'{"a": "\xed\xa0\xbd"}', "not UTF-8"),
        (b"{'a': 1}", "not JSON"),
        (b"", "not JSON"),
    ],
)
def test_what_is_not_json_is_explained_to_its_author(text: bytes, words: str) -> None:
    reason, field = verdict(text) or ("", None)

    assert words in reason
    assert field is None


@pytest.mark.parametrize(
    ("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}"), (b'[{"a":', b"}]")]
)
def test_depth_has_one_limit_which_does_not_depend_on_the_caller(
    opening: bytes, closing: bytes
) -> None:
    levels = opening.count(b"[") + opening.count(b"{")
    deepest = MAX_DEPTH // levels

    assert verdict(opening * deepest + b"1" + closing * deepest) is None
    for times in (deepest + 1, 900, 990, 1_000, 100_000):
        reason, _ = verdict(opening * times + b"1" + closing * times) or ("", None)
        assert "nested more than 128 deep" in reason


def test_brackets_in_texts_do_not_nest() -> None:
    text = json.dumps({"code": "[" * 500 + '\\"{"' * 100}).encode()

    assert decode(text) == json.loads(text)


@pytest.mark.parametrize("piece", [b"x", b"\\n", b"x\\n"])
def test_the_look_at_the_depth_of_a_long_text_takes_no_more_memory_than_the_text(
    piece: bytes,
) -> None:
    text = b'{"texts": [%s], "text": "%s"}' % (b",".join([b"[1]"] * 200), piece * 1_000_000)

    tracemalloc.start()
    check_depth(text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 2 * len(text)


def test_commas_and_brackets_in_texts_are_no_values() -> None:
    assert not has_too_many_values(b'{"text": "%s"}' % (b'[{,\\"' * 1_000_000))
    assert has_too_many_values(b"[%s" % (b"[[]," * 400_000))


def test_of_a_key_that_is_there_twice_the_last_one_wins() -> None:
    assert decode(b'{"n": 1, "n": 2}') == {"n": 2}


@given(st.binary() | ANY_JSON.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=200)
def test_any_bytes_are_a_value_that_can_be_written_again_or_bad_json(text: bytes) -> None:
    if verdict(text) is None:
        json.dumps(decode(text), ensure_ascii=False, allow_nan=False).encode()
