"""How soon trouble is noticed, and how soon work goes on: each accident, default settings.

    python -m benchmarks.recovery

Writes `benchmarks/recovery.md`. Real `dagster dev` as the repository's `dagster.yaml` has it, a
batch of its own for each accident; the engine is the simulated one, as a real child server.
"""

import os
import platform
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from batch_orchestration.core.crash_points import VARIABLE
from batch_orchestration.engines.processes.records import ProcessIdentity, read_record
from batch_orchestration.files.journal import read_journal
from batch_orchestration.settings import Settings
from batch_orchestration_tests.fault.accidents import (
    assert_undisturbed,
    durable_outcomes,
    wait_for_answering,
    wait_for_outcomes,
)
from batch_orchestration_tests.fault.hanging import (
    inheriting_orphans,
    is_zombie,
    reap,
    stop,
    wait_for_blocked_loop,
)
from batch_orchestration_tests.support.builders import make_input
from batch_orchestration_tests.support.dagster_client import Run
from batch_orchestration_tests.support.dagster_processes import (
    DagsterProcesses,
    dagster_dev,
    kill,
    wait_until,
)

REQUESTS, CHUNK, IN_FLIGHT, LATENCY_SECONDS = 240, 40, 4, 0.4
#: Done before the accident.
DONE = 30
PAGE = Path(__file__).with_name("recovery.md")


class Accident(NamedTuple):
    """What happens, by what it is noticed, and how soon it should be.

    `happen` returns the POSIX seconds of the accident, if that was not just now.
    """

    name: str
    noticed_by: str
    happen: Callable[[DagsterProcesses, str, Run], float | None]
    target_seconds: float


class Figures(NamedTuple):
    """Seconds from an accident until it was noticed, and until the next answer was durable."""

    accident: Accident
    noticed: float
    resumed: float


def main() -> None:
    """Measure, and write the page."""
    load = os.getloadavg()[0]
    # No later worker of the batch has so many requests left, and so none blocks again.
    blocking = {VARIABLE: f"after_submit:{REQUESTS // 2 + 10}:hang"}
    figures = [
        *in_one_deployment([accident for accident in ACCIDENTS if accident.happen is not block]),
        *in_one_deployment(
            [accident for accident in ACCIDENTS if accident.happen is block], blocking
        ),
    ]
    figures.sort(key=lambda figure: ACCIDENTS.index(figure.accident))
    PAGE.write_text("\n".join(page(figures, (load, os.getloadavg()[0]))) + "\n")


def in_one_deployment(
    accidents: Sequence[Accident], environment: Mapping[str, str] = MappingProxyType({})
) -> list[Figures]:
    """Measure accidents one after the other under one `dagster dev`."""
    with (
        tempfile.TemporaryDirectory() as root,
        inheriting_orphans(),
        dagster_dev(
            Path(root),
            poll_seconds=5,
            BATCH_REQUESTS_PER_CHUNK=str(CHUNK),
            BATCH_IN_FLIGHT=str(IN_FLIGHT),
            **environment,
        ) as dagster,
    ):
        dagster.simulate(latency_seconds=LATENCY_SECONDS)
        return [measure(dagster, accident, number) for number, accident in enumerate(accidents)]


def measure(dagster: DagsterProcesses, accident: Accident, number: int) -> Figures:
    """Let one accident happen to a batch of its own, and wait for its end."""
    # Other content each time: what was admitted before is known.
    dagster.drop(f"accident{number}.jsonl", make_input(REQUESTS + number))
    batch_id = dagster.wait_for_batch(f"accident{number}")
    run = wait_for_answering(dagster, batch_id)
    wait_for_outcomes(dagster, batch_id, DONE)
    engine = engine_of(dagster, run)
    began = accident.happen(dagster, batch_id, run) or time.time()
    before = durable_outcomes(dagster, batch_id)
    if accident.noticed_by == ENGINE:
        wait_until(
            lambda: engine_of(dagster, run) not in (None, engine), 300, "another engine is there"
        )
    else:
        dagster.wait_until(lambda: has_failed(dagster, run), 300, "the run has failed")
    noticed = time.time() - began
    resumed = wait_until(lambda: newest_after(dagster, batch_id, began), 300, "work goes on")
    print(f"{accident.name}: noticed {noticed:.1f} s, resumed {resumed - began:.1f} s", flush=True)
    dagster.wait_for_status(batch_id, "completed", seconds=300)
    assert_undisturbed(dagster, batch_id, REQUESTS + number, before)
    return Figures(accident, noticed, resumed - began)


def has_failed(dagster: DagsterProcesses, run: Run) -> bool:
    """Whether Dagster has marked the run as failed."""
    found = next(known for known in dagster.runs("answer_chunks") if known.run_id == run.run_id)
    return found.status == "FAILURE"


def engine_of(dagster: DagsterProcesses, run: Run) -> ProcessIdentity | None:
    """The server that is on record as the run's engine."""
    record = read_record(dagster.folder.engine_record_path(run.run_id))
    return record.leader if record else None


def newest_after(dagster: DagsterProcesses, batch_id: str, began: float) -> float | None:
    """When the first outcome since then became durable; not one that was on its way."""
    paths = (dagster.folder.journals / batch_id).glob("*.journal")
    recent = [path for path in paths if path.is_file() and path.stat().st_mtime > began]
    times = [entry.settled_at for path in recent for entry in read_journal(path)]
    return min((at for at in times if at > began + 2 * LATENCY_SECONDS), default=None)


# --- accidents ------------------------------------------------------------------------------------


def kill_run_worker(dagster: DagsterProcesses, _: str, run: Run) -> None:
    """`kill -9`."""
    dagster.kill_worker(run)


def stop_run_worker(dagster: DagsterProcesses, _: str, run: Run) -> None:
    """SIGSTOP."""
    stop(dagster.worker(run))


def block(dagster: DagsterProcesses, _: str, run: Run) -> float:
    """The event loop waits for ever, at a crash point."""
    return wait_for_blocked_loop(dagster, run)


def make_zombie(dagster: DagsterProcesses, _: str, run: Run) -> None:
    """The worker's parent is gone, and whoever inherited it reaps nobody."""
    # Else it would be done by itself before Dagster is there again.
    dagster.simulate(latency_seconds=30.0)
    dagster.kill_daemon()
    wait_until(lambda: not dagster.is_up(), 60, "dagster dev is gone")
    dagster.start()
    worker = dagster.worker(run)
    kill(worker)
    dagster.simulate(latency_seconds=LATENCY_SECONDS)
    wait_until(lambda: is_zombie(worker.pid), 10, "it is a zombie")


def kill_everything(dagster: DagsterProcesses, _: str, run: Run) -> float:
    """As a power cut; counted from the moment at which Dagster is started again."""
    dagster.kill_everything()
    reap(dagster.worker(run).pid)
    began = time.time()
    dagster.start()
    return began


def signal_engine(number: signal.Signals, dagster: DagsterProcesses, _: str, run: Run) -> None:
    """SIGKILL or SIGSTOP to the engine's server."""
    engine = engine_of(dagster, run)
    assert engine is not None
    os.kill(engine.pid, number)


MONITORING, ENGINE = "run monitoring", "the run itself"
ACCIDENTS = (
    Accident("run worker killed (`kill -9`)", MONITORING, kill_run_worker, 30),
    Accident("run worker stopped (SIGSTOP): no heartbeat", MONITORING, stop_run_worker, 120),
    Accident("run worker's event loop blocked, heartbeat goes on", MONITORING, block, 120),
    Accident("run worker a zombie that nobody reaps", MONITORING, make_zombie, 30),
    Accident("everything killed; from Dagster's next start", MONITORING, kill_everything, 30),
    Accident("engine killed", ENGINE, partial(signal_engine, signal.SIGKILL), 30),
    Accident("engine stopped (SIGSTOP)", ENGINE, partial(signal_engine, signal.SIGSTOP), 120),
)


def page(figures: list[Figures], load: tuple[float, float]) -> Iterator[str]:
    """Yield the lines of the page."""
    settings = Settings(_env_file=None)
    yield "# How soon trouble is noticed, and how soon work goes on"
    yield ""
    yield f"Measured {datetime.now(UTC):%Y-%m-%d} by `python -m benchmarks.recovery` on"
    yield f"{os.cpu_count()} cores ({platform.system()}, Python {platform.python_version()}; load"
    yield f"{load[0]:.1f} before, {load[1]:.1f} after) with real `dagster dev`, the repository's"
    yield "`dagster.yaml` (run monitoring every 5 s) and default settings"
    yield f"(`BATCH_HEARTBEAT_SECONDS={settings.heartbeat_seconds:g}`,"
    yield f"`BATCH_SILENT_SECONDS={settings.silent_seconds:g}`,"
    yield f"`BATCH_HANG_SECONDS={settings.hang_seconds:g}`). The engine is the **simulated** one,"
    yield "as a real child server that starts in about a second: where a run or an engine is"
    yield "started again, add the start of yours. One round; the targets are those of the issue."
    yield "After each accident every request was in the output exactly once, with the outcome that"
    yield "it had before, if it had one."
    yield ""
    yield "| accident | noticed by | noticed after | target | next answer after |"
    yield "|---|---|---:|---:|---:|"
    for row in figures:
        yield (
            f"| {row.accident.name} | {row.accident.noticed_by} | {row.noticed:.0f} s |"
            f" {row.accident.target_seconds:.0f} s | {row.resumed:.0f} s |"
        )


if __name__ == "__main__":
    main()
