"""How many requests a chunk of a file has: by a sample of its lines, before the file is read.

Chunks are cut while the file is read; what its requests are like is known only afterwards. So its
lines are run through before, without looking into them, and some from all over it are looked at.
"""

import logging
import math
from typing import BinaryIO

import msgspec

from batch_orchestration.domain import derivation
from batch_orchestration.domain.derivation import Derived, request_tokens
from batch_orchestration.domain.requests import parse_line
from batch_orchestration.services.intake import Intake
from batch_orchestration.services.line_reading import ReadingRules, judge
from batch_orchestration.storage.lines import read_lines

logger = logging.getLogger(__name__)

#: Lines that are looked at: as many as this, or up to twice as many.
SAMPLE = 200
#: More chunks of one batch than this are slow to look at, and to launch a backfill over.
MOST_CHUNKS = 1000


def choose_chunk_size(file: BinaryIO, *, rules: ReadingRules, intake: Intake) -> int:
    """Return how many requests each chunk of an open file should have, and log why.

    The file is at its beginning afterwards. A file that cannot be read ahead, as one that is
    expanded on the way, gets the default.

    Args:
        intake: That will see the file's requests; it sees none of them here.
    """
    if not intake.knows_costs or not file.seekable():
        derived = derivation.chunk_size(None, None, at_a_time=1)
    else:
        derived = _derive(file, rules, intake.anew())
    logger.info("%s", derived)
    return int(derived.value)


def _derive(file: BinaryIO, rules: ReadingRules, trial: Intake) -> Derived:
    lines, sampled = sample_lines(file, max_line_bytes=rules.max_line_bytes)
    for number, data in enumerate(sampled):
        judge(parse_line(data, index=number, line=number + 1, model_required=False), trial.examine)
    file.seek(0)
    estimate = trial.estimate(at=0.0)
    tokens = request_tokens([estimate])
    derived = derivation.chunk_size(estimate.costs, tokens, at_a_time=estimate.at_a_time)
    least = math.ceil(min(rules.requests_per_batch, lines) / MOST_CHUNKS)
    if derived.value >= least:
        return derived
    return msgspec.structs.replace(
        derived, value=least, why=f"at most {MOST_CHUNKS:,} chunks a batch; else {derived}"
    )


def sample_lines(file: BinaryIO, *, max_line_bytes: int) -> tuple[int, list[bytes]]:
    """Return how many lines a file has that are requests, and every nth of them.

    Each request has the same chance, wherever it stands and however long it is: files are often
    sorted. Of what is not looked at nothing is held.
    """
    places: list[tuple[int, int]] = []
    stride, lines = 1, 0
    file.seek(0)
    for line in read_lines(file, max_line_bytes):
        if line.blank or line.too_long:
            continue
        if lines % stride == 0:
            places.append((line.start, line.end))
            if len(places) == 2 * SAMPLE:
                places, stride = places[::2], 2 * stride
        lines += 1
    return lines, [_between(file, *place) for place in places]


def _between(file: BinaryIO, start: int, end: int) -> bytes:
    file.seek(start)
    return file.read(end - start)
