"""The heartbeat writer of a run worker: a thread that reports the run status every few seconds."""

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator

import msgspec
from filelock import BaseFileLock, Timeout

from batch_orchestration.engines.processes.records import ProcessIdentity, identify
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.workers.heartbeat import Heartbeat
from batch_orchestration.workers.heartbeat_files import (
    remove_heartbeat,
    touch_heartbeat,
    write_heartbeat,
)
from batch_orchestration.workers.run_status import LONGEST_PATIENCE_SECONDS, WORK_SECONDS, RunStatus

logger = logging.getLogger(__name__)

#: Between two attempts to acquire a lock.
LOCK_SECONDS = 5.0
#: Between two rounds of an event loop that is watched.
LOOP_SECONDS = 1.0

_of_this_process: RunStatus | None = None


def status_of_this_worker() -> RunStatus | None:
    """Return the run status that this process reports; None if it has no heartbeat writer."""
    return _of_this_process


def report_phase(
    phase: str, batch_id: str | None = None, *, patience_seconds: float = WORK_SECONDS
) -> None:
    """Report the phase of this worker, and the time within which it reports progress again."""
    if _of_this_process is not None:
        _of_this_process.batch_id = batch_id
        _of_this_process.enter(phase, patience_seconds=patience_seconds)


def report_progress() -> None:
    """Report that the work of this worker advances: a line, a row, an answer."""
    if _of_this_process is not None:
        _of_this_process.note_progress()


@contextlib.asynccontextmanager
async def loop_watched(status: RunStatus) -> AsyncIterator[None]:
    """Keep `loop_at` current during the body; a blocked event loop does not come round."""

    async def come_round() -> None:
        while True:
            status.loop_at = time.time()
            await asyncio.sleep(LOOP_SECONDS)

    rounds = asyncio.create_task(come_round())
    try:
        yield
    finally:
        rounds.cancel()
        status.loop_at = None


@contextlib.contextmanager
def holding(lock: BaseFileLock) -> Iterator[None]:
    """Hold a lock. Waiting for it counts as progress, since its holder is watched as well."""
    while True:
        try:
            lock.acquire(timeout=LOCK_SECONDS)
        except Timeout:
            report_progress()
        else:
            break
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def heartbeats_written(
    *, folder: DataFolder, run_id: str, job: str, every_seconds: float
) -> Iterator[RunStatus]:
    """Write heartbeats of this process during the body, which is all that the worker does.

    The heartbeat is removed however the body ends; only a kill leaves it behind.
    """
    global _of_this_process
    status, over = RunStatus(), threading.Event()
    writer = _HeartbeatWriter(
        status, folder=folder, run_id=run_id, job=job, every_seconds=every_seconds
    )
    thread = threading.Thread(target=writer.beat, args=(over,), name="heartbeats", daemon=True)
    _of_this_process = status
    writer.beat_once()
    thread.start()
    try:
        yield status
    finally:
        over.set()
        # A disk that hangs must not keep the worker from ending.
        thread.join(every_seconds)
        _of_this_process = None
        with contextlib.suppress(OSError):
            remove_heartbeat(folder.heartbeat_path(run_id))


class _HeartbeatWriter:
    def __init__(
        self,
        status: RunStatus,
        *,
        folder: DataFolder,
        run_id: str,
        job: str,
        every_seconds: float,
    ) -> None:
        self._every_seconds = every_seconds
        self._status = status
        self._path = folder.heartbeat_path(run_id)
        self._run_id = run_id
        self._job = job
        me = identify(os.getpid())
        assert me is not None, "this process is running"
        self._me: ProcessIdentity = me
        self._failing = False

    def beat(self, over: threading.Event) -> None:
        while not over.wait(self._every_seconds):
            self.beat_once()

    def beat_once(self) -> None:
        try:
            write_heartbeat(self._path, self._heartbeat())
        except Exception as error:  # noqa: BLE001 - whatever it is, the run is well
            if not self._failing:
                logger.warning("cannot write %s; the run goes on: %s", self._path, error)
            self._failing = True
            with contextlib.suppress(OSError):
                touch_heartbeat(self._path)
        else:
            self._failing = False

    def _heartbeat(self) -> Heartbeat:
        return Heartbeat(
            run_id=self._run_id,
            job=self._job,
            pid=self._me.pid,
            started=self._me.started,
            boot_id=self._me.boot_id,
            at=time.time(),
            every_seconds=self._every_seconds,
            **msgspec.structs.asdict(self._status)
            | {"patience_seconds": min(self._status.patience_seconds, LONGEST_PATIENCE_SECONDS)},
        )
