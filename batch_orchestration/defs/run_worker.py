"""The process of a run worker: Dagster's command for the run, and a heartbeat writer beside it.

`python -m batch_orchestration.defs.run_worker RUN JOB api execute_run …`, see `launcher`. The
heartbeat writer works from before Dagster is imported until the process ends, so that a worker
never hangs unnoticed. `STACKS_SIGNAL` makes each thread write its stack.

If Dagster's storage is on a full disk, messages are dropped, and events that determine a state wait
for space; neither ends the run (`patient_events`).
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
#: SQLite needs this much beside an event: its log and the index of the log grow in pieces.
ROOM_BYTES = 2**20
#: SQLite's error codes: the first means a full disk; the others have several causes, among them a
#: full disk or a lack of descriptors.
_FULL, _AMBIGUOUS = sqlite3.SQLITE_FULL, (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)


def main() -> None:
    """Execute a run."""
    keep_from_others()
    run_id, job, *command = sys.argv[1:]
    raise_open_file_limit()
    # A descriptor of its own, because Dagster redirects the standard one while a step runs.
    faulthandler.register(STACKS_SIGNAL, file=os.dup(sys.stderr.fileno()), all_threads=True)
    with _heartbeats(run_id, job), patient_events():
        from dagster._cli import cli

        cli(command)


@contextlib.contextmanager
def patient_events() -> Iterator[None]:
    """Keep this process's run going, during the body, when an event cannot be stored.

    Log lines, observations and engine events are dropped whatever the error: a run must not end
    because of a message. All other events determine the state of a run or a chunk, so they wait
    while the disk is full or no file can be opened. Waiting counts as progress for the worker's
    observers.
    """
    from dagster import DagsterInstance

    store = DagsterInstance.handle_new_event
    dropped = _DroppedEvents()

    def handle_new_event(instance: "DagsterInstance", event: "EventLogEntry", **how: Any) -> None:
        while True:
            try:
                store(instance, event, **how)
            except Exception as error:  # any exception of a storage; examined below
                if _may_be_dropped(event):
                    return dropped.note(error)
                if not _is_short(instance, event, error):
                    raise
                report_progress()
                time.sleep(RETRY_SECONDS)
            else:
                return dropped.report()

    DagsterInstance.handle_new_event = handle_new_event  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        DagsterInstance.handle_new_event = store  # type: ignore[method-assign]


class _DroppedEvents:
    """Counts dropped events, and reports them once the worker's own log can be written again."""

    def __init__(self) -> None:
        self._count = 0
        self._error = ""

    def note(self, error: Exception) -> None:
        self._count += 1
        self._error = str(error).splitlines()[0]

    def report(self) -> None:
        if not self._count:
            return
        count, self._count = self._count, 0
        with contextlib.suppress(OSError, ValueError):  # its disk is full too, or it is closed
            print(f"Dagster did not store {count} log lines: {self._error}", file=sys.__stderr__)


def _may_be_dropped(event: "EventLogEntry") -> bool:
    from dagster import DagsterEventType

    if event.dagster_event is None:
        return True
    messages = (DagsterEventType.ASSET_OBSERVATION, DagsterEventType.ENGINE_EVENT)
    return event.dagster_event.event_type in messages


def _is_short(instance: "DagsterInstance", event: "EventLogEntry", error: Exception) -> bool:
    """Whether an event cannot be stored for lack of space or descriptors."""
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
def _heartbeats(run_id: str, job: str) -> Iterator[None]:
    try:
        settings = load_settings()
    except ValueError as error:  # pydantic's ValidationError is one, too
        # The definitions cannot be loaded either; the run reports that better.
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
