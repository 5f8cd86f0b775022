"""What a run worker executes: Dagster's own command for it, with a heart that beats beside it.

`python -m batch_orchestration.defs.run_worker RUN JOB api execute_run …`, see `launcher`. The heart
beats from before Dagster is imported until the process ends, so that there is no time in which a
worker hangs unnoticed. The signal that asks for stacks makes each thread write where it is.

Dagster's storage may lie on the disk that is full. Then what is only said is not said, and events
that tell what has happened wait for room; neither ends the run (`patient_events`).
"""

import contextlib
import faulthandler
import os
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.sharing import keep_from_others
from batch_orchestration.inference.open_files import raise_open_file_limit
from batch_orchestration.settings import load_settings
from batch_orchestration.workers.cleanup import STACKS_SIGNAL
from batch_orchestration.workers.reporter import heartbeats_written, report_progress

if TYPE_CHECKING:
    from dagster import DagsterInstance, EventLogEntry

#: Between two attempts to store an event that must not be lost.
RETRY_SECONDS = 1.0
#: What SQLite needs beside an event: its log and the index of it grow in pieces.
ROOM_BYTES = 2**20
#: What SQLite says of a full disk (the first), and of a full disk or of descriptors among others.
_FULL, _AMBIGUOUS = sqlite3.SQLITE_FULL, (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)


def main() -> None:
    """Execute a run."""
    keep_from_others()
    run_id, job, *command = sys.argv[1:]
    raise_open_file_limit()
    # Of its own: while a step runs, Dagster has the standard one go elsewhere.
    faulthandler.register(STACKS_SIGNAL, file=os.dup(sys.stderr.fileno()), all_threads=True)
    with _heart(run_id, job), patient_events():
        from dagster._cli import cli

        cli(command)


@contextlib.contextmanager
def patient_events() -> Iterator[None]:
    """Let no event that cannot be stored just now end the run; of this process, during the body.

    Log lines, observations and engine events are left out, however storing them fails: a run must
    not end by what it says. All others wait while the disk is full or no file can be opened; they
    are what a run's and a chunk's state is told by. Waiting is no standstill to those who watch.
    """
    from dagster import DagsterInstance

    store = DagsterInstance.handle_new_event
    left_out = _LeftOut()

    def handle_new_event(instance: "DagsterInstance", event: "EventLogEntry", **how: Any) -> None:
        while True:
            try:
                store(instance, event, **how)
            except Exception as error:  # whatever a storage raises; it is looked at
                if _is_only_said(event):
                    return left_out.note(error)
                if not _is_short(instance, event, error):
                    raise
                report_progress()
                time.sleep(RETRY_SECONDS)
            else:
                return left_out.tell()

    DagsterInstance.handle_new_event = handle_new_event  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        DagsterInstance.handle_new_event = store  # type: ignore[method-assign]


class _LeftOut:
    """Counts what was left out, and says so where the worker's own log can be written again."""

    def __init__(self) -> None:
        self._count = 0
        self._error = ""

    def note(self, error: Exception) -> None:
        self._count += 1
        self._error = str(error).splitlines()[0]

    def tell(self) -> None:
        if not self._count:
            return
        count, self._count = self._count, 0
        with contextlib.suppress(OSError, ValueError):  # full as well, or closed
            print(f"Dagster did not store {count} log lines: {self._error}", file=sys.__stderr__)


def _is_only_said(event: "EventLogEntry") -> bool:
    from dagster import DagsterEventType

    if event.dagster_event is None:
        return True
    said = (DagsterEventType.ASSET_OBSERVATION, DagsterEventType.ENGINE_EVENT)
    return event.dagster_event.event_type in said


def _is_short(instance: "DagsterInstance", event: "EventLogEntry", error: Exception) -> bool:
    """Whether it is for want of room or descriptors that an event cannot be stored."""
    cause = getattr(error, "orig", error)  # SQLAlchemy's errors carry SQLite's
    if not isinstance(cause, sqlite3.Error):
        return False
    code = getattr(cause, "sqlite_errorcode", None)
    if code is None or code & 0xFF == _FULL:
        return code is not None
    return code & 0xFF in _AMBIGUOUS and (_no_room(instance, event) or _no_descriptor())


def _no_room(instance: "DagsterInstance", event: "EventLogEntry") -> bool:
    from dagster._core.storage.event_log import SqliteEventLogStorage

    storage = instance.event_log_storage
    if not isinstance(storage, SqliteEventLogStorage):
        return False
    found = os.statvfs(Path(storage.path_for_shard(event.run_id)).parent)
    return found.f_bavail * found.f_frsize < ROOM_BYTES


def _no_descriptor() -> bool:
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        return True
    return False


@contextlib.contextmanager
def _heart(run_id: str, job: str) -> Iterator[None]:
    try:
        settings = load_settings()
    except ValueError as error:  # pydantic's is one, too
        # The definitions cannot be loaded either, which the run will say better.
        print(f"no heartbeat: {error}", file=sys.stderr)
        yield
        return
    with heartbeats_written(
        folder=DataFolder(settings.data_dir),
        run_id=run_id,
        job=job,
        every_seconds=settings.heartbeat_seconds,
    ):
        yield


if __name__ == "__main__":
    main()
