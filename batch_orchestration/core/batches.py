"""Batches: identity, plan, options and status words."""

import hashlib
import re
import unicodedata
from enum import StrEnum
from typing import Annotated, Any

import msgspec

#: Source of a file that lies in the inbox itself and whose side-car names no user.
DEFAULT_SOURCE = "inbox"
SOURCE_MAX_LENGTH = 64
#: Subfolder of the inbox whose files are not admitted.
REJECTED = "rejected"


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """Where a dropped file came from, as recorded in its claim.

    Attributes:
        folder: Path within the inbox, separated by `/`; empty for the inbox itself.
        source: Submitter that the folder implies; a side-car overrides it.
        priority: Priority that the folder implies; a side-car overrides it.
        arrived_at: When the file arrived in the folder.
    """

    folder: str = ""
    source: str = DEFAULT_SOURCE
    priority: int = 0
    arrived_at: float = 0.0


#: Most chunks of one batch. More would make a batch slow to display and to backfill.
MOST_CHUNKS = 2000
#: Dagster accepts any text as a partition key; we accept this form only.
_CHUNK_KEY = re.compile(r"(?P<batch_id>[A-Za-z0-9_-][A-Za-z0-9._-]*)/(?P<number>[0-9]{5})")


class MemoryDemand(msgspec.Struct, frozen=True, kw_only=True):
    """The memory that some requests need in an engine. The defaults stand for unknown requests.

    Attributes:
        longest_tokens: Upper bound of prompt and answer together, for every request; None if a
            request may be of any length.
        prompts_can_be_cut: Every request generates text from text. vLLM then processes a prompt in
            pieces, and `max_num_batched_tokens` may be below its length.
    """

    longest_tokens: int | None = None
    prompts_can_be_cut: bool = False


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """Up to `requests_per_chunk` consecutive requests: the unit of commit and of a partition.

    Attributes:
        number: Position in the batch, from 0.
        requests: Number of requests, faulty lines included.
        first_line: Line number of the first byte, from 1.
        start: Offset of the first byte in the kept input.
        end: Offset after the last byte.
        digest: BLAKE2b-128 of the bytes from `start` to `end`, hexadecimal; detects a changed
            input.
        memory: Demand of the requests that are sent, under the `max_tokens_cap` of the plan.
    """

    number: int
    first_index: int
    requests: int
    first_line: int
    start: int
    end: int
    digest: str
    memory: MemoryDemand = MemoryDemand()


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
        ValueError: The key is not of the form that `chunk_key` returns.
    """
    match = _CHUNK_KEY.fullmatch(key)
    if match is None or ".." in key:
        raise ValueError(f"not a chunk key: {key!r} (expected <batch id>/<five digits>)")
    return match["batch_id"], int(match["number"])


def can_be_id(name: str) -> bool:
    """Whether the name is valid as a batch id, and so as the name of a batch's folder."""
    # Characters that a partition key rejects (`/`, `..`) are unsafe in a path, too.
    try:
        chunk_key(name, 0)
    except ValueError:
        return False
    return True


#: Long enough to recognise the file, short enough for file names and the UI.
SLUG_MAX_LENGTH = 40
ID_HASH_DIGITS = 8
METADATA_MAX_PAIRS = 16
#: Priorities range from minus this to plus this.
MAX_PRIORITY = 1000
#: Default limit for one line of a batch file.
MAX_LINE_BYTES = 16 * 2**20
#: Default limits of a batch, the same as OpenAI's. A file with more requests is admitted as one
#: batch with this many requests open at a time. The bytes are counted after decompression.
MAX_REQUESTS_PER_BATCH = 50_000
MAX_FILE_BYTES = 200 * 2**20
#: Pattern of a duration such as `24h` or `1h30m`; `core.lifecycle.window_seconds` parses it.
DURATION = r"^([1-9][0-9]{0,8}[smhd])+\Z"
#: Options added after the first release. `identity` omits them while they are None, so that the
#: identities of older batches stay the same.
_LATER_OPTIONS = ("user", "max_failure_rate")
_NOT_SLUG = re.compile(r"[^a-z0-9]+")


class BatchStatus(StrEnum):
    """OpenAI's eight status words for a batch."""

    VALIDATING = "validating"
    #: The *file* was unusable; a batch with failed requests is still `completed`.
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


class LinePolicy(StrEnum):
    """How faulty lines affect the rest of their file."""

    #: Each faulty line becomes a row of the error file; the other lines run.
    LENIENT = "lenient"
    #: One faulty line rejects the file.
    STRICT = "strict"


class OnOversize(StrEnum):
    """How to treat a file with more requests than a batch may have open at a time."""

    #: Admit it as a batch that is answered window by window.
    WINDOW = "window"
    #: Reject it.
    REJECT = "reject"


Metadata = Annotated[dict[str, str], msgspec.Meta(max_length=METADATA_MAX_PAIRS)]
FailureShare = Annotated[float, msgspec.Meta(ge=0, le=1)]
User = Annotated[str, msgspec.Meta(pattern="^[^\\x00-\\x1f]+$", max_length=SOURCE_MAX_LENGTH)]


class BatchOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The author's options for a batch, from the side-car `<name>.meta.json` or CLI flags.

    Attributes:
        model: Served model that answers every request; overrides the models named in the bodies.
        priority: Higher runs earlier.
        metadata: Up to 16 pairs, echoed back in the report and by `status`.
        completion_window: Duration from admission, such as `24h` or `1h30m`. Requests without an
            answer at its end are no longer sent.
        user: The submitter; if None, the inbox folder determines it.
        max_failure_rate: Share of the latest requests that may fail before the batch pauses, 0 to
            1; None uses the deployment's setting.
    """

    model: str | None = None
    priority: Annotated[int, msgspec.Meta(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = 0
    metadata: Metadata = {}
    completion_window: Annotated[str, msgspec.Meta(pattern=DURATION)] = "24h"
    user: User | None = None
    max_failure_rate: FailureShare | None = None

    @property
    def source(self) -> str:
        """The submitter; the engine is shared fairly between submitters."""
        return self.user or DEFAULT_SOURCE


class BatchPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Everything decided at admission; it never changes afterwards.

    Attributes:
        batch_id: Readable and unique: file stem and first digits of the identity.
        file_name: The author's name for the file.
        sha256: SHA-256 of the kept input (uncompressed), hexadecimal.
        size_bytes: Size of the kept input (uncompressed).
        requests: Number of non-blank lines, faulty ones included.
        faulty: Number of lines refused at admission.
        max_line_bytes: Limit on a line; longer lines were refused at admission.
        settings: Settings that answers depend on, by name; `settings_hash` is their hash.
        source: The submitter, see `BatchOptions.source`.
        arrived_at: When the file arrived in the inbox; 0 if unknown.
    """

    batch_id: str
    identity: str
    file_name: str
    sha256: str
    size_bytes: int
    requests: int
    faulty: int
    chunks: tuple[Chunk, ...]
    options: BatchOptions
    settings: dict[str, Any]
    created_at: float
    max_line_bytes: int = MAX_LINE_BYTES
    source: str = DEFAULT_SOURCE
    arrived_at: float = 0.0

    @property
    def requests_per_chunk(self) -> int:
        """Number of requests in each chunk; the last chunk may have fewer."""
        return self.chunks[0].requests if self.chunks else 1

    @property
    def chunk_keys(self) -> list[str]:
        """Partition keys of all chunks, in file order."""
        return [chunk_key(self.batch_id, chunk.number) for chunk in self.chunks]

    @property
    def settings_hash(self) -> str:
        """Hash of the settings that answers depend on."""
        return settings_hash(self.settings)


def slug(file_name: str) -> str:
    """Return the file's stem as lower-case ASCII for use in ids; `batch` if nothing is left.

    Directories and the endings `.jsonl` and `.jsonl.gz` are dropped.
    """
    stem = re.split(r"[/\\]", file_name)[-1]
    stem = re.sub(r"\.jsonl(\.gz)?$", "", stem, flags=re.IGNORECASE)
    ascii_stem = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode()
    return _NOT_SLUG.sub("-", ascii_stem.lower()).strip("-")[:SLUG_MAX_LENGTH].strip("-") or "batch"


def identity(sha256: str, options: BatchOptions) -> str:
    """Return a hash of content and options; two drops with equal hashes are the same batch.

    The file's name does not count.

    Args:
        sha256: SHA-256 of the uncompressed content, hexadecimal.
    """
    given = msgspec.to_builtins(options)
    for name in _LATER_OPTIONS:
        if given[name] is None:
            del given[name]
    return hashlib.sha256(sha256.encode() + msgspec.json.encode(given, order="sorted")).hexdigest()


def batch_id(file_name: str, identity: str, *, digits: int = ID_HASH_DIGITS) -> str:
    """Return a readable id: the file's slug and the first digits of the identity."""
    return f"{slug(file_name)}-{identity[:digits]}"


def settings_hash(settings: dict[str, Any]) -> str:
    """Return 16 hexadecimal digits that change with any setting that answers depend on."""
    return hashlib.sha256(msgspec.json.encode(settings, order="sorted")).hexdigest()[:16]


def settings_difference(planned: dict[str, Any], present: dict[str, Any]) -> list[str]:
    """Return one line per setting that differs: `name: planned → present`."""
    missing = "(not set)"
    return [
        f"{name}: {planned.get(name, missing)!r} → {present.get(name, missing)!r}"
        for name in sorted(planned.keys() | present.keys())
        if planned.get(name, missing) != present.get(name, missing)
    ]
