"""Dropped files: what lies in the inbox and its sub-folders, and which of it is complete.

    inbox/x.jsonl                  source `inbox`
    inbox/high/x.jsonl             a priority folder (setting `inbox_priorities`)
    inbox/alice/x.jsonl            source `alice`
    inbox/alice/high/x.jsonl       both

Deeper folders, `rejected`, links and what begins with a dot are left alone.
"""

import contextlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from batch_orchestration.admission.reading.batch_files import is_batch_file_name
from batch_orchestration.core.batches import REJECTED, BatchOptions, Origin, origin_in
from batch_orchestration.services.sidecars import (
    SIDECAR_ENDING,
    doubt_about_sidecar,
    files_of_sidecar,
    find_sidecar,
    options_said,
)
from batch_orchestration.services.surveys import Survey

#: Of folders within the inbox.
MAX_DEPTH = 2
#: Names that copying programs and editors give to what is not finished.
_UNFINISHED = re.compile(
    r"(^~.*|.*(~|\.(tmp|temp|part|partial|filepart|crdownload|download|swp)))", re.IGNORECASE
)


_PACKED = re.compile(
    r".*\.(zst|zstd|bz2|xz|lzma|lz4|br|z|zip|7z|rar|tar|tgz|tbz2?|txz)(\.gz)?", re.IGNORECASE
)


@dataclass(frozen=True, kw_only=True)
class DroppedFile:
    """Something that lies in the inbox.

    Attributes:
        reason: Why it cannot be claimed; None if it is complete and may be.
        settling: Whether that is only because somebody may still be writing it.
        survey: What was found in it, if it was read before.
    """

    path: Path
    stats: os.stat_result = field(repr=False)
    origin: Origin
    reason: str | None
    settling: bool = False
    survey: Survey | None = None

    def options(self) -> BatchOptions:
        """Return what is said about it."""
        return options_said(find_sidecar(self.path), self.origin)


def look(
    inbox: Path, *, priorities: Mapping[str, int], settle_seconds: float, now: float
) -> Iterator[DroppedFile]:
    """Yield what lies in the inbox, in no order.

    Args:
        inbox: The folder.
        priorities: Of priority folders, by name.
        settle_seconds: How long a file must rest before it counts as complete.
        now: POSIX seconds.
    """
    for folders, entry in _walk(inbox, ()):
        with contextlib.suppress(FileNotFoundError):  # claimed or removed meanwhile
            path, stats = Path(entry.path), entry.stat(follow_symlinks=False)
            if _is_sidecar_in_use(path):
                continue
            settling, reason = False, reason_to_ignore(path.name, stats.st_mode)
            if reason is None and not _is_utf8("".join(folders)):
                reason = "its folder's name is not UTF-8; rename the folder"
            if reason is None and (reason := _reason_to_wait(path, stats, settle_seconds, now)):
                settling = True
            if reason is None:
                reason = doubt_about_sidecar(path)
            yield DroppedFile(
                path=path,
                stats=stats,
                origin=origin_in(folders, priorities, arrived_at=stats.st_ctime),
                reason=reason,
                settling=settling,
            )


def reason_to_ignore(name: str, mode: int) -> str | None:
    """Return why a file is none that the inbox takes, by name and kind; None if it takes it."""
    if stat.S_ISLNK(mode):
        return "a symbolic link is not followed; copy the file itself"
    if stat.S_ISDIR(mode):
        return (
            f"a folder; files are taken from {MAX_DEPTH} levels of folders, unless these are named"
            f" like a batch file, an unfinished copy or `{REJECTED}`"
        )
    if not stat.S_ISREG(mode):
        return "not a regular file"
    if name.startswith("."):
        return "hidden by the dot in front of its name"
    if _UNFINISHED.fullmatch(name):
        return "named like an unfinished copy; rename it when it is complete"
    if name.endswith(SIDECAR_ENDING):
        return "a side-car without its file"
    if _PACKED.fullmatch(name):
        return "packed in a form that is not read; unpack it, or pack it with gzip as .jsonl.gz"
    if not is_batch_file_name(name):
        return "ignored for its ending; rename to .jsonl (or .jsonl.gz) to have it admitted"
    return None


def _walk(
    folder: Path, above: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], "os.DirEntry[str]"]]:
    """Yield each file, with the names of its folders, and each folder that is not looked into."""
    with contextlib.suppress(FileNotFoundError, PermissionError), os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith(".") or (not above and name == REJECTED):
                continue
            if entry.is_dir(follow_symlinks=False) and _is_open(name) and len(above) < MAX_DEPTH:
                yield from _walk(Path(entry.path), (*above, name))
            else:
                yield above, entry


def _is_open(folder_name: str) -> bool:
    return not (
        folder_name == REJECTED
        or is_batch_file_name(folder_name)
        or _UNFINISHED.fullmatch(folder_name)
    )


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _reason_to_wait(
    path: Path, stats: os.stat_result, settle_seconds: float, now: float
) -> str | None:
    if reason := _unrest(stats, settle_seconds, now):
        return f"still being written: {reason}"
    sidecar = find_sidecar(path)
    if sidecar is not None and (reason := _unrest(sidecar.lstat(), settle_seconds, now)):
        return f"its side-car {sidecar.name} is still being written: {reason}"
    return None


def _unrest(stats: os.stat_result, settle_seconds: float, now: float) -> str | None:
    """Say why a file has not rested for `settle_seconds`; None if it has.

    A tick has no memory of sizes, but every write moves mtime and ctime, so their age tells.
    mtime alone does not: `cp -p`, rsync and unpackers set it back to that of the original.
    ctime cannot be set; a rename into the inbox moves it too. An mtime in the future (clocks
    that disagree, `touch -d`) says nothing and must not hold a file for ever.
    """
    ages = [now - stats.st_ctime]
    if stats.st_mtime <= now:
        ages.append(now - stats.st_mtime)
    if min(ages) < 0:
        return f"changed {-min(ages):.0f} s in the future; do the clocks agree?"
    if min(ages) < settle_seconds:
        return f"changed {min(ages):.1f} s ago, must rest {settle_seconds:g} s"
    return None


def _is_sidecar_in_use(path: Path) -> bool:
    return path.name.endswith(SIDECAR_ENDING) and bool(files_of_sidecar(path))
