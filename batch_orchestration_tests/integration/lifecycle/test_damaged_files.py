"""Damaged files of one batch, and of the deployment: what they cost is that batch, and no other.

Every kind of file that `DataFolder` names is in one of the tables below, or a test fails.
"""

import os
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from batch_orchestration.admission.inbox import Inbox
from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.core.lifecycle import FINAL
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.lifecycle.clock import clock_path
from batch_orchestration.operations.health.checks import files
from batch_orchestration.operations.health.examine import examine_health
from batch_orchestration.status.overview import read_overview
from batch_orchestration.workers.utilization_files import account_path
from batch_orchestration_tests.support.builders import (
    NOW,
    make_input,
    make_line,
    make_settled_chunk,
)
from batch_orchestration_tests.support.deployment import Deployment

#: Folders that all members share: without them there is no deployment.
SHARED_FOLDERS = {
    *("inbox", "rejected", "claims", "batches", "journals", "outbox", "logs"),
    *("heartbeats", "scans", "fences", "unfinished", "engines"),
}
#: The store has tests of its own: `recover` makes it anew.
ELSEWHERE = {"duckdb"}

OF_A_BATCH: dict[str, Callable[[DataFolder, str], Path]] = {
    "plan_path": DataFolder.plan_path,
    "input_path": DataFolder.input_path,
    "early_end": lambda folder, batch_id: folder.early_end(batch_id).path,
    "resumption": lambda folder, batch_id: folder.resumption(batch_id).path,
    "halt": lambda folder, batch_id: folder.halt(batch_id).path,
    "progress_path": DataFolder.progress_path,
    "account_path": lambda folder, batch_id: account_path(folder, batch_id, "run-9"),
    "journal_path": lambda folder, batch_id: folder.journal_path(batch_id, 1),
}
#: That it is there is all that it says.
MARKS: dict[str, Callable[[DataFolder, str], Path]] = {
    "pruned_path": DataFolder.pruned_path,
    "outbox_path": DataFolder.outbox_path,
}
OF_THE_DEPLOYMENT: dict[str, Callable[[DataFolder], Path]] = {
    "queue": lambda folder: folder.queue,
    "needs": lambda folder: folder.needs,
    "health": lambda folder: folder.health,
    "alerts": lambda folder: folder.alerts,
    "refusal": lambda folder: folder.refusal,
    "memory_levels": lambda folder: folder.memory_levels,
    "heartbeat_path": lambda folder: folder.heartbeat_path("run-9"),
    "engine_record_path": lambda folder: folder.engine_record_path("run-9"),
    "a fence": lambda folder: folder.fences / "GPU-9.json",
    "a survey": lambda folder: folder.scans / "9-9-9.json",
    "clock": clock_path,
    "housekeeping": lambda folder: folder.root / "housekeeping.json",
}
#: A damaged pause is a pause: see `test_queue_files_damaged`.
FAILS_CLOSED = {"paused"}

WAYS: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "truncated": lambda path: path.write_bytes(b'{"batch_'),
    "a folder": lambda path: path.mkdir(),
    "emptied": lambda path: path.write_bytes(b""),
}
#: No journal is the same as an empty one, and what is torn in it is passed over.
HARMLESS = {("journal_path", "truncated"), ("journal_path", "emptied")}
#: Of what a person has to mend before its batch can be delivered.
NEEDED = {"plan_path", "journal_path"}
#: Without them nothing of the batch can be decided.
STOPPING = ("plan_path", "early_end", "resumption")


ROOMY = {"chunks_per_run": 1, "disk_reserve_bytes": 0, "max_unfinished_batches": 20}


@pytest.fixture
def deployment(tmp_path):
    with closing(Deployment(tmp_path, **ROOMY)) as deployment:
        yield deployment


def damage(path: Path, way: str) -> None:
    remove(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    WAYS[way](path)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def named(deployment, paths):
    """Return which of these paths both health and status name; neither names any of the others."""
    now = time.time()
    report = examine_health(
        settings=deployment.settings,
        folder=deployment.folder,
        now=now,
        checks={"files": files},
    )
    overview = read_overview(
        folder=deployment.folder,
        store=deployment.store,
        inbox=Inbox(deployment.folder, deployment.settings),
        now=now,
    )
    found = {p: [f for f in report.findings if str(p) in f.reason] for p in paths}
    assert all(finding.next_command for findings in found.values() for finding in findings)
    in_health = {path for path, findings in found.items() if findings}
    in_status = {damage.path for damage in overview.damaged} & set(paths)
    assert in_health == in_status
    return in_health


def serve(deployment, *batch_ids, ticks=25):
    """Run what is asked for, until these batches have ended; return how."""
    for _ in range(ticks):
        for request in deployment.requests("dispatch_sensor"):
            deployment.run(request)
            ended = {id: deployment.store.batch(id).status for id in batch_ids}
            if set(ended.values()) <= set(FINAL):
                return set(ended.values())
    raise AssertionError(f"{ended}; {deployment.reason('dispatch_sensor')}")


def at_work(deployment, batch_id):
    """Have the first of two chunks committed."""
    plan = deployment.folder.read_plan(batch_id)
    settled = make_settled_chunk(plan.chunks[0])
    deployment.store.commit_chunk(batch_id, 0, settled, run_id="r", at=NOW, seconds=2.0)


STAGES = {"waits": lambda *_: None, "runs": at_work, "closes": Deployment.cancel}


def test_every_kind_of_path_that_the_data_folder_names_is_attacked():
    named = {
        name
        for name, member in vars(DataFolder).items()
        if isinstance(member, property) or name.endswith("_path")
    }
    here = {*OF_A_BATCH, *MARKS, *OF_THE_DEPLOYMENT}

    assert named <= here | SHARED_FOLDERS | ELSEWHERE | FAILS_CLOSED


def admit_many(deployment, names):
    """Admit a batch of two chunks for each name."""
    contents = {
        name: b"".join(make_line(100 * number + line) for line in range(10))
        for number, name in enumerate(names)
    }
    return {name: deployment.admit(f"{name}.jsonl", text) for name, text in contents.items()}


@pytest.mark.parametrize("stage", STAGES)
def test_damaged_files_of_batches_stop_no_other(deployment, stage):
    victims = admit_many(deployment, OF_A_BATCH)
    paths = {kind: OF_A_BATCH[kind](deployment.folder, victims[kind]) for kind in OF_A_BATCH}
    for victim in victims.values():
        STAGES[stage](deployment, victim)
    for way in WAYS:
        for path in paths.values():
            damage(path, way)
        harmful = {path for kind, path in paths.items() if (kind, way) not in HARMLESS}
        assert named(deployment, paths.values()) == harmful, way
        deployment.tick("dispatch_sensor")
        told = deployment.folder.needs.read_text()
        assert [kind for kind in STOPPING if str(paths[kind]) not in told] == []
    for path in paths.values():
        damage(path, "a folder")
    deployment.tick("recovery_sensor")

    other = deployment.admit("high/other.jsonl", make_input(7))

    assert serve(deployment, other) == {BatchStatus.COMPLETED}
    # Some could be delivered all the same.
    left = [k for k in OF_A_BATCH if deployment.store.batch(victims[k]).status not in FINAL]
    assert set(STOPPING) <= set(left)
    assert named(deployment, paths.values()) >= {paths[kind] for kind in left}
    for kind in left:
        deployment.cancel(victims[kind])
    endable = [victims[kind] for kind in left if kind not in NEEDED]
    assert serve(deployment, *endable) == {BatchStatus.CANCELLED}


@pytest.mark.parametrize(
    ("kind", "way"),
    [("plan_path", "truncated"), ("early_end", "a folder"), ("resumption", "truncated")],
)
def test_a_batch_goes_on_by_itself_once_its_file_is_mended(deployment, kind, way):
    victim = deployment.admit("victim.jsonl", make_input(5))
    path = OF_A_BATCH[kind](deployment.folder, victim)
    whole = path.read_bytes() if path.exists() else None
    damage(path, way)
    assert deployment.requests("dispatch_sensor") == []
    needs = deployment.folder.needs.read_text()
    assert str(path) in needs

    remove(path)
    if whole is not None:
        path.write_bytes(whole)

    assert serve(deployment, victim) == {BatchStatus.COMPLETED}
    assert deployment.folder.needs.read_bytes() == b"[]\n"


def test_damaged_files_of_the_deployment_stop_no_batch(deployment):
    paths = {place(deployment.folder) for place in OF_THE_DEPLOYMENT.values()}
    for way in WAYS:
        for path in paths:
            damage(path, way)
        assert named(deployment, paths) == paths, way
        for sensor in ("inbox_sensor", "dispatch_sensor", "recovery_sensor", "replay_sensor"):
            deployment.tick(sensor)

    for path in paths:
        damage(path, "a folder")
    batch_id = deployment.admit("a.jsonl", make_input(5))

    assert serve(deployment, batch_id) == {BatchStatus.COMPLETED}


def test_marks_that_say_nothing_stop_no_other_batch(deployment):
    ways = ["a pipe", "emptied"]
    victims = admit_many(deployment, [f"{kind}-{way}" for kind in MARKS for way in ways])
    for name, victim in victims.items():
        kind, _, way = name.partition("-")
        damage(MARKS[kind](deployment.folder, victim), way)

    other = deployment.admit("high/other.jsonl", make_input(7))

    assert serve(deployment, other) == {BatchStatus.COMPLETED}


def test_foreign_folders_among_the_batches_stop_nothing_and_are_named(deployment):
    first = deployment.admit("first.jsonl", make_input(10))
    plan = deployment.folder.plan_path(first).read_bytes()
    copies = [deployment.folder.batches / f"My Copy of {first} (batch)"]
    copies += [deployment.folder.batches / f"{first}-copy", deployment.folder.batches / "notes"]
    for copy in copies:
        copy.mkdir()
    for copy in copies[:2]:
        (copy / "plan.json").write_bytes(plan)

    other = deployment.admit("high/other.jsonl", make_input(7))

    assert serve(deployment, other) == {BatchStatus.COMPLETED}
    assert {record.batch_id for record in deployment.store.batches()} == {first, other}
    overview = read_overview(
        folder=deployment.folder,
        store=deployment.store,
        inbox=Inbox(deployment.folder, deployment.settings),
        now=time.time(),
    )
    for copy in copies:
        assert any(str(copy) in damage.reason for damage in overview.damaged), copy
