"""The original lines of requests, read again from a batch's kept input."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.core.requests import (
    Fault,
    Request,
    override_line,
    parse_line,
    too_long_fault,
)
from batch_orchestration.services.chunk_pass import ChunkRef
from batch_orchestration.services.plan_checks import check_input_kept
from batch_orchestration.storage.files import DataFolder, RawLine


@dataclass(frozen=True, kw_only=True)
class OriginalLine:
    """One line as it was admitted, and what it says with some fields of its body replaced."""

    raw: RawLine
    parsed: Request | Fault


def original_lines(
    plan: BatchPlan,
    indices: Collection[int],
    folder: DataFolder,
    *,
    overrides: Mapping[str, object] | None = None,
    model_required: bool = False,
) -> Iterator[OriginalLine]:
    """Yield the lines of some requests in file order; only their chunks are read.

    Raises:
        PlanMismatch: The kept input is not the one that was admitted.
    """
    check_input_kept(plan, folder)
    size = plan.chunks[0].requests  # of every chunk but the last
    wanted = sorted(set(indices))
    for number, members in groupby(wanted, key=lambda index: index // size):
        of_chunk = set(members)
        for raw in ChunkRef.of(plan, number, folder).lines():
            if raw.index in of_chunk:
                parsed = _parse(raw, plan, overrides or {}, model_required=model_required)
                yield OriginalLine(raw=raw, parsed=parsed)


def _parse(
    raw: RawLine, plan: BatchPlan, overrides: Mapping[str, object], *, model_required: bool
) -> Request | Fault:
    if raw.too_long:
        return too_long_fault(
            raw.data,
            index=raw.index,
            line=raw.line,
            size_bytes=raw.end - raw.start,
            max_line_bytes=plan.max_line_bytes,
        )
    data = override_line(raw.data, overrides)
    return parse_line(data, index=raw.index, line=raw.line, model_required=model_required)
