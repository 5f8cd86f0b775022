"""Short connections to the DuckDB file: one transaction each, retried while the file is locked.

DuckDB allows one writing process at a time and excludes all others meanwhile, readers included;
a reader excludes writers. DuckDB has no queue for them. Therefore, our own writers queue at a lock
file beside the DuckDB file, and all processes retry with jitter until a deadline.
"""

import atexit
import contextlib
import itertools
import logging
import os
import random
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
from filelock import BaseFileLock, Timeout

from batch_orchestration.core.errors import (
    DiskFull,
    StorageError,
    StoreDamaged,
    StoreLocked,
    TooManyOpenFiles,
)
from batch_orchestration.files.atomic import disk_errors, make_folder, shortages, sync_folder
from batch_orchestration.files.sharing import made_for_the_group, share, shared_lock

logger = logging.getLogger(__name__)

DEADLINE_SECONDS = 600.0
#: Our readers finish within this time; longer waits are logged.
QUIET_SECONDS = 0.5
REPORT_INTERVAL_SECONDS = 10.0
_FIRST_PAUSE_SECONDS = 0.01
_LONGEST_PAUSE_SECONDS = 0.25
#: Descriptors for the database, its log and temporary files, and for other threads meanwhile.
_DESCRIPTORS = 16

#: Rows in a row group, the smallest number that DuckDB accepts. A commit rewrites the last row
#: group, using five times the memory of its texts. With the default of 122,880 rows, that memory
#: would grow with each of 100 commits.
ROW_GROUP = 2048

#: DuckDB's messages if another process has the file open, or this process has in the other mode.
_LOCKED = (
    "Could not set lock on file",
    "different configuration than existing connections",
    "Unique file handle conflict",
)
_HOLDER = re.compile(r"\(PID (\d+)\)")
_DAMAGED = ("Corrupt", "not a valid DuckDB", "checksum", "deserialize", "enough bytes")

#: Within a process, one thread at a time has a file open: DuckDB cannot open it for reading and
#: for writing at once.
_inside: defaultdict[Path, threading.Lock] = defaultdict(threading.Lock)


@contextlib.contextmanager
def writing(
    path: Path, *, deadline_seconds: float = DEADLINE_SECONDS
) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open the file for one transaction, committed if the body does not raise.

    Raises:
        StoreLocked: The file stayed locked past the deadline.
        Shortage: No space or no descriptor is left; nothing was committed.
        StorageError: The file cannot be written or is damaged, or DuckDB rejected a statement.
    """
    wait = _Wait(path, "write", deadline_seconds)
    with (
        _queue(path, wait),
        # If a process is killed, DuckDB's log stays behind, and other users must be able to use it.
        made_for_the_group(),
        _transaction(path, wait, read_only=False) as connection,
    ):
        yield connection


@contextlib.contextmanager
def creating(
    path: Path, *, deadline_seconds: float = DEADLINE_SECONDS
) -> Iterator[duckdb.DuckDBPyConnection | None]:
    """Create the file and open it like `writing`; yield None if a non-empty file exists.

    The file appears only with everything the body has written. A process killed right after
    creating a DuckDB file would otherwise leave one that DuckDB cannot open.
    """
    wait = _Wait(path, "create", deadline_seconds)
    unfinished = path.with_name(f".{path.name}.new")
    log = path.with_name(f"{unfinished.name}.wal")
    with _queue(path, wait):
        if path.exists() and path.stat().st_size:
            yield None
            return
        with disk_errors(path):
            unfinished.unlink(missing_ok=True)
            log.unlink(missing_ok=True)
        with _transaction(unfinished, wait, read_only=False) as connection:
            yield connection
        if log.exists():
            # Closing does not raise if the log could not be checkpointed, usually for a full disk.
            with _duckdb_errors(path), contextlib.closing(duckdb.connect(unfinished)) as again:
                again.execute("CHECKPOINT")
        if log.exists():
            raise StorageError(f"{path} could not be created: DuckDB left {log.name} behind")
        with disk_errors(path):
            share(unfinished)
            unfinished.replace(path)
            sync_folder(path.parent)


@contextlib.contextmanager
def replacing(path: Path, *, deadline_seconds: float = DEADLINE_SECONDS) -> Iterator[None]:
    """Block all our other writers while the body replaces the file.

    Raises:
        StoreLocked: Other writers held the lock past the deadline.
    """
    with _queue(path, _Wait(path, "replace", deadline_seconds)):
        yield


@contextlib.contextmanager
def reading(
    path: Path, *, deadline_seconds: float = DEADLINE_SECONDS, alone: bool = False
) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open an existing file read-only for one transaction.

    Args:
        deadline_seconds: Longest wait while the file is locked.
        alone: Use a separate DuckDB instance, whose settings the body may change.

    Raises:
        StoreLocked: The file stayed locked past the deadline.
        StoreDamaged: The file cannot be read.
        StorageError: The file is missing, or DuckDB rejected a statement.
    """
    wait = _Wait(path, "read", deadline_seconds)
    with _transaction(path, wait, read_only=True, alone=alone) as connection:
        yield connection


class _Wait:
    """Retries until a deadline, logging the holder of the file now and then."""

    def __init__(self, path: Path, purpose: str, deadline_seconds: float) -> None:
        self._path = path
        self._purpose = purpose
        self._started = time.monotonic()
        self._deadline = self._started + deadline_seconds
        self._next_report = self._started + QUIET_SECONDS
        self._reported = False

    def until(self, enter: Callable[[], str | None]) -> None:
        """Call `enter` until it returns None; until then, it returns the holder of the lock.

        Raises:
            StoreLocked: The deadline has passed.
        """
        pause = _FIRST_PAUSE_SECONDS
        while holder := enter():
            now = time.monotonic()
            if now >= self._deadline:
                raise StoreLocked(
                    f"gave up after {now - self._started:.0f} s of waiting to {self._purpose} "
                    f"{self._path}: held by {holder}"
                )
            self._report(now, holder)
            time.sleep(min(pause * random.uniform(0.5, 1.0), self._deadline - now))
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        if self._reported:
            waited = time.monotonic() - self._started
            logger.info("waited %.1f s to %s %s", waited, self._purpose, self._path)
            self._reported = False

    def _report(self, now: float, holder: str) -> None:
        if now < self._next_report:
            return
        logger.warning(
            "pid %d has waited %.1f s to %s %s, held by %s; it will wait %.0f s more",
            *(os.getpid(), now - self._started, self._purpose, self._path, holder),
            self._deadline - now,
        )
        self._reported = True
        self._next_report = now + REPORT_INTERVAL_SECONDS


@contextlib.contextmanager
def _queue(path: Path, wait: _Wait) -> Iterator[None]:
    """Hold the lock of our writers."""
    queue = shared_lock(path.with_name(f"{path.name}.lock"))
    with disk_errors(path):
        make_folder(path.parent)
        wait.until(lambda: _enter_queue(queue))
    try:
        yield
    finally:
        queue.release()


def _enter_queue(queue: BaseFileLock) -> str | None:
    """Acquire the lock of our writers; if it is held, return its holder."""
    owner = Path(queue.lock_file)
    try:
        queue.acquire(timeout=_LONGEST_PAUSE_SECONDS, poll_interval=_FIRST_PAUSE_SECONDS)
    except Timeout:
        with contextlib.suppress(OSError, ValueError):
            return _process(int(owner.read_text()))
        return "another writer of ours"
    # The pid serves other processes' log lines only, so a full disk does not matter here.
    with contextlib.suppress(OSError):
        owner.write_text(str(os.getpid()))
    return None


@contextlib.contextmanager
def _transaction(
    path: Path, wait: _Wait, *, read_only: bool, alone: bool = False
) -> Iterator[duckdb.DuckDBPyConnection]:
    inside = _inside[path.resolve()]
    opened: list[_Opened] = []

    def enter() -> str | None:
        if not inside.acquire(timeout=_LONGEST_PAUSE_SECONDS):
            return "another thread of this process"
        try:
            _require_descriptors(path)
            opened.append(_open_alone(path) if alone else _attach(path, read_only=read_only))
        except duckdb.Error as error:
            inside.release()
            if not any(words in str(error) for words in _LOCKED):
                raise
            holder = _HOLDER.search(str(error))
            return _process(int(holder[1]) if holder else os.getpid())
        except BaseException:
            inside.release()
            raise
        return None

    with _duckdb_errors(path):
        wait.until(enter)
        try:
            # Leaving the context rolls back an uncommitted transaction. Leaving that to the garbage
            # collector would keep the file locked as long as an exception refers to the connection.
            with opened[0] as connection:
                connection.execute("BEGIN TRANSACTION")
                yield connection
                connection.execute("COMMIT")
        finally:
            inside.release()


_Opened = contextlib.AbstractContextManager[duckdb.DuckDBPyConnection]


def _open_alone(path: Path) -> _Opened:
    return contextlib.closing(duckdb.connect(path, read_only=True))


def _attach(path: Path, *, read_only: bool) -> _Opened:
    """Attach the file to this process's DuckDB instance until the end of the context."""
    connection = _duckdb()
    name = f"store_{next(_names)}"
    quoted = str(path).replace("'", "''")
    mode = "READ_ONLY" if read_only else "READ_WRITE"
    try:
        connection.execute(f"ATTACH '{quoted}' AS {name} ({mode}, ROW_GROUP_SIZE {ROW_GROUP})")
        connection.execute(f"USE {name}")
    except BaseException:
        connection.close()
        raise
    return _attached(connection, name)


@contextlib.contextmanager
def _attached(
    connection: duckdb.DuckDBPyConnection, name: str
) -> Iterator[duckdb.DuckDBPyConnection]:
    try:
        yield connection
    except (duckdb.FatalException, duckdb.InternalException):
        _forget_duckdb()  # after such an error, the instance rejects every statement
        raise
    finally:
        try:
            with contextlib.suppress(duckdb.TransactionException):
                connection.execute("ROLLBACK")
            connection.execute("USE memory")
            connection.execute(f"DETACH {name}")
        except duckdb.Error:
            # Committed data is in DuckDB's log. Closing the instance releases the file.
            _forget_duckdb()
        finally:
            connection.close()


def _duckdb() -> duckdb.DuckDBPyConnection:
    """Return a new connection to this process's DuckDB instance.

    The instance is shared, because starting one takes 30 ms of CPU time and attaching a file 2 ms
    (DuckDB 2.0 on one of our machines, November 2026). Each sensor tick reads the store several
    times.
    """
    global _instance
    with _starting:
        if _instance is None:
            _instance = duckdb.connect(":memory:")
        return _instance.cursor()


def _forget_duckdb() -> None:
    """Close this process's DuckDB instance; it ends with its last open transaction."""
    global _instance
    with _starting:
        instance, _instance = _instance, None
        if instance is not None:
            instance.close()


_instance: duckdb.DuckDBPyConnection | None = None
_starting = threading.Lock()
_names = itertools.count(1)
# The instance's threads do not survive a fork.
os.register_at_fork(before=_forget_duckdb)
atexit.register(_forget_duckdb)


def _require_descriptors(path: Path) -> None:
    """Check that enough descriptors are left for DuckDB.

    DuckDB ends the whole process if it runs out of descriptors in the middle of its work.

    Raises:
        TooManyOpenFiles: Too few descriptors are left.
    """
    spare: list[int] = []
    try:
        with shortages(path):
            spare.extend(os.open(os.devnull, os.O_RDONLY) for _ in range(_DESCRIPTORS))
    finally:
        for descriptor in spare:
            os.close(descriptor)


@contextlib.contextmanager
def _duckdb_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except duckdb.Error as error:
        reason = str(error).strip()
        if "No space left" in reason or "File too large" in reason:
            raise DiskFull(f"no room to write {path}: {reason}") from error
        if "Too many open files" in reason:
            raise TooManyOpenFiles(f"cannot open {path}: {reason}") from error
        refused = isinstance(error, duckdb.ProgrammingError)
        if not refused and any(word in reason for word in _DAMAGED):
            raise StoreDamaged(
                f"the store {path} is damaged: {reason}\nNothing is lost: `python -m"
                " batch_orchestration recover` sets it aside and rebuilds it from plans and"
                " journals"
            ) from error
        raise StorageError(f"{path}: {reason}") from error


def _process(pid: int) -> str:
    """Return pid and command of a process, for messages."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except (OSError, UnicodeDecodeError):
        command = ""
    return f"pid {pid} ({command[:80] or 'command unknown'})"
