"""The index of unfinished work: what is on it is found at once, what is missing after a while."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from batch_orchestration.admission.registration import register_lost
from batch_orchestration.files.unfinished import mark, marked
from batch_orchestration.lifecycle.resumption import finish_resumptions, resume
from batch_orchestration.lifecycle.unfinished import MARK_SECONDS, SEARCH_SECONDS, keep_index
from batch_orchestration.queue.load import read_rates
from batch_orchestration.settings import Settings
from batch_orchestration.store.operations import open_replays, replay_asked_since
from batch_orchestration_tests.support.builders import NOW, make_batch
from batch_orchestration_tests.support.letter_bench import LetterBench
from batch_orchestration_tests.support.workbench import Workbench

DAY = 86_400.0


def look(bench: Workbench, *, now: float) -> list[str]:
    return keep_index(folder=bench.folder, store=bench.store, now=now)


def age_marks(bench: Workbench, *, seconds: float) -> None:
    for name in marked(bench.folder):
        path = bench.folder.unfinished / name
        at = path.stat().st_mtime - seconds
        os.utime(path, (at, at))


def unlisted_batch(root: Path) -> tuple[Workbench, str, Callable[[], object]]:
    """A folder in `batches/` that the store does not know; the store has another batch."""
    bench = Workbench(root)
    bench.admitted(3)
    batch_id = make_batch(bench.folder, 5).batch_id
    return bench, batch_id, lambda: batch_id in bench.store.records([batch_id])


def resumed_batch(root: Path) -> tuple[Workbench, str, Callable[[], object]]:
    """A batch whose resumption was decided by somebody who was killed right after."""
    bench = Workbench(root)
    plan = bench.admit_now(10)
    bench.cancel(plan)
    bench.deliver(plan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("batch_orchestration.lifecycle.resumption._carry_out", lambda *_: None)
        resume(plan.batch_id, folder=bench.folder, store=bench.store, actor="a", at=time.time() + 1)
    return bench, plan.batch_id, lambda: bench.status(plan) == "in_progress"


def replayed_batch(root: Path) -> tuple[Workbench, str, Callable[[], object]]:
    """A batch that was delivered, with a replay that nobody has run."""
    bench = LetterBench(root)
    bench.assemble()
    bench.ask()
    return bench, bench.batch_id, lambda: open_replays(bench.folder) == [(bench.batch_id, 1)]


CASES = [unlisted_batch, resumed_batch, replayed_batch]


def act(bench: Workbench) -> None:
    register_lost(bench.folder, bench.store, at=time.time())
    finish_resumptions(folder=bench.folder, store=bench.store)


@pytest.mark.parametrize("case", CASES)
def test_what_lost_its_mark_is_found_by_the_next_search(case, tmp_path):
    bench, name, is_seen = case(tmp_path)
    shutil.rmtree(bench.folder.unfinished)
    bench.folder.create()

    found = look(bench, now=time.time())
    act(bench)

    assert name in found
    assert is_seen()


@pytest.mark.parametrize("instead", ["nothing", "a file", "a link that leads nowhere"])
@pytest.mark.parametrize("case", CASES)
def test_without_an_index_everything_is_looked_at(case, instead, tmp_path):
    bench, _, is_seen = case(tmp_path)
    shutil.rmtree(bench.folder.unfinished)
    if instead == "a file":
        bench.folder.unfinished.touch()
    elif instead != "nothing":
        bench.folder.unfinished.symlink_to(tmp_path / "nowhere")

    act(bench)
    bench.folder.create()
    look(bench, now=time.time())

    assert is_seen()


@pytest.mark.parametrize("case", CASES)
def test_between_two_searches_only_marks_are_looked_at_and_the_next_finds_the_rest(case, tmp_path):
    bench, name, is_seen = case(tmp_path)
    look(bench, now=time.time())
    for path in bench.folder.unfinished.glob("[!.]*"):
        path.unlink()

    assert look(bench, now=time.time() + SEARCH_SECONDS / 2) == []
    act(bench)
    assert not is_seen()

    assert name in look(bench, now=time.time() + SEARCH_SECONDS)
    act(bench)
    assert is_seen()


@pytest.mark.parametrize("case", CASES[1:])
def test_whoever_makes_unfinished_work_has_marked_it(case, tmp_path):
    bench, name, is_seen = case(tmp_path)

    assert name in marked(bench.folder)
    act(bench)
    assert is_seen()


@pytest.mark.parametrize("case", CASES)
def test_a_mark_stays_while_its_work_is_open_and_goes_when_it_is_done(case, tmp_path):
    bench, name, _ = case(tmp_path)
    look(bench, now=time.time())
    age_marks(bench, seconds=MARK_SECONDS + 1)

    look(bench, now=time.time())
    assert name in marked(bench.folder)

    act(bench)
    if isinstance(bench, LetterBench):
        bench.replay(1)
    age_marks(bench, seconds=MARK_SECONDS + 1)
    look(bench, now=time.time() + 400 * DAY)
    assert name not in marked(bench.folder)


def test_a_young_mark_stays_for_what_it_stands_for_may_not_be_there_yet(tmp_path):
    bench = Workbench(tmp_path)
    mark(bench.folder, "b-12345678")

    look(bench, now=time.time())
    assert marked(bench.folder) == ["b-12345678"]

    age_marks(bench, seconds=MARK_SECONDS + 1)
    look(bench, now=time.time())
    assert marked(bench.folder) == []


def test_strange_files_on_the_index_disturb_nothing(tmp_path):
    bench, name, is_seen = replayed_batch(tmp_path)
    for strange in ("a b", "Copy of (x)", ".hidden", "x..y", "ü"):
        (bench.folder.unfinished / strange).touch()
    (bench.folder.unfinished / "a-folder").mkdir()
    age_marks(bench, seconds=MARK_SECONDS + 1)

    look(bench, now=time.time())
    act(bench)

    assert name in marked(bench.folder)
    assert is_seen()


def test_a_clock_that_was_ahead_at_the_last_search_delays_no_other(tmp_path):
    bench, name, _ = unlisted_batch(tmp_path)
    look(Workbench(tmp_path), now=time.time() + 100 * DAY)
    for path in bench.folder.unfinished.glob("[!.]*"):
        path.unlink()

    assert name in look(bench, now=time.time())


def test_a_run_finds_the_replay_that_was_asked_for_since_it_began(tmp_path):
    bench, _, _ = replayed_batch(tmp_path)

    assert replay_asked_since(bench.folder, time.time() - 60)
    assert not replay_asked_since(bench.folder, time.time() + 60)
    bench.replay(1)
    assert not replay_asked_since(bench.folder, time.time() - 60)


def test_rates_remember_what_is_of_late_and_what_is_still_owed_alone(tmp_path):
    bench = Workbench(tmp_path)
    settings = Settings(engine="simulated", _env_file=None)
    ages_and_sizes = [(3600.0, 10), (2 * DAY, 20), (2 * DAY, 10 * 400_000 * 24)]
    for age, requests in ages_and_sizes:
        plan = make_batch(bench.folder, 1 + len(bench.store.batches()))
        bench.store.add_batch(plan, at=NOW - age)
        set_size(bench, plan.batch_id, NOW - age, requests)

    rates = read_rates(bench.store, settings, now=NOW)

    assert sorted(event.requests for event in rates.events) == [10, 10 * 400_000 * 24]


def set_size(bench: Workbench, batch_id: str, at: float, requests: int) -> None:
    with bench.store.writing() as db:
        db.execute(
            "UPDATE batches SET requests = ?, created_at = to_timestamp(?) AT TIME ZONE 'UTC'"
            " WHERE batch_id = ?",
            [requests, at, batch_id],
        )
