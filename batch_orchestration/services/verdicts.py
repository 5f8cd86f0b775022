"""What becomes of a claimed file, as values: admitted, a duplicate, rejected, held, or released."""

import msgspec

from batch_orchestration.core.requests import Fault
from batch_orchestration.queue.entries import WaitReason


class Admitted(msgspec.Struct, frozen=True, kw_only=True, tag="admitted"):
    """The file is a new batch.

    Attributes:
        requests: Non-blank lines, faulty ones included.
        faulty: How many of them will be rows of the error file, unasked.
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
    """The same content with the same options is a batch already.

    Attributes:
        batch_id: Of the first.
        kept_as: Where the file was put.
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
    """Nothing of the file is run.

    Attributes:
        error_count: Faulty lines in all.
        errors: The first few of them; `errors_path` lists all.
        rejected_path: Where the file was put.
        next_step: What its author can do, with the command.
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


class Released(msgspec.Struct, frozen=True, kw_only=True, tag="released"):
    """Somebody was still writing the file: it is back in the inbox.

    Attributes:
        released_path: Where it is now.
    """

    file_name: str
    reason: str
    released_path: str

    def __str__(self) -> str:
        return f"{self.file_name}: {self.reason}; it is back in the inbox as {self.released_path}"


class Held(msgspec.Struct, frozen=True, kw_only=True, tag="held"):
    """There is no room for the file now: it is back in the inbox, and will be claimed again.

    Attributes:
        detail: The reason as a sentence with numbers.
        released_path: Where it is now.
    """

    file_name: str
    reason: WaitReason
    detail: str
    released_path: str

    def __str__(self) -> str:
        return f"{self.file_name}: {self.reason}: {self.detail}; it waits in the inbox"


Admission = Admitted | AlreadyAdmitted | Rejected | Held
Verdict = Admission | Released
