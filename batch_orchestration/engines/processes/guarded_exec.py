"""Turns into a given command that the kernel kills when its parent dies.

Run as a script, by path: `python -I -S guarded_exec.py <parent pid> -- command…`. It imports
nothing of this package, so that it starts in a few milliseconds.
"""

import ctypes
import os
import signal
import sys

#: prctl(2), <linux/prctl.h>.
PR_SET_PDEATHSIG = 1
#: EX_OSERR of sysexits.h.
FAILED = 71


def become(parent_pid: int, command: list[str]) -> None:
    """Replace this process by the command; the kernel kills it as soon as `parent_pid` ends.

    SIGKILL, because no process is left to wait for an orderly end. The setting survives exec and
    is not inherited by children; `parent_guard` ends those of vLLM.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
    # If the parent died before the call, the kernel never acts on the setting.
    if os.getppid() != parent_pid:
        sys.exit(FAILED)
    os.execvp(command[0], command)


if __name__ == "__main__":
    become(int(sys.argv[1]), sys.argv[sys.argv.index("--") + 1 :])
