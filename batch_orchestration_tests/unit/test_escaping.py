"""Text of others commands no terminal, wherever the command line prints it."""

import io
import json
import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from rich.live import Live
from rich.table import Table
from rich.text import Text

from batch_orchestration.cli import escaping as visible_module
from batch_orchestration.cli.context import Commands, print_json
from batch_orchestration.cli.escaping import VisibleConsole, escaped, say, visible
from batch_orchestration.core.errors import BatchOrchestrationError

HOSTILE = [
    "\x1b]2;owned\x07",
    "\x1b[2J\x1b[31mred",
    "\x1bP+q544e\x1b\\",
    "\x9b2J",
    "\x9d0;title\x9c",
    "line\rforged",
    "back\x08\x08space",
    "del\x7f",
    "nul\x00bell\x07",
    "\u202egnp.exe",
    "\u2066isolated\u2069",
    "\u200fmark",
    "\U000e0041tag",
    "half \udc9b",
]


def commands_in(text: str) -> list[str]:
    """Characters that a terminal would obey or not show."""
    return [
        c
        for c in text
        if (ord(c) < 32 and c not in "\n\t")
        or 0x7F <= ord(c) <= 0x9F
        or c in "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"
        or 0xD800 <= ord(c) <= 0xDFFF
        or 0xE0000 <= ord(c) <= 0xE007F
    ]


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_that_commands_a_terminal_is_left_and_it_shows_that_something_was(
    text: str,
) -> None:
    assert commands_in(visible(text)) == []
    assert visible(text) != text
    assert visible(visible(text)) == visible(text)


@pytest.mark.parametrize("text", ["plain", "zwei\nZeilen\tTab", "日本語", "עברית", "👩‍👩‍👧 é"])
def test_text_of_every_language_stays_as_it_is(text: str) -> None:
    assert visible(text) == text
    assert escaped(text) == text


@pytest.mark.parametrize("text", HOSTILE)
def test_tables_live_pictures_and_styled_text_are_harmless(text: str) -> None:
    file = io.StringIO()
    console = VisibleConsole(file=file, force_terminal=False, width=200)
    table = Table(title=Text(text))
    table.add_column(Text(text))
    table.add_row(Text(text))

    console.print(table)
    console.print(text, markup=False)
    with Live(Text(text), console=console) as live:
        live.update(Text(text))

    assert commands_in(file.getvalue()) == []


def test_colours_of_our_own_still_reach_a_terminal() -> None:
    file = io.StringIO()

    VisibleConsole(file=file, force_terminal=True, color_system="standard").print(
        Text("\x1b[2Jred", style="red")
    )

    assert file.getvalue() == "\x1b[31m␛[2Jred\x1b[0m\n"


@pytest.mark.parametrize("text", HOSTILE[:-1])
def test_json_says_the_same_in_escapes(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"id": text})

    printed = capsys.readouterr().out
    assert commands_in(printed) == []
    assert json.loads(printed) == {"id": text}


@pytest.mark.parametrize(
    "error",
    [BatchOrchestrationError, click.ClickException, click.UsageError],
)
@pytest.mark.parametrize("text", HOSTILE)
def test_messages_and_errors_are_harmless(text: str, error: type[Exception]) -> None:
    @click.group(cls=Commands)
    def main() -> None:
        pass

    @main.command()
    def fail() -> None:
        say(text)
        raise error(text)

    result = CliRunner().invoke(main, ["fail"])

    assert result.exit_code in (1, 2)
    assert commands_in(result.output) == []
    assert result.output.count(visible(text)) == 2


def test_no_command_prints_by_another_way() -> None:
    """Metrics are bytes, made of figures and of names that are escaped by their own rules."""
    folder = Path(visible_module.__file__).parent
    others = [
        path.name
        for path in folder.glob("*.py")
        if re.search(r"click\.s?echo\(|\bConsole\(|(?<!\.)\bprint\(", path.read_text())
    ]

    assert sorted(others) == ["escaping.py", "metrics.py"]
