"""One request of a batch file: reading its line, and what is wrong with it."""

import re
from collections.abc import Iterator
from typing import Any

import msgspec

from batch_orchestration.domain.outcomes import Failure, FailureCode

#: OpenAI's paths that an engine of ours can answer.
SUPPORTED_ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
#: As OpenAI's own service allows, in characters.
CUSTOM_ID_MAX_LENGTH = 512
UTF8_BOM = b"\xef\xbb\xbf"
#: What a message quotes of the author's value: enough to recognise it, too little to flood a log.
_QUOTED_CHARACTERS = 80


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One usable line of a batch file.

    Attributes:
        index: Place among the non-blank lines of the file, from 0.
        line: Line number in the file, from 1.
        custom_id: The author's key, unique in the batch.
        endpoint: One of `SUPPORTED_ENDPOINTS`.
        body: What is sent to the engine, byte for byte as in the file.
    """

    index: int
    line: int
    custom_id: str
    endpoint: str
    body: msgspec.Raw


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """What is wrong with one line.

    Attributes:
        custom_id: None where it could not be read; cut to `CUSTOM_ID_MAX_LENGTH` where too long.
        code: Of the first problem found.
        message: All problems of the line, without its number.
    """

    index: int
    line: int
    custom_id: str | None
    code: FailureCode
    message: str

    def as_failure(self) -> Failure:
        """Return the failure that this line ends with in a lenient batch."""
        return Failure(code=self.code, message=f"line {self.line}: {self.message}")


class _Envelope(msgspec.Struct):
    """The envelope with every field still raw, so that each fault can be named by itself."""

    custom_id: Any = None
    method: Any = None
    url: Any = None
    body: msgspec.Raw = msgspec.Raw(b"null")


class _BodyHead(msgspec.Struct):
    """The two fields of a body that admission looks at."""

    model: Any = None
    stream: Any = None


_Problem = tuple[FailureCode, str]
_decode_envelope = msgspec.json.Decoder(_Envelope).decode
_decode_body_head = msgspec.json.Decoder(_BodyHead).decode
#: Finds the id at the usual place, the front, of a line that is torn or too long to be read.
_CUSTOM_ID_AT_FRONT = re.compile(rb'\s*\{\s*"custom_id"\s*:\s*("(?:[^"\\\x00-\x1f]|\\.){1,2048}")')


def parse_line(
    raw: bytes, *, index: int, line: int, model_required: bool = True
) -> Request | Fault:
    """Read one non-blank line of a batch file.

    A UTF-8 byte order mark and CR/LF around the line are tolerated. Uniqueness of `custom_id` is
    the caller's to check: it needs the whole file.

    Args:
        raw: The line's bytes.
        index: Place among the non-blank lines, from 0.
        line: Line number, from 1.
        model_required: False if an alias `*` supplies a missing `model`.
    """
    text = raw.removeprefix(UTF8_BOM)
    try:
        text.decode("utf-8")
        envelope = _decode_envelope(text)
    except UnicodeDecodeError as error:
        problem = (FailureCode.INVALID_JSON, f"not UTF-8: byte {error.start + 1} of the line")
    except msgspec.ValidationError:
        problem = (FailureCode.INVALID_REQUEST, "not a JSON object with `custom_id`, `body`, …")
    except (msgspec.DecodeError, RecursionError) as error:
        reason = str(error).removeprefix("JSON is malformed: ")
        problem = (FailureCode.INVALID_JSON, f"not JSON: {reason}")
    else:
        return _check(envelope, index=index, line=line, model_required=model_required)
    return _fault([problem], index=index, line=line, custom_id=salvage_custom_id(text))


def too_long_fault(
    head: bytes, *, index: int, line: int, size_bytes: int, max_line_bytes: int
) -> Fault:
    """Return the fault of a line that was not read for its length; `head` is its beginning."""
    message = f"the line has {size_bytes:,} bytes; at most {max_line_bytes:,} are read"
    custom_id = salvage_custom_id(head.removeprefix(UTF8_BOM))
    problem = (FailureCode.INVALID_REQUEST, message)
    return _fault([problem], index=index, line=line, custom_id=custom_id)


def salvage_custom_id(text: bytes) -> str | None:
    """Return the id that stands at the front of an unreadable line, so that it can be named."""
    match = _CUSTOM_ID_AT_FRONT.match(text)
    if match is None:
        return None
    try:
        return msgspec.json.decode(match[1], type=str)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _check(envelope: _Envelope, *, index: int, line: int, model_required: bool) -> Request | Fault:
    custom_id = envelope.custom_id
    problems = list(_problems(envelope, model_required=model_required))
    if problems:
        shown = custom_id if isinstance(custom_id, str) else None
        return _fault(problems, index=index, line=line, custom_id=shown)
    return Request(
        index=index,
        line=line,
        custom_id=custom_id,
        endpoint=envelope.url,
        # A copy: a Raw otherwise keeps the whole line alive.
        body=envelope.body.copy(),
    )


def _fault(problems: list[_Problem], *, index: int, line: int, custom_id: str | None) -> Fault:
    return Fault(
        index=index,
        line=line,
        custom_id=custom_id and custom_id[:CUSTOM_ID_MAX_LENGTH],
        code=problems[0][0],
        message="; ".join(message for _, message in problems),
    )


def _problems(envelope: _Envelope, *, model_required: bool) -> Iterator[_Problem]:
    if problem := _custom_id_problem(envelope.custom_id):
        yield FailureCode.INVALID_REQUEST, problem
    if envelope.method is None:
        yield FailureCode.INVALID_REQUEST, "`method` is missing; it must be POST"
    elif envelope.method != "POST":
        yield FailureCode.INVALID_REQUEST, f"`method` must be POST, not {_quoted(envelope.method)}"
    if envelope.url is None:
        yield FailureCode.INVALID_REQUEST, "`url` is missing"
    elif envelope.url not in SUPPORTED_ENDPOINTS:
        supported = ", ".join(SUPPORTED_ENDPOINTS)
        message = f"`url` {_quoted(envelope.url)} is not one of {supported}"
        yield FailureCode.UNSUPPORTED_ENDPOINT, message
    if problem := _body_problem(envelope.body, model_required=model_required):
        yield FailureCode.INVALID_REQUEST, problem


def _custom_id_problem(custom_id: object) -> str | None:
    if custom_id is None:
        return "`custom_id` is missing"
    if not isinstance(custom_id, str):
        return f"`custom_id` must be a string, not {_quoted(custom_id)}"
    if not custom_id:
        return "`custom_id` is empty"
    if len(custom_id) > CUSTOM_ID_MAX_LENGTH:
        return f"`custom_id` has {len(custom_id)} characters; at most {CUSTOM_ID_MAX_LENGTH}"
    return None


def _body_problem(body: msgspec.Raw, *, model_required: bool) -> str | None:
    if bytes(body) == b"null":
        return "`body` is missing"
    try:
        head = _decode_body_head(body)
    except msgspec.ValidationError:
        return "`body` must be a JSON object"
    if head.stream is not None and head.stream is not False:
        return "`stream` must not be set: a batch is answered in a file"
    if head.model is None and not model_required:
        return None
    if not isinstance(head.model, str) or not head.model:
        return "`body.model` is missing or not a string"
    return None


def _quoted(value: object) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= _QUOTED_CHARACTERS else f"{text[:_QUOTED_CHARACTERS]}…"
