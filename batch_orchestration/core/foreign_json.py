"""JSON that somebody else wrote: the one place where its faults become values.

A request's line, an engine's answer and a side-car come from outside. They are decoded here, or
not at all: `decode` either returns the whole value or raises `BadJson`, whatever the bytes are, and
what it returns can be stored, encoded again and compared as a float. The limits are fixed, so that
every step reaches the same verdict.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any

import msgspec

#: Objects and arrays within each other. Python's own limit depends on how deep the caller stands;
#: vLLM's parser, ours and DuckDB's all manage this many. Real bodies have about ten.
MAX_DEPTH = 128
#: Whole numbers must fit 64 bits, with or without sign, as in most engines. The largest that
#: OpenAI's API knows is a `seed` of 63 bits; JSON schemas have bounds of unsigned 64 bits.
SMALLEST_INTEGER, LARGEST_INTEGER = -(2**63), 2**64 - 1

#: Of a request; in memory each takes up to thirty times its bytes. No prompt has so many tokens.
MAX_VALUES = 1_000_000

#: Strings, whole or torn: brackets inside them do not nest. Possessive: a pattern that could step
#: back keeps a hundred bytes for each one of a string.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
#: Of an answer of many MB there may be millions of brackets: they are counted without a loop.
_DEEPER = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in _DEEPER)
#: Below 19 digits no number is out of range. With every digit a zero, a plain search finds them,
#: eight times as fast as a regular expression does.
_MANY_DIGITS, _AS_ZEROS = b"0" * 19, bytes.maketrans(b"123456789", b"000000000")
#: Python's own limit is 4,300. From where the digits begin only: tried within, it is quadratic.
_ENDLESS = re.compile(rb"(?<!\d)\d{4300}")
_MORE = re.compile(r"trailing characters \(byte (\d+)\)")
_CONSTANT = re.compile(rb"[:,\[{\s]-?(NaN|Infinity|nan|inf(?:inity)?)\b")
_decode_any = msgspec.json.Decoder(Any).decode


class BadJson(ValueError):
    """The text cannot be used.

    Attributes:
        reason: For the author: what is wrong, and where it helps, what to write.
        field: Path of the value that is out of range, as `messages[0].weight`; None where the text
            is no JSON at all.
    """

    def __init__(self, reason: str, *, field: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.field = field


def decode(text: bytes | msgspec.Raw) -> Any:
    """Return the value of a JSON text. Of a key that is there twice the last one wins.

    Raises:
        BadJson: It is not UTF-8, not JSON, nested deeper than `MAX_DEPTH`, or a number in it is out
            of range. Nothing else is raised.
    """
    text = bytes(text)
    check_depth(text)
    try:
        text.decode()  # msgspec names the fault, but not its byte
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
    """Return what a text that `decode` refuses nevertheless says, for a message; None if nothing.

    Constants like NaN and numbers out of range are floats in it, and halves of surrogate pairs
    stay in its strings.
    """
    try:
        return json.loads(text, parse_int=_wide_integer)
    except (ValueError, RecursionError):
        return None


def check_depth(text: bytes) -> None:
    """Let a text pass that is nested at most `MAX_DEPTH` deep, well-formed or not.

    Raises:
        BadJson: It is nested deeper.
    """
    if text.count(b"[") + text.count(b"{") <= MAX_DEPTH:
        return
    brackets = _STRING.sub(b"", text).translate(None, _NO_BRACKETS)
    if max(accumulate(map(_DEEPER.__getitem__, brackets)), default=0) > MAX_DEPTH:
        raise BadJson(f"nested more than {MAX_DEPTH} deep")


def has_too_many_values(text: bytes) -> bool:
    """Whether a text, well-formed or not, has more than about `MAX_VALUES` values in it."""
    return _count_values(text) > MAX_VALUES and _count_values(_STRING.sub(b"", text)) > MAX_VALUES


def _count_values(text: bytes) -> int:
    return sum(map(text.count, (b",", b"[", b"{")))


def check_digits(text: bytes) -> None:
    """Let a text pass whose numbers everybody's `json.loads` can read.

    Raises:
        BadJson: One has more digits than Python converts.
    """
    if _ENDLESS.search(text) and _ENDLESS.search(_STRING.sub(b"", text)):
        raise BadJson("a number has thousands of digits")


def _reason(text: bytes, error: str) -> str:
    """Say what is wrong in words that its author has a use for."""
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
    """Find the number that the fast decoder refused."""
    try:
        _check_integers(salvage(text), floats=True)
    except BadJson as error:
        return error
    return BadJson("not JSON that can be read: a number is out of range")


def _wide_integer(digits: str) -> int | float:
    """Return an integer; one with thousands of digits, which Python refuses, as infinity."""
    return int(digits) if len(digits) <= 40 else math.copysign(math.inf, -digits.startswith("-"))


def _check_integers(value: object, *, floats: bool = False) -> None:
    for path, number in _numbers(value):
        wide = type(number) is int and not SMALLEST_INTEGER <= number <= LARGEST_INTEGER
        if wide or (floats and math.isinf(number)):
            raise BadJson(f"the number in `{path or 'body'}` is out of range", field=path or "body")


def _numbers(value: object, path: str = "") -> Iterator[tuple[str, int | float]]:
    """Yield the numbers within a value, each with its path; depth is limited before."""
    if isinstance(value, Mapping):
        for key, member in value.items():
            yield from _numbers(member, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for place, member in enumerate(value):
            yield from _numbers(member, f"{path}[{place}]")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value
