"""What the demo and `make dev` run on unless the environment says otherwise: one home for both."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from dotenv import dotenv_values
from prepare_model import default_folder

from batch_orchestration.engines.simulated.answers import DEFAULT_MODEL as SIMULATED_MODEL

REPOSITORY = Path(__file__).resolve().parent.parent
#: The model's own 8,192 tokens would take memory from other things, and no request uses them.
MAX_MODEL_LEN = 2048
#: vLLM 0.32 dies on a CPU ("CPU Generator does not use offset") when the prefill of a request with
#: a `seed` does not fit into one step.
CPU_ENGINE_ARGS = {"enable-chunked-prefill": False}
#: Files that are submitted by renaming are complete at once.
SETTLE_SECONDS = "1"
#: There while the NVIDIA driver is loaded.
NVIDIA_CONTROL = Path("/dev/nvidiactl")


class SettingsMissing(Exception):
    """Something has to be said before there can be a demo; the message says how."""


def fill_in(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the settings to add to the environment; those given there or in `.env` stand.

    Raises:
        SettingsMissing: No model is given for a GPU, or that for the CPU is not made yet.
    """
    given = {**_env_file(), **environ}
    added = {"BATCH_SETTLE_SECONDS": SETTLE_SECONDS}
    match given.get("BATCH_ENGINE", "vllm"):
        case "vllm":
            added |= _vllm(given)
        case "simulated":
            added |= {"BATCH_MODEL_ALIASES": json.dumps({"*": SIMULATED_MODEL})}
    return {name: value for name, value in added.items() if name not in given}


def _vllm(given: Mapping[str, str]) -> dict[str, str]:
    device = given.get("BATCH_DEVICE") or ("cuda" if NVIDIA_CONTROL.exists() else "cpu")
    model = given.get("BATCH_MODEL") or _cpu_model(device)
    # The example asks for "demo-model"; here every name means the one model that is served.
    name = given.get("BATCH_SERVED_MODEL_NAME") or model.rstrip("/").rpartition("/")[2]
    engine_args = {"max-model-len": MAX_MODEL_LEN, **(CPU_ENGINE_ARGS if device == "cpu" else {})}
    return {
        "BATCH_ENGINE": "vllm",
        "BATCH_DEVICE": device,
        "BATCH_MODEL": model,
        "BATCH_MODEL_ALIASES": json.dumps({"*": name}),
        "BATCH_ENGINE_ARGS": json.dumps(engine_args),
    }


def _cpu_model(device: str) -> str:
    if device != "cpu":
        raise SettingsMissing(
            "Say which model the GPU shall serve: make demo BATCH_MODEL=<folder or hub name>"
        )
    folder = default_folder()
    if not folder.is_dir():
        raise SettingsMissing(f"The demo's model {folder} is not made yet: make model")
    return os.path.relpath(folder, REPOSITORY)


def _env_file() -> dict[str, str]:
    found = dotenv_values(REPOSITORY / ".env")
    return {name: value for name, value in found.items() if value is not None}
