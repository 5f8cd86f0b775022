"""Batches: their identity, their plan, their options and their life cycle."""

import hashlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any

import msgspec

#: Who submits what lies in the inbox itself and does not say whose it is.
DEFAULT_SOURCE = "inbox"
SOURCE_MAX_LENGTH = 64
#: Folder of the inbox in which nothing waits.
REJECTED = "rejected"


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """Where a dropped file came from: what its claim remembers of it.

    Attributes:
        folder: Within the inbox, `/` between its parts; empty for the inbox itself.
        source: What that folder says of who submits; a side-car knows better.
        priority: What it says of the priority; a side-car knows better.
        arrived_at: When the file came to lie there, POSIX seconds.
    """

    folder: str = ""
    source: str = DEFAULT_SOURCE
    priority: int = 0
    arrived_at: float = 0.0


def origin_in(
    folders: Sequence[str], priorities: Mapping[str, int], *, arrived_at: float
) -> Origin:
    """Return the origin of a file by the folders that it lies in.

    Args:
        folders: From the inbox down. The first that is no priority folder names the source, the
            last that is one the priority.
        priorities: Priority folders, in any case, with their priority.
        arrived_at: POSIX seconds.
    """
    by_name = {name.casefold(): priority for name, priority in priorities.items()}
    priority = [by_name[name.casefold()] for name in folders if name.casefold() in by_name]
    sources = [name for name in folders if name.casefold() not in by_name]
    return Origin(
        folder="/".join(folders),
        source=sources[0][:SOURCE_MAX_LENGTH] if sources else DEFAULT_SOURCE,
        priority=priority[-1] if priority else 0,
        arrived_at=arrived_at,
    )


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


#: Long enough to recognise the file, short enough for file names and the UI.
SLUG_MAX_LENGTH = 40
ID_HASH_DIGITS = 8
METADATA_MAX_PAIRS = 16
#: In either direction.
MAX_PRIORITY = 1000
#: Of one line of a batch file, unless a setting says otherwise.
MAX_LINE_BYTES = 16 * 2**20
#: OpenAI's limits on a batch, unless settings say otherwise. With more requests a file is a batch
#: all the same: so many of them are open at a time. The bytes are those of the expanded file.
MAX_REQUESTS_PER_BATCH = 50_000
MAX_FILE_BYTES = 200 * 2**20
#: For example `24h` or `1h30m`; `core.lifecycle.window_seconds` reads it.
DURATION = r"^([1-9][0-9]{0,8}[smhd])+\Z"
#: Options that came later: at their default they do not change the identity of older batches.
_LATER_OPTIONS = ("user", "max_failure_rate")
_NOT_SLUG = re.compile(r"[^a-z0-9]+")


class BatchStatus(StrEnum):
    """OpenAI's eight words for the life of a batch."""

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
    """What faulty lines do to the rest of their file."""

    #: Each becomes a row of the error file; the rest runs.
    LENIENT = "lenient"
    #: One is enough to refuse the file.
    STRICT = "strict"


class OnOversize(StrEnum):
    """What becomes of a file with more requests than a batch may have open at a time."""

    #: A batch that is answered window by window.
    WINDOW = "window"
    #: It is refused.
    REJECT = "reject"


Metadata = Annotated[dict[str, str], msgspec.Meta(max_length=METADATA_MAX_PAIRS)]
FailureShare = Annotated[float, msgspec.Meta(ge=0, le=1)]
User = Annotated[str, msgspec.Meta(pattern="^[^\\x00-\\x1f]+$", max_length=SOURCE_MAX_LENGTH)]


class BatchOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the author may say about a batch: the side-car `<name>.meta.json` or CLI flags.

    Attributes:
        model: Served model that answers every request of the batch, whatever their bodies say.
        priority: Higher runs earlier.
        metadata: Up to 16 pairs, echoed back in the report and by `status`.
        completion_window: For example `24h` or `1h30m`, from admission; what has no answer then
            is not asked any more.
        user: Who submits it; else the folder of the inbox says so.
        max_failure_rate: Share of the latest requests that may fail before the batch pauses, 0 to
            1; None leaves it to the deployment.
    """

    model: str | None = None
    priority: Annotated[int, msgspec.Meta(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = 0
    metadata: Metadata = {}
    completion_window: Annotated[str, msgspec.Meta(pattern=DURATION)] = "24h"
    user: User | None = None
    max_failure_rate: FailureShare | None = None

    @property
    def source(self) -> str:
        """Who submits the batch: one of those between whom the engine is shared fairly."""
        return self.user or DEFAULT_SOURCE


class BatchPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Everything decided at admission; it never changes afterwards.

    Attributes:
        batch_id: Readable and unique: file stem and first digits of the identity.
        identity: See `identity`.
        file_name: What the author called the file.
        sha256: Of the kept input (uncompressed), hexadecimal.
        size_bytes: Of the kept input (uncompressed).
        requests: Non-blank lines, faulty ones included.
        faulty: How many of them were refused at admission.
        max_line_bytes: Longer lines were refused at admission.
        settings: What answers depend on, by name; its hash is `settings_hash`.
        created_at: POSIX seconds.
        source: Who submitted it, see `BatchOptions.source`.
        arrived_at: In the inbox, POSIX seconds; 0 if that is not known.
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
        """Requests of each chunk but the last, which may have fewer."""
        return self.chunks[0].requests if self.chunks else 1

    @property
    def chunk_keys(self) -> list[str]:
        """Partition keys of all chunks, in file order."""
        return [chunk_key(self.batch_id, chunk.number) for chunk in self.chunks]

    @property
    def settings_hash(self) -> str:
        """Hash of what answers depend on."""
        return settings_hash(self.settings)


def slug(file_name: str) -> str:
    """Return the file's stem as lower-case ASCII fit for ids; `batch` if nothing is left.

    Directories and the endings `.jsonl`, `.jsonl.gz` are dropped.
    """
    stem = re.split(r"[/\\]", file_name)[-1]
    stem = re.sub(r"\.jsonl(\.gz)?$", "", stem, flags=re.IGNORECASE)
    ascii_stem = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode()
    return _NOT_SLUG.sub("-", ascii_stem.lower()).strip("-")[:SLUG_MAX_LENGTH].strip("-") or "batch"


def identity(sha256: str, options: BatchOptions) -> str:
    """Return what makes two drops the same batch: content and options, not the name.

    Args:
        sha256: Of the uncompressed content, hexadecimal.
        options: Options of the drop.
    """
    said = msgspec.to_builtins(options)
    for name in _LATER_OPTIONS:
        if said[name] is None:
            del said[name]
    return hashlib.sha256(sha256.encode() + msgspec.json.encode(said, order="sorted")).hexdigest()


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
