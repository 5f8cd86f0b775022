"""A vLLM plugin that ends vLLM's child processes when their parent is gone.

vLLM loads it (entry point group `vllm.general_plugins`) in the API server and in every process that
starts below it. Without it, EngineCore and Worker would outlive a killed parent and hold the
device's memory.
"""

import multiprocessing
import os
import threading
import time

#: Set by `EngineProcess` for all its descendants. Not `BATCH_…`, the prefix of settings.
GUARD_VARIABLE = "ENGINE_PARENT_GUARD"
EXIT_STATUS = 70
POLL_SECONDS = 0.5

#: Pid of the watching process; a forked child inherits the value but not the thread.
_watching_pid = 0


def register() -> None:
    """Start watching the parent, once per process.

    Does nothing in processes that were not started by this package, nor in the server itself, which
    the kernel ends (`guarded_exec`).
    """
    global _watching_pid
    if GUARD_VARIABLE not in os.environ or _watching_pid == os.getpid():
        return
    if multiprocessing.parent_process() is None:
        return
    _watching_pid = os.getpid()
    threading.Thread(
        target=_end_with_parent, args=(os.getppid(),), name="parent-guard", daemon=True
    ).start()


def _end_with_parent(parent_pid: int) -> None:
    parent = multiprocessing.parent_process()
    # Two checks, since each has a blind spot. After a fork, siblings keep the pipe behind
    # `is_alive` open. If the parent died before `register` ran, `parent_pid` is its successor's.
    while os.getppid() == parent_pid and (parent is None or parent.is_alive()):
        time.sleep(POLL_SECONDS)
    os._exit(EXIT_STATUS)
