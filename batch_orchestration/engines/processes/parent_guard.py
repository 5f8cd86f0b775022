"""A vLLM plugin: ends vLLM's own child processes when the process above them is gone.

vLLM loads it (entry point group `vllm.general_plugins`) in the API server and in every process that
starts below it. When their parent is killed, EngineCore and Worker would live on for ever and hold
the device's memory.
"""

import multiprocessing
import os
import threading
import time

#: Set by `EngineProcess` for everything below it. Not `BATCH_…`: those are all settings.
GUARD_VARIABLE = "ENGINE_PARENT_GUARD"
EXIT_STATUS = 70
POLL_SECONDS = 0.5

#: Pid of the process that is watching; a forked child inherits the value but not the thread.
_watching_pid = 0


def register() -> None:
    """Begin to watch the parent, once per process.

    Does nothing in processes that we did not start, nor in the server itself: that one is ended by
    the kernel (`guarded_exec`).
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
    # Two questions, as each has a blind spot: after a fork, siblings keep the pipe behind
    # `is_alive` open; a parent that died before `register` ran has left its pid already.
    while os.getppid() == parent_pid and (parent is None or parent.is_alive()):
        time.sleep(POLL_SECONDS)
    os._exit(EXIT_STATUS)
