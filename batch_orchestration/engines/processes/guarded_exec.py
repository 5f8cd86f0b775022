"""Becomes a given command after asking the kernel to kill it when its parent dies.

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
    """Replace this process by the command; it is killed as soon as `parent_pid` ends.

    SIGKILL, because nothing is left that could wait for an orderly end. The wish survives exec
    and is not inherited by children: vLLM's are looked after by `parent_guard`.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
    # The parent may have died before the wish was made; the kernel would then never act on it.
    if os.getppid() != parent_pid:
        sys.exit(FAILED)
    os.execvp(command[0], command)


if __name__ == "__main__":
    become(int(sys.argv[1]), sys.argv[sys.argv.index("--") + 1 :])
