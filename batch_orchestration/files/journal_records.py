"""Records of a journal, and the framing that keeps damage from spreading.

A record is RS (0x1E), eight hexadecimal digits of CRC-32, a space, JSON and a line break, similar
to RFC 7464. Valid JSON never contains RS, so torn records and garbage end where the next record
begins. The JSON may contain line breaks, because answers are kept byte for byte.
"""

import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

from batch_orchestration.core.errors import FileDamaged
from batch_orchestration.core.outcomes import Failure, Outcome
from batch_orchestration.core.results import Attempt, Place, Provenance
from batch_orchestration.files.regular import open_regular

RECORD_SEPARATOR = b"\x1e"
#: Since format 2, outcome records contain all request data that a commit needs.
FORMAT = 2
_BLOCK_BYTES = 2**20
_HEAD_BYTES = len(b"01234567 ")
_HEAD = re.compile(rb"([0-9a-f]{8}) ")


class PassRecord(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="pass"):
    """A writer opened the journal; its records have the same `ordinal`."""

    ordinal: int
    batch_id: str
    number: int
    pid: int
    at: float
    provenance: Provenance
    format: int = FORMAT


class _RequestRecord(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """An event of one request in the pass `ordinal`."""

    ordinal: int
    index: int
    attempt: int
    at: float


class SubmittedRecord(_RequestRecord, frozen=True, kw_only=True, tag="submitted"):
    """The request is about to be submitted to the engine."""


class FailedAttemptRecord(_RequestRecord, frozen=True, kw_only=True, tag="failed_attempt"):
    """An attempt failed, and another one will follow."""

    failed: Attempt


class SuspectedRecord(_RequestRecord, frozen=True, kw_only=True, tag="suspected"):
    """The engine died with the request in flight; the request will be tested in this group."""

    group: str


class OutcomeRecord(_RequestRecord, frozen=True, kw_only=True, tag="outcome", omit_defaults=True):
    """The outcome of the request, with all request data that a commit needs.

    Attributes:
        line: Line number in the file, from 1.
        custom_id: None only if the line has none.
        endpoint: Empty if the line was unreadable.
        body: Body of a failed request as text, or the whole line if that was unreadable; empty if
            too long (`requests.kept_body`).
    """

    line: int
    custom_id: str | None = None
    endpoint: str = ""
    body: str = ""
    outcome: Outcome
    #: Used in the file only: msgspec cannot decode an optional Raw, but it can decode a tuple.
    failure_body: tuple[msgspec.Raw, ...] = ()


Record = PassRecord | SubmittedRecord | FailedAttemptRecord | SuspectedRecord | OutcomeRecord

_encode = msgspec.json.Encoder().encode
_decoder = msgspec.json.Decoder(Record)


def encode_record(record: Record) -> bytes:
    """Return the bytes to append for a record.

    Raises:
        ValueError, RecursionError: The record could not be read back: a body is not JSON, a text is
            not Unicode, or the nesting is too deep.
    """
    payload = _encode(_with_body_apart(record))
    # The encoder does not check raw bodies, but a body that is not JSON could not be read back.
    _decoder.decode(payload)
    return b"%s%08x %s\n" % (RECORD_SEPARATOR, zlib.crc32(payload), payload)


def read_records(path: Path, *, end: int | None = None) -> Iterator[Record | None]:
    """Yield every intact record of a journal in order, and None for each unreadable piece.

    One piece is in memory at a time: usually a record, at worst a run of garbage.

    Args:
        end: Number of bytes to read. Journals are append-only, so reading up to an earlier size
            gives the state of that moment. A record cut by `end` is an unreadable piece.

    Raises:
        FileDamaged: The journal has the format of another version.
    """
    for record, _ in read_placed_records(path, end=end):
        yield record


def read_placed_records(
    path: Path, *, end: int | None = None
) -> Iterator[tuple[Record | None, Place]]:
    """Yield the records and None values of `read_records`, each with its place."""
    for start, piece in _pieces(path, end):
        payload = _payload(piece)
        size = len(piece) if payload is None else _HEAD_BYTES + len(payload)
        record = _decoded(payload)
        if isinstance(record, PassRecord) and record.format != FORMAT:
            raise _of_another_format(path, record)
        yield record, Place(path, start, size)
        if len(piece) > size + len(b"\n"):
            yield None, Place(path, start + size, len(piece) - size)


def record_at(place: Place, index: int) -> OutcomeRecord:
    """Read a request's outcome record again.

    Raises:
        FileDamaged: The record is no longer there.
    """
    try:
        with open_regular(place.journal) as file:
            file.seek(place.start)
            record = _decoded(_payload(file.read(place.size_bytes)))
    except FileNotFoundError:
        raise FileDamaged(place.journal, f"is missing, {_lost(index)}") from None
    if not isinstance(record, OutcomeRecord) or record.index != index:
        raise FileDamaged(place.journal, f"is damaged at byte {place.start}, {_lost(index)}")
    return record


def _of_another_format(path: Path, begun: PassRecord) -> FileDamaged:
    return FileDamaged(
        path,
        f"is a journal of format {begun.format}, and this version reads format {FORMAT} only:"
        " finish its batch with the version that began it, or submit the input file again to"
        " another data folder (BATCH_DATA_DIR)",
    )


def _lost(index: int) -> str:
    return (
        f"and holds the only copy of the outcome of request {index}: restore it from a backup, or"
        " run `python -m batch_orchestration recover --force` to have that request asked again"
    )


def _decoded(payload: bytes | None) -> Record | None:
    if payload is None:
        return None
    try:
        return _with_body_inside(_decoder.decode(payload))
    except (ValueError, RecursionError):
        return None


def _with_body_apart(record: Record) -> Record:
    if not isinstance(record, OutcomeRecord) or not isinstance(record.outcome, Failure):
        return record
    if (body := record.outcome.body) is None:
        return record
    bodiless = msgspec.structs.replace(record.outcome, body=None)
    return msgspec.structs.replace(record, outcome=bodiless, failure_body=(body,))


def _with_body_inside(record: Record) -> Record:
    if not isinstance(record, OutcomeRecord) or not record.failure_body:
        return record
    (body,) = record.failure_body
    whole = msgspec.structs.replace(record.outcome, body=body)
    return msgspec.structs.replace(record, outcome=whole, failure_body=())


def _pieces(path: Path, end: int | None) -> Iterator[tuple[int, bytes]]:
    """Yield offset and bytes of each non-empty piece between separators."""
    unfinished: list[bytes] = []
    start = 0
    left = sys.maxsize if end is None else end
    with open_regular(path) as file:
        while block := file.read(min(left, _BLOCK_BYTES)):
            left -= len(block)
            first, *others = block.split(RECORD_SEPARATOR)
            unfinished.append(first)
            for other in others:
                if piece := b"".join(unfinished):
                    yield start, piece
                start += len(piece) + len(RECORD_SEPARATOR)
                unfinished = [other]
    if piece := b"".join(unfinished):
        yield start, piece


def _payload(piece: bytes) -> bytes | None:
    """Return the JSON at the beginning of a piece; None if its checksum does not match.

    Garbage may follow the record, so every line break may be the end of the record.
    """
    head = _HEAD.match(piece)
    if head is None:
        return None
    expected = int(head[1], 16)
    body = piece[head.end() :]
    if zlib.crc32(body.removesuffix(b"\n")) == expected:
        return body.removesuffix(b"\n")
    checksum = start = 0
    while (line_break := body.find(b"\n", start)) >= 0:
        checksum = zlib.crc32(body[start:line_break], checksum)
        if checksum == expected:
            return body[:line_break]
        checksum = zlib.crc32(b"\n", checksum)
        start = line_break + 1
    return None
