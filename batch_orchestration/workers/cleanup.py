"""Ending run workers, and clearing away what dead ones left: heartbeats, and engines with memory.

Only by what was recorded when they were started. A worker is killed, never asked: asked to end, it
would have its run canceled, which means that a person wants its batch to end. All that it knows is
in the journals.
"""

import contextlib
import logging
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from batch_orchestration.core.errors import EngineError
from batch_orchestration.engines.processes.records import ProcessIdentity, end_recorded, is_running
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.workers.heartbeat import Heartbeat
from batch_orchestration.workers.heartbeat_files import (
    heartbeat_paths,
    read_last_heartbeat,
    remove_heartbeat,
)

logger = logging.getLogger(__name__)

#: Upon this a worker writes the stack of each of its threads into its log.
STACKS_SIGNAL = signal.SIGUSR1
STACKS_SECONDS = 0.5
#: A process that is busy in the kernel ends later; it runs no instruction of its own any more.
KILL_SECONDS = 10.0
#: Of an engine whose worker is gone; usually the kernel has ended it already.
ENGINE_GRACE_SECONDS = 2.0
POLL_SECONDS = 0.05
#: Run tag with `RecordedWorker`, as JSON. Dagster's UI hides this prefix.
WORKER_TAG = ".dagster/batch_orchestration/worker"


class RecordedWorker(msgspec.Struct, frozen=True):
    """Who the worker of a run is.

    Attributes:
        pid: With `started` and `boot_id` as in `ProcessIdentity`.
        run_id: Of its run: a retry inherits the tags of its parent, and has no worker yet. Of
            workers that were started before there were heartbeats, none.
    """

    pid: int
    started: int
    boot_id: str
    run_id: str | None = None

    @property
    def process(self) -> ProcessIdentity:
        """What to find it by."""
        return ProcessIdentity(self.pid, self.started, self.boot_id)


def recorded_worker(
    run_id: str, tags: Mapping[str, str], folder: DataFolder | None = None
) -> RecordedWorker | None:
    """Return the worker that a run's tags name, or else its heartbeat; None if it has none yet.

    A launcher that died between the two has started a worker and not put it on record.
    """
    text = tags.get(WORKER_TAG)
    record = msgspec.json.decode(text, type=RecordedWorker) if text else None
    if record is not None and record.run_id in (None, run_id):
        return record
    with contextlib.suppress(OSError):
        last_heartbeat = (
            None if folder is None else read_last_heartbeat(folder.heartbeat_path(run_id))
        )
        if last_heartbeat is not None and (beat := last_heartbeat.heartbeat) is not None:
            return RecordedWorker(beat.pid, beat.started, beat.boot_id, run_id)
    return None


def end_worker(worker: ProcessIdentity) -> None:
    """Kill exactly this worker, after having it write its stacks; one that is gone is left alone.

    Also one that is stopped (SIGSTOP): SIGKILL needs no cooperation.
    """
    _signal(worker, STACKS_SIGNAL)
    _wait_for_end(worker, STACKS_SECONDS)
    _signal(worker, signal.SIGKILL)
    _wait_for_end(worker, KILL_SECONDS)


def clear_after(run_id: str, folder: DataFolder) -> bool:
    """Clear away what the dead worker of a run left; return whether that was an engine.

    What cannot be cleared away now is said in the log, and left to the next who comes.
    """
    with contextlib.suppress(OSError):
        remove_heartbeat(folder.heartbeat_path(run_id))
    return _end_engine(folder.engine_record_path(run_id))


def living_workers(folder: DataFolder) -> dict[str, ProcessIdentity]:
    """Return the workers that have shown a heartbeat and whose process is there, by run id."""
    living = {}
    for path in heartbeat_paths(folder):
        with contextlib.suppress(OSError):
            last_heartbeat = read_last_heartbeat(path)
            if last_heartbeat is not None and last_heartbeat.heartbeat is not None:
                worker = worker_of(last_heartbeat.heartbeat)
                if is_running(worker):
                    living[path.stem] = worker
    return living


def clear_after_crashes(folder: DataFolder) -> list[str]:
    """Clear away what dead workers left, also before the machine was restarted; say what it was.

    An engine whose worker still runs is nobody's leftover and is not touched.
    """
    cleared = []
    for record in sorted((folder.logs / "engines").glob("*.process.json")):
        run_id = record.name.removesuffix(".process.json")
        if _end_engine(record):
            cleared.append(f"ended the engine that run {run_id} had left")
    for path in heartbeat_paths(folder):
        with contextlib.suppress(OSError):
            last_heartbeat = read_last_heartbeat(path)
            if (
                last_heartbeat is None
                or last_heartbeat.heartbeat is None
                or is_running(worker_of(last_heartbeat.heartbeat))
            ):
                continue
            remove_heartbeat(path)
            cleared.append(f"removed the heartbeat of run {path.stem}, whose worker is gone")
    return cleared


def unreadable_heartbeats(folder: DataFolder) -> dict[str, float]:
    """Return when those were written that nobody can read, by run id; POSIX seconds."""
    found = {}
    for path in heartbeat_paths(folder):
        with contextlib.suppress(OSError):
            last_heartbeat = read_last_heartbeat(path)
            if last_heartbeat is not None and last_heartbeat.heartbeat is None:
                found[path.stem] = last_heartbeat.at
    return found


def worker_of(heartbeat: Heartbeat) -> ProcessIdentity:
    """Return who wrote a heartbeat."""
    return ProcessIdentity(heartbeat.pid, heartbeat.started, heartbeat.boot_id)


def _end_engine(record: Path) -> bool:
    try:
        return end_recorded(record, grace_seconds=ENGINE_GRACE_SECONDS)
    except (EngineError, OSError) as error:
        logger.warning("what %s describes is still there: %s", record, error)
        return False


def _signal(worker: ProcessIdentity, number: signal.Signals) -> None:
    if is_running(worker):
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.pid, number)


def _wait_for_end(worker: ProcessIdentity, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
