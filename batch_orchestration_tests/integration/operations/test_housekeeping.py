"""Housekeeping on a data folder: what is old goes, and never anything of a batch not at rest."""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.core.errors import HousekeepingBusy, StoreLocked
from batch_orchestration.core.lifecycle import FINAL, RESUMABLE, Resumption
from batch_orchestration.core.results import BatchRecord
from batch_orchestration.delivery.lines import output_line_id
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.operations.housekeeping.clean import (
    Cleanup,
    Part,
    Removal,
    results_file,
    run_cleanup,
)
from batch_orchestration.operations.housekeeping.retention import cleanup_parts
from batch_orchestration.settings import Settings
from batch_orchestration.store.store import Store
from batch_orchestration_tests.support.builders import NOW, make_input, make_plan, write_plan

DAY = 86_400.0
#: Everything on, and short.
SETTINGS = Settings(
    **{
        f"{part}_retention_days": 1
        for part in ("journal", "sample", "input", "rejected", "log", "leftover")
    },
    _env_file=None,
)
HASTY = {"stale_file_retention_days": 0.000001}
TEMPORARY = ".plan.json.0123456789ab.tmp"


class ToldStore(Store):
    """A store whose batches are told by the test; its table of samples is a real one."""

    def __init__(self, folder: DataFolder, records: list[BatchRecord]) -> None:
        super().__init__(folder.duckdb, deadline_seconds=5)
        self.told = records

    def batches(self) -> list[BatchRecord]:
        return self.told


@dataclass(frozen=True)
class History:
    """What became of one batch."""

    status: BatchStatus
    ended_days_ago: float
    replaying: bool
    resumed: bool

    @property
    def busy(self) -> bool:
        """Whether something may still happen to it."""
        goes_on = self.resumed and self.status in RESUMABLE
        return self.status not in FINAL or self.replaying or goes_on or self.ended_days_ago < 0.05


def record_of(batch_id: str, history: History, now: float) -> BatchRecord:
    plan = make_plan(make_input(3))
    return BatchRecord(
        batch_id=batch_id,
        file_name="a.jsonl",
        identity=batch_id,
        status=history.status,
        total=3,
        completed=3,
        failed=0,
        chunks=1,
        requests_per_chunk=10,
        chunks_committed=1,
        prompt_tokens=0,
        completion_tokens=0,
        options=plan.options,
        settings_hash="",
        model="m",
        times={"validating": NOW, str(history.status): now - history.ended_days_ago * DAY},
    )


def build(folder: DataFolder, batch_id: str, history: History) -> None:
    """All that a batch may have on the disk, delivered whole."""
    plan = make_plan(make_input(3))
    plan = msgspec.structs.replace(plan, batch_id=batch_id)
    write_plan(folder, plan)
    own, outbox = folder.plan_path(batch_id).parent, folder.outbox_path(batch_id)
    folder.input_path(batch_id).write_bytes(b"input")
    if history.resumed:
        folder.resumption(batch_id).write(Resumption(at=time.time() + 400 * DAY, actor="me"))
    outbox.mkdir(parents=True)
    ids = [output_line_id(batch_id, index) for index in range(3)]
    lines = "".join(json.dumps({"id": line_id}) + "\n" for line_id in ids)
    (outbox / "output.jsonl").write_text(lines)
    (outbox / "errors.jsonl").touch()
    journal = folder.journal_path(batch_id, 0)
    (journal.parent / "dead_letters").mkdir(parents=True)
    journal.write_bytes(b"outcomes")
    if history.replaying:
        (journal.parent / "dead_letters/00001-replay.open.json").write_bytes(b"{}")
    for place in (own, outbox, journal.parent):
        (place / TEMPORARY).touch()
    for kind in ("samples", "accounts"):
        (own / kind).mkdir()
        (own / kind / f"run-of-{batch_id}.jsonl").write_bytes(b"{}\n")
    logs = folder.logs / "engines"
    logs.mkdir(exist_ok=True)
    (logs / f"run-of-{batch_id}.log").write_bytes(b"log")


def files_of(folder: DataFolder, batch_id: str) -> dict[str, bytes]:
    places = [
        *(folder.plan_path(batch_id).parent, folder.outbox_path(batch_id)),
        folder.journal_path(batch_id, 0).parent,
        folder.logs / "engines" / f"run-of-{batch_id}.log",
    ]
    found = [path for place in places for path in (place, *place.rglob("*"))]
    files = [path for path in found if path.is_file() and path.suffix != ".lock"]
    return {str(path): path.read_bytes() for path in files}


histories = st.builds(
    History,
    status=st.sampled_from(list(BatchStatus)),
    ended_days_ago=st.sampled_from([0.01, 0.5, 2, 500]),
    replaying=st.sampled_from([False, False, True]),
    resumed=st.sampled_from([False, False, True]),
)


@settings(max_examples=20, deadline=None)
@given(st.lists(histories, min_size=1, max_size=7))
def test_of_a_batch_that_is_not_at_rest_no_byte_is_touched(drawn: list[History]) -> None:
    """Random histories: any status, replays that are open, resumptions undone."""
    now = time.time() + 2 * DAY
    with TemporaryDirectory() as root:
        folder = DataFolder(Path(root) / "data")
        folder.create()
        batches = {f"b{number}": history for number, history in enumerate(drawn)}
        for batch_id, history in batches.items():
            build(folder, batch_id, history)
        busy = {batch_id for batch_id, history in batches.items() if history.busy}
        before = {batch_id: files_of(folder, batch_id) for batch_id in busy}
        store = ToldStore(folder, [record_of(n, h, now) for n, h in batches.items()])

        report = run_cleanup(
            cleanup_parts(SETTINGS), Cleanup(folder, store, now=now), clock=time.time
        )

        assert not any(result.problem for result in report.results)
        for batch_id in busy:
            assert files_of(folder, batch_id) == before[batch_id]
        for batch_id in batches.keys() - busy:
            gone = batches[batch_id].ended_days_ago > 1
            completed = batches[batch_id].status is BatchStatus.COMPLETED
            assert folder.plan_path(batch_id).exists()
            assert (folder.outbox_path(batch_id) / "output.jsonl").exists()
            assert folder.journal_path(batch_id, 0).exists() is not (gone and completed)


@pytest.fixture
def folder(tmp_path: Path) -> DataFolder:
    folder = DataFolder(tmp_path / "data")
    folder.create()
    return folder


def house(folder: DataFolder, *, days: float = 2, dry_run: bool = False) -> Cleanup:
    store = ToldStore(folder, [])
    return Cleanup(folder, store, now=time.time() + days * DAY, dry_run=dry_run)


def clean(folder: DataFolder, part: str, *, days: float = 2, dry_run: bool = False) -> list[str]:
    report = run_cleanup(
        [known for known in cleanup_parts(SETTINGS) if known.name == part],
        house(folder, days=days, dry_run=dry_run),
        clock=time.monotonic,
    )
    return [removal.subject for removal in report.removals.get(part, [])]


def touched(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_leftovers_of_crashes_go_and_nothing_of_anybody_else(folder: DataFolder) -> None:
    ours = [
        *(folder.root / TEMPORARY, folder.root / "heartbeats/run-1.json"),
        *(folder.scans / TEMPORARY, folder.root / "heartbeats" / TEMPORARY),
    ]
    others = [
        *(folder.inbox / TEMPORARY, folder.inbox / "a.jsonl", folder.claims / "c" / TEMPORARY),
        *(folder.root / ".mine.tmp", folder.batches / "unknown" / TEMPORARY),
        *(folder.root / "batch.duckdb.damaged-1", folder.rejected / "bad.jsonl"),
    ]
    for path in (*ours, *others):
        touched(path)

    assert clean(folder, "stale-files", days=0.9) == []
    assert set(clean(folder, "stale-files")) == {str(p.relative_to(folder.root)) for p in ours}

    assert not any(path.exists() for path in ours)
    assert all(path.exists() for path in others)


def test_what_somebody_is_writing_now_is_no_leftover_whatever_the_setting(
    folder: DataFolder,
) -> None:
    for name in ("run-1.json", TEMPORARY):
        touched(folder.root / "heartbeats" / name)
    hasty = [part for part in cleanup_parts(SETTINGS.model_copy(update=HASTY)) if part.keep_seconds]

    run_cleanup(hasty, house(folder, days=0.01), clock=time.monotonic)

    assert len(list((folder.root / "heartbeats").iterdir())) == 2


def test_a_dry_run_names_what_a_real_one_removes_and_removes_nothing(folder: DataFolder) -> None:
    log = touched(folder.logs / "runs/run-1.log")
    record = touched(folder.logs / "engines/run-1.process.json")

    assert clean(folder, "logs", dry_run=True) == ["logs/runs/run-1.log"]
    assert log.exists()
    assert not results_file(folder).path.exists()

    assert clean(folder, "logs") == ["logs/runs/run-1.log"]
    assert not log.exists()
    assert record.exists(), "by it a process is found that outlived its run"


def test_a_rejected_file_is_as_old_as_its_arrival_not_as_its_last_change(
    folder: DataFolder,
) -> None:
    path = touched(folder.rejected / "bad.jsonl")
    os.utime(path, (0, 0))

    assert clean(folder, "rejected", days=0.5) == []
    assert clean(folder, "rejected") == ["inbox/rejected/bad.jsonl"]


def test_users_files_are_kept_for_ever_unless_somebody_says_otherwise() -> None:
    off = {part.name for part in cleanup_parts(Settings(_env_file=None)) if not part.keep_seconds}

    assert off == {"inputs", "rejected"}


def test_what_fails_does_not_stop_the_next(folder: DataFolder) -> None:
    def broken(house: Cleanup, keep_seconds: float) -> Iterator[Removal]:
        yield Removal(subject="first", size_bytes=7)
        raise StoreLocked("held by pid 1")

    def fine(house: Cleanup, keep_seconds: float) -> Iterator[Removal]:
        yield Removal(subject="second")

    parts = [Part("a", 1, broken), Part("b", 1, fine), Part("c", 0, broken)]

    results = run_cleanup(parts, house(folder), clock=time.monotonic).results

    assert [(r.part, r.removed, r.size_bytes, r.problem, r.off) for r in results] == [
        ("a", 1, 7, "StoreLocked: held by pid 1", False),
        ("b", 1, 0, None, False),
        ("c", 0, 0, None, True),
    ]
    assert tuple((results_file(folder).read() or {}).values()) == results


def test_a_part_whose_time_is_over_goes_on_the_next_time(folder: DataFolder) -> None:
    def endless(house: Cleanup, keep_seconds: float) -> Iterator[Removal]:
        while True:
            yield Removal(subject="one more")

    ticks = iter(range(1000))

    (result,) = run_cleanup(
        [Part("a", 1, endless)], house(folder), clock=lambda: float(next(ticks)), seconds=5
    ).results

    assert (result.removed, result.more) == (6, True)


def test_results_of_other_parts_are_kept(folder: DataFolder) -> None:
    clean(folder, "logs")
    clean(folder, "stale-files")

    assert (results_file(folder).read() or {}).keys() == {"logs", "stale-files"}


def test_two_do_not_clean_at_once(folder: DataFolder) -> None:
    with FileLock(folder.root / "housekeeping.lock"), pytest.raises(HousekeepingBusy):
        clean(folder, "logs")


def test_a_damaged_decision_leaves_its_batch_alone_and_the_others_are_cleaned(
    folder: DataFolder,
) -> None:
    history = History(BatchStatus.COMPLETED, 3, replaying=False, resumed=False)
    for name in ("good", "damaged"):
        build(folder, name, history)
    folder.resumption("damaged").path.write_text("{")
    now = time.time() + 2 * DAY
    store = ToldStore(folder, [record_of(name, history, now) for name in ("good", "damaged")])

    assert set(Cleanup(folder, store, now=now).settled) == {"good"}
