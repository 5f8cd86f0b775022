"""Chunks: how a batch is cut, and the keys that name the pieces to Dagster."""

import re

import msgspec

#: Of one batch: with more, a batch is slow to look at, and to launch a backfill over.
MOST_CHUNKS = 2000
#: Dagster accepts any text as a partition key; we do not (DESIGN section 6).
_CHUNK_KEY = re.compile(r"(?P<batch_id>[A-Za-z0-9_-][A-Za-z0-9._-]*)/(?P<number>[0-9]{5})")


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """Up to `requests_per_chunk` consecutive requests: the unit of commit and of a partition.

    Attributes:
        number: Place in the batch, from 0.
        first_index: Index of its first request.
        requests: How many requests it holds, faulty lines included.
        first_line: Line number of the first byte, from 1.
        start: Offset of its first byte in the kept input.
        end: Offset after its last byte.
        digest: BLAKE2b-128 of those bytes, hexadecimal; guards against a changed input.
    """

    number: int
    first_index: int
    requests: int
    first_line: int
    start: int
    end: int
    digest: str


def chunk_key(batch_id: str, number: int) -> str:
    """Return the partition key of a chunk; keys sort in file order.

    Raises:
        ValueError: The number does not fit five digits.
    """
    key = f"{batch_id}/{number:05d}"
    parse_chunk_key(key)
    return key


def parse_chunk_key(key: str) -> tuple[str, int]:
    """Return batch id and chunk number of a partition key.

    Raises:
        ValueError: The key was not made by `chunk_key`.
    """
    match = _CHUNK_KEY.fullmatch(key)
    if match is None or ".." in key:
        raise ValueError(f"not a chunk key: {key!r} (expected <batch id>/<five digits>)")
    return match["batch_id"], int(match["number"])


def can_be_id(name: str) -> bool:
    """Whether a folder of this name can be that of a batch."""
    # What cannot be in a partition key (`/`, `..`) has no business in a path either.
    try:
        chunk_key(name, 0)
    except ValueError:
        return False
    return True
