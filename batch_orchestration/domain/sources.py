"""Sources: who submits a file, by its side-car or by the folder of the inbox that it lies in."""

from collections.abc import Mapping, Sequence

import msgspec

#: Who submits what lies in the inbox itself and does not say whose it is.
DEFAULT_SOURCE = "inbox"
SOURCE_MAX_LENGTH = 64
#: Folder of the inbox in which nothing waits.
REJECTED = "rejected"


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """Where a dropped file came from: what its claim remembers of it.

    Attributes:
        folder: Within the inbox, `/` between its parts; empty for the inbox itself.
        source: What that folder says of who submits; a side-car knows better.
        priority: What it says of the priority; a side-car knows better.
        arrived_at: When the file came to lie there, POSIX seconds.
    """

    folder: str = ""
    source: str = DEFAULT_SOURCE
    priority: int = 0
    arrived_at: float = 0.0


def origin_in(
    folders: Sequence[str], priorities: Mapping[str, int], *, arrived_at: float
) -> Origin:
    """Return the origin of a file by the folders that it lies in.

    Args:
        folders: From the inbox down. The first that is no priority folder names the source, the
            last that is one the priority.
        priorities: Priority folders, in any case, with their priority.
        arrived_at: POSIX seconds.
    """
    by_name = {name.casefold(): priority for name, priority in priorities.items()}
    priority = [by_name[name.casefold()] for name in folders if name.casefold() in by_name]
    sources = [name for name in folders if name.casefold() not in by_name]
    return Origin(
        folder="/".join(folders),
        source=sources[0][:SOURCE_MAX_LENGTH] if sources else DEFAULT_SOURCE,
        priority=priority[-1] if priority else 0,
        arrived_at=arrived_at,
    )
