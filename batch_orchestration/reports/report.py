"""The report on a finished batch, for the person who looks at it at three in the morning.

`report.md` and `report.html` are the same document; `report.md.j2` says what is in it. It holds
ids, codes and messages, never prompts or answers.
"""

from collections.abc import Mapping

from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.core.lifecycle import EarlyEnd
from batch_orchestration.core.results import BatchRecord, ChunkReport
from batch_orchestration.core.totals import BatchTotals
from batch_orchestration.estimates.scoring import Scored
from batch_orchestration.reports.documents import to_markdown
from batch_orchestration.reports.gathering import ReportFigures

#: More chunks than these are summed up by the slowest.
CHUNKS_SHOWN = 20

_NO_FIGURES = ReportFigures()


def batch_report(
    plan: BatchPlan,
    record: BatchRecord,
    totals: BatchTotals,
    chunks: Mapping[int, ChunkReport],
    *,
    outbox: str,
    scored: Scored | None = None,
    closing: EarlyEnd | None = None,
    figures: ReportFigures = _NO_FIGURES,
) -> str:
    """Return the report as Markdown; the same figures always give the same one.

    Args:
        plan: Of the batch.
        record: Of the batch; only times that a second assembly does not change are read.
        tally: Of all its requests.
        chunks: Their reports by number.
        outbox: Folder of the files, as a person would write it.
        scored: The estimate made at admission, beside what it took.
        closing: Why it ended early; None if it did not.
        figures: Of the batch over time.
    """
    shown = sorted(chunks.values(), key=lambda chunk: chunk.number)
    if len(shown) > CHUNKS_SHOWN:
        shown = sorted(shown, key=lambda chunk: -chunk.seconds)[:CHUNKS_SHOWN]
    return to_markdown(
        "report.md.j2",
        plan=plan,
        record=record,
        totals=totals,
        chunks=chunks,
        shown=shown,
        outbox=outbox,
        scored=scored,
        closing=closing,
        figures=figures,
    )
