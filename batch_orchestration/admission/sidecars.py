"""Side-cars: small JSON files beside batch files, with the options of their authors."""

import os
import re
from pathlib import Path

import msgspec

from batch_orchestration.admission.reading.batch_files import is_batch_file_name
from batch_orchestration.core import foreign_json
from batch_orchestration.core.batches import DEFAULT_SOURCE, BatchOptions, Origin
from batch_orchestration.core.errors import FileRefused
from batch_orchestration.core.requests import UTF8_BOM
from batch_orchestration.files.moving import NAME_MAX_BYTES, fit_name

SIDECAR_ENDING = ".meta.json"
#: Many times the size of sixteen metadata pairs; a larger file has its name by mistake.
SIDECAR_MAX_BYTES = 256 * 2**10

_FIELD = re.compile(r" - at `\$\.?(?P<path>.*)`$")
#: Shown instead of a regular expression, which few people can read.
_WORDS = {
    "completion_window": "expected a time like 24h, 90m or 1h30m (s, m, h and d; no blanks)",
    "user": "expected a name without control characters",
}
_ENDINGS = [f"{jsonl}{gz}" for jsonl in ("", ".jsonl", ".JSONL") for gz in ("", ".gz", ".GZ")]


def sidecar_names(file_name: str) -> list[str]:
    """Return the possible names of a batch file's side-car, the preferred name first.

    The side-car of `a.jsonl.gz` is `a.jsonl.gz.meta.json`, `a.jsonl.meta.json` or `a.meta.json`.
    Names too long for the file system are left out.
    """
    without_gz = re.sub(r"\.gz$", "", file_name, flags=re.IGNORECASE)
    stem = re.sub(r"\.jsonl$", "", without_gz, flags=re.IGNORECASE)
    names = (f"{name}{SIDECAR_ENDING}" for name in dict.fromkeys((file_name, without_gz, stem)))
    return [name for name in names if len(os.fsencode(name)) <= NAME_MAX_BYTES]


def sidecar_beside(file: Path) -> Path:
    """Return the path to which we move the side-car of a batch file."""
    names = sidecar_names(file.name) or [fit_name(file.name, SIDECAR_ENDING)]
    return file.with_name(names[0])


def find_sidecar(file: Path) -> Path | None:
    """Return the side-car beside a batch file; None if there is none.

    A side-car that bears the full name of another batch file there belongs to that file.
    """
    for name in sidecar_names(file.name):
        path, owner = file.with_name(name), file.with_name(name.removesuffix(SIDECAR_ENDING))
        is_its_own = owner == file or not _is_batch_file(owner)
        if path.is_file() and not path.is_symlink() and is_its_own:
            return path
    return None


def files_of_sidecar(sidecar: Path) -> list[Path]:
    """Return the batch files beside a side-car to which it applies."""
    stem = sidecar.name.removesuffix(SIDECAR_ENDING)
    beside = (sidecar.with_name(f"{stem}{ending}") for ending in _ENDINGS)
    return [file for file in beside if _is_batch_file(file) and find_sidecar(file) == sidecar]


def doubt_about_sidecar(file: Path) -> str | None:
    """Return why a batch file's side-car may be meant for another; None if it is unambiguous."""
    sidecar = find_sidecar(file)
    if sidecar is None or len(files := files_of_sidecar(sidecar)) < 2:
        return None
    names = " and ".join(each.name for each in files)
    meant = sidecar_names(file.name)[0]
    return (
        f"the side-car {sidecar.name} fits {names}, and nothing says which of them it is for;"
        f" rename it to {meant}, or move the other file away until this one is admitted"
    )


def own_sidecar(file: Path) -> Path | None:
    """Return the side-car beside a batch file; None if there is none.

    Raises:
        FileRefused: The side-car may be meant for another file there.
    """
    if (doubt := doubt_about_sidecar(file)) is not None:
        raise FileRefused(doubt)
    return find_sidecar(file)


def read_options(sidecar: Path | None, origin: Origin | None = None) -> BatchOptions:
    """Return the options of a side-car; its inbox folder supplies missing ones.

    Args:
        origin: None for a file that was not dropped.

    Raises:
        FileRefused: The side-car is too large or not JSON, or a field is unknown or out of range;
            the message names the field.
    """
    origin = origin or Origin()
    user = None if origin.source == DEFAULT_SOURCE else origin.source
    if sidecar is None:
        return BatchOptions(priority=origin.priority, user=user)
    with sidecar.open("rb") as file:
        content = file.read(SIDECAR_MAX_BYTES + 1)
    if len(content) > SIDECAR_MAX_BYTES:
        raise FileRefused(f"side-car {sidecar.name}: larger than {SIDECAR_MAX_BYTES:,} bytes")
    try:
        names = foreign_json.decode(content.removeprefix(UTF8_BOM))
        given = msgspec.convert(names, type=BatchOptions)
    except foreign_json.BadJson as error:
        raise FileRefused(f"side-car {sidecar.name}: {error.reason}") from error
    except msgspec.ValidationError as error:
        raise FileRefused(f"side-car {sidecar.name}: {named_problem(error)}") from error
    return msgspec.structs.replace(
        given,
        priority=given.priority if "priority" in names else origin.priority,
        user=given.user or user,
    )


def options_said(sidecar: Path | None, origin: Origin) -> BatchOptions:
    """Return the options of a file in the queue; the folder's if the side-car is unusable."""
    try:
        return read_options(sidecar, origin)
    except (FileRefused, OSError):
        return read_options(None, origin)


def _is_batch_file(path: Path) -> bool:
    return is_batch_file_name(path.name) and path.is_file()


def named_problem(error: msgspec.ValidationError) -> str:
    """Describe the problem with options to their author, the field first."""
    message = str(error)
    match = _FIELD.search(message)
    if match is None:
        return message
    path, problem = match["path"], message[: match.start()]
    if "matching regex" in problem:
        problem = _WORDS.get(path, problem)
    return f"`{path}`: {problem}"
