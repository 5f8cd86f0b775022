"""The inbox: claims dropped files that are complete. Nothing here reads the lines of a batch file.

This runs within a sensor's tick, so files are only inspected and renamed; `taking` copies those
that cannot be renamed.
"""

import contextlib
import logging
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import filelock
import msgspec

from batch_orchestration.admission.claims import Claim, ClaimFolder, claimed, find_claim
from batch_orchestration.admission.reading.batch_files import is_batch_file_name
from batch_orchestration.admission.scans import (
    FileScan,
    FileScans,
    Untaken,
    UntakenFiles,
    reason_of,
)
from batch_orchestration.admission.sidecars import (
    SIDECAR_ENDING,
    doubt_about_sidecar,
    files_of_sidecar,
    find_sidecar,
    options_said,
)
from batch_orchestration.admission.taking import NotTaken, take
from batch_orchestration.core.batches import (
    DEFAULT_SOURCE,
    REJECTED,
    SOURCE_MAX_LENGTH,
    BatchOptions,
    Origin,
    slug,
)
from batch_orchestration.core.errors import ClaimNotFound
from batch_orchestration.core.fault_isolation import Faults
from batch_orchestration.files.atomic import sync_folder
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.moving import readable_name
from batch_orchestration.files.sharing import shared_lock
from batch_orchestration.settings import Settings

#: Levels of folders within the inbox.
MAX_DEPTH = 2
#: Names that copying programs and editors give to unfinished files.
_UNFINISHED = re.compile(
    r"(^~.*|.*(~|\.(tmp|temp|part|partial|filepart|crdownload|download|swp)))", re.IGNORECASE
)
_PACKED = re.compile(
    r".*\.(zst|zstd|bz2|xz|lzma|lz4|br|z|zip|7z|rar|tar|tgz|tbz2?|txz)(\.gz)?", re.IGNORECASE
)


@dataclass(frozen=True, kw_only=True)
class DroppedFile:
    """A file or folder in the inbox.

    Attributes:
        reason: Why it cannot be claimed; None if it is complete and can be.
        settling: Whether the only reason is that it may still be being written.
        scan: None if the file was not read, or has changed since.
    """

    path: Path
    stats: os.stat_result = field(repr=False)
    origin: Origin
    reason: str | None
    settling: bool = False
    scan: FileScan | None = None

    def options(self) -> BatchOptions:
        """Return the batch options from its side-car and its folder."""
        return options_said(find_sidecar(self.path), self.origin)


def look(
    inbox: Path, *, priorities: Mapping[str, int], settle_seconds: float, now: float
) -> Iterator[DroppedFile]:
    """Yield the files of the inbox and the folders that are not searched, unordered.

    Args:
        priorities: Of priority folders, by name.
        settle_seconds: How long a file must rest before it counts as complete.
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


def origin_in(
    folders: Sequence[str], priorities: Mapping[str, int], *, arrived_at: float
) -> Origin:
    """Return the origin of a file, derived from the folders that contain it.

    Args:
        folders: Folder names from the inbox down. The first one that is not a priority folder is
            the source. The last priority folder sets the priority.
        priorities: Priority by folder name; case is ignored.
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


def reason_to_ignore(name: str, mode: int) -> str | None:
    """Return why the inbox ignores a file of this name and mode; None if it accepts the file."""
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
    """Yield each file and each folder that is not searched, with the names of the folders above."""
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
    """Return why a file has not rested for `settle_seconds`; None if it has.

    Ticks do not remember sizes, but every write updates mtime and ctime, so their age suffices.
    mtime alone does not: `cp -p`, rsync and unpackers restore that of the original. ctime cannot
    be set, and a rename into the inbox updates it too. An mtime in the future (clock skew,
    `touch -d`) is ignored: it must not hold a file back indefinitely.
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


logger = logging.getLogger(__name__)
#: If another tick holds the inbox for longer, the files are left to it; a tick has 60 s in all.
_LOCK_TIMEOUT_SECONDS = 10.0
#: Returns the dropped files that may be claimed now, in order.
Choice = Callable[[Sequence[DroppedFile]], Sequence[DroppedFile]]


class Waiting(NamedTuple):
    """A dropped file that stays in the inbox, its name within the inbox, and the reason."""

    path: Path
    name: str
    reason: str


class Inbox:
    """The folder that users drop files into, and the claims on them."""

    def __init__(self, folder: DataFolder, settings: Settings) -> None:
        self._folder = folder
        self._settings = settings

    def ready_files(self, *, now: float) -> list[Path]:
        """Return the complete files, by priority and then arrival."""
        return [file.path for file in self.look(now=now) if file.reason is None]

    def waiting(self, *, now: float) -> list[Waiting]:
        """Return the files that cannot be claimed now, each with a reason for people."""
        return sorted(
            Waiting(file.path, self.name_of(file.path), file.reason)
            for file in self.look(now=now)
            if file.reason
        )

    def claim_ready(self, *, now: float, choose: Choice | None = None) -> list[Claim]:
        """Move complete files, with their side-cars, to claims of their own and return those.

        If two ticks run at the same time, only one of them claims a file.

        Args:
            choose: Given all dropped files, returns those for which there is capacity; without it
                all complete files are claimed. Called under the inbox lock.
        """
        lock = shared_lock(self._folder.claims / ".inbox.lock")
        try:
            with lock.acquire(timeout=_LOCK_TIMEOUT_SECONDS):
                self._return_half_claimed()
                files = self.look(now=now)
                chosen = files if choose is None else choose(files)
                claims = self._claim_each([f for f in chosen if f.reason is None], now)
        except filelock.Timeout:
            logger.info("the inbox is being claimed by another process; it is left to it")
            return []
        return claims

    def forget_gone(self) -> None:
        """Remove the scans of files that are neither in the inbox nor claimed any more."""
        scans = FileScans(self._folder)
        if scans.empty:
            return
        files = [file.stats for file in self.look(now=0.0)]
        for claim in self.claims():
            with contextlib.suppress(FileNotFoundError):
                files.append(claim.path.lstat())
        # Again: a file may have returned from its claim meanwhile.
        files += [file.stats for file in self.look(now=0.0)]
        scans.forget_others(files)

    def claims(self, faults: Faults | None = None) -> list[Claim]:
        """Return all readable claims that are not settled, the oldest first.

        Args:
            faults: Collects unreadable claims, by id.
        """
        found, faults = [], faults or Faults()
        for claim_id in self._claim_ids():
            with faults.of(claim_id), contextlib.suppress(ClaimNotFound):
                found.append(find_claim(self._folder, claim_id))
        return sorted(found, key=lambda claim: (_changed_at(claim.path), claim.claim_id))

    def claim(self, claim_id: str) -> Claim:
        """Return a claim by id, settled or not.

        Raises:
            ClaimNotFound: No such claim ever existed.
        """
        return find_claim(self._folder, claim_id)

    def name_of(self, path: Path) -> str:
        """Return the name of a dropped file within the inbox, fit for JSON."""
        return readable_name(str(path.relative_to(self._folder.inbox)))

    def look(self, *, now: float) -> list[DroppedFile]:
        """Return the content of the inbox, by priority and then arrival."""
        found = look(
            self._folder.inbox,
            priorities=self._settings.inbox_priorities,
            settle_seconds=self._settings.settle_seconds,
            now=now,
        )
        untaken = UntakenFiles(self._folder).read()
        surveyed = [self._surveyed(self._tried(file, untaken, now)) for file in found]
        return sorted(
            surveyed, key=lambda file: (-file.origin.priority, file.origin.arrived_at, file.path)
        )

    def _tried(self, file: DroppedFile, untaken: Mapping[str, Untaken], now: float) -> DroppedFile:
        reason = reason_of(untaken.get(self.name_of(file.path)), file.stats, now=now)
        return file if file.reason or reason is None else replace(file, reason=reason)

    def _surveyed(self, file: DroppedFile) -> DroppedFile:
        scan = FileScans(self._folder).find(file.stats)
        if scan is None:
            return file
        origin = msgspec.structs.replace(file.origin, arrived_at=scan.arrived_at)
        return replace(file, scan=scan, origin=origin)

    def _claim_each(self, files: Sequence[DroppedFile], now: float) -> list[Claim]:
        claims, faults = [], Faults()
        untaken: dict[str, Untaken] = {}
        for file in files:
            with faults.of(str(file.path)):
                try:
                    claims.append(self._claim(file))
                except NotTaken as reason:
                    with contextlib.suppress(FileNotFoundError):  # taken by another tick
                        stats = file.path.lstat()
                        untaken[self.name_of(file.path)] = Untaken(
                            inode=stats.st_ino,
                            changed_ns=stats.st_ctime_ns,
                            reason=str(reason),
                            at=now,
                        )
        faults.log()
        if files:
            UntakenFiles(self._folder).keep(untaken, now=now)
        return claims

    def _claim(self, file: DroppedFile) -> Claim:
        path = file.path
        place = ClaimFolder(self._folder, f"{slug(path.name)}-{secrets.token_hex(6)}")
        # Before the move: a crash after it would otherwise leave a file of unknown origin.
        place.create(file.origin)
        sidecar, ours = find_sidecar(path), place.root / path.name
        try:
            if sidecar is not None:
                # The side-car first: no file is admitted without its author's options.
                take(sidecar, place.root / sidecar.name)
            take(path, ours)
        except NotTaken as reason:
            logger.warning("cannot claim %s: %s", path, reason)
            self._return_sidecar(place)
            raise
        sync_folder(self._folder.claims)
        return claimed(place, ours)

    def _return_half_claimed(self) -> None:
        """Return side-cars that a crash separated from their file, and remove empty claims."""
        faults = Faults()  # `claims` reports the same ones
        for claim_id in self._claim_ids():
            place = ClaimFolder(self._folder, claim_id)
            with faults.of(claim_id):
                place.release_links()
                if place.holds_only_sidecar():
                    with contextlib.suppress(TimeoutError), place.lock(timeout_seconds=0):
                        if place.holds_only_sidecar():
                            self._return_sidecar(place)

    def _return_sidecar(self, place: ClaimFolder) -> None:
        place.release_sidecar()
        place.sweep()

    def _claim_ids(self) -> list[str]:
        with os.scandir(self._folder.claims) as entries:
            return [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]


def _changed_at(path: Path) -> float:
    try:
        return path.stat().st_ctime
    except FileNotFoundError:
        return 0.0
