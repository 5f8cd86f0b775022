"""The inbox: which dropped files are complete, and claiming them. Nothing here reads a file.

Work of a sensor's tick, so it only stats and renames. Each sub-folder of the inbox is left alone.
"""

import contextlib
import logging
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import filelock

from batch_orchestration.domain.batches import slug
from batch_orchestration.domain.errors import ClaimNotFound
from batch_orchestration.services.claims import (
    Claim,
    ClaimFolder,
    find_claim,
    is_batch_file_name,
)
from batch_orchestration.services.sidecars import SIDECAR_ENDING, find_sidecar
from batch_orchestration.storage.files import DataFolder, sync_folder
from batch_orchestration.storage.moves import readable_name

logger = logging.getLogger(__name__)

#: Names that copying programs and editors give to what is not finished.
_UNFINISHED = re.compile(
    r"(^~.*|.*(~|\.(tmp|temp|part|partial|filepart|crdownload|download|swp)))", re.IGNORECASE
)
#: Another tick that holds the inbox this long claims what there is; a tick has 60 s in all.
_LOCK_TIMEOUT_SECONDS = 10.0


class Waiting(NamedTuple):
    """A dropped file that is left where it is, and why."""

    path: Path
    reason: str


class Inbox:
    """The folder that users drop files into, and the claims on them."""

    def __init__(self, folder: DataFolder, *, settle_seconds: float) -> None:
        self._folder = folder
        self._settle_seconds = settle_seconds

    def ready_files(self, *, now: float) -> list[Path]:
        """Return the complete files, the first to arrive first; `now` in POSIX seconds."""
        ready = [(s.st_ctime_ns, p) for p, s, reason in self._look(now) if reason is None]
        return [path for _, path in sorted(ready)]

    def waiting(self, *, now: float) -> list[Waiting]:
        """Return the files that cannot be claimed now, each with a reason for a person."""
        return sorted(Waiting(path, reason) for path, _, reason in self._look(now) if reason)

    def claim_ready(self, *, now: float) -> list[Claim]:
        """Move every complete file, with its side-car, to a claim of its own and return those.

        Of two ticks at once one claims a file, the other goes without it.
        """
        lock = filelock.FileLock(self._folder.claims / ".inbox.lock")
        try:
            with lock.acquire(timeout=_LOCK_TIMEOUT_SECONDS):
                self._return_half_claimed()
                claims = [self._claim(path) for path in self.ready_files(now=now)]
        except filelock.Timeout:
            logger.info("the inbox is being claimed by another process; it is left to it")
            return []
        return [claim for claim in claims if claim is not None]

    def claims(self) -> list[Claim]:
        """Return all claims that are not settled, the oldest first."""
        found = [claim for claim_id in self._claim_ids() if (claim := self._find(claim_id))]
        return sorted(found, key=lambda claim: (_changed_at(claim.path), claim.claim_id))

    def claim(self, claim_id: str) -> Claim:
        """Return a claim by its id, settled or not.

        Raises:
            ClaimNotFound: There never was one.
        """
        return find_claim(self._folder, claim_id)

    def _look(self, now: float) -> Iterator[tuple[Path, os.stat_result, str | None]]:
        with os.scandir(self._folder.inbox) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                with contextlib.suppress(FileNotFoundError):  # claimed or removed meanwhile
                    path, stats = Path(entry.path), entry.stat(follow_symlinks=False)
                    if path == self._folder.rejected or self._is_sidecar_in_use(path):
                        continue
                    yield path, stats, self._reason_to_wait(path, stats, now)

    def _reason_to_wait(self, path: Path, stats: os.stat_result, now: float) -> str | None:
        if reason := reason_to_ignore(path.name, stats.st_mode):
            return reason
        if reason := self._unrest(stats, now):
            return f"still being written: {reason}"
        sidecar = find_sidecar(path)
        if sidecar is not None and (reason := self._unrest(sidecar.lstat(), now)):
            return f"its side-car {sidecar.name} is still being written: {reason}"
        return None

    def _unrest(self, stats: os.stat_result, now: float) -> str | None:
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
        if min(ages) < self._settle_seconds:
            return f"changed {min(ages):.1f} s ago, must rest {self._settle_seconds:g} s"
        return None

    def _is_sidecar_in_use(self, path: Path) -> bool:
        if not path.name.endswith(SIDECAR_ENDING):
            return False
        stem = path.name.removesuffix(SIDECAR_ENDING)
        names = (stem, f"{stem}.jsonl", f"{stem}.jsonl.gz", f"{stem}.gz")
        return any(is_batch_file_name(n) and (path.parent / n).exists() for n in names)

    def _claim(self, path: Path) -> Claim | None:
        claim_id = f"{slug(path.name)}-{secrets.token_hex(6)}"
        target = self._folder.claims / claim_id
        target.mkdir()
        sidecar = find_sidecar(path)
        try:
            if sidecar is not None:
                # First, so that no file is ever admitted without what its author said about it.
                sidecar = sidecar.rename(target / sidecar.name)
            claimed = path.rename(target / path.name)
        except OSError as error:
            logger.warning("cannot claim %s: %s", path, error)
            self._return_sidecar(ClaimFolder(self._folder, claim_id))
            return None
        sync_folder(target)
        sync_folder(self._folder.claims)
        name = readable_name(path.name)
        return Claim(claim_id=claim_id, path=claimed, sidecar=sidecar, file_name=name)

    def _return_half_claimed(self) -> None:
        """Put back side-cars that a crash parted from their file; remove what holds nothing."""
        for claim_id in self._claim_ids():
            place = ClaimFolder(self._folder, claim_id)
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

    def _find(self, claim_id: str) -> Claim | None:
        try:
            return find_claim(self._folder, claim_id)
        except ClaimNotFound:
            return None


def reason_to_ignore(name: str, mode: int) -> str | None:
    """Return why a file is none that the inbox takes, by name and kind; None if it takes it."""
    if stat.S_ISLNK(mode):
        return "a symbolic link is not followed; copy the file itself"
    if stat.S_ISDIR(mode):
        return "a folder; only files in the inbox itself are admitted"
    if not stat.S_ISREG(mode):
        return "not a regular file"
    if name.startswith("."):
        return "hidden by the dot in front of its name"
    if _UNFINISHED.fullmatch(name):
        return "named like an unfinished copy; rename it when it is complete"
    if name.endswith(SIDECAR_ENDING):
        return "a side-car without its file"
    if not is_batch_file_name(name):
        return "ignored for its ending; rename to .jsonl (or .jsonl.gz) to have it admitted"
    return None


def _changed_at(path: Path) -> float:
    try:
        return path.stat().st_ctime
    except FileNotFoundError:
        return 0.0
