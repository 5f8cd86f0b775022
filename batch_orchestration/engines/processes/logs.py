"""Reads a server's log: its last lines, and the causes of a failure among them."""

import re
from pathlib import Path

#: Enough for the tracebacks of all processes of a server that fails to start.
TAIL_BYTES = 256 * 1024

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
#: `ValueError: …`, `MemoryError`, and the second line of pydantic's errors.
_CAUSE = re.compile(r"(?:\w+\.)*\w*(?:Error|Exception|Exit)(?:: .+)?|Value error, .+")
#: vLLM's prefix, `(EngineCore pid=7) ERROR 11-23 19:30:00 [core.py:100] `.
_PREFIX = re.compile(r"^(\([^)]*pid=\d+\) )?([A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d )?(\[[^\]]*\] )?")


def last_lines(
    path: Path, count: int, *, start: int = 0, tail_bytes: int = TAIL_BYTES
) -> list[str]:
    """Return the last non-blank lines after byte `start`; a progress bar's latest state only."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(start, size - tail_bytes))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    lines = (_ANSI.sub("", line.rstrip().split("\r")[-1]) for line in text.split("\n"))
    return [line for line in lines if line.strip()][-count:]


def size(path: Path) -> int:
    """Return the present size of a log in bytes; 0 if there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def message_of(line: str) -> str:
    """Return a line without the prefix of vLLM's logger."""
    return _PREFIX.sub("", line).strip()


def causes(lines: list[str]) -> list[str]:
    """Return the exceptions named in the lines, each once, in order.

    The root cause of a failed start is often dozens of lines above the end of the log.
    """
    found: dict[str, None] = {}
    for line in lines:
        message = message_of(line)
        if _CAUSE.fullmatch(message):
            found[message] = None
    return list(found)
