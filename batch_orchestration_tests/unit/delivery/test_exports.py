"""A CSV that is opened in a spreadsheet runs nothing that an author or a model wrote."""

import csv
from pathlib import Path

import pytest

from batch_orchestration.delivery.exports import FlatOutcome, TableFormat, write_table


def written(path: Path, texts: list[str], **options: bool) -> list[dict[str, str]]:
    rows = [
        FlatOutcome(
            custom_id=text,
            index=n,
            line=n + 1,
            status="completed",
            text=text,
            latency_seconds=0.5,
            attempts=1,
            engine="simulated",
            model="demo",
            simulated=True,
        )
        for n, text in enumerate(texts)
    ]
    write_table(rows, path / "t.csv", TableFormat.CSV, metadata={}, **options)
    with (path / "t.csv").open(newline="") as file:
        return list(csv.DictReader(file))


FORMULAS = [
    '=HYPERLINK("http://evil","x")',
    "=cmd|' /C calc'!A0",
    "+1+cmd|'/C calc'!A0",
    "-2+3+cmd|'/C calc'!A0",
    "@SUM(1+1)",
    "\t=1+1",
    "\r=1+1",
    "\n=1+1",
    "  =1+1",
    "\uff1d1+1",
    "-1-1",
    "-",
    "- a list",
]


def test_text_that_a_spreadsheet_would_run_gets_a_quote_before_it(tmp_path: Path) -> None:
    rows = written(tmp_path, FORMULAS)

    assert [row["text"] for row in rows] == [f"'{text}" for text in FORMULAS]
    assert [row["custom_id"] for row in rows] == [f"'{text}" for text in FORMULAS]


@pytest.mark.parametrize("text", ["-1", "+4.5", "-1e-5", "1,000", "a=b", "x@y", "'quoted", "日本"])
def test_numbers_and_other_text_stay_as_they_are(tmp_path: Path, text: str) -> None:
    (row,) = written(tmp_path, [text])

    assert (row["text"], row["index"], row["attempts"]) == (text, "0", "1")


def test_raw_cells_are_left_alone(tmp_path: Path) -> None:
    rows = written(tmp_path, FORMULAS, raw=True)

    assert [row["text"] for row in rows] == FORMULAS
