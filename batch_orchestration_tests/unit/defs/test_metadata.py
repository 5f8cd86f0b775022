"""Metadata of Dagster's events: numbers plot, and what is not there has no entry."""

from pathlib import Path

import dagster as dg

from batch_orchestration.core.dead_letters import DeadLetterState
from batch_orchestration.core.results import Attempt
from batch_orchestration.defs.metadata import counts_table, list_of, metadata_of, table_of

ATTEMPT = Attempt(at=1.23456789, code="timeout", message="no answer")


def test_numbers_stay_numbers_and_nothing_has_no_entry():
    metadata = metadata_of(
        ATTEMPT, "at", "code", zero=0, rate=0.0, off=False, state=DeadLetterState.DEAD,
        file=Path("/a"), settings={"model": "m"}, none=None, empty="", nothing={},
    )  # fmt: skip

    assert metadata == {
        "at": 1.234568,
        "code": "timeout",
        "zero": 0,
        "rate": 0.0,
        "off": False,
        "state": "dead",
        "file": dg.MetadataValue.path("/a"),
        "settings": dg.MetadataValue.json({"model": "m"}),
    }


def test_a_table_has_the_fields_of_its_rows_and_there_is_none_without_rows():
    table = table_of([ATTEMPT], "at", "message")

    assert [record.data for record in table.records] == [{"at": 1.235, "message": "no answer"}]
    assert table_of([], "at") is counts_table({}) is list_of([]) is None


def test_counts_are_a_table_with_the_most_frequent_first():
    table = counts_table({"timeout": 1, "engine_refused": 3})

    assert [record.data["code"] for record in table.records] == ["engine_refused", "timeout"]
