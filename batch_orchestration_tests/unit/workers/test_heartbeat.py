"""Telling alive, silent and stuck apart; above all: stuck is not slow."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_orchestration.workers.heartbeat import (
    FIRST_HEARTBEAT_SECONDS,
    Heartbeat,
    IdleTimes,
    LastHeartbeat,
    WorkerState,
    judge_worker,
)
from batch_orchestration.workers.watch import LONGEST_STEP_SECONDS, WorkerWatch
from batch_orchestration_tests.support.builders import NOW

SILENT_SECONDS = 60.0
PATIENCE = 160.0
POLL = 5.0


def make_heartbeat(at=NOW, *, progress_at=NOW, loop_at=None, patience=PATIENCE, outdated=False):
    heartbeat = Heartbeat(
        run_id="run",
        job="answer_chunks",
        pid=1,
        started=1,
        boot_id="boot",
        at=at,
        phase="feeding",
        progress_at=progress_at,
        patience_seconds=patience,
        loop_at=loop_at,
        in_flight=12,
    )
    return LastHeartbeat(at=at, heartbeat=heartbeat, outdated=outdated)


def state(last_heartbeat, **idle):
    return judge_worker(last_heartbeat, IdleTimes(**idle), silent_seconds=SILENT_SECONDS).state


class Observer:
    """A watch on a clock of its own, of a worker whose clock may say anything."""

    def __init__(self):
        self.now = 0.0
        self.watch = WorkerWatch(silent_seconds=SILENT_SECONDS, clock=lambda: self.now)

    def look(self, last_heartbeat, *, after=POLL):
        self.now += after
        return self.watch.check("run", last_heartbeat).state

    def seconds_until(self, wanted, heartbeat_at):
        """Look every few seconds until the worker is judged so."""
        began = self.now
        while self.look(heartbeat_at(self.now)) is not wanted:
            assert self.now - began < 3600
        return self.now - began


@pytest.mark.parametrize(
    ("last_heartbeat", "idle", "expected"),
    [
        (None, {"heartbeat": FIRST_HEARTBEAT_SECONDS}, WorkerState.ALIVE),
        (None, {"heartbeat": FIRST_HEARTBEAT_SECONDS + 1}, WorkerState.SILENT),
        (make_heartbeat(), {"heartbeat": 60.0}, WorkerState.ALIVE),
        (make_heartbeat(), {"heartbeat": 61.0}, WorkerState.SILENT),
        (make_heartbeat(), {"heartbeat": 5.0, "progress": PATIENCE}, WorkerState.ALIVE),
        (make_heartbeat(), {"heartbeat": 5.0, "progress": PATIENCE + 1}, WorkerState.STUCK),
        # There is no loop now.
        (make_heartbeat(), {"heartbeat": 5.0, "loop": 1e6}, WorkerState.ALIVE),
        (make_heartbeat(loop_at=NOW), {"heartbeat": 5.0, "loop": 61.0}, WorkerState.STUCK),
        # No room to write: it can be heard, and that is all that is known.
        (make_heartbeat(outdated=True), {"heartbeat": 5.0, "progress": 1e6}, WorkerState.ALIVE),
        (make_heartbeat(outdated=True), {"heartbeat": 61.0}, WorkerState.SILENT),
        (LastHeartbeat(at=NOW), {"heartbeat": 5.0, "progress": 1e6}, WorkerState.ALIVE),
    ],
)
def test_what_was_seen_gives_this_judgement(last_heartbeat, idle, expected):
    assert state(last_heartbeat, **idle) is expected


def test_a_worker_that_was_started_with_rarer_heartbeats_is_judged_by_those():
    """The settings were changed while it was at work."""
    last_heartbeat = make_heartbeat()
    rare = msgspec.structs.replace(last_heartbeat.heartbeat, every_seconds=30.0)
    last_heartbeat = msgspec.structs.replace(last_heartbeat, heartbeat=rare)

    assert state(last_heartbeat, heartbeat=90.0) is WorkerState.ALIVE
    assert state(last_heartbeat, heartbeat=91.0) is WorkerState.SILENT


def test_a_reason_has_the_figures_that_a_person_would_ask_for():
    judged = judge_worker(
        make_heartbeat(), IdleTimes(heartbeat=3.0, progress=200.0), silent_seconds=60.0
    )

    assert judged.reason == (
        "no outcome, token or commit for 200 s while feeding (12 in flight);"
        " 160 s would only be slow"
    )


@given(
    gaps=st.lists(st.floats(min_value=1.0, max_value=PATIENCE - 2 * POLL), max_size=8),
    patience=st.floats(min_value=PATIENCE, max_value=1e5),
)
def test_whoever_makes_progress_within_its_patience_is_never_stuck_however_slow(gaps, patience):
    observer, progress_at = Observer(), 0.0
    for gap in gaps:
        while observer.now < progress_at + gap:
            now = observer.now
            last_heartbeat = make_heartbeat(
                NOW + now, progress_at=NOW + progress_at, patience=patience
            )
            assert observer.look(last_heartbeat) is WorkerState.ALIVE
        progress_at = observer.now


@given(st.floats(min_value=10.0, max_value=2000.0))
def test_whoever_makes_none_is_stuck_one_look_after_its_patience(patience):
    observer = Observer()

    seconds = observer.seconds_until(
        WorkerState.STUCK, lambda now: make_heartbeat(NOW + now, progress_at=NOW, patience=patience)
    )

    assert patience < seconds <= patience + 3 * POLL


def test_whoever_stops_saying_anything_is_silent_after_a_minute():
    seconds = Observer().seconds_until(WorkerState.SILENT, lambda now: make_heartbeat())

    assert SILENT_SECONDS < seconds <= SILENT_SECONDS + 3 * POLL


def test_a_loop_that_is_blocked_shows_long_before_patience_ends():
    seconds = Observer().seconds_until(
        WorkerState.STUCK, lambda now: make_heartbeat(NOW + now, progress_at=NOW, loop_at=NOW)
    )

    assert seconds <= SILENT_SECONDS + 3 * POLL


@pytest.mark.parametrize("hours", [0.1, 8.0, 72.0])
def test_nobody_is_judged_by_time_in_which_the_observer_slept_too(hours):
    """A suspended machine or frozen container: the worker speaks up after us, within seconds."""
    observer = Observer()
    observer.look(make_heartbeat(loop_at=NOW))
    observer.look(make_heartbeat(loop_at=NOW))

    assert observer.look(make_heartbeat(loop_at=NOW), after=hours * 3600) is WorkerState.ALIVE
    assert observer.look(make_heartbeat(loop_at=NOW)) is WorkerState.ALIVE

    awake = NOW + hours * 3600
    later = make_heartbeat(awake, progress_at=awake, loop_at=awake)
    assert observer.look(later) is WorkerState.ALIVE
    assert 4 * LONGEST_STEP_SECONDS <= SILENT_SECONDS


@given(st.floats(min_value=-1e9, max_value=1e9))
def test_a_clock_that_is_set_kills_nobody(jump):
    observer = Observer()
    for number in range(20):
        at = NOW + number * POLL + (jump if number >= 10 else 0.0)
        assert observer.look(make_heartbeat(at, progress_at=at, loop_at=at)) is WorkerState.ALIVE


def test_a_phase_that_begins_is_progress_whatever_was_before():
    observer = Observer()
    for number in range(30):
        observer.look(make_heartbeat(NOW + number, progress_at=NOW, patience=1e6))

    fresh = make_heartbeat(NOW + 99, progress_at=NOW + 98, patience=20.0)
    assert observer.look(fresh) is WorkerState.ALIVE


@pytest.mark.parametrize("unheard", [None, LastHeartbeat(at=NOW), make_heartbeat(outdated=True)])
def test_heartbeats_that_say_nothing_hide_no_worker_that_is_stuck(unheard):
    """One slow write or torn read per patience would, if each began the count anew."""
    observer, looks = Observer(), 0

    def heartbeat_at(now):
        nonlocal looks
        looks += 1
        return unheard if looks % 10 == 0 else make_heartbeat(NOW + now, progress_at=NOW)

    assert observer.seconds_until(WorkerState.STUCK, heartbeat_at) <= 1.2 * PATIENCE + 3 * POLL
