"""Invalid and unusual answers by name, which the simulated engine gives on request."""

import functools
import gzip
from collections.abc import Mapping
from typing import Any

import msgspec
from aiohttp import web

_CHOICE = b'{"finish_reason": "stop", "message": {"role": "assistant", "content": "[simulated]"}}'
_DEPTH = 5_000
#: Above the default of `BATCH_MAX_ANSWER_BYTES`.
_BOMB_BYTES = 80 * 2**20


def _answer(content: bytes = _CHOICE, usage: object = None) -> bytes:
    return b'{"choices": [%s], "usage": %s}' % (content, msgspec.json.encode(usage))


def _usage(tokens: int) -> dict[str, Any]:
    # An integer of any length, which the encoder would refuse.
    number = msgspec.Raw(str(tokens).encode())
    return {"prompt_tokens": number, "completion_tokens": number}


#: Bodies with status 200. The first three are answers with impossible counts.
_BODIES: Mapping[str, bytes] = {
    "huge_usage": _answer(usage=_usage(10**30)),
    "negative_usage": _answer(usage=_usage(-7)),
    "wrong_usage": _answer(usage=["much"]),
    "deep": _answer(b'{"x": ' + b"[" * _DEPTH + b"]" * _DEPTH + b"}"),
    "empty": b"",
    "nothing": b"{}",
    "no_choices": b'{"choices": []}',
    "null_choices": b'{"choices": null}',
    "error_429": b'{"error": {"code": 429, "message": "simulated, with status 200"}}',
    "error_400": b'{"error": {"code": "400", "message": "simulated, with status 200"}}',
    "error": b'{"error": {"message": "simulated, with status 200 and no code"}}',
    "html": b"<html><body>Please log in</body></html>",
    "not_utf8": _answer(b'{"text": "\xff"}'),
    "half_emoji": _answer(b'{"text": "\\ud83d"}'),
}
_OTHERS = frozenset({"bomb", "broken_gzip", "unasked_encoding", "redirect", "retry_after"})
#: All kinds that can be requested.
KINDS = frozenset(_BODIES) | _OTHERS


def strange_answer(kind: str) -> web.Response:
    """Return an answer of one of `KINDS`."""
    if kind in _BODIES:
        return web.Response(body=_BODIES[kind], content_type="application/json")
    match kind:
        case "bomb":
            return web.Response(body=_bomb(), headers={"Content-Encoding": "gzip"})
        case "broken_gzip":
            half = gzip.compress(_answer())[:-9]
            return web.Response(body=half, headers={"Content-Encoding": "gzip"})
        case "unasked_encoding":
            return web.Response(body=_answer(), headers={"Content-Encoding": "br"})
        case "redirect":
            return web.Response(status=302, headers={"Location": "http://127.0.0.1:1/login"})
    return web.Response(status=429, headers={"Retry-After": "31536000"})


@functools.cache
def _bomb() -> bytes:
    return gzip.compress(b" " * _BOMB_BYTES, compresslevel=1)
