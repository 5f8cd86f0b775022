"""Side-cars: the small JSON file beside a batch file in which its author states options."""

import os
import re
from pathlib import Path

import msgspec

from batch_orchestration.domain.batches import BatchOptions
from batch_orchestration.domain.errors import FileRefused
from batch_orchestration.domain.requests import UTF8_BOM
from batch_orchestration.domain.sources import DEFAULT_SOURCE, Origin
from batch_orchestration.storage.moves import NAME_MAX_BYTES, fit_name

SIDECAR_ENDING = ".meta.json"
#: Sixteen pairs of metadata fit many times over; a larger file was named so by mistake.
SIDECAR_MAX_BYTES = 256 * 2**10

_FIELD = re.compile(r" - at `\$\.?(?P<path>.*)`$")


def sidecar_names(file_name: str) -> list[str]:
    """Return what the side-car of a batch file may be called, the preferred name first.

    That of `a.jsonl.gz` is `a.jsonl.gz.meta.json`, `a.jsonl.meta.json` or `a.meta.json`; a name
    that the file system would refuse for its length is left out.
    """
    without_gz = re.sub(r"\.gz$", "", file_name, flags=re.IGNORECASE)
    stem = re.sub(r"\.jsonl$", "", without_gz, flags=re.IGNORECASE)
    names = (f"{name}{SIDECAR_ENDING}" for name in dict.fromkeys((file_name, without_gz, stem)))
    return [name for name in names if len(os.fsencode(name)) <= NAME_MAX_BYTES]


def sidecar_beside(file: Path) -> Path:
    """Return where the side-car of a batch file is put by us."""
    names = sidecar_names(file.name) or [fit_name(file.name, SIDECAR_ENDING)]
    return file.with_name(names[0])


def find_sidecar(file: Path) -> Path | None:
    """Return the side-car that lies beside a batch file, if there is one."""
    beside = (file.with_name(name) for name in sidecar_names(file.name))
    return next((path for path in beside if path.is_file() and not path.is_symlink()), None)


def read_options(sidecar: Path | None, origin: Origin | None = None) -> BatchOptions:
    """Return what a side-car says; of what it leaves open, what the folder of the inbox says.

    Args:
        sidecar: None if there is none.
        origin: Where the file was dropped; None for one that was not.

    Raises:
        FileRefused: It is not JSON, or a field is unknown or out of range; the message names it.
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
        content = content.removeprefix(UTF8_BOM)
        said = msgspec.json.decode(content, type=BatchOptions)
        names = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError as error:
        raise FileRefused(f"side-car {sidecar.name}: {_named(str(error))}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FileRefused(f"side-car {sidecar.name}: not JSON: {error}") from error
    return msgspec.structs.replace(
        said,
        priority=said.priority if "priority" in names else origin.priority,
        user=said.user or user,
    )


def options_said(sidecar: Path | None, origin: Origin) -> BatchOptions:
    """Return the options of a file in the queue; of a side-car that is refused, the folder's."""
    try:
        return read_options(sidecar, origin)
    except (FileRefused, OSError):
        return read_options(None, origin)


def _named(message: str) -> str:
    match = _FIELD.search(message)
    if match is None:
        return message
    return f"`{match['path']}`: {message[: match.start()]}"
