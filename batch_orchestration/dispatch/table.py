"""The queue as text and as a table, for the terminal and for Dagster's pages."""

from collections.abc import Iterator
from datetime import datetime

from batch_orchestration.queue.entries import QueueEntry, QueueView
from batch_orchestration.queue.pause import pause_blocker

COLUMNS = (
    *("Place", "What", "Source", "Priority", "State", "Requests", "Pending"),
    *("Expected start", "Expected end", "Waits for"),
)


def queue_rows(view: QueueView) -> Iterator[tuple[str, ...]]:
    """Yield a row for each entry, in the columns of `COLUMNS`."""
    for entry in view.entries:
        yield (
            str(entry.place),
            entry.id,
            entry.source,
            _priority(entry),
            str(entry.state),
            _count(entry.requests),
            _count(entry.pending),
            moment(entry.expected_start),
            moment(entry.expected_end),
            waits_for(entry),
        )


def waits_for(entry: QueueEntry) -> str:
    """Return the wait reason of an entry, with numbers; without one, the reason for its place."""
    return f"{entry.reason}: {entry.detail}" if entry.reason else entry.detail


def pause_line(view: QueueView) -> str | None:
    """Return a line about the pause of the queue; None if it is not paused."""
    return None if view.paused is None else f"Paused: {pause_blocker(view.paused).detail}"


def queue_markdown(view: QueueView) -> str:
    """Return the queue as a Markdown page."""
    lines = [f"As of {moment(view.at)}: {len(view.entries)} in the queue."]
    if paused := pause_line(view):
        lines.append(f"\n**{_cell(paused)}**")
    if view.entries:
        lines += ["", _line(COLUMNS), _line(["---"] * len(COLUMNS))]
        lines += [_line([_cell(text) for text in row]) for row in queue_rows(view)]
    return "\n".join(lines)


def moment(posix_seconds: float | None) -> str:
    """Return a time for people, in the local time zone; empty if unknown."""
    if posix_seconds is None:
        return ""
    return datetime.fromtimestamp(posix_seconds).astimezone().strftime("%m-%d %H:%M")


def _priority(entry: QueueEntry) -> str:
    gained = int(entry.effective_priority - entry.priority)
    return f"{entry.priority} (+{gained})" if gained else str(entry.priority)


def _count(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
