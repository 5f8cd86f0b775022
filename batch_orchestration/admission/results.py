"""Admission results as values: admitted, duplicate, rejected, queued or returned."""

import msgspec

from batch_orchestration.core.requests import Fault
from batch_orchestration.queue.entries import WaitReason


class Admitted(msgspec.Struct, frozen=True, kw_only=True, tag="admitted"):
    """The file is a new batch.

    Attributes:
        requests: Non-blank lines, faulty ones included.
        faulty: Requests that go to the error file without being sent.
    """

    batch_id: str
    file_name: str
    requests: int
    faulty: int
    chunks: int

    def __str__(self) -> str:
        refused = f", {self.faulty:,} of them refused by their line" if self.faulty else ""
        return (
            f"{self.file_name}: admitted as {self.batch_id},"
            f" {self.requests:,} requests in {self.chunks:,} chunks{refused}"
        )


class AlreadyAdmitted(msgspec.Struct, frozen=True, kw_only=True, tag="already_admitted"):
    """The same content with the same options was admitted before.

    Attributes:
        batch_id: Of the first batch.
        kept_as: New location of the file.
    """

    batch_id: str
    file_name: str
    kept_as: str

    def __str__(self) -> str:
        return (
            f"{self.file_name}: the same content and options were admitted before, as"
            f" {self.batch_id}; see `python -m batch_orchestration status {self.batch_id}`."
            f" The file is kept as {self.kept_as}"
        )


class Rejected(msgspec.Struct, frozen=True, kw_only=True, tag="rejected"):
    """No request of the file is run.

    Attributes:
        error_count: Faulty lines in all.
        errors: The first few of them; `errors_path` lists all.
        rejected_path: New location of the file.
        next_step: Advice for the author, with the command.
    """

    file_name: str
    reason: str
    error_count: int
    errors: tuple[Fault, ...]
    rejected_path: str
    errors_path: str
    next_step: str

    def __str__(self) -> str:
        return f"{self.file_name}: rejected, {self.reason}. {self.next_step}"


class Returned(msgspec.Struct, frozen=True, kw_only=True, tag="released"):
    """The file was still being written and is back in the inbox.

    Attributes:
        released_path: Location of the file in the inbox.
    """

    file_name: str
    reason: str
    released_path: str

    def __str__(self) -> str:
        return f"{self.file_name}: {self.reason}; it is back in the inbox as {self.released_path}"


class Queued(msgspec.Struct, frozen=True, kw_only=True, tag="held"):
    """There is no capacity for the file now: it is back in the inbox, and will be claimed again.

    Attributes:
        detail: The reason as a sentence with numbers.
        released_path: Location of the file in the inbox.
    """

    file_name: str
    reason: WaitReason
    detail: str
    released_path: str

    def __str__(self) -> str:
        return f"{self.file_name}: {self.reason}: {self.detail}; it waits in the inbox"


Admission = Admitted | AlreadyAdmitted | Rejected | Queued
AdmissionResult = Admission | Returned
