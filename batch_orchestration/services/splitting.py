"""Splitting: a file with more requests than a batch may have becomes consecutive parts.

The parts share one kept input; the chunks of each are byte ranges of it.
"""

from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import msgspec

from batch_orchestration.domain.batches import BatchPlan, Part
from batch_orchestration.domain.chunks import Chunk
from batch_orchestration.domain.requests import Fault
from batch_orchestration.domain.submissions import Submission, part_id
from batch_orchestration.services.registration import write_fault_journals
from batch_orchestration.storage.files import sync_folder, write_atomically
from batch_orchestration.storage.sharing import share


def write_submission(
    work: Path, whole: BatchPlan, faults: Iterable[Fault], *, requests_per_part: int, at: float
) -> Submission:
    """Write all of a submission but its input into the folder that will be its own.

    Args:
        work: The folder.
        whole: Plan of the file as if it were one batch; no chunk reaches over a border of parts.
        faults: In file order, with indices of the whole file.
        requests_per_part: Of every part but the last.
        at: POSIX seconds.
    """
    parts = part_plans(whole, requests_per_part)
    faulty = [0] * len(parts)
    for number, of_part in groupby(faults, key=lambda fault: fault.index // requests_per_part):
        first = number * requests_per_part
        faulty[number] = write_fault_journals(
            work / "parts" / parts[number].batch_id,
            parts[number],
            (msgspec.structs.replace(fault, index=fault.index - first) for fault in of_part),
            at=at,
        )
    for plan, count in zip(parts, faulty, strict=True):
        kept = msgspec.structs.replace(plan, faulty=count)
        path = work / "parts" / plan.batch_id / "plan.json"
        write_atomically(path, msgspec.json.encode(kept) + b"\n")
        share(path.parent)  # it will be a batch's folder, where people decide
    share(work / "parts")  # who cancels the submission makes them batches
    sync_folder(work / "parts")
    submission = Submission(
        submission_id=whole.batch_id,
        identity=whole.identity,
        file_name=whole.file_name,
        sha256=whole.sha256,
        size_bytes=whole.size_bytes,
        source=whole.source,
        requests=whole.requests,
        faulty=whole.faulty,
        parts=tuple(plan.batch_id for plan in parts),
        options=whole.options,
        created_at=whole.created_at,
    )
    write_atomically(work / "submission.json", msgspec.json.encode(submission) + b"\n")
    return submission


def part_plans(whole: BatchPlan, requests_per_part: int) -> list[BatchPlan]:
    """Return the plans of the parts, in file order; their faulty lines are not counted yet.

    Raises:
        ValueError: A chunk reaches over a border of parts.
    """
    cut = list(_chunks_by_part(whole.chunks, requests_per_part))
    return [
        msgspec.structs.replace(
            whole,
            batch_id=part_id(whole.batch_id, number, len(cut)),
            identity=f"{whole.identity}-p{number}",
            requests=sum(chunk.requests for chunk in chunks),
            faulty=0,
            chunks=chunks,
            part=Part(submission=whole.batch_id, number=number, of=len(cut)),
        )
        for number, chunks in enumerate(cut, start=1)
    ]


def _chunks_by_part(chunks: Iterable[Chunk], requests: int) -> Iterator[tuple[Chunk, ...]]:
    """Yield the chunks of each part, numbered and with indices from 0 within the part."""
    for part, members in groupby(chunks, key=lambda chunk: chunk.first_index // requests):
        yield tuple(
            msgspec.structs.replace(
                chunk, number=number, first_index=chunk.first_index - part * requests
            )
            for number, chunk in enumerate(members)
            if _fits(chunk, requests)
        )


def _fits(chunk: Chunk, requests: int) -> bool:
    if chunk.first_index % requests + chunk.requests > requests:
        raise ValueError(f"chunk {chunk.number} reaches over the border of a part")
    return True
