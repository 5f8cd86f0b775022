"""Child processes of fault tests: Python programs that are started, spoken to and killed."""

import contextlib
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def child(program: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Start a Python program with pipes for input and output; it is dead afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def next_line(process: subprocess.Popen[str]) -> str:
    """Wait for a line of output."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, f"the child ended with {process.wait()}"
    return line.strip()


def lines_until_killed(process: subprocess.Popen[str]) -> list[str]:
    """Kill with SIGKILL; return the whole lines that were printed and not read before."""
    process.send_signal(signal.SIGKILL)
    assert process.stdout is not None
    return [line.strip() for line in process.stdout if line.endswith("\n")]
