"""A data folder with a long history, made cheaply: folders by links, rows of the store by SQL."""

import os
import time
from pathlib import Path

import msgspec

from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.core.lifecycle import EarlyEnd
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.store.store import Store
from batch_orchestration_tests.support.builders import make_input, make_plan

DAY = 86_400.0
#: How long ago all of it ended.
AGE_SECONDS = 60 * DAY


def finished_id(number: int) -> str:
    """The id of a batch of the history."""
    return f"old-{number:06d}-0a1b2c3d"


def make_history(folder: DataFolder, store: Store, *, completed: int, cancelled: int) -> None:
    """Add finished batches: plan, decision, dead letters, outbox and rows, as months leave them."""
    plan = make_plan(make_input(3), requests_per_chunk=3)
    store.add_batch(plan, at=time.time() - AGE_SECONDS)
    early_end = EarlyEnd(
        status=BatchStatus.CANCELLED, at=time.time() - AGE_SECONDS, actor="a", reason=""
    )
    for number in range(completed + cancelled):
        name = finished_id(number)
        home = folder.batches / name
        home.mkdir()
        old = msgspec.structs.replace(plan, batch_id=name, identity=f"identity-{number}")
        (home / "plan.json").write_bytes(msgspec.json.encode(old))
        (folder.journals / name / "dead_letters").mkdir(parents=True)
        _put(folder.outbox / name / "output.jsonl")
        if number >= completed:
            (home / "early-end.json").write_bytes(msgspec.json.encode(early_end))
    _add_rows(store, plan.batch_id, completed=completed, cancelled=cancelled)


def _put(path: Path) -> None:
    path.parent.mkdir(parents=True)
    os.close(os.open(path, os.O_CREAT))


def _add_rows(store: Store, pattern: str, *, completed: int, cancelled: int) -> None:
    """Copy the rows of one batch so often, and take the one away."""
    ids = [finished_id(number) for number in range(completed + cancelled)]
    with store.writing() as db:
        db.execute("CREATE TEMP TABLE ids AS SELECT unnest(?::VARCHAR[]) AS id", [ids])
        for table in ("batches", "chunks", "batch_events"):
            db.execute(
                f"INSERT INTO {table} SELECT {table}.* REPLACE (ids.id AS batch_id)"
                f" FROM {table}, ids WHERE batch_id = ?",
                [pattern],
            )
            db.execute(f"DELETE FROM {table} WHERE batch_id = ?", [pattern])
        first_cancelled = finished_id(completed)
        db.execute(
            "UPDATE batches SET chunks_committed = chunks, completed_at = created_at,"
            " cancelled_at = created_at, completed = requests,"
            " status = CASE WHEN batch_id < ? THEN 'completed' ELSE 'cancelled' END",
            [first_cancelled],
        )
        db.execute("UPDATE chunks SET status = 'committed', committed_at = TIMESTAMP '2020-01-01'")
