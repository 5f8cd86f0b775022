"""Renders the report of a finished batch, for an operator at three in the morning.

`report.md` comes from the template `report.md.j2`; `report.html` is the same document, made from
that Markdown. The report contains ids, codes and messages, never prompts or answers. Every value
shown by a template is untrusted text: it is escaped on insertion, whatever the template contains.
Only the template's own text is markup.
"""

import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.core.lifecycle import EarlyEnd
from batch_orchestration.core.results import BatchRecord, BatchTotals, ChunkReport
from batch_orchestration.core.text import duration
from batch_orchestration.estimates.estimate import seconds_band, tokens_band
from batch_orchestration.estimates.scoring import Scored
from batch_orchestration.reports.gathering import BatchStats
from batch_orchestration.reports.plots import URI_PREFIX

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

#: Of a batch with more chunks, only the slowest are shown.
CHUNKS_SHOWN = 20
#: Limit on a table cell: a message that repeats a whole prompt discloses it and helps no reader.
CELL_LENGTH = 200
#: Characters that could start a link, a picture, code, emphasis or an entity, or end a cell. An `_`
#: within a word is harmless.
_MARKUP = re.compile(r"[\\|\[\]`*~]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)")
_NO_STATS = BatchStats()


def batch_report(
    plan: BatchPlan,
    record: BatchRecord,
    totals: BatchTotals,
    chunks: Mapping[int, ChunkReport],
    *,
    outbox: str,
    scored: Scored | None = None,
    early_end: EarlyEnd | None = None,
    stats: BatchStats = _NO_STATS,
) -> str:
    """Return the report as Markdown. The same arguments always give the same report.

    Args:
        record: Record of the batch; the report uses no time that a second assembly changes.
        chunks: Chunk reports by number.
        outbox: Folder of the delivered files, as a person would write it.
        scored: The estimate made at admission, with the actual values.
        early_end: The early end of the batch; None if it was completed.
    """
    shown = sorted(chunks.values(), key=lambda chunk: chunk.number)
    if len(shown) > CHUNKS_SHOWN:
        shown = sorted(shown, key=lambda chunk: -chunk.seconds)[:CHUNKS_SHOWN]
    return (
        _environment(escape)
        .get_template("report.md.j2")
        .render(
            plan=plan,
            record=record,
            totals=totals,
            chunks=chunks,
            shown=shown,
            outbox=outbox,
            scored=scored,
            early_end=early_end,
            stats=stats,
        )
    )


def to_html(title: str, markdown: str) -> str:
    """Return a document as one self-contained HTML page that loads nothing."""
    from markdown_it import MarkdownIt
    from markupsafe import Markup

    class Parser(MarkdownIt):
        def validateLink(self, url: str) -> bool:
            return url.startswith(URI_PREFIX)

    parser = Parser("commonmark", {"breaks": True, "html": False}).enable("table")
    page = _environment().get_template("report.html.j2")
    return page.render(title=title, body=Markup(parser.render(markdown)))


def escape(value: object) -> "Markup":
    """Join the lines of a value, and escape it for Markdown and HTML."""
    from markupsafe import Markup

    if isinstance(value, Markup):
        return value
    return Markup(_MARKUP.sub(r"\\\g<0>", _flat(value)).replace("<", "&lt;"))


@cache
def _environment(finalize: Callable[[object], str] | None = None) -> "Environment":
    # Takes a quarter of a second, so it is imported at delivery only, as are the other libraries.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        autoescape=True,
        finalize=finalize,
        keep_trailing_newline=True,
        loader=FileSystemLoader(Path(__file__).parent),
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "cell": _cell,
        "code": _code,
        "code_cell": _code_cell,
        "duration": duration,
        "latency": _latency,
        "moment": _moment,
        "number": _number,
        "percent": _percent,
        "seconds_band": seconds_band,
        "tokens_band": tokens_band,
    }
    return environment


def _flat(value: object) -> str:
    return " ".join(str(value).split())


def _cell(value: object) -> str:
    text = _flat(value)
    return text if len(text) <= CELL_LENGTH else f"{text[: CELL_LENGTH - 1]}…"


def _code(value: object) -> "Markup":
    """Return a command, code or file name as inline code."""
    from markupsafe import Markup

    # A backtick cannot be escaped within inline code.
    text = _flat(value).replace("`", "'")
    return Markup(f"`{text}`" if text else "")


def _code_cell(value: object) -> "Markup":
    from markupsafe import Markup

    return Markup(_code(_cell(value)).replace("|", r"\|"))


def _latency(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds < 1 else duration(seconds)


def _moment(posix_seconds: float) -> str:
    return datetime.fromtimestamp(posix_seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _number(value: float, decimals: int = 0) -> str:
    return f"{value:,.{decimals}f}"


def _percent(value: float, decimals: int = 0) -> str:
    return f"{value:.{decimals}%}"
