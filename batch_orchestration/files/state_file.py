"""State files: small JSON files in the data folder, each with one value of ours."""

import contextlib
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from batch_orchestration.core.errors import FileDamaged
from batch_orchestration.files.atomic import disk_errors, sync_folder, write_atomically
from batch_orchestration.files.regular import open_regular

State = TypeVar("State")


@dataclass(frozen=True)
class StateFile(Generic[State]):
    """A JSON file with one value of type `kind`; readers see the old value or the new."""

    path: Path
    kind: type[State]

    def read(self) -> State | None:
        """Return the value; None if the file does not exist.

        Never blocks: a pipe, a socket or a broken link in the file's place counts as damage.

        Raises:
            FileDamaged: The path is not a file with such a value, or cannot be read.
            TooManyOpenFiles: No descriptor is left; retry later.
        """
        try:
            with open_regular(self.path) as file:
                data = file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise FileDamaged(self.path, f"cannot be read: {error.strerror or error}") from error
        try:
            return msgspec.json.decode(data, type=self.kind)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            reason = "is empty" if not data else f"is damaged: {error}"
            raise FileDamaged(self.path, reason) from error

    def read_if_sound(self) -> State | None:
        """Return the value; None if the file is missing or damaged."""
        with contextlib.suppress(FileDamaged):
            return self.read()
        return None

    def write(self, value: State) -> None:
        """Replace the value durably; missing folders are created.

        Raises:
            Shortage: No space or no descriptor is left; the old value stays.
            StorageError: The file cannot be written; the old value stays.
        """
        write_atomically(self.path, _encoded(value))

    def write_unsynced(self, value: State) -> None:
        """Replace the value without waiting for the disk: a power loss may leave an empty file.

        Raises:
            OSError: The file cannot be written, or its folder is missing.
        """
        temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(6)}.tmp")
        try:
            temporary.write_bytes(_encoded(value))
            temporary.replace(self.path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the file durably, if it exists.

        Raises:
            StorageError: The file cannot be removed.
        """
        with disk_errors(self.path), contextlib.suppress(FileNotFoundError):
            self.path.unlink()
            sync_folder(self.path.parent)


def _encoded(value: object) -> bytes:
    return msgspec.json.encode(value) + b"\n"
