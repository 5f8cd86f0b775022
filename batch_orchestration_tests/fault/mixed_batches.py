"""Batches with a bit of everything that goes wrong, and what must be true of them in the end."""

import re
from collections import Counter
from pathlib import Path

from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.delivery.assembly import OutboxFiles, assemble
from batch_orchestration.delivery.recount import recount
from batch_orchestration.engines.openai_server import ServerOptions
from batch_orchestration.engines.processes.records import is_running, read_record
from batch_orchestration.engines.simulated.engine import SimulatedEngine
from batch_orchestration.engines.simulated.malformed_answers import KINDS
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.journal import read_journal
from batch_orchestration.files.journal_records import OutcomeRecord, read_records
from batch_orchestration.inference.faults.retries import RetryPolicy
from batch_orchestration.inference.policy import RunContext
from batch_orchestration.inference.run import run_chunks
from batch_orchestration.store.store import Store
from batch_orchestration_tests.support.builders import MODEL, NOW, make_body, make_line
from batch_orchestration_tests.support.workbench import make_policy

#: Names the submission, of which a disturbed batch has more than an undisturbed one.
_REQUEST_ID = re.compile(rb'("request_id":"[^"]*)-\d+"')


STRANGE = sorted(KINDS)
#: Far below that of a bomb, so that it takes no time.
ANSWER_BYTES = 2**20
#: Quick, and no longer than a moment where the engine asks for a year.
RETRY = RetryPolicy(max_attempts=4, base_delay_seconds=0.0, max_retry_after_seconds=0.5)


def strange_input(requests: int, *, name: str) -> bytes:
    """The same with answers that no engine should give among those of the plain requests."""
    return b"".join(
        _strange_line(name, number) if number % 19 == 7 else _line(name, number)
        for number in range(requests)
    )


def doomed_input(requests: int, *, name: str) -> bytes:
    """A batch file of which the engine refuses every request."""
    faults = {"status": 400}
    return b"".join(
        make_line(
            number,
            custom_id=f"{name}-{number}",
            body=make_body(f"{name}: question {number}", simulate=faults),
        )
        for number in range(requests)
    )


def _strange_line(name: str, number: int) -> bytes:
    faults = {"strange": STRANGE[number // 19 % len(STRANGE)]}
    body = make_body(f"{name}: question {number}", simulate=faults)
    return make_line(number, custom_id=f"{name}-{number}", body=body)


def mixed_input(requests: int, *, name: str = "mixed") -> bytes:
    """A batch file: mostly plain requests; some refused, some that fail at first, some unusable."""
    return b"".join(_line(name, number) for number in range(requests))


def _line(name: str, number: int) -> bytes:
    if number % 37 == 11:
        return b"{not json\n"
    faults: dict[str, object] = {}
    if number % 13 == 5:
        faults = {"status": 400}
    elif number % 17 == 3:
        faults = {"status": 503, "fail_first": 1}
    fields = {"simulate": faults} if faults else {}
    body = make_body(f"{name}: question {number}", **fields)
    return make_line(number, custom_id=f"{name}-{number}", body=body)


def simulated_engine(folder: DataFolder, *, name: str = "engine") -> SimulatedEngine:
    """A real child server; its record lies where those of all runs lie."""
    return SimulatedEngine(
        log_path=folder.logs / "engines" / f"{name}.log",
        models=[MODEL],
        control_path=folder.root / "simulated.json",
        options=ServerOptions(answer_bytes=ANSWER_BYTES),
    )


def engine_leaders(folder: DataFolder) -> list[int]:
    """Pids of the engines of this folder, by what was recorded when they were started."""
    records = map(read_record, (folder.logs / "engines").glob("*.process.json"))
    return [record.leader.pid for record in records if record and is_running(record.leader)]


def run_to_the_end(
    batch_id: str,
    folder: DataFolder,
    store: Store,
    engine: SimulatedEngine,
    *,
    run_id: str,
    in_flight: int = 8,
    max_failure_rate: float = 0.5,
) -> None:
    """Answer what is pending and assemble the output, as the runs of a batch do.

    One that is paused, or pauses meanwhile, is left to a person, and to the run after that.
    """
    plan = folder.read_plan(batch_id)
    commits = run_chunks(
        {batch_id: range(len(plan.chunks))},
        RunContext(
            engine=engine,
            folder=folder,
            store=store,
            run_id=run_id,
            policy=make_policy(
                in_flight=in_flight,
                engine_restarts=1_000,
                retry=RETRY,
                max_failure_rate=max_failure_rate,
            ),
        ),
    )
    for _ in commits:
        pass
    # As dispatch decides: a person may have resumed it since it paused.
    if len(store.chunk_reports(batch_id)) < len(plan.chunks):
        return
    assemble(batch_id, folder=folder, store=store, clock=lambda: NOW)


def durable_outcomes(folder: DataFolder, plan: BatchPlan) -> dict[int, tuple[str, float]]:
    """By request index: the run that gave it its outcome, and when, by the journals."""
    return {
        entry.index: (entry.provenance.run_id, round(entry.settled_at, 3))
        for path in _journals(folder, plan)
        for entry in read_journal(path)
    }


def assert_accounted(folder: DataFolder, store: Store, plan: BatchPlan) -> None:
    """Every request has exactly one outcome, in journals, store and files, and the counts agree."""
    everyone = list(range(plan.requests))
    recorded = Counter(
        record.index
        for path in _journals(folder, plan)
        for record in read_records(path)
        if isinstance(record, OutcomeRecord)
    )
    assert sorted(recorded) == everyone
    assert set(recorded.values()) == {1}
    assert [settled.index for settled in store.settled(plan.batch_id)] == everyone
    batch = store.batch(plan.batch_id)
    assert batch.completed + batch.failed == plan.requests
    counts = recount(plan, OutboxFiles(folder.outbox_path(plan.batch_id)))
    assert counts.problem is None
    assert (counts.completed, counts.failed) == (batch.completed, batch.failed)


def answers(folder: DataFolder, batch_id: str) -> tuple[bytes, bytes]:
    """Both output files; of the ids that the engine gave, which submission it was is left out."""
    files = OutboxFiles(folder.outbox_path(batch_id))
    output, errors = (
        _REQUEST_ID.sub(rb'\1"', path.read_bytes()) for path in (files.output, files.errors)
    )
    return output, errors


def _journals(folder: DataFolder, plan: BatchPlan) -> list[Path]:
    return [folder.journal_path(plan.batch_id, chunk.number) for chunk in plan.chunks]
