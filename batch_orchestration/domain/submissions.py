"""Submissions: files that were split into parts, each of them a batch."""

import re

import msgspec

from batch_orchestration.domain.batches import BatchOptions

_PART_ID = re.compile(r"(?P<submission>.+)-p[1-9][0-9]*of[1-9][0-9]*")


class Submission(msgspec.Struct, frozen=True, kw_only=True):
    """A file with more requests than a batch may have; it never changes after admission.

    Attributes:
        submission_id: Readable and unique, as a batch's id.
        identity: That of the file: see `domain.batches.identity`.
        file_name: What the author called the file.
        sha256: Of the kept input (uncompressed), hexadecimal.
        size_bytes: Of the kept input (uncompressed).
        source: Who submitted it.
        requests: Non-blank lines of the whole file, faulty ones included.
        faulty: How many of them were refused at admission.
        parts: Ids of the batches that it becomes, in file order.
        created_at: POSIX seconds.
    """

    submission_id: str
    identity: str
    file_name: str
    sha256: str
    size_bytes: int
    source: str = "inbox"
    requests: int
    faulty: int
    parts: tuple[str, ...]
    options: BatchOptions
    created_at: float


def part_id(submission_id: str, number: int, of: int) -> str:
    """Return the batch id of a part; `number` counts from 1."""
    return f"{submission_id}-p{number}of{of}"


def submission_of(batch_id: str) -> str | None:
    """Return the id of the submission that a batch is a part of, by its name; None if of none."""
    match = _PART_ID.fullmatch(batch_id)
    return match["submission"] if match else None
