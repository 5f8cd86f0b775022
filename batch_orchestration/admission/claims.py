"""Claims: dropped files that are ours to read, and their recovery after a crash.

    claims/<claim id>/claim.json                     origin of the file, written before the move
                      attempts.json                  admission attempts without a result
                      <the author's file>            ours to read
                      <its side-car>
                      result.json                    admission result, before it is carried out
                      work/                          becomes the batch's folder
    claims/.settled/<claim id>.json                  admission result, once it is carried out

The author's file is moved last, by one rename. While it lies in the claim, everything else there
can be rebuilt; once it is gone, the result determines the remaining steps.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from batch_orchestration.admission.reading.batch_files import is_batch_file_name, is_gzip_name
from batch_orchestration.admission.results import AdmissionResult, Admitted, Queued, Returned
from batch_orchestration.admission.sidecars import SIDECAR_ENDING, find_sidecar, sidecar_beside
from batch_orchestration.core.batches import Origin
from batch_orchestration.core.errors import ClaimNotFound
from batch_orchestration.files.atomic import make_folder, sync_folder, write_atomically
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.moving import (
    is_taken,
    move_if_free,
    move_into,
    numbered_names,
    readable_name,
)
from batch_orchestration.files.sharing import share, shared_lock
from batch_orchestration.files.state_file import StateFile

SomeResult = TypeVar("SomeResult", bound=AdmissionResult)


class Attempts(msgspec.Struct, frozen=True, kw_only=True):
    """Admission attempts of a claim that ended without a result.

    Attributes:
        begun: The present attempt, and earlier ones that were killed or could not write.
        failed: Attempts that failed because of the file itself.
        reason: Cause of the last failure, which happened `at`.
    """

    begun: int = 0
    failed: int = 0
    reason: str = ""
    at: float = 0.0

    def __str__(self) -> str:
        if self.failed:
            times = "once" if self.failed == 1 else f"{self.failed} times"
            return f"its admission failed {times}: {self.reason}"
        return "its admission came to no end before, and is tried again"

    @property
    def failing(self) -> bool:
        """Whether an earlier attempt ended without a result."""
        return self.failed > 0 or self.begun > 1


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A dropped file that is ours to read.

    Attributes:
        claim_id: Readable and unique, fit for run keys and tags.
        path: Location of the file; its former one once the claim is settled.
        file_name: The author's name for the file, fit for JSON.
    """

    claim_id: str
    path: Path
    sidecar: Path | None
    file_name: str
    origin: Origin
    attempts: Attempts = field(default_factory=Attempts)


class ClaimFolder:
    """The folder of one claim; its files determine the claim's state."""

    def __init__(self, folder: DataFolder, claim_id: str) -> None:
        self.claim_id = claim_id
        self._folder = folder
        self.root = folder.claims / claim_id
        self.work = self.root / "work"
        self.result_path = self.root / "result.json"
        self.origin_path = self.root / "claim.json"
        self.attempts_path = self.root / "attempts.json"
        self._settled_path = folder.claims / ".settled" / f"{claim_id}.json"
        self._lock_path = folder.claims / ".locks" / f"{claim_id}.lock"

    def create(self, origin: Origin) -> None:
        """Create the claim's folder with a durable record of the file's origin."""
        self.root.mkdir()
        sync_folder(self.root.parent)
        StateFile(self.origin_path, Origin).write(origin)

    def origin(self) -> Origin:
        """Return the origin of the file; the inbox itself if none was recorded."""
        return StateFile(self.origin_path, Origin).read() or Origin()

    def inbox_folder(self) -> Path:
        """Return the inbox folder that the file came from."""
        return self._folder.inbox / self.origin().folder

    def user_file(self) -> Path | None:
        """Return the author's file if it still lies here."""
        return next((path for path in self._files() if is_batch_file_name(path.name)), None)

    def file_name(self, user_file: Path) -> str:
        """Return the author's name for the file, fit for JSON."""
        return readable_name(user_file.name)

    def sidecar(self) -> Path | None:
        """Return the author's side-car if it still lies here."""
        if (user_file := self.user_file()) is not None:
            return find_sidecar(user_file)
        return next((p for p in self._files() if p.name.endswith(SIDECAR_ENDING)), None)

    def holds_only_sidecar(self) -> bool:
        """Whether the author's file never arrived here, or was returned to the inbox."""
        result = self.result()
        went_back = isinstance(result, Returned | Queued)
        return self.user_file() is None and (result is None or went_back)

    def release_links(self) -> None:
        """Move links and special files, such as pipes, back to the inbox."""
        with contextlib.suppress(FileNotFoundError), os.scandir(self.root) as entries:
            strange = [
                Path(e.path) for e in entries if e.is_symlink() or not (e.is_file() or e.is_dir())
            ]
        for path in strange:
            move_into(path, self.inbox_folder(), path.name)

    def release_sidecar(self) -> None:
        """Move the side-car back to the inbox, beside the returned file if there is one."""
        if (sidecar := self.sidecar()) is None:
            return
        result = self.result()
        beside = self.inbox_folder() / sidecar.name
        if isinstance(result, Returned | Queued):
            beside = sidecar_beside(Path(result.released_path))
        move_into(sidecar, beside.parent, beside.name)

    def result(self) -> AdmissionResult | None:
        """Return the result that was decided; it may not have been carried out yet."""
        return read_result(self.result_path)

    def settled_result(self) -> AdmissionResult | None:
        """Return the result that was decided and carried out."""
        return read_result(self._settled_path)

    def attempts(self) -> Attempts:
        """Return the attempts so far; if their record is damaged, none."""
        return StateFile(self.attempts_path, Attempts).read_if_sound() or Attempts()

    def note(self, attempts: Attempts) -> None:
        """Record the attempts durably."""
        StateFile(self.attempts_path, Attempts).write(attempts)

    def decide(self, result: AdmissionResult) -> None:
        """Record a result durably, before anything is moved."""
        write_atomically(self.result_path, msgspec.json.encode(result))

    def restore(self) -> Path | None:
        """Move the author's file back if a crash left it half moved, and return its path."""
        if (user_file := self.user_file()) is not None:
            return user_file
        result = self.result()
        if not isinstance(result, Admitted):
            return None
        half_moved = self.work / kept_name(result.file_name)
        return half_moved.rename(self.root / result.file_name) if half_moved.exists() else None

    def take_in(self, user_file: Path) -> None:
        """Move the author's file into the work folder: the last step but one of admission."""
        with user_file.open("rb") as file:  # the program that copied it may not have synced it
            os.fsync(file.fileno())
        user_file.rename(self.work / kept_name(user_file.name))
        sync_folder(self.work)

    def set_aside(
        self, user_file: Path, folder: Path, result_at: Callable[[Path], SomeResult]
    ) -> SomeResult:
        """Move the author's file into a folder, never over another file, and return the result.

        Args:
            folder: Created if missing.
            result_at: Returns the result for a target path; it is recorded before the move.
        """
        make_folder(folder)
        targets = (folder / name for name in numbered_names(user_file.name))
        for target in targets:
            if is_taken(target, by_other_than=user_file):
                continue
            result = result_at(target)
            self.decide(result)
            if move_if_free(user_file, target):
                sync_folder(folder)
                return result
        raise AssertionError("names never run out")

    def clear_work(self) -> None:
        """Create an empty work folder; call it only while the author's file lies outside."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        share(self.work)  # it becomes a batch's folder, where users record decisions

    def settle(self) -> None:
        """Mark the result as carried out, and remove the claim."""
        make_folder(self._settled_path.parent)
        self.result_path.replace(self._settled_path)
        sync_folder(self._settled_path.parent)
        self.sweep()

    def sweep(self) -> None:
        """Remove the remains of a claim that is settled or was never completed."""
        if self._settled_path.exists():
            shutil.rmtree(self.work, ignore_errors=True)
        if self.user_file() is None and self.sidecar() is None:
            for ours in (self.origin_path, self.attempts_path):
                ours.unlink(missing_ok=True)
            for rest in self.root.glob(".*.tmp"):  # left by a crash during a write
                rest.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # any other content is not ours to remove
            self.root.rmdir()
        self._lock_path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self, *, timeout_seconds: float = -1) -> Iterator[None]:
        """Lock the claim against other processes; the death of a process releases its lock.

        Raises:
            TimeoutError: Another process held the lock for all of `timeout_seconds`.
        """
        self._lock_path.parent.mkdir(exist_ok=True)
        with shared_lock(self._lock_path).acquire(timeout=timeout_seconds):
            yield

    def _files(self) -> list[Path]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self.root) as entries:
            return sorted(Path(e.path) for e in entries if e.is_file(follow_symlinks=False))
        return []


def kept_name(file_name: str) -> str:
    """Return the name of the author's file in its batch's folder."""
    return "input.jsonl.gz" if is_gzip_name(file_name) else "input.jsonl"


def find_claim(folder: DataFolder, claim_id: str) -> Claim:
    """Return a claim by id; `admit` returns the recorded result of a settled one.

    Raises:
        ClaimNotFound: The id is invalid, or no such claim ever existed.
    """
    if claim_id in ("", ".", "..") or "/" in claim_id:
        raise ClaimNotFound(f"not a claim id: {claim_id!r}")
    place = ClaimFolder(folder, claim_id)
    if (path := place.user_file()) is not None:
        return claimed(place, path)
    if (result := place.result() or place.settled_result()) is None:
        raise ClaimNotFound(f"no claim {claim_id!r} in {folder.claims}")
    return Claim(
        claim_id=claim_id,
        path=place.root / result.file_name,
        sidecar=None,
        file_name=result.file_name,
        origin=place.origin(),
    )


def claimed(place: ClaimFolder, user_file: Path) -> Claim:
    """Return the claim on a file in its claim folder."""
    return Claim(
        claim_id=place.claim_id,
        path=user_file,
        sidecar=place.sidecar(),
        file_name=place.file_name(user_file),
        origin=place.origin(),
        attempts=place.attempts(),
    )


def read_result(path: Path) -> AdmissionResult | None:
    """Return the admission result in a file; None if there is no file.

    Raises:
        FileDamaged: The file cannot be read.
    """
    # mypy does not accept a union as `type[Kept]`.
    result: AdmissionResult | None = StateFile(path, AdmissionResult).read()  # type: ignore[arg-type]
    return result
