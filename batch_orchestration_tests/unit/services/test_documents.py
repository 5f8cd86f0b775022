"""Documents: the same text as Markdown and as HTML, whoever wrote it."""

import re
from base64 import b64decode
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_orchestration.services.documents import (
    Bullets,
    Code,
    Heading,
    Paragraph,
    Picture,
    Quote,
    Strong,
    Table,
    to_html,
    to_markdown,
)

#: What somebody may put into an id or provoke in a message.
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "![x](http://evil.example/pixel.png)",
    "[click](javascript:alert(1))",
    "`|`</td></tr></table><h1>owned",
    "[throughput]: http://evil.example/pixel.png",
    "a\n\n# heading\n\n[throughput]: http://evil.example/pixel.png",
)


class Tags(HTMLParser):
    """Every tag with its attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def document(text: str) -> list:
    return [
        Heading(1, "report"),
        Paragraph((text, Strong(text), Code(text))),
        Quote([text, (Strong(text), text)]),
        Bullets([text, Code(text)]),
        Table(("a", "b"), [(text, (Code(text), Strong(text)))]),
        Picture("throughput", "Throughput", b"<svg/>"),
    ]


@pytest.mark.parametrize("text", HOSTILE)
def test_foreign_text_is_text_in_html(text: str) -> None:
    page = Tags(to_html(text, document(text)))

    kinds = Tags(to_html("x", document("x"))).tags
    assert page.tags == kinds
    sources = [attributes["src"] for _, attributes in page.tags if attributes.get("src")]
    assert [source.partition(",")[0] for source in sources] == ["data:image/svg+xml;base64"]
    assert " ".join(text.split()) in " ".join(page.text.split())


@pytest.mark.parametrize("text", HOSTILE)
def test_foreign_text_is_text_in_markdown(text: str) -> None:
    markdown = to_markdown(document(text))

    outside = re.sub(r"`[^`]*`", "", markdown)
    assert "<" not in outside
    assert not re.search(r"(?<!\\)\[(?!throughput\]|Throughput)", outside.replace("![T", "[T"))
    definitions = [line for line in markdown.splitlines() if line.startswith("[throughput]:")]
    assert definitions == ["[throughput]: data:image/svg+xml;base64,PHN2Zy8+"]
    assert [line for line in markdown.splitlines() if line.startswith("#")] == ["# report"]


@given(st.text())
def test_whatever_the_text_a_table_has_its_rows_and_cells(text: str) -> None:
    lines = to_markdown([Table(("a", "b"), [(text, Code(text))])]).splitlines()

    assert len(lines) == 3
    assert [len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines] == [3, 3, 3]


def test_the_page_says_itself_that_it_loads_nothing() -> None:
    page = to_html("report", document("text"))

    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page
    assert not re.search(r"https?://", page)


def test_a_picture_is_named_in_its_place_and_follows_at_the_end() -> None:
    lines = to_markdown([Picture("gpu", "GPU", b"<svg>1</svg>"), Paragraph("after")]).splitlines()

    assert lines[0] == "![GPU][gpu]"
    assert lines[2] == "after"
    assert b64decode(lines[4].partition("base64,")[2]) == b"<svg>1</svg>"


def test_what_is_too_long_for_a_cell_is_cut() -> None:
    assert "x" * 300 not in to_markdown([Table(("a",), [("x" * 5000,)])])
    assert "x" * 300 not in to_html("t", [Table(("a",), [(Code("x" * 5000),)])])
