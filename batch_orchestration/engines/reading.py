"""Reads what a server sends: decompressed piece by piece, and no further than a limit."""

import asyncio
import contextlib
import zlib
from collections.abc import Awaitable, Callable, Iterator

import aiohttp
import msgspec

#: What can be decompressed piece by piece; without this header the client asks for more.
ACCEPT_ENCODING = "gzip, deflate"
PIECE_BYTES = 2**16
#: How `zlib` finds out by itself whether it reads gzip or zlib, and how it reads bare deflate.
_GZIP_OR_ZLIB, _BARE = zlib.MAX_WBITS | 32, -zlib.MAX_WBITS
_ZLIB_METHOD = 8


class AnswerLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How much memory the answers of an engine may take.

    Attributes:
        one_bytes: A longer answer, decompressed, is a failure and read no further.
        all_bytes: Of all answers at a time; beyond it reading waits.
    """

    one_bytes: int = 64 * 2**20
    all_bytes: int = 256 * 2**20


DEFAULT_LIMITS = AnswerLimits()


class Unreadable(Exception):
    """What the server sends cannot be read, or not to its end; the message says why."""


class AnswerBudget:
    """The memory for all answers that are being read, in one event loop.

    Where it is used up, readers wait until others are done. One of them at a time may exceed it:
    otherwise answers that are half read could wait for each other without end.
    """

    def __init__(self, all_bytes: int) -> None:
        self._all = all_bytes
        self._used = 0
        self._exceeding: object = None
        self._waiting: list[asyncio.Future[None]] = []

    @contextlib.contextmanager
    def reader(self) -> Iterator[Callable[[int], Awaitable[None]]]:
        """Hand out what takes so many bytes more, for one answer; all of it is given back."""
        me, held = object(), 0

        async def take(count: int) -> None:
            nonlocal held
            while self._used + count > self._all and self._exceeding not in (None, me):
                waiter = asyncio.get_running_loop().create_future()
                self._waiting.append(waiter)
                await waiter
            if self._used + count > self._all:
                self._exceeding = me
            self._used += count
            held += count

        try:
            yield take
        finally:
            self._used -= held
            if self._exceeding is me:
                self._exceeding = None
            waiting, self._waiting = self._waiting, []
            for waiter in waiting:
                if not waiter.done():
                    waiter.set_result(None)


async def _take_freely(count: int) -> None:
    """Take memory for a page, which is small."""


async def read_body(
    response: aiohttp.ClientResponse,
    *,
    most_bytes: int,
    take: Callable[[int], Awaitable[None]] = _take_freely,
) -> bytes:
    """Return the body of a response whose session does not decompress.

    Args:
        response: Whose body was not read yet.
        most_bytes: Limit of the body, as it comes and decompressed.
        take: Waits until there is memory for so many bytes more.

    Raises:
        Unreadable: It is longer, or compressed in a way that was not asked for, or badly.
        aiohttp.ClientError: The connection broke, or the framing is wrong.
    """
    expand = _expander(response.headers.get("Content-Encoding", ""))
    body, sent = bytearray(), 0
    async for chunk in response.content.iter_any():
        sent += len(chunk)
        for piece in expand(chunk):
            if max(sent, len(body) + len(piece)) > most_bytes:
                raise Unreadable(f"it is longer than {most_bytes:,} bytes")
            await take(len(piece))
            body += piece
    for piece in expand(b""):
        body += piece
    return bytes(body)


def require_success(response: aiohttp.ClientResponse) -> None:
    """Let a response pass that has a status of success: a redirect has none.

    Raises:
        Unreadable: It has another.
    """
    if not 200 <= response.status < 300:
        raise Unreadable(f"HTTP status {response.status}")


def _expander(encoding: str) -> Callable[[bytes], Iterator[bytes]]:
    """Return what expands one chunk after the other, and is given an empty one at the end."""
    match encoding.strip().lower():
        case "" | "identity":
            return lambda chunk: iter([chunk])
        case "gzip" | "x-gzip" | "deflate":
            return _Inflater().expand
    raise Unreadable(f"its Content-Encoding is {encoding[:50]!r}, and was asked for as gzip")


class _Inflater:
    def __init__(self) -> None:
        self._stream: zlib._Decompress | None = None

    def expand(self, chunk: bytes) -> Iterator[bytes]:
        if self._stream is None and chunk:
            is_zlib = chunk[0] == 0x1F or chunk[0] & 0x0F == _ZLIB_METHOD
            self._stream = zlib.decompressobj(_GZIP_OR_ZLIB if is_zlib else _BARE)
        stream = self._stream
        if stream is None:
            return
        if not chunk and not stream.eof:
            raise Unreadable("it is compressed and ends in the middle")
        more = bool(chunk)
        while more:
            try:
                piece = stream.decompress(chunk, PIECE_BYTES)
            except zlib.error as error:
                raise Unreadable(f"it cannot be decompressed: {error}") from error
            yield piece
            if stream.unused_data:
                raise Unreadable("something follows its compressed data")
            chunk = stream.unconsumed_tail
            # What a full piece left over may be within the stream, though all bytes are read.
            more = bool(chunk) or len(piece) == PIECE_BYTES
