"""Documents as Markdown from a template, and as a page of HTML from that Markdown.

Every value that a template shows is text, and may be somebody else's: it is escaped where it is put
in, whatever the template says. Only the template's own text is markup.
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

#: A message that repeats a whole prompt tells too much and helps nobody.
CELL_LENGTH = 200
#: What would be a link, a picture, code, emphasis, an entity or the end of a cell. Within a word
#: `_` is none of it.
_MARKUP = re.compile(r"[\\|\[\]`*~]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)")
#: Pictures that are in the document itself are all that is loaded or linked.
_PICTURE = "data:image/svg+xml;base64,"


@dataclass(frozen=True)
class Picture:
    """A picture as SVG; `name` is one word, unique in the document."""

    name: str
    title: str
    svg: bytes

    @property
    def uri(self) -> str:
        """The picture itself, as an address."""
        return f"{_PICTURE}{b64encode(self.svg).decode()}"


def to_markdown(template: str, **values: Any) -> str:
    """Return a document as Markdown.

    Args:
        template: Name of a file beside this one.
        values: What it shows.
    """
    return _environment(escape).get_template(template).render(values)


def to_html(title: str, markdown: str) -> str:
    """Return a document as one page of HTML that needs nothing else and loads nothing."""
    from markdown_it import MarkdownIt
    from markupsafe import Markup

    class Parser(MarkdownIt):
        def validateLink(self, url: str) -> bool:
            return url.startswith(_PICTURE)

    parser = Parser("commonmark", {"breaks": True, "html": False}).enable("table")
    page = _environment().get_template("report.html.j2")
    return page.render(title=title, body=Markup(parser.render(markdown)))


def escape(value: object) -> "Markup":
    """Return text on one line that means nothing in Markdown, nor in HTML."""
    from markupsafe import Markup

    if isinstance(value, Markup):
        return value
    return Markup(_MARKUP.sub(r"\\\g<0>", _flat(value)).replace("<", "&lt;"))


@cache
def _environment(finalize: Callable[[object], str] | None = None) -> "Environment":
    # A quarter of a second, which only who delivers a batch shall pay; so are the other imports.
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
    """Return text for a machine: a command, a code, a file name."""
    from markupsafe import Markup

    # A backtick cannot be escaped within.
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
