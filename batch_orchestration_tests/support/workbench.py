"""A data folder with a store, and verbs for all that happens to a batch in it.

The files of a batch, its journals and its rows are made by the product; only `admitted` skips the
inbox, for tests that begin with a batch.
"""

import copy
import json
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

import msgspec

from batch_orchestration.admission.admission import admit
from batch_orchestration.admission.claims import Claim
from batch_orchestration.admission.inbox import Inbox
from batch_orchestration.admission.results import Admission, Admitted
from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.core.lifecycle import EarlyEnd, Halt, Resumption
from batch_orchestration.delivery.assembly import Delivery, assemble
from batch_orchestration.dispatch.queue_building import claim_admissible
from batch_orchestration.dispatch.run_planning import Dispatch, KnownRun, dispatch
from batch_orchestration.engines.base import Engine
from batch_orchestration.files.atomic import write_atomically
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.journal import (
    JournalEntry,
    JournalState,
    read_journal,
    replay_journal,
)
from batch_orchestration.gpu.thermal import Throttle
from batch_orchestration.inference.faults.retries import RetryPolicy
from batch_orchestration.inference.policy import RunContext, RunPolicy
from batch_orchestration.inference.run import CommittedChunk, run_chunks
from batch_orchestration.lifecycle.cancellation import Cancellation, cancel, end_overdue
from batch_orchestration.lifecycle.close_out import fail_unanswered
from batch_orchestration.lifecycle.resumption import resume
from batch_orchestration.queue.entries import EntryKind, EntryState, QueueEntry, QueueView
from batch_orchestration.queue.halts import halt_in_force, halts_in_force
from batch_orchestration.queue.ordering import whole_points
from batch_orchestration.store.store import Store
from batch_orchestration.workers.run_status import RunStatus
from batch_orchestration_tests.support.builders import (
    ANSWER_SETTINGS,
    NOW,
    believe_the_clock,
    make_batch,
    make_settings,
)
from batch_orchestration_tests.support.scripted_engine import ScriptedEngine, StickingEngine

SETTINGS = ANSWER_SETTINGS
#: Later than any file of a test, however long the test takes.
LATER = 4_000_000_000.0


def make_policy(**fields: Any) -> RunPolicy:
    """A run policy without waits between attempts, however many requests are scripted to fail."""
    values: dict[str, Any] = {
        "in_flight": 8,
        "retry": RetryPolicy(max_attempts=3, base_delay_seconds=0.0),
        "engine_restarts": 2,
        "model_aliases": {},
        "max_tokens_cap": None,
        "answer_settings": SETTINGS,
        "max_failure_rate": 1.0,
    }
    return RunPolicy(**{**values, **fields})


class Workbench:
    """One data folder.

    Args:
        lock_seconds: How long the store waits for its file.
        clock: The clock of admission.
        policy: Fields of the policy of every run; see `make_policy`.
        settings: Of the deployment; see `make_settings`.
    """

    def __init__(
        self,
        root: Path,
        *,
        lock_seconds: float = 60.0,
        clock: Callable[[], float] = lambda: NOW,
        policy: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        self.folder = DataFolder(root)
        self.folder.create()
        believe_the_clock(self.folder)
        self._lock_seconds = lock_seconds
        self.store = Store(self.folder.duckdb, deadline_seconds=lock_seconds)
        self.clock = clock
        self.settings = make_settings(data_dir=root, **settings)
        self.inbox = Inbox(self.folder, self.settings)
        self._policy = policy or {}

    def copied(self, root: Path) -> Self:
        """Return the same bench over a copy of the folder; saves preparing it twice."""
        shutil.copytree(self.folder.root, root, dirs_exist_ok=True)
        other = copy.copy(self)
        other.folder = DataFolder(root)
        other.store = Store(other.folder.duckdb, deadline_seconds=self._lock_seconds)
        other.inbox = Inbox(other.folder, other.settings)
        return other

    # --- admission --------------------------------------------------------------------------------

    def drop(self, name: str, content: bytes, *, meta: bytes | None = None) -> Path:
        """Put a file, and perhaps its side-car, into the inbox."""
        path = self.folder.inbox / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        if meta is not None:
            path.with_name(f"{path.name}.meta.json").write_bytes(meta)
        return path

    def claim(self, name: str, content: bytes, *, meta: bytes | None = None) -> Claim:
        """Drop a file and claim it."""
        self.drop(name, content, meta=meta)
        [claim] = self.inbox.claim_ready(now=LATER)
        return claim

    def claim_admissible(self) -> list[QueueEntry]:
        """Claim the files for which there is capacity; return those that wait."""
        return claim_admissible(
            folder=self.folder,
            store=self.store,
            inbox=self.inbox,
            settings=self.settings,
            now=LATER,
        )

    def admit(self, claim: Claim) -> Admission:
        """Admit a claim."""
        return admit(
            claim, folder=self.folder, store=self.store, settings=self.settings, clock=self.clock
        )

    def admit_file(self, name: str, content: bytes, *, meta: bytes | None = None) -> Admission:
        """Drop, claim and admit a file."""
        return self.admit(self.claim(name, content, meta=meta))

    def plan_of(self, name: str, content: bytes, *, meta: bytes | None = None) -> BatchPlan:
        """Admit a file that must become a batch, and return its plan."""
        result = self.admit_file(name, content, meta=meta)
        assert isinstance(result, Admitted), result
        return self.folder.read_plan(result.batch_id)

    def admitted(
        self,
        requests: int,
        name: str | None = None,
        *,
        requests_per_chunk: int = 10,
        settings: dict[str, Any] = SETTINGS,
        at: float = NOW,
        **options: Any,
    ) -> BatchPlan:
        """Return the plan of a batch of usable requests, ready to run.

        Args:
            name: Of the file; the prompts then begin with it.
            settings: Settings that answers depend on, as the plan records them.
            options: Fields of `BatchOptions`.
        """
        plan = make_batch(
            self.folder,
            requests,
            requests_per_chunk=requests_per_chunk,
            name=name,
            settings=settings,
            at=at,
            **options,
        )
        self.store.add_batch(plan, at=at)
        return plan

    def admit_now(self, requests: int, **fields: Any) -> BatchPlan:
        """Return the plan of a batch admitted just now, with a window of 24 hours; see above."""
        return self.admitted(requests, **{"at": time.time(), "completion_window": "24h", **fields})

    # --- runs -------------------------------------------------------------------------------------

    def run(self, plan: BatchPlan, engine: Engine, **how: Any) -> list[CommittedChunk]:
        """Run chunks of a batch to the end, as `chunk_results` does; see `commits`."""
        return list(self.commits(plan, engine, **how))

    def commits(
        self,
        plan: BatchPlan,
        engine: Engine,
        *,
        numbers: Sequence[int] | None = None,
        run_id: str = "run-1",
        force: bool = False,
        status: RunStatus | None = None,
        throttle: Callable[[], Throttle] = Throttle,
        **policy: Any,
    ) -> Generator[CommittedChunk, None, None]:
        """Run chunks of a batch, and yield each as it is committed.

        Args:
            numbers: Of the chunks; None for all.
            policy: Fields of the run policy.
        """
        run = RunContext(
            engine=engine,
            folder=self.folder,
            store=self.store,
            run_id=run_id,
            policy=make_policy(**{**self._policy, **policy}),
            status=status or RunStatus(),
            throttle=throttle,
        )
        selection = {plan.batch_id: range(len(plan.chunks)) if numbers is None else numbers}
        return run_chunks(selection, run, force=force)

    def run_until_stuck(
        self,
        plan: BatchPlan,
        engine: StickingEngine,
        then: Callable[[], object],
        *,
        numbers: Sequence[int] | None = None,
    ) -> tuple[list[CommittedChunk], float]:
        """Run chunks; do `then` once requests stick; return commits and seconds since then."""
        began = [0.0]

        def wait_and_do() -> None:
            while engine.stuck < 8:
                time.sleep(0.01)
            began[0] = time.monotonic()
            then()

        with _thread(wait_and_do):
            commits = self.run(plan, engine, numbers=numbers)
        return commits, time.monotonic() - began[0]

    def answer_windows(
        self, plan: BatchPlan, engine: Engine | None = None
    ) -> Iterator[CommittedChunk]:
        """Answer what dispatch asks for, run after run; yield each chunk as it is committed."""
        engine = engine or ScriptedEngine()
        while (chunks := self.next_chunks(plan)) is not None:
            run_id = f"run-{chunks[0]}-{chunks[-1]}"
            yield from self.commits(plan, engine, numbers=chunks, run_id=run_id)

    def dispatch(self, *runs: KnownRun, chunks_per_run: int = 500) -> Dispatch:
        """Return the runs that a tick of the sensor asks for."""
        batches = self.store.batches()
        return dispatch(
            batches,
            runs,
            reports=self.store.chunk_reports,
            chunks_per_run=chunks_per_run,
            most_requests=self.settings.max_requests_per_batch,
            now=time.time(),
            halts=halts_in_force(self.folder, batches),
        )

    def next_chunks(self, plan: BatchPlan) -> range | None:
        """Return the chunks of the run that a batch needs now; None if it is to be delivered."""
        (needed,) = (run for run in self.dispatch().needed if run.batch.batch_id == plan.batch_id)
        return needed.chunks

    def queue(self, *entries: QueueEntry, at: float | None = None) -> None:
        """Write `queue.json` with these entries, in their order."""
        placed = [
            msgspec.structs.replace(entry, place=place)
            for place, entry in enumerate(entries, start=1)
        ]
        view = QueueView(at=time.time() if at is None else at, entries=tuple(placed))
        write_atomically(self.folder.queue, msgspec.json.encode(view))

    def kill(self, verb: str, *arguments: Any, at: str) -> int:
        """Call a method in a process of its own that dies at a crash point.

        Arguments that cannot be pickled, such as engines, are given as a `functools.partial`.

        Returns:
            The exit code of the process.
        """
        work = self.folder.root, self._policy, verb, arguments
        # Not at the top: users who may not read the standard library import this module, too.
        from batch_orchestration_tests.support.forks import run_forked

        return run_forked(_do, *work, crash_point=at)

    # --- decisions, delivery ----------------------------------------------------------------------

    def cancel(self, plan: BatchPlan, *, reason: str = "no longer needed") -> Cancellation:
        """Cancel a batch, as a person does."""
        return cancel(
            plan.batch_id,
            folder=self.folder,
            store=self.store,
            actor="tester",
            reason=reason,
            at=time.time(),
        )

    def resume(self, plan: BatchPlan, **how: Any) -> Resumption:
        """Resume a batch, as a person does."""
        how = {"actor": "tester", "at": time.time(), **how}
        return resume(plan.batch_id, folder=self.folder, store=self.store, **how)

    def let_expire(self, plan: BatchPlan) -> None:
        """Let the window of a batch be over."""
        over = Resumption(at=0.0, actor="tester", deadline=time.time() - 1)
        self.folder.resumption(plan.batch_id).write(over)

    def end_overdue(
        self, *, terminated: str | None = None, doubt: str | None = None
    ) -> dict[str, EarlyEnd]:
        """End batches as a tick of the sensor does."""
        batches = self.store.batches()
        return end_overdue(
            batches,
            folder=self.folder,
            store=self.store,
            terminated={batch.batch_id: terminated for batch in batches if terminated},
            actor="sensor",
            now=time.time(),
            doubt=doubt,
        )

    def deliver(self, plan: BatchPlan, *, run_id: str = "deliver-1") -> Delivery:
        """Deliver a batch, as the run of `batch_output` does."""
        for _ in fail_unanswered(
            plan.batch_id, folder=self.folder, store=self.store, run_id=run_id, clock=time.time
        ):
            pass
        return assemble(
            plan.batch_id, folder=self.folder, store=self.store, clock=time.time, actor=run_id
        )

    def finish(self, plan: BatchPlan, engine: Engine | None = None) -> Delivery:
        """Run what is pending, and deliver."""
        self.run(plan, engine or ScriptedEngine(), run_id="run-2")
        return self.deliver(plan)

    # --- questions --------------------------------------------------------------------------------

    def status(self, plan: BatchPlan) -> str:
        """Return the batch's status in the store."""
        return str(self.store.batch(plan.batch_id).status)

    def history(self, plan: BatchPlan) -> list[tuple[str, str]]:
        """Return status and actor of each event after admission."""
        events = self.store.batch_events(plan.batch_id)[2:]
        return [(str(event.to_status), event.actor) for event in events]

    def halt(self, plan: BatchPlan) -> Halt | None:
        """Return why the batch is paused."""
        return halt_in_force(self.folder, plan.batch_id)

    def journals(self, plan: BatchPlan) -> list[JournalState]:
        """Return the states of a batch's journals."""
        return [
            replay_journal(
                self.folder.journal_path(plan.batch_id, chunk.number), plan.batch_id, chunk.number
            )
            for chunk in plan.chunks
        ]

    def settled(self, plan: BatchPlan) -> list[JournalEntry]:
        """Return the outcomes in a batch's journals."""
        paths = (self.folder.journal_path(plan.batch_id, chunk.number) for chunk in plan.chunks)
        return [entry for path in paths for entry in read_journal(path)]

    def attempts(self, plan: BatchPlan) -> int:
        """Return how often a request of the batch was given to an engine, by its journals."""
        return sum(sum(state.attempts.values()) for state in self.journals(plan))

    def indices(self, plan: BatchPlan) -> list[int]:
        """Return the indices of all committed requests, in the store's order."""
        return [settled.index for settled in self.store.settled(plan.batch_id)]

    def committed(self, plan: BatchPlan) -> set[int]:
        """Return the numbers of the committed chunks."""
        return set(self.store.chunk_reports(plan.batch_id))

    def lines(self, plan: BatchPlan, name: str) -> list[dict[str, Any]]:
        """Return the lines of a file in the outbox; none if there is no file."""
        path = self.folder.outbox_path(plan.batch_id) / name
        lines = path.read_bytes().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def numbers(self, plan: BatchPlan, name: str) -> list[int | None]:
        """Return of which request each line of a file of the outbox is."""
        ids = [line["custom_id"] for line in self.lines(plan, name)]
        return [custom_id and int(custom_id.removeprefix("request-")) for custom_id in ids]

    def files_of(self, place: Path) -> set[str]:
        """Return the files below a folder, hidden ones and lock files left out."""
        files = (path.relative_to(place) for path in place.rglob("*") if path.is_file())
        return {str(file) for file in files if not any(part[0] == "." for part in file.parts)}


def queued(plan: BatchPlan, *, effective: float = 0.0, **fields: Any) -> QueueEntry:
    """An admitted batch in the queue."""
    values: dict[str, Any] = {
        "kind": EntryKind.BATCH,
        "id": plan.batch_id,
        "batch_id": plan.batch_id,
        "source": "inbox",
        "priority": whole_points(effective),
        "effective_priority": effective,
        "state": EntryState.ADMITTED,
        "place": 0,
        "settings_hash": plan.settings_hash,
    }
    return QueueEntry(**{**values, **fields})


def _do(root: Path, policy: Mapping[str, Any], verb: str, arguments: tuple[Any, ...]) -> None:
    given = [each() if isinstance(each, partial) else each for each in arguments]
    getattr(Workbench(root, policy=policy), verb)(*given)


@contextmanager
def _thread(work: Callable[[], object]) -> Iterator[None]:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield
    thread.join(5)
    assert not thread.is_alive()
