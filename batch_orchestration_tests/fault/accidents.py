"""What must hold when a batch went through an accident: durable outcomes stay as they were."""

from typing import NamedTuple

import pytest

from batch_orchestration.files.journal import read_journal
from batch_orchestration_tests.support.dagster_client import Run
from batch_orchestration_tests.support.dagster_processes import DagsterProcesses


class Settled(NamedTuple):
    """Which run gave a request its outcome, and when."""

    run_id: str
    at: float


def durable_outcomes(dagster: DagsterProcesses, batch_id: str) -> dict[int, Settled]:
    """Every request with an outcome in the journals, by its index."""
    journals = sorted((dagster.folder.journals / batch_id).glob("*.journal"))
    return {
        entry.index: Settled(entry.provenance.run_id, entry.settled_at)
        for path in journals
        for entry in read_journal(path)
    }


#: Of a request, so that a test on a busy machine is not too late with its accident.
SLOW_SECONDS = 2.0


def wait_for_outcomes(dagster: DagsterProcesses, batch_id: str, count: int) -> None:
    # Often, so as not to be late with the accident.
    dagster.wait_until(
        lambda: len(durable_outcomes(dagster, batch_id)) >= count,
        60,
        f"{count} outcomes",
        look_seconds=0.1,
    )


def wait_for_answering(dagster: DagsterProcesses, batch_id: str, *, but: str = "") -> Run:
    """Wait until a run other than `but` answers the batch, and return it."""

    def answering() -> Run | None:
        runs = dagster.runs("answer_chunks", batch=batch_id)
        return next((run for run in runs if run.status == "STARTED" and run.run_id != but), None)

    return dagster.wait_until(answering, 90, "a run answers the batch")


def assert_undisturbed(
    dagster: DagsterProcesses, batch_id: str, requests: int, before: dict[int, Settled]
) -> None:
    """Every request has one outcome, and those that were durable are the same as before."""
    results = {
        settled.index: Settled(settled.provenance.run_id, settled.settled_at)
        for settled in dagster.store.settled(batch_id)
    }
    assert sorted(results) == list(range(requests))
    for index, settled in before.items():
        assert results[index].run_id == settled.run_id
        assert results[index].at == pytest.approx(settled.at, abs=1e-3)
    record = dagster.store.batch(batch_id)
    assert (record.completed, record.failed) == (requests, 0)
    output = dagster.folder.outbox_path(batch_id) / "output.jsonl"
    assert len(output.read_bytes().splitlines()) == requests
