"""Requests of a batch file: parsing a line, its faults, and changes to the body."""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec

from batch_orchestration.core import foreign_json
from batch_orchestration.core.outcomes import Failure, FailureCode

#: OpenAI's endpoints that our engines can serve.
SUPPORTED_ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
#: In characters, the same as OpenAI's limit.
CUSTOM_ID_MAX_LENGTH = 512
UTF8_BOM = b"\xef\xbb\xbf"
#: Characters of the author's value that a message quotes: enough to recognise it, too few to flood
#: a log.
_QUOTED_CHARACTERS = 80
#: No engine accepts more than these. vLLM returns at most 16,384 answers to one prompt
#: (`VLLM_MAX_N_SEQUENCES`), OpenAI 128. No context holds 2^31 tokens and no vocabulary has as many;
#: engines that are not written in Python count both in 32 bits. Values that exceed only the limits
#: of one engine are left for that engine to refuse.
_MOST_ANSWERS, _MOST_TOKENS = 16_384, 2**31 - 1
_MOST = {
    **dict.fromkeys(("n", "best_of"), _MOST_ANSWERS),
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "min_tokens"), _MOST_TOKENS),
    **dict.fromkeys(("logprobs", "top_logprobs", "prompt_logprobs", "top_k"), _MOST_TOKENS),
    **dict.fromkeys(("truncate_prompt_tokens", "dimensions"), _MOST_TOKENS),
}
#: A number in a string, in the format that pydantic, and so vLLM, accepts. Its length is bounded,
#: because Python does not convert very long numbers.
_WHOLE_NUMBER = re.compile(r"\s*[+-]?(?=\d)[\d_]{1,40}(\.0*)?\s*", re.ASCII)
#: Largest body in bytes that is stored with a failure. Longer bodies, and those of answered
#: requests, exist only in the kept input.
LARGEST_KEPT_BODY = 24 * 2**10
#: Fields that only the engine reads; they make up most of a body.
_ENGINES_FIELDS = frozenset({"messages", "prompt", "input", "tools", "functions", "documents"})


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One usable line of a batch file.

    Attributes:
        index: Position among the non-blank lines of the file, from 0.
        line: Line number in the file, from 1.
        custom_id: The author's key, unique in the batch.
        endpoint: One of `SUPPORTED_ENDPOINTS`.
        body: The body, byte for byte as in the file.
        fields: The decoded body; use it instead of decoding the body again.
    """

    index: int
    line: int
    custom_id: str
    endpoint: str
    body: msgspec.Raw
    fields: Mapping[str, Any]

    def lean(self) -> "Request":
        """Return a copy to hold for long, without the decoded prompt; `body` still has it."""
        kept = {name: value for name, value in self.fields.items() if name not in _ENGINES_FIELDS}
        return msgspec.structs.replace(self, fields=kept)

    def refused(self, code: FailureCode, message: str) -> "Fault":
        """Return the fault of a request that is readable but must not be sent."""
        return Fault(
            index=self.index,
            line=self.line,
            custom_id=self.custom_id,
            endpoint=self.endpoint,
            body=kept_body(self.body),
            code=code,
            message=message,
        )


class Fault(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line that cannot be used, with its problems.

    Attributes:
        custom_id: None if unreadable; cut to `CUSTOM_ID_MAX_LENGTH` if too long.
        endpoint: Empty if the line is unreadable.
        body: The request's body, or the whole line if that is unreadable; see `kept_body`.
        code: Code of the first problem.
        message: All problems of the line, without the line number.
    """

    index: int
    line: int
    custom_id: str | None
    endpoint: str = ""
    body: bytes = b""
    code: FailureCode
    message: str

    def lean(self) -> "Fault":
        """Return a copy without the body, for lists of faults."""
        return msgspec.structs.replace(self, body=b"")

    def as_failure(self) -> Failure:
        """Return the failure recorded for this line in a lenient batch."""
        return Failure(code=self.code, message=f"line {self.line}: {self.message}")


class _Bytes(msgspec.Struct):
    """Locates the body's bytes; their content is decoded with the whole line."""

    body: msgspec.Raw


_Problem = tuple[FailureCode, str]
_find_bytes = msgspec.json.Decoder(_Bytes).decode
#: Matches a `custom_id` at the start of a line, its usual place, if the line is truncated.
_CUSTOM_ID_AT_FRONT = re.compile(rb'\s*\{\s*"custom_id"\s*:\s*("(?:[^"\\\x00-\x1f]|\\.){1,2048}")')


def parse_line(
    raw: bytes, *, index: int, line: int, model_required: bool = True
) -> Request | Fault:
    """Parse one non-blank line of a batch file.

    A UTF-8 byte order mark and CR/LF around the line are tolerated. The caller has to check that
    each `custom_id` is unique, which takes the whole file.

    Args:
        index: Position among the non-blank lines, from 0.
        line: Line number, from 1.
        model_required: False if an alias `*` supplies a missing `model`.
    """
    text = raw.removeprefix(UTF8_BOM)
    fault = partial(_fault, index=index, line=line, raw=raw)
    if foreign_json.has_too_many_values(text):
        message = f"more than {foreign_json.MAX_VALUES:,} values; no request has so many"
        problem = (FailureCode.INVALID_JSON, message)
        return fault([problem], custom_id=salvage_custom_id(text))
    try:
        envelope = foreign_json.decode(text)
    except foreign_json.BadJson as error:
        code = FailureCode.INVALID_REQUEST if error.field else FailureCode.INVALID_JSON
        return fault([(code, error.reason)], custom_id=salvage_custom_id(text))
    if not isinstance(envelope, dict):
        problem = (FailureCode.INVALID_REQUEST, "not a JSON object with `custom_id`, `body`, …")
        return fault([problem], custom_id=None)
    custom_id: Any = envelope.get("custom_id")
    if problems := list(_problems(envelope, model_required=model_required)):
        shown = custom_id if isinstance(custom_id, str) else None
        return fault(problems, custom_id=shown)
    return Request(
        index=index,
        line=line,
        custom_id=custom_id,
        endpoint=envelope["url"],
        # Without the copy, the Raw would keep the whole line alive.
        body=_find_bytes(text).body.copy(),
        fields=envelope["body"],
    )


def too_long_fault(
    head: bytes, *, index: int, line: int, size_bytes: int, max_line_bytes: int
) -> Fault:
    """Return the fault of a line too long to be read; `head` is its beginning."""
    message = f"the line has {size_bytes:,} bytes; at most {max_line_bytes:,} are read"
    custom_id = salvage_custom_id(head.removeprefix(UTF8_BOM))
    problem = (FailureCode.INVALID_REQUEST, message)
    return _fault([problem], index=index, line=line, raw=head, custom_id=custom_id)


def kept_body(body: bytes | msgspec.Raw) -> bytes:
    """Return the body to store with a failure: empty if longer than `LARGEST_KEPT_BODY`."""
    return bytes(body) if len(body) <= LARGEST_KEPT_BODY else b""


def salvage_custom_id(text: bytes) -> str | None:
    """Return the `custom_id` of an unusable line, for messages; None if it cannot be found."""
    value = None if foreign_json.has_too_many_values(text) else foreign_json.salvage(text)
    if isinstance(value, dict):
        custom_id = value.get("custom_id")
    else:
        match = _CUSTOM_ID_AT_FRONT.match(text)
        custom_id = None if match is None else foreign_json.salvage(match[1])
    return custom_id if isinstance(custom_id, str) and _is_text(custom_id) else None


def _is_text(string: str) -> bool:
    """Whether the string has no lone surrogate, which could not be stored."""
    try:
        string.encode()
    except UnicodeEncodeError:
        return False
    return True


def _fault(
    problems: list[_Problem], *, index: int, line: int, raw: bytes, custom_id: str | None
) -> Fault:
    return Fault(
        index=index,
        line=line,
        custom_id=custom_id and custom_id[:CUSTOM_ID_MAX_LENGTH],
        body=kept_body(raw),
        code=problems[0][0],
        message="; ".join(message for _, message in problems),
    )


def _problems(envelope: Mapping[str, Any], *, model_required: bool) -> Iterator[_Problem]:
    method, url = envelope.get("method"), envelope.get("url")
    if problem := _custom_id_problem(envelope.get("custom_id")):
        yield FailureCode.INVALID_REQUEST, problem
    if method is None:
        yield FailureCode.INVALID_REQUEST, "`method` is missing; it must be POST"
    elif method != "POST":
        yield FailureCode.INVALID_REQUEST, f"`method` must be POST, not {_quoted(method)}"
    if url is None:
        yield FailureCode.INVALID_REQUEST, "`url` is missing"
    elif url not in SUPPORTED_ENDPOINTS:
        supported = ", ".join(SUPPORTED_ENDPOINTS)
        message = f"`url` {_quoted(url)} is not one of {supported}"
        yield FailureCode.UNSUPPORTED_ENDPOINT, message
    for problem in _body_problems(envelope.get("body"), model_required=model_required):
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


def _body_problems(body: object, *, model_required: bool) -> Iterator[str]:
    if body is None:
        yield "`body` is missing"
        return
    if not isinstance(body, dict):
        yield "`body` must be a JSON object"
        return
    if body.get("stream") is not None and body["stream"] is not False:
        yield "`stream` must not be set: a batch is answered in a file"
    model = body.get("model")
    if not (model is None and not model_required) and (not isinstance(model, str) or not model):
        yield "`body.model` is missing or not a string"
    for name, most in _MOST.items():
        given = as_integer(body.get(name))
        if given is not None and given > most:
            shown = f"{given:,}" if given < 10**20 else "a number of more than twenty digits"
            yield f"`body.{name}` is {shown}; more than {most:,} no engine accepts"


def as_integer(value: object) -> int | None:
    """Return the integer that an engine reads from a JSON value; None if engines refuse the value.

    Pydantic, and so vLLM, reads `16.0` and `"16"` as 16. A limit on JSON integers alone would let
    them through.
    """
    if type(value) is int:
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and _WHOLE_NUMBER.fullmatch(value):
        return int(value.partition(".")[0].replace("_", ""))
    return None


def _quoted(value: object) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= _QUOTED_CHARACTERS else f"{text[:_QUOTED_CHARACTERS]}…"


ANY_MODEL = "*"
TOKEN_LIMITS = ("max_completion_tokens", "max_tokens")
#: Splits a JSON object, already checked, into the bytes of its fields.
_bytes_of_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class Overrides(msgspec.Struct, frozen=True, kw_only=True):
    """The deployment's and the batch's changes to request bodies.

    Attributes:
        model: If set, the model for every request of the batch.
        aliases: Served model by name in the body; `*` matches any other name and a missing one.
        max_tokens_cap: Upper bound of a request's token limit.
    """

    model: str | None = None
    aliases: Mapping[str, str] = {}
    max_tokens_cap: int | None = None


def resolve_model(name: str | None, *, overrides: Overrides, served: Sequence[str]) -> str | None:
    """Return the model to use: the batch's, else the name's alias, else the name itself.

    The alias `*` does not apply to a name that the engine serves.
    """
    if overrides.model is not None:
        return overrides.model
    if name is not None and name in overrides.aliases:
        return overrides.aliases[name]
    if name is not None and name in served:
        return name
    return overrides.aliases.get(ANY_MODEL, name)


def prepare_body(request: Request, *, overrides: Overrides, served: Sequence[str]) -> bytes:
    """Return the body to send: the request's own bytes, unless an override applies.

    Fields that no override changes keep their bytes. A token limit that is not an integer to any
    engine is left for the engine to refuse.
    """
    changed: dict[str, object] = {}
    named = request.fields.get("model")
    model = resolve_model(named, overrides=overrides, served=served)
    if model != named:
        changed["model"] = model
    if overrides.max_tokens_cap is not None and request.endpoint != "/v1/embeddings":
        changed |= _capped_limits(request.fields, overrides.max_tokens_cap)
    if not changed:
        return bytes(request.body)
    return msgspec.json.encode(_bytes_of_fields(request.body) | changed)


def _capped_limits(fields: Mapping[str, object], cap: int) -> dict[str, object]:
    given = {name: fields[name] for name in TOKEN_LIMITS if fields.get(name) is not None}
    if not given:
        return {"max_tokens": cap}
    return {name: cap for name, limit in given.items() if (as_integer(limit) or 0) > cap}


def override_line(line: bytes, fields: Mapping[str, object]) -> bytes:
    """Return a line of a batch file with fields of its body replaced; null removes a field.

    `max_tokens` replaces whichever token limit the body has. Other fields keep their bytes. A line
    without a JSON object as body is returned unchanged.
    """
    if not fields:
        return line
    text = line.removeprefix(UTF8_BOM)
    try:
        decoded = foreign_json.decode(text)
    except foreign_json.BadJson:
        return line
    if not isinstance(decoded, dict) or not isinstance(decoded.get("body"), dict):
        return line
    envelope = _bytes_of_fields(text)
    body = _bytes_of_fields(envelope["body"])
    given = dict(fields)
    if "max_tokens" in given and "max_completion_tokens" in body:
        given.setdefault("max_completion_tokens", given.pop("max_tokens"))
    merged: dict[str, object] = {**body, **given}
    changed = {name: value for name, value in merged.items() if given.get(name, ...) is not None}
    return msgspec.json.encode({**envelope, "body": changed})
