"""Starts child processes from one thread that lives as long as this process.

Linux sends the parent-death signal when the *thread* that started the child ends, not when the
process does (prctl(2), PR_SET_PDEATHSIG). A child started from a pool's worker thread would be
killed as soon as the pool shrinks.
"""

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import BinaryIO

from batch_orchestration.engines import guarded_exec

_GUARDED_EXEC = str(Path(guarded_exec.__file__).resolve())

_Call = tuple["Future[subprocess.Popen[bytes]]", Sequence[str], Mapping[str, str], BinaryIO]


class _Spawner:
    """The thread and the calls that wait for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def spawn(
        self, command: Sequence[str], env: Mapping[str, str], output: BinaryIO
    ) -> "subprocess.Popen[bytes]":
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="spawner", daemon=True)
                self._thread.start()
        future: Future[subprocess.Popen[bytes]] = Future()
        self._calls.put((future, command, env, output))
        return future.result()

    def _serve(self) -> None:
        while True:
            future, command, env, output = self._calls.get()
            try:
                future.set_result(_popen(command, env, output))
            except OSError as error:
                future.set_exception(error)


def _popen(
    command: Sequence[str], env: Mapping[str, str], output: BinaryIO
) -> "subprocess.Popen[bytes]":
    guarded = [sys.executable, "-I", "-S", _GUARDED_EXEC, str(os.getpid()), "--", *command]
    return subprocess.Popen(
        guarded,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


_spawner = _Spawner()


def spawn_guarded(
    command: Sequence[str], *, env: Mapping[str, str], output: BinaryIO
) -> "subprocess.Popen[bytes]":
    """Start a command as leader of a session of its own; it dies when this process dies.

    Raises:
        OSError: It cannot be started.
    """
    return _spawner.spawn(command, env, output)


def _forget_thread() -> None:
    global _spawner
    _spawner = _Spawner()


# A forked child has the object, but not its thread.
os.register_at_fork(after_in_child=_forget_thread)
