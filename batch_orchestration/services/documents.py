"""Documents of headings, tables and plots: one structure, written as Markdown and as HTML.

Every string in it is plain text and may be somebody else's. The two writers escape it; nothing else
does, and nothing in it is markup.
"""

import html
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

#: A message that repeats a whole prompt tells too much and helps nobody.
CELL_LENGTH = 200


@dataclass(frozen=True)
class Code:
    """Text for a machine: a command, a code, a file name."""

    text: str


@dataclass(frozen=True)
class Strong:
    """Text that must not be overlooked."""

    text: str


Piece = str | Code | Strong
#: A stretch of text: a piece of it, or several one after the other.
Text = Piece | Sequence[Piece]


@dataclass(frozen=True)
class Heading:
    """A heading; the document's own has level 1."""

    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """A paragraph."""

    text: Text


@dataclass(frozen=True)
class Quote:
    """Lines that are set apart."""

    lines: Sequence[Text]


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: Sequence[Text]


@dataclass(frozen=True)
class Table:
    """A table; what is too long for a cell is cut."""

    header: Sequence[str]
    rows: Sequence[Sequence[Text]]


@dataclass(frozen=True)
class Picture:
    """A picture as SVG; `name` is one word, unique in the document."""

    name: str
    title: str
    svg: bytes

    @property
    def uri(self) -> str:
        """The picture itself, as an address."""
        return f"data:image/svg+xml;base64,{b64encode(self.svg).decode()}"


Block = Heading | Paragraph | Quote | Bullets | Table | Picture


def to_markdown(blocks: Iterable[Block]) -> str:
    """Return a document as Markdown.

    Pictures are named where they belong and follow at the end, so that the text can be read in a
    terminal.
    """
    shown = list(blocks)
    parts = [_markdown(block) for block in shown]
    pictures = [f"[{block.name}]: {block.uri}" for block in shown if isinstance(block, Picture)]
    return "\n\n".join([*parts, *(["\n".join(pictures)] if pictures else [])]) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {_markdown_text(text)}"
        case Paragraph(text):
            return _markdown_text(text)
        case Quote(lines):
            return "\n".join(f"> {_markdown_text(line)}" for line in lines)
        case Bullets(items):
            return "\n".join(f"- {_markdown_text(item)}" for item in items)
        case Table(header, rows):
            table: list[Sequence[Text]] = [header, ["---"] * len(header), *rows]
            return "\n".join(f"| {' | '.join(map(_markdown_cell, row))} |" for row in table)
        case Picture(name, title):
            return f"![{_markdown_text(title)}][{name}]"


def _markdown_cell(text: Text) -> str:
    return " ".join(_markdown_piece(_cut(piece), in_table=True) for piece in _pieces(text))


def _markdown_text(text: Text) -> str:
    return "".join(_markdown_piece(piece) for piece in _pieces(text))


def _markdown_piece(piece: Piece, *, in_table: bool = False) -> str:
    match piece:
        case Code(text):
            # A backtick cannot be escaped within; a pipe must be, even there.
            text = _flat(text).replace("`", "'")
            return f"`{text.replace('|', chr(92) + '|') if in_table else text}`"
        case Strong(text):
            return f"**{_markdown_plain(text)}**"
        case str(text):
            return _markdown_plain(text)


def _markdown_plain(text: str) -> str:
    """Take the meaning from what would be a tag, a link, a picture, code or the end of a cell."""
    for character in "\\|[]`*":
        text = text.replace(character, f"\\{character}")
    return _spaced(text).replace("<", "&lt;")


def to_html(title: str, blocks: Iterable[Block]) -> str:
    """Return a document as one page of HTML that needs nothing else and loads nothing."""
    body = "\n".join(_html(block) for block in blocks)
    return _PAGE.format(title=html.escape(title), body=body, style=_STYLE)


def _html(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{_html_text(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{_html_text(text)}</p>"
        case Quote(lines):
            return f"<blockquote>{'<br>'.join(map(_html_text, lines))}</blockquote>"
        case Bullets(items):
            return f"<ul>{''.join(f'<li>{_html_text(item)}</li>' for item in items)}</ul>"
        case Table(header, rows):
            head = "".join(f"<th>{_html_text(name)}</th>" for name in header)
            lines = "\n".join(f"<tr>{''.join(map(_html_cell, row))}</tr>" for row in rows)
            head = f"<thead><tr>{head}</tr></thead>" if any(header) else ""
            return f'<div class="wide"><table>{head}<tbody>\n{lines}\n</tbody></table></div>'
        case Picture(_, title):
            return f'<figure><img alt="{html.escape(title)}" src="{block.uri}"></figure>'


def _html_cell(text: Text) -> str:
    return f"<td>{' '.join(_html_piece(_cut(piece)) for piece in _pieces(text))}</td>"


def _html_text(text: Text) -> str:
    return "".join(_html_piece(piece) for piece in _pieces(text))


def _html_piece(piece: Piece) -> str:
    match piece:
        case Code(text):
            return f"<code>{html.escape(_flat(text))}</code>"
        case Strong(text):
            return f"<strong>{html.escape(_spaced(text))}</strong>"
        case str(text):
            return html.escape(_spaced(text))


def _pieces(text: Text) -> Sequence[Piece]:
    return (text,) if isinstance(text, str | Code | Strong) else text


def _cut(piece: Piece) -> Piece:
    text = _flat(piece if isinstance(piece, str) else piece.text)
    if len(text) > CELL_LENGTH:
        text = text[: CELL_LENGTH - 1] + "…"
    return text if isinstance(piece, str) else type(piece)(text)


def _flat(text: str) -> str:
    return " ".join(text.split())


def _spaced(text: str) -> str:
    """Make one line of it; spaces at its ends are between it and its neighbours."""
    return "".join(" " if character in "\n\r\t\v\f\x1c\x1d\x1e\x85" else character
                   for character in text)  # fmt: skip


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line) }
.wide { overflow-x: auto }
table { border-collapse: collapse }
th, td { text-align: left; vertical-align: top; padding: .25rem .9rem .25rem 0;
  border-bottom: 1px solid var(--line) }
th { white-space: nowrap }
td { overflow-wrap: anywhere; min-width: 4.5em }
code { background: var(--soft); padding: 0 .25em; border-radius: 3px }
blockquote { margin: 1rem 0; padding: .5rem 1rem; border-left: 4px solid #D55E00;
  background: var(--soft) }
figure { margin: 1rem 0 }
img { max-width: 100%; background: #fff; border-radius: 6px; padding: .5rem;
  box-sizing: border-box }
"""
