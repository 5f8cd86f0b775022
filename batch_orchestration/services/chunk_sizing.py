"""How many requests a chunk of a file has: by a sample of its lines, before the file is read.

Chunks are cut while the file is read; how many requests it has, and what they are like, is known
only afterwards. So its lines are run through before, without looking into them, and some from all
over it are looked at.
"""

import logging
import math
from collections.abc import Sequence
from typing import BinaryIO

import msgspec

from batch_orchestration.core.batches import MOST_CHUNKS
from batch_orchestration.core.requests import parse_line
from batch_orchestration.estimates import derivation
from batch_orchestration.estimates.derivation import Derived, request_tokens
from batch_orchestration.files.input_lines import read_lines
from batch_orchestration.services.intake import Intake
from batch_orchestration.services.line_reading import ReadingRules, judge

logger = logging.getLogger(__name__)

#: Lines that are looked at: as many as this, or up to twice as many.
SAMPLE = 200


def choose_chunk_size(
    file: BinaryIO,
    *,
    configured: int | None,
    rules: ReadingRules,
    intake: Intake,
    most_chunks: int = MOST_CHUNKS,
) -> int:
    """Return how many requests each chunk of an open file should have, and log why.

    The file is at its beginning afterwards.

    Args:
        configured: So many at least; None to derive it from the requests.
        intake: That will see the file's requests; it sees none of them here.
        most_chunks: Into which the file is cut, however long it is.
    """
    if configured is None and intake.knows_costs:
        requests, sample = sample_lines(file, max_line_bytes=rules.max_line_bytes)
        derived = _derive(sample, intake.anew())
    else:
        requests = sum(not line.blank for line in read_lines(file, rules.max_line_bytes))
        derived = derivation.chunk_size(None, None, at_a_time=1)
        if configured is not None:
            derived = Derived(name="chunk", value=configured, why="as it is configured")
    file.seek(0)
    least = math.ceil(requests / most_chunks)
    if derived.value < least:
        why = f"at most {most_chunks:,} chunks a batch; else {derived}"
        derived = msgspec.structs.replace(derived, value=least, why=why)
    logger.info("%s", derived)
    return int(derived.value)


def _derive(sample: Sequence[bytes], trial: Intake) -> Derived:
    for number, data in enumerate(sample):
        judge(parse_line(data, index=number, line=number + 1, model_required=False), trial.examine)
    estimate = trial.estimate(at=0.0)
    tokens = request_tokens([estimate])
    return derivation.chunk_size(estimate.costs, tokens, at_a_time=estimate.at_a_time)


def sample_lines(file: BinaryIO, *, max_line_bytes: int) -> tuple[int, list[bytes]]:
    """Return how many requests a file has, and every nth of their lines.

    Each has the same chance, wherever it stands and however long it is: files are often sorted.
    Only those that are too long have none. Of what is not looked at nothing is held.
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
