"""Decoding of JSON from outside: request lines, engines' answers and side-cars.

All foreign JSON is decoded here. For any bytes, `decode` returns the whole value or raises
`BadJson`. The returned value can be stored, encoded again and compared as a float. The limits are
constants, so that every step accepts and rejects the same texts.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any

import msgspec

#: Deepest nesting of objects and arrays. vLLM's parser, ours and DuckDB's all support this depth;
#: Python's own limit depends on the caller's stack depth. Real bodies nest about ten levels deep.
MAX_DEPTH = 128
#: Integers must fit 64 bits, signed or unsigned, as in most engines. The largest integer in
#: OpenAI's API is a `seed` of 63 bits; JSON schemas have bounds of unsigned 64 bits.
SMALLEST_INTEGER, LARGEST_INTEGER = -(2**63), 2**64 - 1

#: Most values in one request. In memory a value takes up to thirty times its bytes. No prompt has
#: this many tokens.
MAX_VALUES = 1_000_000

#: A string, whole or truncated: brackets inside strings do not nest. The quantifiers are
#: possessive, because backtracking would take a hundred bytes of memory per byte of a string.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
#: Change of depth at each bracket. An answer of many MB may contain millions of brackets, so they
#: are counted without a Python loop.
_DEEPER = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in _DEEPER)
#: Numbers of fewer than 19 digits are in range. Once all digits are replaced by zeros, a plain
#: search finds longer ones eight times as fast as a regular expression.
_MANY_DIGITS, _AS_ZEROS = b"0" * 19, bytes.maketrans(b"123456789", b"000000000")
#: Python converts numbers of up to 4,300 digits. The lookbehind matches only at the first digit of
#: a number; matching at every digit would be quadratic.
_ENDLESS = re.compile(rb"(?<!\d)\d{4300}")
_MORE = re.compile(r"trailing characters \(byte (\d+)\)")
_CONSTANT = re.compile(rb"[:,\[{\s]-?(NaN|Infinity|nan|inf(?:inity)?)\b")
_decode_any = msgspec.json.Decoder(Any).decode


class BadJson(ValueError):
    """The text cannot be used.

    Attributes:
        reason: The fault in words for the author, with a correction where that helps.
        field: Path of the value that is out of range, such as `messages[0].weight`; None if the
            text is not JSON.
    """

    def __init__(self, reason: str, *, field: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.field = field


def decode(text: bytes | msgspec.Raw) -> Any:
    """Return the value of a JSON text; the last of duplicate keys wins.

    Raises:
        BadJson: The text is not UTF-8, not JSON or nested deeper than `MAX_DEPTH`, or contains a
            number out of range. No other exception is raised.
    """
    text = bytes(text)
    check_depth(text)
    try:
        text.decode()  # unlike msgspec's error, this one has the position of the byte
        value = _decode_any(text)
    except UnicodeDecodeError as error:
        raise BadJson(f"not UTF-8: byte {error.start + 1}") from error
    except msgspec.ValidationError as error:
        raise _out_of_range(text) from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadJson(_reason(text, str(error))) from error
    if _MANY_DIGITS in text.translate(_AS_ZEROS):
        _check_integers(value)
    return value


def salvage(text: bytes) -> Any:
    """Return the value of a text that `decode` rejects, for use in messages; None if there is none.

    Constants such as NaN and numbers out of range become floats; lone surrogates stay in strings.
    """
    try:
        return json.loads(text, parse_int=_wide_integer)
    except (ValueError, RecursionError):
        return None


def check_depth(text: bytes) -> None:
    """Check that a text, well-formed or not, is nested at most `MAX_DEPTH` deep.

    Raises:
        BadJson: The text is nested deeper.
    """
    if text.count(b"[") + text.count(b"{") <= MAX_DEPTH:
        return
    brackets = _STRING.sub(b"", text).translate(None, _NO_BRACKETS)
    if max(accumulate(map(_DEEPER.__getitem__, brackets)), default=0) > MAX_DEPTH:
        raise BadJson(f"nested more than {MAX_DEPTH} deep")


def has_too_many_values(text: bytes) -> bool:
    """Whether a text, well-formed or not, contains more than about `MAX_VALUES` values."""
    return _count_values(text) > MAX_VALUES and _count_values(_STRING.sub(b"", text)) > MAX_VALUES


def _count_values(text: bytes) -> int:
    return sum(map(text.count, (b",", b"[", b"{")))


def check_digits(text: bytes) -> None:
    """Check that Python's `json.loads` can read all numbers of a text.

    Raises:
        BadJson: A number has more digits than Python converts.
    """
    if _ENDLESS.search(text) and _ENDLESS.search(_STRING.sub(b"", text)):
        raise BadJson("a number has thousands of digits")


def _reason(text: bytes, error: str) -> str:
    """Return a description of the fault that helps the author of the text."""
    outside_strings = _STRING.sub(b'""', text)
    if constant := _CONSTANT.search(outside_strings):
        word = constant[1].decode()
        return f"not JSON: {word} is no JSON value; write null, or leave the field out"
    if b"\\u" in text and _has_lone_surrogate(text):
        return (
            "not JSON: half of a surrogate pair, as `\\ud83d` without the half that follows"
            " (an emoji that was cut?)"
        )
    error = error.removeprefix("JSON is malformed: ")
    if more := _MORE.search(error):
        place = int(more[1])
        follows = text[place - 1 : place].decode(errors="replace")
        return f"not JSON: after the value, at byte {place}, there is more: {follows!r}"
    return f"not JSON: {error}"


def _has_lone_surrogate(text: bytes) -> bool:
    try:
        json.dumps(salvage(text), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _out_of_range(text: bytes) -> BadJson:
    """Return the error for the number that the fast decoder rejected."""
    try:
        _check_integers(salvage(text), floats=True)
    except BadJson as error:
        return error
    return BadJson("not JSON that can be read: a number is out of range")


def _wide_integer(digits: str) -> int | float:
    """Return the integer; infinity for more than 40 digits, as Python rejects thousands."""
    return int(digits) if len(digits) <= 40 else math.copysign(math.inf, -digits.startswith("-"))


def _check_integers(value: object, *, floats: bool = False) -> None:
    for path, number in _numbers(value):
        wide = type(number) is int and not SMALLEST_INTEGER <= number <= LARGEST_INTEGER
        if wide or (floats and math.isinf(number)):
            raise BadJson(f"the number in `{path or 'body'}` is out of range", field=path or "body")


def _numbers(value: object, path: str = "") -> Iterator[tuple[str, int | float]]:
    """Yield the numbers within a value with their paths; the caller has checked the depth."""
    if isinstance(value, Mapping):
        for key, member in value.items():
            yield from _numbers(member, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for place, member in enumerate(value):
            yield from _numbers(member, f"{path}[{place}]")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value
