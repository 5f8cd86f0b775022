"""Ends run workers, and cleans up after dead ones: heartbeats, and engines that hold memory.

Processes are found only by what was recorded at their start. A worker is killed, never asked to
end: it would then have its run canceled, which means that a person wants its batch to end. No
result is lost, since the journals have them all.
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

#: On this signal, a worker writes the stack of each of its threads into its log.
STACKS_SIGNAL = signal.SIGUSR1
STACKS_SECONDS = 0.5
#: A process that is busy in the kernel ends later, but runs no instruction of its own any more.
KILL_SECONDS = 10.0
#: For an engine whose worker is gone; usually the kernel has already ended it.
ENGINE_GRACE_SECONDS = 2.0
POLL_SECONDS = 0.05
#: Run tag that holds a `RecordedWorker` as JSON. Dagster's UI hides this prefix.
WORKER_TAG = ".dagster/batch_orchestration/worker"


class RecordedWorker(msgspec.Struct, frozen=True):
    """The identity of a run's worker.

    Attributes:
        pid: With `started` and `boot_id`, as in `ProcessIdentity`.
        run_id: The worker's run: a retry inherits the tags of its parent before it has a worker.
            None for workers that were started before there were heartbeats.
    """

    pid: int
    started: int
    boot_id: str
    run_id: str | None = None

    @property
    def process(self) -> ProcessIdentity:
        """The process by which the worker is found."""
        return ProcessIdentity(self.pid, self.started, self.boot_id)


def recorded_worker(
    run_id: str, tags: Mapping[str, str], folder: DataFolder | None = None
) -> RecordedWorker | None:
    """Return the worker in a run's tags, or else in its heartbeat; None if it has none yet.

    A launcher that dies after starting a worker and before recording it leaves only the heartbeat.
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
    """Kill exactly this worker, after it has written its stacks; do nothing if it is gone.

    A stopped worker (SIGSTOP) is killed as well: SIGKILL needs no cooperation.
    """
    _signal(worker, STACKS_SIGNAL)
    _wait_for_end(worker, STACKS_SECONDS)
    _signal(worker, signal.SIGKILL)
    _wait_for_end(worker, KILL_SECONDS)


def clear_after(run_id: str, folder: DataFolder) -> bool:
    """Clean up after the dead worker of a run; return whether an engine was ended.

    Remains that cannot be removed now are left for the next cleanup; for an engine, a warning is
    logged.
    """
    with contextlib.suppress(OSError):
        remove_heartbeat(folder.heartbeat_path(run_id))
    return _end_engine(folder.engine_record_path(run_id))


def living_workers(folder: DataFolder) -> dict[str, ProcessIdentity]:
    """Return the workers that have written a heartbeat and whose process exists, by run id."""
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
    """Clean up after dead workers, including those from before a reboot; return descriptions.

    An engine whose worker still runs is not touched.
    """
    cleared = []
    for record in sorted((folder.logs / "engines").glob("*.process.json")):
        run_id = record.name.removesuffix(".process.json")
        if _end_engine(record):
            cleared.append(f"ended the engine left by run {run_id}")
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
    """Return the times of the heartbeats that are unreadable, by run id."""
    found = {}
    for path in heartbeat_paths(folder):
        with contextlib.suppress(OSError):
            last_heartbeat = read_last_heartbeat(path)
            if last_heartbeat is not None and last_heartbeat.heartbeat is None:
                found[path.stem] = last_heartbeat.at
    return found


def worker_of(heartbeat: Heartbeat) -> ProcessIdentity:
    """Return the process that wrote a heartbeat."""
    return ProcessIdentity(heartbeat.pid, heartbeat.started, heartbeat.boot_id)


def _end_engine(record: Path) -> bool:
    try:
        return end_recorded(record, grace_seconds=ENGINE_GRACE_SECONDS)
    except (EngineError, OSError) as error:
        logger.warning("cannot end the engine recorded in %s: %s", record, error)
        return False


def _signal(worker: ProcessIdentity, number: signal.Signals) -> None:
    if is_running(worker):
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.pid, number)


def _wait_for_end(worker: ProcessIdentity, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
