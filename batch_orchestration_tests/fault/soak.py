"""Batches in an endless row while chaos kills whatever works on them; then the books are checked.

`make soak MINUTES=3 SEED=7`, or `python -m batch_orchestration_tests.fault.soak --minutes 3`. With
Dagster its daemon is among the victims; `--stage workers` does without, and gets many more kills
into the same time.

Every fourth batch is doomed: the engine refuses all of it, it pauses, and a person resumes it. Some
answers are strange. Now and then files are damaged, the engine lets nobody in, or the disk is full
(`soak_accidents`).
"""

import argparse
import json
import logging
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.core.errors import FileDamaged
from batch_orchestration.core.lifecycle import FINAL
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.lifecycle.resumption import resume
from batch_orchestration.queue.halts import halts_in_force
from batch_orchestration.store.store import Store
from batch_orchestration_tests.fault.mixed_batches import (
    ANSWER_BYTES,
    RETRY,
    answers,
    assert_accounted,
    doomed_input,
    run_to_the_end,
    simulated_engine,
    strange_input,
)
from batch_orchestration_tests.fault.soak_accidents import (
    LASTING,
    STRIKES,
    End,
    simulate,
    small_disk_if_allowed,
)
from batch_orchestration_tests.support.builders import MODEL
from batch_orchestration_tests.support.children import ROOT
from batch_orchestration_tests.support.dagster_processes import (
    DagsterProcesses,
    dagster_dev,
    wait_until,
)
from batch_orchestration_tests.support.workbench import Workbench

PER_CHUNK = 20
#: So many batches are always unfinished: a kill never finds everything idle.
UNFINISHED = 2
DRAIN_SECONDS = 600.0
#: One batch in so many is doomed, and has so many requests: more than are judged.
DOOMED_EVERY = 4
DOOMED_REQUESTS = 120
POLL_SECONDS = 0.2
#: Between two things that last: a gate that opens for a moment and closes again may refuse a
#: request before a control and after it, which then counts as the request's own refusal.
CALM_SECONDS = 5.0


#: How likely the accidents of `soak_accidents` are, on any stage.
OTHERS = {"engine": 3, "file": 2, "needed file": 1, "gate": 1, "disk": 1}


class Stage(Protocol):
    """Whatever answers batches, and can be killed piece by piece."""

    folder: DataFolder
    #: Whether the folder has a small disk to itself.
    own_disk: bool
    #: How likely each of its processes is to be the next that dies; the rest is in `OTHERS`.
    victims: Mapping[str, int]
    #: The shortest and the longest time between two accidents, and of one that lasts.
    pause_seconds: tuple[float, float]
    #: Per batch.
    requests: int

    @property
    def store(self) -> Store:
        """The store of the data folder."""

    def submit(self, name: str, content: bytes) -> None:
        """Let a batch file in."""

    def strike(self, victim: str) -> bool:
        """Kill one process of this kind; say whether there was one."""

    def tend(self) -> None:
        """Start again what a person or a supervisor would."""


class Workers:
    """One worker process that is started again whenever it is found dead."""

    victims: ClassVar = {"worker": 3}
    pause_seconds = (0.5, 4.0)
    requests = 240

    def __init__(self, root: Path, *, own_disk: bool) -> None:
        self.own_disk = own_disk
        self._bench = Workbench(root, clock=time.time, requests_per_chunk=PER_CHUNK)
        self.folder, self.store = self._bench.folder, self._bench.store
        self._worker: subprocess.Popen[bytes] | None = None

    def submit(self, name: str, content: bytes) -> None:
        self._bench.plan_of(name, content)

    def strike(self, _victim: str) -> bool:
        assert self._worker is not None
        alive = self._worker.poll() is None
        self._worker.kill()
        return alive

    def tend(self) -> None:
        if self._worker is not None and self._worker.poll() in (None, 0):
            return
        if self._worker is not None:
            # It may be killed, but never fail by itself.
            ended = self._worker.returncode
            assert ended == -signal.SIGKILL, f"the worker ended with {ended}: {self.log()}"
        command = [sys.executable, "-m", "batch_orchestration_tests.fault.soak_worker"]
        with (self.folder.logs / "worker.log").open("ab") as log:
            self._worker = subprocess.Popen(
                [*command, str(self.folder.root)], cwd=ROOT, stdout=log, stderr=log
            )

    def stop(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker.wait()

    def log(self) -> str:
        return (self.folder.logs / "worker.log").read_text()[-3000:]


class Dagster:
    """`dagster dev` in a folder of its own; the real daemon, sensors, launcher and retries."""

    victims: ClassVar = {"worker": 3, "daemon": 1, "everything": 1}
    pause_seconds = (3.0, 9.0)
    #: A run takes Dagster six seconds to start; it should then have something to do for a while.
    requests = 800

    def __init__(self, processes: DagsterProcesses, *, own_disk: bool) -> None:
        self._processes = processes
        self.own_disk = own_disk
        self.folder = processes.folder

    @property
    def store(self) -> Store:
        return self._processes.store

    def submit(self, name: str, content: bytes) -> None:
        self._processes.drop(name, content)

    def strike(self, victim: str) -> bool:
        if victim == "worker":
            started = [run for run in self._processes.runs() if run.status == "STARTED"]
            for run in started:
                self._processes.kill_worker(run)
            return bool(started)
        if victim == "daemon":
            self._processes.kill_daemon()
            # `dagster dev` gives up without its daemon; the run workers go on.
            wait_until(lambda: not self._processes.is_up(), 60, "dagster dev is gone")
        else:
            self._processes.kill_everything()
        return True

    def tend(self) -> None:
        if not self._processes.is_up():
            self._processes.start()


@dataclass
class Figures:
    """What a soak came to."""

    seed: int
    seconds: float = 0.0
    batches: int = 0
    requests: int = 0
    completed: int = 0
    failed: int = 0
    submissions: int = 0
    lost: int = 0
    duplicated: int = 0
    paused: int = 0
    kills: Counter[str] = field(default_factory=Counter)


class Chaos:
    """Accidents, one after the other, by the dice of a seed."""

    def __init__(self, stage: Stage, figures: Figures) -> None:
        self._stage = stage
        self._figures = figures
        self._dice = random.Random(figures.seed)
        self._began = time.monotonic()
        self._strike_at, self._next = self._draw()
        #: What lasts at the moment, until when, and how it is ended.
        self._lasting: tuple[str, float, End] | None = None
        self._calm_until = 0.0

    @property
    def disk_is_full(self) -> bool:
        return self._lasting is not None and self._lasting[0] == "disk"

    def go_on(self) -> None:
        """End what is over, and do what is due; who is to die may have to be born first."""
        now = time.monotonic()
        if self._lasting is not None and now > self._lasting[1]:
            self.calm_down()
        if now > self._strike_at and self._strike(now):
            self._figures.kills[self._next] += 1
            print(f"{now - self._began:6.1f} s  {self._next}", flush=True)
            self._strike_at, self._next = self._draw()

    def calm_down(self) -> None:
        """End what lasts."""
        if self._lasting is not None:
            name, _until, end = self._lasting
            end()
            print(f"{time.monotonic() - self._began:6.1f} s  {name}: over", flush=True)
            self._lasting, self._calm_until = None, time.monotonic() + CALM_SECONDS

    def _draw(self) -> tuple[float, str]:
        """Return when the next accident is due, and which."""
        odds = {**self._stage.victims, **OTHERS}
        if not self._stage.own_disk:
            del odds["disk"]
        (drawn,) = self._dice.choices([*odds], [*odds.values()])
        return time.monotonic() + self._dice.uniform(*self._stage.pause_seconds), drawn

    def _strike(self, now: float) -> bool:
        stage, what = self._stage, self._next
        if what in LASTING:
            if self._lasting is not None or now < self._calm_until:
                return False
            end = LASTING[what](stage.folder, self._dice)
            if end is not None:
                until = time.monotonic() + self._dice.uniform(*stage.pause_seconds)
                self._lasting = what, until, end
            return end is not None
        if what in STRIKES:
            return STRIKES[what](stage.folder, self._dice)
        # Who looks for processes to kill needs room on the disk, too.
        return not self.disk_is_full and stage.strike(what)


@contextmanager
def opened(stage: str, root: Path) -> Iterator[Stage]:
    """Set a stage up in a folder, and clear it away."""
    with small_disk_if_allowed(root) as (place, own_disk):
        if stage == "dagster":
            settings = {
                "BATCH_MODEL_ALIASES": "{}",
                "BATCH_SERVED_MODEL_NAME": MODEL,
                "BATCH_REQUESTS_PER_CHUNK": str(PER_CHUNK),
                "BATCH_IN_FLIGHT": "8",
                "BATCH_MAX_ATTEMPTS": str(RETRY.max_attempts),
                "BATCH_MAX_RETRY_AFTER_SECONDS": str(RETRY.max_retry_after_seconds),
                "BATCH_MAX_ANSWER_BYTES": str(ANSWER_BYTES),
                # It is the disk itself that is to be full.
                "BATCH_DISK_RESERVE_BYTES": "0",
            }
            with dagster_dev(place, **settings) as processes:
                yield Dagster(processes, own_disk=own_disk)
            return
        workers = Workers(place, own_disk=own_disk)
        try:
            yield workers
        finally:
            workers.stop()


def soak(stage: Stage, *, seconds: float, seed: int) -> Figures:
    """Keep batches coming and accidents happening; then let the stage finish; check everything.

    Raises:
        AssertionError: A request has no outcome, or two, or another than undisturbed.
    """
    print(f"seed {seed}", flush=True)
    simulate(stage.folder)
    figures, contents, began = Figures(seed=seed), dict[str, bytes](), time.monotonic()
    chaos = Chaos(stage, figures)
    while time.monotonic() < began + seconds:
        # On a full disk no person can do anything, either.
        if not chaos.disk_is_full:
            stage.tend()
            if len(contents) - _completed(stage) < UNFINISHED:
                name = f"soak-{len(contents):03d}.jsonl"
                contents[name] = _content(stage, name, number=len(contents))
                stage.submit(name, contents[name])
            figures.paused += _resume_paused(stage)
        chaos.go_on()
        time.sleep(POLL_SECONDS)
    chaos.calm_down()
    _drain(stage, len(contents), figures)
    figures.seconds = time.monotonic() - began
    _check(stage, contents, figures)
    return figures


def _completed(stage: Stage) -> int:
    return sum(batch.status is BatchStatus.COMPLETED for batch in stage.store.batches())


def _content(stage: Stage, name: str, *, number: int) -> bytes:
    if number % DOOMED_EVERY == 1:
        return doomed_input(DOOMED_REQUESTS, name=name)
    return strange_input(stage.requests, name=name)


def _resume_paused(stage: Stage) -> int:
    """Do what a person does who wants the rest of a paused batch all the same; count them."""
    unfinished = [batch for batch in stage.store.batches() if batch.status not in FINAL]
    resumed = 0
    for batch_id in halts_in_force(stage.folder, unfinished):
        with suppress(FileDamaged):  # which the person mends first
            resume(
                batch_id,
                folder=stage.folder,
                store=stage.store,
                actor="soak",
                max_failure_rate=1.0,
                at=time.time(),
            )
            resumed += 1
    return resumed


def _drain(stage: Stage, batches: int, figures: Figures) -> None:
    deadline = time.monotonic() + DRAIN_SECONDS
    while (completed := _completed(stage)) < batches:
        assert time.monotonic() < deadline, f"only {completed} of {batches} batches complete"
        stage.tend()
        figures.paused += _resume_paused(stage)
        time.sleep(POLL_SECONDS)


def _check(stage: Stage, contents: Mapping[str, bytes], figures: Figures) -> None:
    """Compare every batch with the same one undisturbed, and count."""
    plans = {plan.file_name: plan for plan in map(stage.folder.read_plan, stage.folder.batch_ids())}
    assert plans.keys() == contents.keys()
    with tempfile.TemporaryDirectory(prefix="soak-undisturbed-") as root:
        undisturbed = _undisturbed(Path(root), contents)
        for name, plan in plans.items():
            disturbed = answers(stage.folder, plan.batch_id)
            lines = [json.loads(line) for file in disturbed for line in file.splitlines()]
            different = {line["id"] for line in lines}
            figures.lost += plan.requests - len(different)
            figures.duplicated += len(lines) - len(different)
            assert_accounted(stage.folder, stage.store, plan)
            for file, calm in zip(disturbed, answers(undisturbed, plan.batch_id), strict=True):
                differences = sorted(set(file.splitlines()) ^ set(calm.splitlines()))
                assert file == calm, f"{name} is not as undisturbed: {differences}"
    for batch in stage.store.batches():
        figures.batches += 1
        figures.requests += batch.total
        figures.completed += batch.completed
        figures.failed += batch.failed
        reports = stage.store.chunk_reports(batch.batch_id).values()
        figures.submissions += sum(report.attempts for report in reports)


def _undisturbed(root: Path, contents: Mapping[str, bytes]) -> DataFolder:
    bench = Workbench(root, clock=time.time, requests_per_chunk=PER_CHUNK)
    engine = simulated_engine(bench.folder)
    try:
        for name, content in contents.items():
            plan = bench.plan_of(name, content)
            run_to_the_end(
                plan.batch_id,
                bench.folder,
                bench.store,
                engine,
                run_id="calm",
                in_flight=32,
                max_failure_rate=1.0,
            )
    finally:
        engine.stop()
    return bench.folder


def main() -> None:
    """Soak for a while and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--stage", choices=["dagster", "workers"], default="dagster")
    options = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    with (
        tempfile.TemporaryDirectory(prefix="soak-") as root,
        opened(options.stage, Path(root)) as stage,
    ):
        print(soak(stage, seconds=60 * options.minutes, seed=options.seed))


if __name__ == "__main__":
    main()
