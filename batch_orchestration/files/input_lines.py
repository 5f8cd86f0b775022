"""Reading a batch file line by line, by byte ranges, in bounded memory."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from batch_orchestration.core.batches import Chunk
from batch_orchestration.core.errors import PlanMismatch
from batch_orchestration.core.requests import UTF8_BOM
from batch_orchestration.files.regular import open_regular

#: Bytes kept of a line that is too long: enough to recognise it.
TOO_LONG_KEPT_BYTES = 64 * 2**10
_BLOCK_BYTES = 2**20


class RawLine(msgspec.Struct, frozen=True):
    """One unparsed line of a file.

    Attributes:
        line: Line number, from 1.
        index: Position among the non-blank lines, from 0; a blank line has the next request's.
        start: Offset of the first byte.
        end: Offset after the last byte, the line break included.
        data: The bytes from `start` to `end`; cut to 64 KiB if the line is too long.
        too_long: True if the line is not blank and exceeds `max_line_bytes`, not counting its
            line break.
        blank: True if the line has only white space and so is no request. A byte order mark in
            line 1 is ignored.
    """

    line: int
    index: int
    start: int
    end: int
    data: bytes
    too_long: bool
    blank: bool


def new_digest() -> hashlib.blake2b:
    """Return a new hash object for a chunk's digest, BLAKE2b-128 over its byte range."""
    return hashlib.blake2b(digest_size=16)


def read_lines(
    file: BinaryIO,
    max_line_bytes: int,
    *,
    line: int = 1,
    index: int = 0,
    offset: int = 0,
    observe: Callable[[bytes], object] | None = None,
) -> Iterator[RawLine]:
    """Yield every line of a file, blank ones included; together they cover each byte once.

    A line break is LF or CR LF. Memory use is little more than `max_line_bytes`. Whether a line is
    blank does not depend on `max_line_bytes`, so that indices never shift.

    Args:
        file: A file positioned at the start of a line.
        max_line_bytes: Limit on a line; longer lines are yielded cut, with `too_long` set.
        line: Number of the first line.
        index: Index of the first request.
        offset: Offset of the first line, if the file is not read from its beginning.
        observe: Called with all bytes of a line, in order, before the line is yielded, for example
            to hash them.
    """
    while data := file.readline(max_line_bytes + 2):
        if observe:
            observe(data)
        end = offset + len(data)
        blank = not (data.removeprefix(UTF8_BOM) if line == 1 else data).strip()
        too_long = len(_without_break(data)) > max_line_bytes
        if len(data) == max_line_bytes + 2 and not data.endswith(b"\n"):
            for rest in _rest_of_line(file):
                if observe:
                    observe(rest)
                end += len(rest)
                blank = blank and not rest.strip()
            too_long = True
        if too_long:
            data = data[:TOO_LONG_KEPT_BYTES]
        yield RawLine(line, index, offset, end, data, too_long and not blank, blank)
        line, index, offset = line + 1, index + (not blank), end


def _without_break(data: bytes) -> bytes:
    return data[:-2] if data.endswith(b"\r\n") else data.removesuffix(b"\n")


def _rest_of_line(file: BinaryIO) -> Iterator[bytes]:
    while rest := file.readline(_BLOCK_BYTES):
        yield rest
        if rest.endswith(b"\n"):
            break


def read_chunk(input_path: Path, chunk: Chunk, max_line_bytes: int) -> Iterator[RawLine]:
    """Yield the non-blank lines of one chunk, after checking its bytes against the digest.

    Raises:
        PlanMismatch: The kept input is missing or differs from the plan.
        FileDamaged: The kept input cannot be read.
    """
    where = f"{input_path}, bytes {chunk.start} to {chunk.end}"
    try:
        file = open_regular(input_path)
    except FileNotFoundError:
        raise PlanMismatch(f"the kept input is gone: {where}") from None
    with file:
        if _digest(file, chunk) != chunk.digest:
            raise PlanMismatch(f"the kept input changed since its batch was planned: {where}")
        file.seek(chunk.start)
        for line in read_lines(
            file,
            max_line_bytes,
            line=chunk.first_line,
            index=chunk.first_index,
            offset=chunk.start,
        ):
            if not line.blank:
                yield line
            if line.end >= chunk.end:
                break


def _digest(file: BinaryIO, chunk: Chunk) -> str:
    digest = new_digest()
    file.seek(chunk.start)
    left = chunk.end - chunk.start
    while left and (block := file.read(min(left, _BLOCK_BYTES))):
        digest.update(block)
        left -= len(block)
    return digest.hexdigest()
