"""The report on a finished batch, for an operator at three in the morning.

`report.md` and `report.html` are the same document; `report.md.j2` is its template. The report
contains ids, codes and messages, never prompts or answers.
"""

from collections.abc import Mapping

from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.core.lifecycle import EarlyEnd
from batch_orchestration.core.results import BatchRecord, BatchTotals, ChunkReport
from batch_orchestration.estimates.scoring import Scored
from batch_orchestration.reports.documents import to_markdown
from batch_orchestration.reports.gathering import ReportFigures

#: Of a batch with more chunks, only the slowest are shown.
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
    early_end: EarlyEnd | None = None,
    figures: ReportFigures = _NO_FIGURES,
) -> str:
    """Return the report as Markdown. The same arguments always give the same report.

    Args:
        record: Record of the batch; the report uses no time that a second assembly changes.
        chunks: Chunk reports by number.
        outbox: Folder of the delivered files, as a person would write it.
        scored: The estimate made at admission, with actual figures.
        early_end: The early end of the batch; None if it was completed.
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
        early_end=early_end,
        figures=figures,
    )
