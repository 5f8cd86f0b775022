"""The documents say what the code does: codes, settings, commands, and the tests that prove it."""

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from batch_orchestration.cli import main
from batch_orchestration.core.outcomes import RETRYABLE, FailureCode
from batch_orchestration.operations.health.checks import CHECKS
from batch_orchestration.operations.health.report import AlertKind
from batch_orchestration.settings import Settings, settings_in_force

ROOT = Path(__file__).parents[1]
FAILURE_MODES = ROOT / "docs/failure-modes.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ALL_PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
]
#: As a person types it.
PROGRAM = r"(?:batch-orchestration|python -m batch_orchestration)"
MAKE = r"(?:`|\$ )make ([a-z-]+)"


def table(page: Path, heading: str) -> list[list[str]]:
    """The rows of the first table below a heading, without its head; each a list of its cells."""
    text = page.read_text().partition(f"# {heading}\n")[2].partition("\n#")[0]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def accidents() -> list[list[str]]:
    """The rows of all tables of accidents."""
    text = FAILURE_MODES.read_text().partition("\n## Accidents\n")[2].partition("\n## ")[0]
    return [row for name in re.findall(r"### (.*)", text) for row in table(FAILURE_MODES, name)]


def commands_in_use() -> Iterator[tuple[str, str]]:
    """Yield each command that a page tells to run, with the rest of what is typed."""
    for page in PAGES:
        yield from re.findall(rf"{PROGRAM} ([a-z-]+)([^`\n#]*)", page.read_text())
    for *_, next_command in table(FAILURE_MODES, "Failure codes"):
        yield from re.findall(r"`([a-z-]+)([^`]*)`", next_command)


def options_of(command: click.Command) -> set[str]:
    return {name for option in command.params for name in (*option.opts, *option.secondary_opts)}


def names_of_tests() -> set[str]:
    files = (ROOT / "batch_orchestration_tests").rglob("test_*.py")
    return {name for file in files for name in re.findall(r"def (test_\w+)", file.read_text())}


def test_every_failure_code_is_explained_and_no_other() -> None:
    rows = table(FAILURE_MODES, "Failure codes")

    assert [row[0] for row in rows] == [f"`{code}`" for code in FailureCode]
    assert all(len(row) == 5 and all(row) for row in rows)


def test_the_codes_that_are_said_to_be_sent_again_are() -> None:
    said = {row[0].strip("`"): row[3] for row in table(FAILURE_MODES, "Failure codes")}

    assert said == {str(code): "yes" if code in RETRYABLE else "no" for code in FailureCode}


def test_every_accident_names_the_tests_that_prove_it_and_they_exist() -> None:
    rows = accidents()

    proofs = [re.findall(r"`(test_\w+)`", proof) for _, _, _, proof in rows]
    assert len(rows) >= 80
    assert all(proofs)
    assert all(accident and what_happens for accident, what_happens, _, _ in rows)
    assert {name for names in proofs for name in names} <= names_of_tests()


def test_every_setting_is_documented_as_it_is() -> None:
    documented = [
        (name.strip("`"), default.strip("`"), meaning)
        for name, default, meaning in table(ROOT / "docs/settings.md", "Settings")
    ]

    # Not from the environment, which is that of whoever runs the tests.
    settings = settings_in_force(Settings.model_construct())
    assert documented == [(s.variable, s.value, s.description) for s in settings]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_names_a_setting_that_there_is_not(page: Path) -> None:
    known = {setting.variable for setting in settings_in_force(Settings.model_construct())}

    assert set(re.findall(r"\bBATCH_[A-Z_]*[A-Z]\b", page.read_text())) <= known


def test_every_check_of_the_health_is_explained_and_no_other() -> None:
    rows = table(ROOT / "docs/health.md", "Checks")

    assert [row[0] for row in rows] == [f"`{name}`" for name in CHECKS]


def test_every_kind_of_alert_says_what_to_do_and_no_other_does() -> None:
    rows = table(ROOT / "docs/alerts.md", "Kinds")

    assert [row[0] for row in rows] == [f"`{kind}`" for kind in AlertKind]
    assert all(len(row) == 3 and all(row) for row in rows)


def test_every_command_is_documented() -> None:
    assert {name for name, _ in commands_in_use()} >= main.commands.keys()


def test_every_command_that_a_page_tells_to_run_exists_with_its_options() -> None:
    for name, rest in commands_in_use():
        command = main.commands.get(name)
        assert command is not None, f"there is no command {name!r}"
        if isinstance(command, click.Group):
            command = command.commands.get(rest.split()[0] if rest.split() else "", command)
        unknown = set(re.findall(r"(?<!\w)--[a-z-]+", rest)) - options_of(command)
        assert not unknown, f"{name} has no {unknown}"


def test_every_command_that_the_program_itself_tells_to_run_exists() -> None:
    sources = (ROOT / "batch_orchestration").rglob("*.py")
    # Sentences may break within a command.
    told = {
        name
        for source in sources
        for name in re.findall(r"python -m\W+batch_orchestration ([a-z-]+)", source.read_text())
    }

    assert {"health", "failures", "recover"} <= told <= main.commands.keys()


def test_every_make_target_that_a_page_tells_to_run_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    pages = [*PAGES, ROOT / "ARCHITECTURE.md", *(ROOT / "benchmarks").glob("*.md")]

    told = {name for page in pages for name in re.findall(MAKE, page.read_text())}

    assert "soak" in told
    assert told <= targets


def test_the_architecture_has_a_paragraph_for_each_wing_and_names_no_file_that_is_not_there() -> (
    None
):
    page = (ROOT / "ARCHITECTURE.md").read_text()
    paragraphs = page.partition("## The wings")[2].partition("\n## ")[0]
    product = ROOT / "batch_orchestration"

    wings = {path.parent.name for path in product.glob("*/__init__.py")}
    assert wings
    assert wings <= set(re.findall(r"\*\*(\w+)\*\*", paragraphs))
    named = re.findall(r"`(\w+(?:/\w+)+)(?:\.py)?`", page)
    assert named
    assert [name for name in named if not (product / f"{name}.py").exists()] == []


def test_the_architecture_is_short() -> None:
    assert len((ROOT / "ARCHITECTURE.md").read_text().splitlines()) <= 200


def test_a_reader_meets_the_commands_of_the_readme_within_900_words() -> None:
    assert len((ROOT / "README.md").read_text().partition("## Commands")[0].split()) <= 900


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_link_leads_nowhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", page.read_text())

    assert [to for to in links if "://" not in to and not (page.parent / to).exists()] == []


def test_the_changelog_says_what_comes_next() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)

    assert headings[0] == "Unreleased"
