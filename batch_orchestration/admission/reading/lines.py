"""One pass over a batch file: requests and faults line by line, chunks, hash and counts."""

import hashlib
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import msgspec

from batch_orchestration.admission.reading.screening import Screening
from batch_orchestration.core.batches import MOST_CHUNKS, BatchOptions, Chunk, MemoryDemand
from batch_orchestration.core.errors import BatchOrchestrationError
from batch_orchestration.core.outcomes import FailureCode
from batch_orchestration.core.requests import (
    ANY_MODEL,
    UTF8_BOM,
    Fault,
    Request,
    parse_line,
    too_long_fault,
)
from batch_orchestration.engines.memory_demand import NO_DEMAND, combined, request_demand
from batch_orchestration.estimates import derivation
from batch_orchestration.estimates.derivation import DEFAULT_CHUNK, Derived, request_tokens
from batch_orchestration.files.input_lines import RawLine, new_digest, read_lines
from batch_orchestration.settings import Settings
from batch_orchestration.workers.reporter import report_progress

logger = logging.getLogger(__name__)
#: The differences between two faults of one kind: places, numbers and quotations.
_PARTICULARS = re.compile(r"\d[\d,.]*|\"[^\"]*\"?|'[^']*'?")
#: Kinds of faults that are counted; a file of noise may have a kind per line.
_MOST_KINDS = 100


def model_required(settings: Settings, options: BatchOptions | None = None) -> bool:
    """Whether each body must name a model, because neither an alias nor the batch does."""
    named = options is not None and options.model is not None
    return not named and ANY_MODEL not in settings.model_aliases


def screen(parsed: Request | Fault, screening: Screening | None) -> Request | Fault:
    """Return the result of screening a usable request; return a fault unchanged.

    If the screening fails, the line becomes a fault. Only errors of disk, memory and store are
    raised: these are not caused by the line.
    """
    if isinstance(parsed, Fault) or screening is None:
        return parsed
    try:
        return screening.examine(parsed)
    except (OSError, MemoryError, BatchOrchestrationError):
        raise
    except Exception as error:  # a line must stop neither its file nor other files
        logger.debug("line %d cannot be examined", parsed.line, exc_info=True)
        reason = f"the request cannot be examined: {type(error).__name__}: {error}"[:500]
        return parsed.refused(FailureCode.INVALID_REQUEST, reason)


class BatchFileReading:
    """Reads a batch file once, from its first byte, and counts its lines, requests and faults.

    It holds one line of the file, and a hash of 16 bytes per usable request to find duplicates:
    about 150 bytes of memory each. The chunks cover every byte of the file exactly once. All
    counts cover the part that has been read so far.

    Args:
        screening: Screens each request that is usable so far, and derives the chunk size. Without
            it, no request is refused, and chunks have the configured or the default size.
    """

    def __init__(
        self,
        settings: Settings,
        options: BatchOptions | None = None,
        *,
        screening: Screening | None = None,
    ) -> None:
        self.requests = 0
        self.faults_by_code: Counter[FailureCode] = Counter()
        self._kinds: Counter[str] = Counter()
        self._first_of_kind: dict[str, Fault] = {}
        self.lines = 0
        self.size_bytes = 0
        #: The first bytes that are not white space: they reveal formats other than JSON lines.
        self.beginning = b""
        self._settings = settings
        self._model_required = model_required(settings, options)
        self._screening = screening
        self._sha256 = hashlib.sha256()
        self._chunks = _ChunkCutter(settings.requests_per_chunk or DEFAULT_CHUNK)
        self._first_lines: dict[bytes, int] = {}

    def read(self, file: BinaryIO) -> Iterator[Request | Fault]:
        """Yield the request or fault of each non-blank line, in file order.

        If usable requests share a `custom_id`, all but the first become faults.
        """
        if self._screening is not None:
            size = choose_chunk_size(file, settings=self._settings, screening=self._screening)
            self._chunks = _ChunkCutter(size)
        for line in read_lines(file, self._settings.max_line_bytes, observe=self._observe):
            self.lines, self.size_bytes = line.line, line.end
            self._chunks.add(line)
            report_progress()
            if line.blank:
                continue
            self.requests += 1
            self.beginning = self.beginning or line.data.removeprefix(UTF8_BOM).lstrip()[:16]
            parsed = screen(self._refuse_duplicate(self._parse(line)), self._screening)
            if isinstance(parsed, Fault):
                self._count_fault(parsed)
            else:
                self._chunks.include(request_demand(parsed, self._settings.max_tokens_cap))
            yield parsed

    @property
    def faulty(self) -> int:
        """Number of requests that cannot be used."""
        return self.faults_by_code.total()

    def commonest_fault(self) -> tuple[int, Fault] | None:
        """Return how many lines have the commonest kind of fault, and the first of them."""
        for kind, count in self._kinds.most_common(1):
            return count, self._first_of_kind[kind]
        return None

    @property
    def usable(self) -> int:
        """Number of requests that can be sent to an engine."""
        return self.requests - self.faulty

    @property
    def sha256(self) -> str:
        """Hexadecimal digest of all bytes."""
        return self._sha256.hexdigest()

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """The chunks, in file order; none if there is no request."""
        return self._chunks.all()

    def _observe(self, data: bytes) -> None:
        self._sha256.update(data)
        self._chunks.observe(data)

    def _count_fault(self, fault: Fault) -> None:
        self.faults_by_code[fault.code] += 1
        kind = _PARTICULARS.sub("", fault.message)
        if kind in self._kinds or len(self._kinds) < _MOST_KINDS:
            self._kinds[kind] += 1
            self._first_of_kind.setdefault(kind, fault.lean())

    def _parse(self, line: RawLine) -> Request | Fault:
        if line.too_long:
            return too_long_fault(
                line.data,
                index=line.index,
                line=line.line,
                size_bytes=line.end - line.start,
                max_line_bytes=self._settings.max_line_bytes,
            )
        return parse_line(
            line.data, index=line.index, line=line.line, model_required=self._model_required
        )

    def _refuse_duplicate(self, parsed: Request | Fault) -> Request | Fault:
        if isinstance(parsed, Fault):
            return parsed
        # Ids have up to 512 characters; collisions of a 128-bit hash are negligible.
        key = hashlib.blake2b(parsed.custom_id.encode(), digest_size=16).digest()
        first_line = self._first_lines.setdefault(key, parsed.line)
        if first_line == parsed.line:
            return parsed
        reason = f"`custom_id` is already that of line {first_line}"
        return parsed.refused(FailureCode.DUPLICATE_CUSTOM_ID, reason)


class _ChunkCutter:
    """Cuts a file into chunks while it is read; bytes are observed before their line is added.

    Blank lines belong to the chunk before them, those at the top of the file to the first.
    """

    def __init__(self, requests_per_chunk: int) -> None:
        self._requests_per_chunk = requests_per_chunk
        self._done: list[Chunk] = []
        self._first = RawLine(1, 0, 0, 0, b"", too_long=False, blank=True)
        self._requests = 0
        self._end = 0
        self._memory = NO_DEMAND
        #: Digests of the chunk up to the last line added, without and with the bytes since.
        self._digest, self._digest_with_next = new_digest(), new_digest()
        #: Digest of a chunk that would begin with these bytes.
        self._digest_of_next = new_digest()

    def observe(self, data: bytes) -> None:
        self._digest_with_next.update(data)
        if self._full:
            self._digest_of_next.update(data)

    def add(self, line: RawLine) -> None:
        if self._full and not line.blank:
            self._done.append(self._cut())
            self._first, self._requests, self._memory = line, 0, NO_DEMAND
            self._digest_with_next = self._digest_of_next
        self._requests += not line.blank
        self._end = line.end
        if self._full:
            self._digest = self._digest_with_next.copy()
            self._digest_of_next = new_digest()

    def include(self, demand: MemoryDemand) -> None:
        """Add the demand of the line added last."""
        self._memory = combined((self._memory, demand))

    def all(self) -> tuple[Chunk, ...]:
        if not self._requests:
            return ()
        self._digest = self._digest_with_next
        return (*self._done, self._cut())

    @property
    def _full(self) -> bool:
        return self._requests == self._requests_per_chunk

    def _cut(self) -> Chunk:
        return Chunk(
            number=len(self._done),
            first_index=self._first.index,
            requests=self._requests,
            first_line=self._first.line,
            start=self._first.start,
            end=self._end,
            digest=self._digest.hexdigest(),
            memory=self._memory,
        )


#: Lines in a sample of a long file: at least this many, and fewer than twice as many.
SAMPLE = 200


def choose_chunk_size(
    file: BinaryIO,
    *,
    settings: Settings,
    screening: Screening,
    most_chunks: int = MOST_CHUNKS,
) -> int:
    """Return the number of requests per chunk for an open file, and log the reason.

    It is at least the configured one, or else derived from the requests. It is at most the number
    that may be open at a time, because a chunk is open as a whole; `most_chunks` overrides that.
    The file is at its beginning afterwards.

    Args:
        screening: Screens the file's requests later; only a fresh copy of it is used here.
        most_chunks: Maximum number of chunks for a file of any length.
    """
    configured, most_requests = settings.requests_per_chunk, settings.max_requests_per_batch
    if configured is None and screening.knows_costs:
        requests, sample = sample_lines(file, max_line_bytes=settings.max_line_bytes)
        derived = _derive(sample, screening.fresh_copy())
    else:
        requests = sum(not line.blank for line in read_lines(file, settings.max_line_bytes))
        derived = derivation.chunk_size(None, None, at_a_time=1)
        if configured is not None:
            derived = Derived(name="chunk", value=configured, why="as it is configured")
    file.seek(0)
    if derived.value > most_requests:
        why = f"at most {most_requests:,} requests are open at a time; else {derived}"
        derived = msgspec.structs.replace(derived, value=most_requests, why=why)
    least = math.ceil(requests / most_chunks)
    if derived.value < least:
        why = f"at most {most_chunks:,} chunks a batch; else {derived}"
        derived = msgspec.structs.replace(derived, value=least, why=why)
    logger.info("%s", derived)
    return int(derived.value)


def _derive(sample: Sequence[bytes], trial: Screening) -> Derived:
    for number, data in enumerate(sample):
        screen(parse_line(data, index=number, line=number + 1, model_required=False), trial)
    estimate = trial.estimate(at=0.0)
    tokens = request_tokens([estimate])
    return derivation.chunk_size(estimate.costs, tokens, at_a_time=estimate.at_a_time)


def sample_lines(file: BinaryIO, *, max_line_bytes: int) -> tuple[int, list[bytes]]:
    """Return the number of requests in a file, and a sample of every nth line.

    Files are often sorted, so every line has the same chance, whatever its place and length. Lines
    above `max_line_bytes` are left out. Only sampled lines are held in memory.
    """
    places: list[tuple[int, int]] = []
    stride, requests, fitting = 1, 0, 0
    for line in read_lines(file, max_line_bytes):
        requests += not line.blank
        if line.blank or line.too_long:
            continue
        if fitting % stride == 0:
            places.append((line.start, line.end))
            if len(places) == 2 * SAMPLE:
                places, stride = places[::2], 2 * stride
        fitting += 1
    return requests, [_between(file, *place) for place in places]


def _between(file: BinaryIO, start: int, end: int) -> bytes:
    file.seek(start)
    return file.read(end - start)
