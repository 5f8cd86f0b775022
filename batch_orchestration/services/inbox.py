"""The inbox: claiming dropped files that are complete. Nothing here reads a batch file.

Work of a sensor's tick, so it only stats and renames.
"""

import contextlib
import logging
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import filelock
import msgspec

from batch_orchestration.core.batches import slug
from batch_orchestration.core.errors import ClaimNotFound
from batch_orchestration.core.members import Faults
from batch_orchestration.files.atomic import sync_folder
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.moving import readable_name
from batch_orchestration.files.sharing import shared_lock
from batch_orchestration.services.claims import Claim, ClaimFolder, claimed, find_claim
from batch_orchestration.services.dropped_files import DroppedFile, look
from batch_orchestration.services.sidecars import find_sidecar
from batch_orchestration.services.surveys import Surveys
from batch_orchestration.services.untaken import Untaken, UntakenFiles, reason_of
from batch_orchestration.storage.taking import NotTaken, take

logger = logging.getLogger(__name__)

#: Another tick that holds the inbox this long claims what there is; a tick has 60 s in all.
_LOCK_TIMEOUT_SECONDS = 10.0


#: Which of the dropped files may be claimed now, in their order.
Choice = Callable[[Sequence[DroppedFile]], Sequence[DroppedFile]]


class Waiting(NamedTuple):
    """A dropped file that is left where it is, what it is called within the inbox, and why."""

    path: Path
    name: str
    reason: str


class Inbox:
    """The folder that users drop files into, and the claims on them."""

    def __init__(
        self,
        folder: DataFolder,
        *,
        settle_seconds: float,
        priorities: Mapping[str, int] | None = None,
    ) -> None:
        self._folder = folder
        self._settle_seconds = settle_seconds
        self._priorities = priorities or {}

    def ready_files(self, *, now: float) -> list[Path]:
        """Return the complete files, by priority and then arrival; `now` in POSIX seconds."""
        return [file.path for file in self.look(now=now) if file.reason is None]

    def waiting(self, *, now: float) -> list[Waiting]:
        """Return the files that cannot be claimed now, each with a reason for a person."""
        return sorted(
            Waiting(file.path, self.name_of(file.path), file.reason)
            for file in self.look(now=now)
            if file.reason
        )

    def claim_ready(self, *, now: float, choose: Choice | None = None) -> list[Claim]:
        """Move complete files, with their side-cars, to claims of their own and return those.

        Of two ticks at once one claims a file, the other goes without it.

        Args:
            now: POSIX seconds.
            choose: Says which of the complete files there is room for; all of them without it. It
                is asked while nobody else can claim.
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
        """Remove what is known of files that are neither here nor claimed any more."""
        surveys = Surveys(self._folder)
        if surveys.empty:
            return
        files = [file.stats for file in self.look(now=0.0)]
        for claim in self.claims():
            with contextlib.suppress(FileNotFoundError):
                files.append(claim.path.lstat())
        # Once more, for one may have come back from its claim meanwhile.
        files += [file.stats for file in self.look(now=0.0)]
        surveys.forget_others(files)

    def claims(self, faults: Faults | None = None) -> list[Claim]:
        """Return all claims that are not settled and can be read, the oldest first.

        Args:
            faults: Takes those that cannot be read, by their id.
        """
        found, faults = [], faults or Faults()
        for claim_id in self._claim_ids():
            with faults.of(claim_id), contextlib.suppress(ClaimNotFound):
                found.append(find_claim(self._folder, claim_id))
        return sorted(found, key=lambda claim: (_changed_at(claim.path), claim.claim_id))

    def claim(self, claim_id: str) -> Claim:
        """Return a claim by its id, settled or not.

        Raises:
            ClaimNotFound: There never was one.
        """
        return find_claim(self._folder, claim_id)

    def name_of(self, path: Path) -> str:
        """Return what a dropped file is called within the inbox, fit for JSON."""
        return readable_name(str(path.relative_to(self._folder.inbox)))

    def look(self, *, now: float) -> list[DroppedFile]:
        """Return what lies in the inbox, by priority and then arrival; `now` in POSIX seconds."""
        found = look(
            self._folder.inbox,
            priorities=self._priorities,
            settle_seconds=self._settle_seconds,
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
        survey = Surveys(self._folder).find(file.stats)
        if survey is None:
            return file
        origin = msgspec.structs.replace(file.origin, arrived_at=survey.arrived_at)
        return replace(file, survey=survey, origin=origin)

    def _claim_each(self, files: Sequence[DroppedFile], now: float) -> list[Claim]:
        claims, faults = [], Faults()
        untaken: dict[str, Untaken] = {}
        for file in files:
            with faults.of(str(file.path)):
                try:
                    claims.append(self._claim(file))
                except NotTaken as reason:
                    with contextlib.suppress(FileNotFoundError):  # another tick has it
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
        # First, for a crash after it is moved would leave a file that nobody knows where to put.
        place.create(file.origin)
        sidecar, ours = find_sidecar(path), place.root / path.name
        try:
            if sidecar is not None:
                # First, so that no file is ever admitted without what its author said about it.
                take(sidecar, place.root / sidecar.name)
            take(path, ours)
        except NotTaken as reason:
            logger.warning("cannot claim %s: %s", path, reason)
            self._return_sidecar(place)
            raise
        sync_folder(self._folder.claims)
        return claimed(place, ours)

    def _return_half_claimed(self) -> None:
        """Put back side-cars that a crash parted from their file; remove what holds nothing."""
        faults = Faults()  # `claims` tells of the same
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
