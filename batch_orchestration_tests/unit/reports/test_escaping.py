"""Foreign text in reports: shown as text in Markdown and in HTML, whatever it contains."""

import re
from base64 import b64decode
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from batch_orchestration.core.batches import BatchOptions, BatchStatus
from batch_orchestration.core.lifecycle import EarlyEnd
from batch_orchestration.core.results import BatchTotals
from batch_orchestration.reports.gathering import BatchStats
from batch_orchestration.reports.plots import Picture
from batch_orchestration.reports.rendering import CELL_LENGTH, batch_report, to_html
from batch_orchestration.reports.timeline import TimelineEvent
from batch_orchestration_tests.support.builders import (
    NOW,
    make_failure,
    make_input,
    make_plan,
    make_provenance,
    make_settled,
)
from batch_orchestration_tests.unit.reports.test_rendering import make_record

#: What somebody may put into an id or provoke in a message.
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "![x](http://evil.example/pixel.png)",
    "[click](javascript:alert(1))",
    "`|`</td></tr></table><h1>owned",
    "[throughput]: http://evil.example/pixel.png",
    "a\n\n# heading\n\n[throughput]: http://evil.example/pixel.png",
    "<http://evil.example> &lt;b&gt; &#91;x](http://evil.example)",
    "_a_ __init__ *b* **c** ~~d~~ max_tokens \\_e\\_ \\",
    "| --- | --- |\n| a | b |",
    "    - [ ] > # 1. ===\n\t```\ncode\n```",
    "\\| \\\\| `\\|` \\`",
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


PICTURE = Picture("throughput", "Throughput", b"<svg/>")


def report(text: str, *, examples: int = 2) -> str:
    """A report in which everything that may be somebody else's is this text."""
    plan = make_plan(make_input(3), options=BatchOptions(metadata={text: text}))
    plan = replace(plan, batch_id="candidates-1", file_name=text)
    provenance = make_provenance(text, engine=text, engine_version=text, model=text)
    totals = BatchTotals()
    for index in range(examples):
        settled = make_settled(index, make_failure(message=text), provenance=provenance)
        totals.count(replace(settled, custom_id=text))
    early_end = EarlyEnd(status=BatchStatus.CANCELLED, at=NOW, actor=text, reason=text)
    return batch_report(
        *(plan, make_record(plan), totals, {}),
        outbox=text,
        early_end=early_end,
        stats=BatchStats(timeline=[TimelineEvent(NOW, text)], pictures=[PICTURE]),
    )


def one_line(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("text", HOSTILE)
def test_foreign_text_is_text_in_html(text: str) -> None:
    page = Tags(to_html(text, report(text)))

    assert page.tags == Tags(to_html("x", report("x"))).tags
    sources = [attributes["src"] for _, attributes in page.tags if attributes.get("src")]
    assert [source.partition(",")[0] for source in sources] == ["data:image/svg+xml;base64"]
    shown = one_line(page.text)
    # File, value, two names, two messages, actor, reason, event, engine, version, model, title.
    assert shown.count(one_line(text)) >= 13
    # Code: the key, and the outbox.
    assert shown.count(one_line(text).replace("`", "'")) >= 2


@pytest.mark.parametrize("text", HOSTILE)
def test_foreign_text_is_text_in_markdown(text: str) -> None:
    markdown = report(text)

    outside = re.sub(r"`[^`]*`", "", markdown.replace("\\`", ""))
    assert "<" not in outside
    assert not re.search(r"(?<!\\)\[(?!throughput\]|Throughput)", outside.replace("![T", "[T"))
    definitions = [line for line in markdown.splitlines() if line.startswith("[throughput]:")]
    assert definitions == ["[throughput]: data:image/svg+xml;base64,PHN2Zy8+"]
    headings = [line for line in markdown.splitlines() if line.startswith("#")]
    assert headings == [line for line in report("x").splitlines() if line.startswith("#")]


@given((st.text() | st.text("\\`|[]()!<>&#;:*_~-=1. \nxa", max_size=40)).filter(str.strip))
def test_whatever_the_text_the_page_has_the_same_tags_and_shows_it(text: str) -> None:
    page = Tags(to_html("x", report(text)))

    assert page.tags == REFERENCE.tags
    if len(text) <= CELL_LENGTH and "\0" not in text:
        assert one_line(page.text).count(one_line(text)) >= 12


REFERENCE = Tags(to_html("x", report("x")))


def test_the_page_forbids_itself_to_load_anything() -> None:
    page = to_html("report", report("text"))

    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page
    assert not re.search(r"https?://", page)


@pytest.mark.parametrize(
    "uri",
    [
        *("http://evil.example/x.png", "javascript:alert(1)", "data:text/html;base64,PHN2Zy8+"),
        *("data:image/svg+xml,<svg/>", "//evil.example", "x.png"),
    ],
)
def test_nothing_is_loaded_or_linked_even_if_the_markdown_does(uri: str) -> None:
    """In case a template is careless one day."""
    page = Tags(to_html("x", f"![x]({uri}) [x]({uri}) <{uri}> <img src={uri}>\n\n<script>\n"))

    assert {tag for tag, _ in page.tags}.isdisjoint({"a", "img", "script"})


def test_a_picture_is_named_in_its_place_and_follows_at_the_end() -> None:
    lines = report("x").splitlines()

    assert lines.index("![Throughput][throughput]") < lines.index("## Failures")
    assert b64decode(lines[-1].partition("base64,")[2]) == b"<svg/>"


def test_text_that_is_too_long_for_a_cell_is_cut() -> None:
    tables = [line for line in report("x" * 5000).splitlines() if line.startswith("|")]

    assert any("x" * 199 + "…" in line for line in tables)
    assert not any("x" * 200 in line for line in tables)
