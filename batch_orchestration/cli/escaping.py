"""Untrusted text on a terminal: characters that control it or reverse its lines are made visible.

A custom_id, an engine's message or a file's name can hold any character. Text reaches the terminal
only through `say`, `VisibleConsole` and `print_json`.
"""

import re
from collections.abc import Iterable

import click
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

#: Controls (C0 but tab and newline, DEL, C1), direction marks, lone surrogates, invisible tags.
_COMMANDING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
_PICTURES = 0x2400
_DEL, _DEL_PICTURE = 0x7F, "\u2421"


def visible(text: str) -> str:
    """Return text with every character visible: C0 and DEL as pictures, the others as escapes."""
    return _COMMANDING.sub(_picture, text)


def escaped(json: str) -> str:
    """Return equivalent JSON in which the same characters are escaped."""
    return _COMMANDING.sub(_escape, json)


def say(message: str = "", *, err: bool = False, nl: bool = True) -> None:
    """Print a message, with every character visible."""
    click.echo(visible(message), err=err, nl=nl)


class VisibleConsole(Console):
    """A console that sends only its own control sequences."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Yield the segments with visible text; rich's own control segments pass unchanged."""
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(visible(segment.text), segment.style)


def _picture(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < ord(" "):
        return chr(_PICTURES + code)
    return _DEL_PICTURE if code == _DEL else _escape(match)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code <= 0xFFFF:
        return f"\\u{code:04x}"
    high, low = divmod(code - 0x10000, 0x400)
    return f"\\u{0xD800 + high:04x}\\u{0xDC00 + low:04x}"
