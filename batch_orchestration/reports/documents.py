"""Renders documents: Markdown from a template, and an HTML page from that Markdown.

Every value shown by a template is untrusted text: it is escaped on insertion, whatever the template
contains. Only the template's own text is markup.
"""

import re
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batch_orchestration.core.text import duration
from batch_orchestration.estimates.estimate import seconds_band, tokens_band

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

#: Limit on a table cell: a message that repeats a whole prompt discloses it and helps no reader.
CELL_LENGTH = 200
#: Characters that could start a link, a picture, code, emphasis or an entity, or end a cell. An `_`
#: within a word is harmless.
_MARKUP = re.compile(r"[\\|\[\]`*~]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)")
#: Prefix of embedded pictures; nothing else is loaded or linked.
_PICTURE = "data:image/svg+xml;base64,"


@dataclass(frozen=True)
class Picture:
    """An SVG picture; `name` is one word, unique in the document."""

    name: str
    title: str
    svg: bytes

    @property
    def uri(self) -> str:
        """Data URI of the picture."""
        return f"{_PICTURE}{b64encode(self.svg).decode()}"


def to_markdown(template: str, **values: Any) -> str:
    """Return a document as Markdown.

    Args:
        template: Name of a template file beside this module.
        values: Values that the template shows.
    """
    return _environment(escape).get_template(template).render(values)


def to_html(title: str, markdown: str) -> str:
    """Return a document as one self-contained HTML page that loads nothing."""
    from markdown_it import MarkdownIt
    from markupsafe import Markup

    class Parser(MarkdownIt):
        def validateLink(self, url: str) -> bool:
            return url.startswith(_PICTURE)

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
