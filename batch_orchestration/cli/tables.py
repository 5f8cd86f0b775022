"""Tables for the terminal, and the texts in their cells."""

from collections.abc import Iterable, Sequence
from datetime import datetime

from rich.console import ConsoleRenderable
from rich.table import Table
from rich.text import Text

MESSAGE_LENGTH = 300


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Return a table. Values are shown as they are, never as markup; None is an empty cell."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(Text(column), overflow="fold")
    for row in rows:
        made.add_row(*map(_cell, row))
    return made


def _cell(value: object) -> ConsoleRenderable:
    if isinstance(value, ConsoleRenderable):
        return value
    return Text("" if value is None else str(value))


def moment(posix_seconds: float) -> str:
    """Format a time in the user's time zone."""
    return datetime.fromtimestamp(posix_seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def shortened(text: str) -> str:
    """Return the text on one line, cut at `MESSAGE_LENGTH`."""
    flat = " ".join(text.split())
    return flat if len(flat) <= MESSAGE_LENGTH else flat[: MESSAGE_LENGTH - 1] + "…"
