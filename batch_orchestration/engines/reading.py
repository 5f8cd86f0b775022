"""Reads the body of a response: decompressed piece by piece, and only up to a limit."""

import asyncio
import contextlib
import zlib
from collections.abc import Awaitable, Callable, Iterator

import aiohttp

#: Encodings that can be decompressed piece by piece; the client's default includes others.
ACCEPT_ENCODING = "gzip, deflate"
PIECE_BYTES = 2**16
#: Modes of `zlib`: one detects gzip and zlib by itself, the other reads bare deflate.
_GZIP_OR_ZLIB, _BARE = zlib.MAX_WBITS | 32, -zlib.MAX_WBITS
_ZLIB_METHOD = 8


class Unreadable(Exception):
    """A body cannot be read, or not to its end; the message has the reason."""


class AnswerBudget:
    """The memory for all answers being read in one event loop.

    Once it is used up, readers wait until others finish. One reader at a time may exceed it;
    otherwise half-read answers could wait for each other without end.
    """

    def __init__(self, all_bytes: int) -> None:
        self._all = all_bytes
        self._used = 0
        self._exceeding: object = None
        self._waiting: list[asyncio.Future[None]] = []

    @contextlib.contextmanager
    def reader(self) -> Iterator[Callable[[int], Awaitable[None]]]:
        """Yield a function that reserves bytes for one answer; all are released at the end."""
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
    """Reserve nothing: a page about the server is small."""


async def read_body(
    response: aiohttp.ClientResponse,
    *,
    most_bytes: int,
    take: Callable[[int], Awaitable[None]] = _take_freely,
) -> bytes:
    """Return the body of a response whose session does not decompress.

    Args:
        response: Its body must be unread.
        most_bytes: Limit of the body, both as sent and decompressed.
        take: Waits until memory for so many more bytes is available.

    Raises:
        Unreadable: The body is too long, corrupt, or compressed in a way that was not requested.
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
    """Accept only a status of success, which a redirect is not.

    Raises:
        Unreadable: The status is another.
    """
    if not 200 <= response.status < 300:
        raise Unreadable(f"HTTP status {response.status}")


def _expander(encoding: str) -> Callable[[bytes], Iterator[bytes]]:
    """Return a decompressor of one chunk after the other; an empty chunk marks the end."""
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
            # After a full piece, the stream may hold more output although all bytes are read.
            more = bool(chunk) or len(piece) == PIECE_BYTES
