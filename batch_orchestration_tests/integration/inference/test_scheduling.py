"""Turns inside a run: more urgent batches overtake, and for some the run makes room."""

import asyncio
import threading
import time
from pathlib import Path

import msgspec
import pytest

from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.core.errors import PlanMismatch
from batch_orchestration.core.lifecycle import EarlyEnd
from batch_orchestration.core.outcomes import Failure, FailureCode, Outcome
from batch_orchestration.files.journal import Journal
from batch_orchestration.files.unfinished import mark
from batch_orchestration.inference import scheduling
from batch_orchestration.inference.chunk_pass import ChunkPass
from batch_orchestration.inference.faults.retries import BreakerPolicy
from batch_orchestration.queue.entries import EntryKind, EntryState, WaitReason
from batch_orchestration.store.store import Store
from batch_orchestration.workers.progress import read_progress
from batch_orchestration_tests.support.builders import NOW, make_provenance
from batch_orchestration_tests.support.scripted_engine import PacedEngine, batches_of
from batch_orchestration_tests.support.workbench import Workbench, queued

OTHER_ENGINE = "0" * 16


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workbench:
    """A bench whose runs look at the queue all the time."""
    monkeypatch.setattr(scheduling, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(scheduling, "REPLAY_LOOK_SECONDS", 0.0)
    return Workbench(tmp_path)


def when_asked(text: str, action):
    """A script that does something once, when a request with this text is asked."""
    state = {"done": False}

    def script(body: bytes, submitted: int):
        if text.encode() in body and not state["done"]:
            state["done"] = True
            action()

    return script


def hold_journal(bench: Workbench, plan, number: int) -> Journal:
    return Journal.open(
        bench.folder.journal_path(plan.batch_id, number),
        batch_id=plan.batch_id,
        number=number,
        provenance=make_provenance("another run"),
        at=NOW,
    )


def test_a_more_urgent_batch_overtakes_in_the_middle_of_a_chunk(bench: Workbench) -> None:
    big, urgent = (
        bench.admitted(400, "big", requests_per_chunk=200),
        bench.admitted(15, "urgent"),
    )
    engine = PacedEngine(
        when_asked("big 100.", lambda: bench.queue(queued(urgent, effective=10), queued(big)))
    )

    commits = bench.run(big, engine, in_flight=4)

    places = engine.places_of(urgent)
    assert 100 < places[0] < 200, "within the chunk, as soon as the store has told what is left"
    assert places == list(range(places[0], places[0] + 15)), "and then nothing comes between"
    assert commits[0].report.batch_id == urgent.batch_id
    assert len(commits) == 4
    assert engine.starts == 1
    assert bench.indices(urgent) == list(range(15))
    assert bench.indices(big) == list(range(400))
    assert set(engine.submissions.values()) == {1}


def test_what_a_guest_gets_is_told_of_the_guest(bench: Workbench) -> None:
    """Provenance, counts and the progress file; and its own run finds all of it done."""
    big, urgent = bench.admitted(200, "big"), bench.admitted(25, "urgent")
    bench.queue(queued(urgent, effective=10), queued(big))

    commits = bench.run(big, PacedEngine(), in_flight=4, run_id="the big one's run")

    theirs = [chunk for chunk in commits if chunk.report.batch_id == urgent.batch_id]
    assert (theirs[-1].progress.done, theirs[-1].progress.total) == (25, 25)
    assert {one.provenance.run_id for one in bench.store.settled(urgent.batch_id)} == {
        "the big one's run"
    }
    progress = read_progress(bench.folder.progress_path(urgent.batch_id))
    assert progress is not None
    assert (progress.completed, progress.phase) == (25, "done")
    own = PacedEngine()
    again = bench.run(urgent, own, run_id="its own run")
    assert [chunk.reused for chunk in again] == [True] * 3
    assert own.starts == 0


def test_among_equals_it_is_somebody_elses_turn_only_after_a_chunk(bench: Workbench) -> None:
    # Long enough for a busy machine to find out what the other has left.
    own, fair = (
        bench.admitted(300, "own", requests_per_chunk=100),
        bench.admitted(10, "fair"),
    )
    engine = PacedEngine(
        when_asked("own 3.", lambda: bench.queue(queued(fair, effective=0.9), queued(own))),
        seconds=0.01,
    )

    bench.run(own, engine, in_flight=1)

    assert batches_of(engine.asked) == [own.batch_id, fair.batch_id, own.batch_id]
    first, *_ = places = engine.places_of(fair)
    assert places == list(range(first, first + 10))
    assert first % 100 == 0


def test_the_chunk_of_a_guest_is_finished_before_the_next_of_our_own(bench: Workbench) -> None:
    own, guest = (
        bench.admitted(200, "own"),
        bench.admitted(40, "guest", requests_per_chunk=20),
    )
    bench.queue(queued(guest, effective=1), queued(own))
    engine = PacedEngine(when_asked("guest 5.", lambda: bench.queue(queued(own), queued(guest))))

    bench.run(own, engine, in_flight=1)

    assert bench.committed(guest) == {0}, "the second chunk is its own run's"
    first, *_, last = engine.places_of(guest)
    assert last == first + 19


def test_a_still_more_urgent_batch_overtakes_a_guest(bench: Workbench) -> None:
    own = bench.admitted(300, "own", requests_per_chunk=100)
    guest, most = (
        bench.admitted(200, "guest", requests_per_chunk=50),
        bench.admitted(5, "most"),
    )
    bench.queue(queued(guest, effective=1), queued(own))
    queue = [queued(most, effective=2), queued(guest, effective=1), queued(own)]
    engine = PacedEngine(when_asked("guest 7.", lambda: bench.queue(*queue)))

    bench.run(own, engine, in_flight=2)

    assert [*batches_of(engine.asked)][-4:] == [
        guest.batch_id, most.batch_id, guest.batch_id, own.batch_id,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"settings_hash": OTHER_ENGINE}, "it needs another engine"),
        ({"reason": WaitReason.GPU_UNHEALTHY}, "it has to wait"),
        ({"state": EntryState.WAITING}, "it is not admitted"),
        ({"kind": EntryKind.FILE}, "it is no batch yet"),
        ({"batch_id": "nobody-00000000"}, "there is no such batch"),
    ],
)
def test_who_cannot_be_served_here_does_not_hold_up_the_run(
    bench: Workbench, fields: dict[str, object], why: str
) -> None:
    own, other = bench.admitted(40, "own"), bench.admitted(20, "other")
    bench.queue(queued(other, effective=5, **fields), queued(own))

    bench.run(own, PacedEngine())

    assert (len(bench.committed(own)), bench.committed(other)) == (4, set()), why


@pytest.mark.parametrize("broken", ["nobody is there", "stale", "damaged", "without us", "behind"])
def test_without_a_queue_that_tells_the_run_goes_on_alone(bench: Workbench, broken: str) -> None:
    own, other = bench.admitted(40, "own"), bench.admitted(20, "other")
    match broken:
        case "stale":
            stale = time.time() - scheduling.STALE_SECONDS - 1
            bench.queue(queued(other, effective=5), queued(own), at=stale)
        case "damaged":
            bench.folder.queue.write_bytes(b'{"at": 1, "entr')
        case "without us":
            bench.queue(queued(other, effective=5))
        case "behind":
            bench.queue(queued(own), queued(other, effective=5))

    bench.run(own, PacedEngine())

    assert (len(bench.committed(own)), bench.committed(other)) == (4, set())


def test_a_guests_chunk_that_another_run_is_at_work_on_is_left_alone(bench: Workbench) -> None:
    own, guest = bench.admitted(200, "own"), bench.admitted(30, "guest")
    bench.queue(queued(guest, effective=5), queued(own))

    with hold_journal(bench, guest, 1):
        bench.run(own, PacedEngine())

    assert bench.committed(guest) == {0, 2}
    assert len(bench.committed(own)) == 20


def test_our_own_chunk_that_another_run_is_at_work_on_is_waited_for(bench: Workbench) -> None:
    """The others come first; then what the other run left is answered, and nothing else."""
    plan = bench.admitted(30, "own")
    other = hold_journal(bench, plan, 0)
    engine = PacedEngine()
    release = threading.Timer(1.5, other.close)
    release.start()

    commits = bench.run(plan, engine)

    release.join()
    assert [chunk.report.number for chunk in commits] == [1, 2, 0]
    assert set(engine.submissions.values()) == {1}


def test_what_another_run_has_committed_meanwhile_is_handed_out_as_it_is(bench: Workbench) -> None:
    own, guest = bench.admitted(60, "own"), bench.admitted(30, "guest")
    bench.queue(queued(guest, effective=5), queued(own))
    host = PacedEngine(seconds=0.02)
    hosting = threading.Thread(target=bench.run, args=(own, host), kwargs={"in_flight": 1})
    hosting.start()
    journal = bench.folder.journal_path(guest.batch_id, 0)
    while not journal.exists():
        time.sleep(0.01)

    commits = bench.run(guest, PacedEngine(), run_id="run-2", in_flight=1)

    hosting.join()
    assert {chunk.report.number for chunk in commits} == {0, 1, 2}
    assert len(bench.store.chunk_reports(guest.batch_id)) == 3
    first = next(chunk for chunk in commits if chunk.report.number == 0)
    assert first.reused, "the host has committed it"
    assert bench.indices(guest) == list(range(30))


def test_a_paused_run_ends_what_it_has_begun_and_ends_well(bench: Workbench) -> None:
    plan = bench.admitted(100, "own")
    engine = PacedEngine(when_asked("own 25.", bench.folder.paused.touch))

    bench.run(plan, engine, in_flight=1)

    assert bench.committed(plan) == {0, 1, 2}
    assert len(engine.asked) == 30
    bench.folder.paused.unlink()
    bench.run(plan, engine, run_id="run-2")
    assert bench.indices(plan) == list(range(100))
    assert set(engine.submissions.values()) == {1}


def test_the_run_makes_room_for_who_is_more_urgent_and_needs_another_engine(
    bench: Workbench,
) -> None:
    own, other = bench.admitted(100, "own"), bench.admitted(10, "other")
    bench.queue(queued(own))
    urgent = queued(other, effective=1, settings_hash=OTHER_ENGINE)
    engine = PacedEngine(when_asked("own 25.", lambda: bench.queue(urgent, queued(own))))

    bench.run(own, engine, in_flight=1)

    assert bench.committed(own) == {0, 1, 2}
    assert bench.committed(other) == set()


@pytest.mark.parametrize("effective", [0.9, 5])
def test_the_engine_is_not_given_up_for_equals_nor_for_who_could_not_run_before(
    bench: Workbench, effective: float
) -> None:
    own, other = bench.admitted(100, "own"), bench.admitted(10, "other")
    blocked = queued(other, effective=effective, settings_hash=OTHER_ENGINE)
    bench.queue(*([blocked, queued(own)] if effective > 1 else [queued(own)]))
    engine = PacedEngine(when_asked("own 25.", lambda: bench.queue(blocked, queued(own))))

    bench.run(own, engine)

    assert len(bench.committed(own)) == 10


def test_the_run_makes_room_for_a_replay(bench: Workbench) -> None:
    plan = bench.admitted(100, "own")
    replay = bench.folder.journal_path(plan.batch_id, 0).parent / "dead_letters"
    replay.mkdir(parents=True)
    mark(bench.folder, plan.batch_id)
    engine = PacedEngine(when_asked("own 25.", (replay / "00001-replay.open.json").touch))

    bench.run(plan, engine, in_flight=1)

    assert bench.committed(plan) == {0, 1, 2}


def test_a_run_serves_no_more_chunks_of_others_than_it_may(bench: Workbench) -> None:
    # Long enough for a busy machine to find out what the guest has left.
    own, guest = bench.admitted(2000, "own"), bench.admitted(100, "guest")
    bench.queue(queued(guest, effective=5), queued(own))

    bench.run(own, PacedEngine(), guest_chunks=3)

    assert len(bench.committed(guest)) == 3
    assert len(bench.committed(own)) < 200, "the rest is left to the next run"


def test_a_guest_whose_input_was_changed_costs_the_run_nothing(bench: Workbench) -> None:
    own, guest = bench.admitted(100, "own"), bench.admitted(30, "guest")
    path = bench.folder.input_path(guest.batch_id)
    path.write_bytes(path.read_bytes().replace(b"guest 15.", b"guest 16."))
    bench.queue(queued(guest, effective=5), queued(own))

    bench.run(own, PacedEngine())

    assert len(bench.committed(own)) == 10
    assert bench.committed(guest) <= {0}
    with pytest.raises(PlanMismatch):
        bench.run(guest, PacedEngine(), run_id="its own run")


@pytest.mark.parametrize("how", ["missing", "a bug"])
def test_whatever_is_wrong_with_a_guest_costs_the_run_nothing(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    own, guest = bench.admitted(100, "own"), bench.admitted(30, "guest")
    bench.queue(queued(guest, effective=5), queued(own))
    if how == "missing":
        bench.folder.input_path(guest.batch_id).unlink()
    else:
        pending = ChunkPass.pending

        def stumble(chunk: ChunkPass):
            if chunk.batch_id == guest.batch_id:
                raise KeyError("what nobody has thought of")
            return pending(chunk)

        monkeypatch.setattr(ChunkPass, "pending", stumble)

    bench.run(own, PacedEngine())

    assert len(bench.committed(own)) == 10
    assert bench.committed(guest) == set()


def test_a_guest_that_is_cancelled_while_it_probes_a_sick_engine_does_not_stop_the_run(
    bench: Workbench,
) -> None:
    """All of the window is the guest's, so that nothing is drawn; and its probe never ends."""
    own, guest = bench.admitted(200, "own"), bench.admitted(40, "guest")
    bench.queue(queued(guest, effective=5), queued(own))
    engine, early_end = SickForGuests(), bench.folder.early_end(guest.batch_id).path
    engine.on_probe = lambda: early_end.write_bytes(
        msgspec.json.encode(EarlyEnd(status=BatchStatus.CANCELLED, at=NOW, actor="me", reason=""))
    )

    policy = BreakerPolicy(last=8, pause_seconds=0.05, max_pause_seconds=0.05, probes=99)
    bench.run(own, engine, in_flight=8, breaker=policy)

    assert engine.probed
    assert len(bench.committed(own)) == 20


class SickForGuests(PacedEngine):
    """Fails thirty requests of guests, never ends the next one, and then is well."""

    failed, probed = 0, False
    on_probe = staticmethod(lambda: None)

    async def answer(self, endpoint: str, body: bytes, *, request_id: str) -> Outcome:
        if b"guest" not in body or self.probed:
            return await super().answer(endpoint, body, request_id=request_id)
        self.failed += 1
        if self.failed > 30:  # the breaker is open: this is a probe
            self.probed = True
            self.on_probe()
            await asyncio.Event().wait()
        return Failure(code=FailureCode.ENGINE_OVERLOADED, message="busy", status=503)


def test_a_guest_that_ends_early_is_let_go_and_its_journal_is_free(bench: Workbench) -> None:
    own, guest = (
        bench.admitted(400, "own"),
        bench.admitted(100, "guest", requests_per_chunk=50),
    )
    bench.queue(queued(guest, effective=5), queued(own))
    early_end = bench.folder.plan_path(guest.batch_id).with_name("early-end.json")
    journal = bench.folder.journal_path(guest.batch_id, 0)
    free = []
    close = when_asked("guest 20.", early_end.touch)
    probe = when_asked("own 390.", lambda: free.append(Journal.probe(journal)))
    engine = PacedEngine(lambda *asked: close(*asked) or probe(*asked), seconds=0.05)

    bench.run(own, engine)

    assert free == [None]
    assert len(bench.committed(own)) == 40
    assert bench.committed(guest) == set()
    assert len(engine.places_of(guest)) < 50


def test_while_the_store_is_locked_there_are_no_guests_and_the_feed_goes_on(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, guest = bench.admitted(50, "own"), bench.admitted(20, "guest")
    bench.queue(queued(guest, effective=5), queued(own))
    reports = Store.chunk_reports

    def slow(store: Store, batch_id: str):
        if batch_id == guest.batch_id:
            time.sleep(1.0)
        return reports(store, batch_id)

    monkeypatch.setattr(Store, "chunk_reports", slow)
    engine = PacedEngine()
    bench.run(own, engine)

    assert len(bench.committed(own)) == 5
    assert engine.places_of(guest) == []
