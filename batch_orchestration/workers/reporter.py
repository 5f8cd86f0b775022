"""The heartbeat writer of a run worker: a thread that reports the run status every few seconds."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator

from filelock import BaseFileLock, Timeout

from batch_orchestration.engines.processes.records import ProcessIdentity, identify
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.workers.heartbeat import Heartbeat
from batch_orchestration.workers.heartbeat_files import (
    remove_heartbeat,
    touch_heartbeat,
    write_heartbeat,
)
from batch_orchestration.workers.vitals import WORK_SECONDS, RunVitals, finite

logger = logging.getLogger(__name__)

#: Between two attempts to acquire a lock.
LOCK_SECONDS = 5.0
#: Stands for unlimited patience, since JSON has no infinity.
LONGEST_PATIENCE_SECONDS = 1e9

_of_this_process: RunVitals | None = None


def vitals_of_this_worker() -> RunVitals | None:
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
) -> Iterator[RunVitals]:
    """Write heartbeats of this process during the body, which is all that the worker does.

    The heartbeat is removed however the body ends; only a kill leaves it behind.
    """
    global _of_this_process
    vitals, over = RunVitals(), threading.Event()
    heart = _HeartbeatWriter(
        vitals, folder=folder, run_id=run_id, job=job, every_seconds=every_seconds
    )
    thread = threading.Thread(target=heart.beat, args=(over,), name="heart", daemon=True)
    _of_this_process = vitals
    heart.beat_once()
    thread.start()
    try:
        yield vitals
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
        vitals: RunVitals,
        *,
        folder: DataFolder,
        run_id: str,
        job: str,
        every_seconds: float,
    ) -> None:
        self._every_seconds = every_seconds
        self._vitals = vitals
        self._path = folder.heartbeat_path(run_id)
        self._run_id = run_id
        self._job = job
        me = identify(os.getpid())
        assert me is not None, "who asks is running"
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
        vitals = self._vitals
        return Heartbeat(
            run_id=self._run_id,
            job=self._job,
            pid=self._me.pid,
            started=self._me.started,
            boot_id=self._me.boot_id,
            at=time.time(),
            phase=vitals.phase,
            batch_id=vitals.batch_id,
            chunk=vitals.chunk,
            progress_at=vitals.progress_at,
            patience_seconds=finite(vitals.patience_seconds, otherwise=LONGEST_PATIENCE_SECONDS),
            loop_at=vitals.loop_at,
            every_seconds=self._every_seconds,
            **vitals.load(),
        )
