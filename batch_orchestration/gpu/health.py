"""GPU health: whether an engine may be started on this machine's device now, and why not."""

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from batch_orchestration.core.errors import EngineStartFailed, GpuUnhealthy, GpuUnreadable
from batch_orchestration.core.waiting import BackgroundCall
from batch_orchestration.engines.processes.records import group_members, is_running, read_record
from batch_orchestration.engines.vllm.flags import flags_of, model_folder
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.gpu.facts import GpuFacts
from batch_orchestration.gpu.fences import fence_off, standing_fences
from batch_orchestration.gpu.gate import GpuLimits, GpuNeed, unhealthy_reasons
from batch_orchestration.gpu.monitor import DeviceMonitor
from batch_orchestration.gpu.nvml import ListeningReader, read_gpus
from batch_orchestration.gpu.thermal import ThermalPolicy
from batch_orchestration.settings import Device, EngineKind, Settings

#: Tokens for which the gate requires room in the KV cache: with less, vLLM does not start even at
#: the lowest memory level.
LEAST_TOKENS = 2048
#: For the CUDA context, the engine's workspace and the activations of the smallest step.
MARGIN_BYTES = 2**30
#: Share of the weights, for padding and copies while they are loaded.
MARGIN_SHARE = 0.05
DTYPE_BYTES = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2, "fp8": 1}


def needed_bytes(
    weight_bytes: float, config: Mapping[str, Any], *, kv_dtype_bytes: int, devices: int
) -> int:
    """Return the memory that must be free on each device for a model to be served at all.

        weights / devices x 1.05 + 1 GiB + tokens x KV bytes per token,
        KV bytes per token = 2 x layers x KV heads / devices x head size x bytes per number

    The second formula is vLLM's allocation: a key and a value per layer, head and token
    (vllm/v1/kv_cache_interface.py, `AttentionSpec.page_size_bytes`). Tensor parallelism gives each
    device its share of heads, at least one. Models with latent attention keep one compressed vector
    per layer and token instead of keys and values (ibid., `MLAAttentionSpec`: `kv_lora_rank` +
    `qk_rope_head_dim` numbers, on every device). Tokens are `LEAST_TOKENS`, a minimum: the more
    memory is free beyond it, the more requests run at a time.

    Args:
        weight_bytes: Size of all weights as they will be on the devices.
        config: The model's `config.json`; if it lacks the shape, the KV cache counts as 0.
        kv_dtype_bytes: Bytes per number in the KV cache.
        devices: Number of devices over which the model is spread.
    """
    per_token = kv_bytes_per_token(config, dtype_bytes=kv_dtype_bytes, devices=devices)
    weights = weight_bytes / devices * (1 + MARGIN_SHARE)
    return round(weights + MARGIN_BYTES + LEAST_TOKENS * per_token)


def kv_bytes_per_token(config: Mapping[str, Any], *, dtype_bytes: int, devices: int) -> int:
    """Return the bytes of one token in the KV cache of each device; 0 if the shape is unknown."""
    # Multimodal models keep the shape of their language part separately.
    shape = config.get("text_config") or config
    layers = _whole(shape, "num_hidden_layers", "n_layer")
    heads = _whole(shape, "num_attention_heads", "n_head")
    kv_heads = _whole(shape, "num_key_value_heads") or heads
    hidden = _whole(shape, "hidden_size", "n_embd")
    head_size = _whole(shape, "head_dim") or (hidden // heads if heads else 0)
    if latent := _whole(shape, "kv_lora_rank"):
        return layers * (latent + _whole(shape, "qk_rope_head_dim")) * dtype_bytes
    return 2 * layers * max(1, kv_heads // devices) * head_size * dtype_bytes


def _whole(shape: Mapping[str, Any], *names: str) -> int:
    values = (shape.get(name) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), 0)


logger = logging.getLogger(__name__)
#: NVML takes milliseconds for a device, and a second if the driver must first wake it up.
READ_SECONDS = 5.0
#: After an engine's end, the driver releases its memory within a second or two. A run repeats its
#: check for this long before it considers the device unfit.
PATIENCE_SECONDS = 6.0
_LOOK_SECONDS = 1.0
#: Used by every run.
THERMAL_POLICY = ThermalPolicy()
#: vLLM's flags that spread a model over devices.
_SPREADING = ("tensor-parallel-size", "pipeline-parallel-size")
#: Flags that make the weights on the device differ from those in the files.
_CHANGES_WEIGHTS = ("quantization", "cpu-offload-gb", "load-format", "hf-overrides")
_GIB = 2**30
Readings = Sequence[GpuFacts] | GpuUnreadable


@dataclass(frozen=True, kw_only=True)
class GpuCheck:
    """The result of the gate, and its inputs.

    Attributes:
        no_gate: Why no gate applies; None if one does.
        devices: The devices that CUDA shows; empty if they could not be read.
        unreadable: Why they could not be read; None if they could.
        reasons: Reasons against starting an engine; empty if there are none.
        throttled: Whether heat under one of our own engines is the only reason: its run throttles
            it (`gpu.thermal`).
        fences: Why devices are fenced, by UUID, including devices that CUDA does not show.
    """

    no_gate: str | None
    devices: tuple[GpuFacts, ...]
    unreadable: str | None
    need: GpuNeed
    reasons: tuple[str, ...]
    throttled: bool
    fences: Mapping[str, str]

    @property
    def healthy(self) -> bool:
        """Whether an engine may be started."""
        return not self.reasons

    @property
    def problem(self) -> str | None:
        """All reasons in one line; None if there are none."""
        return "; ".join(self.reasons) or None


class GpuReader:
    """Reads NVML with a time limit: a broken driver may never answer, and is asked only once."""

    def __init__(self, read: Callable[[], Sequence[GpuFacts]]) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._call: BackgroundCall[Sequence[GpuFacts]] | None = None

    def readings(self, *, seconds: float) -> Readings:
        """Return the devices, or why they could not be read within `seconds`."""
        with self._lock:
            if self._call is None or self._call.returned():
                self._call = BackgroundCall("nvml", self._read)
            call = self._call
        if not call.returned(within=seconds):
            return GpuUnreadable(
                f"NVML has not answered for {call.seconds:.0f} s; the driver may hang"
            )
        try:
            return call.result()
        except GpuUnreadable as error:
            return error
        except Exception as error:  # noqa: BLE001 - whatever it is, the device was not seen healthy
            return GpuUnreadable(f"NVML's answer makes no sense: {error!r}")


_reader = GpuReader(lambda: read_gpus())


def gpu_problem(settings: Settings, *, seconds: float = READ_SECONDS) -> str | None:
    """Return why no engine may be started now, in one line; None if it may, or no GPU is used.

    Fails closed: a device that cannot be read within `seconds` is a problem. Starts no process.
    """
    if no_gate(settings) is not None:
        return None
    return check_gpu(settings, seconds=seconds).problem


def require_healthy_gpu(settings: Settings, *, seconds: float = READ_SECONDS) -> None:
    """Return once an engine may be started, waiting at most `PATIENCE_SECONDS`.

    Raises:
        GpuUnhealthy: It may not.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while problem := gpu_problem(settings, seconds=seconds):
        if time.monotonic() >= deadline:
            raise GpuUnhealthy(problem)
        time.sleep(_LOOK_SECONDS)


def no_gate(settings: Settings) -> str | None:
    """Return why no gate applies; None if the GPU is to be checked.

    Only the settings decide that, never NVML.
    """
    if settings.engine is not EngineKind.VLLM:
        return f"no GPU gate applies: BATCH_ENGINE={settings.engine} uses no device of this machine"
    if settings.device is not Device.CUDA:
        return f"no GPU gate applies: BATCH_DEVICE={settings.device} was chosen"
    return None


def check_gpu(settings: Settings, *, seconds: float = READ_SECONDS) -> GpuCheck:
    """Read the devices, and judge them if the settings use any.

    Fences of devices that have visibly recovered come down (see `gpu.fences`).
    """
    readings = _reader.readings(seconds=seconds)
    unreadable = isinstance(readings, GpuUnreadable)
    without = no_gate(settings)
    need, reasons = GpuNeed(), list[str]()
    throttled = False
    fences: Mapping[str, str] = {}
    if without is None:
        own = own_pids(DataFolder(settings.data_dir))
        need = engine_need(settings)
        # The running engine was judged before its start; it already has its memory.
        judged = msgspec.structs.replace(need, memory_bytes=None) if own else need
        seen = () if isinstance(readings, GpuUnreadable) else readings
        fences = standing_fences(DataFolder(settings.data_dir), seen)
        verdict = partial(unhealthy_reasons, readings, need=judged, own=own, fences=fences)
        reasons = verdict(limits=GpuLimits(max_celsius=settings.gpu_max_temperature))
        throttled = bool(own and reasons) and not verdict(limits=GpuLimits(max_celsius=math.inf))
    return GpuCheck(
        no_gate=without,
        devices=() if isinstance(readings, GpuUnreadable) else tuple(readings),
        unreadable=str(readings) if unreadable else None,
        need=need,
        reasons=tuple(reasons),
        throttled=throttled,
        fences=fences,
    )


def device_monitor(settings: Settings, *, run_id: str) -> DeviceMonitor | None:
    """Return the monitor of the devices that a run uses; None if it uses none."""
    if no_gate(settings) is not None:
        return None
    folder = DataFolder(settings.data_dir)
    reader = GpuReader(ListeningReader().read)
    return DeviceMonitor(
        partial(reader.readings, seconds=READ_SECONDS),
        devices=engine_need(settings).devices,
        limits=GpuLimits(max_celsius=settings.gpu_max_temperature),
        fence_off=partial(fence_off, folder, by=run_id),
        policy=THERMAL_POLICY,
    )


def own_pids(folder: DataFolder) -> frozenset[int]:
    """Return the pids of all running engines that runs of this data folder started."""
    pids: set[int] = set()
    for path in (folder.logs / "engines").glob("*.process.json"):
        record = read_record(path)
        if record is not None and any(map(is_running, (record.leader, *record.members))):
            pids |= {member.pid for member in group_members(record.leader.pid)}
    return frozenset(pids)


def engine_need(settings: Settings) -> GpuNeed:
    """Return the resources that vLLM will need with these settings."""
    args = flags_of(settings.engine_args)
    devices = 1
    for flag in _SPREADING:
        devices *= _count(args.get(flag))
    unknown = _unknown_because(settings, args)
    if unknown is not None:
        return GpuNeed(devices=devices, why=unknown)
    folder = Path(settings.model).expanduser()
    config = _config(folder)
    weights = (weight_bytes(folder) or 0) * _cast(config, str(args.get("dtype", "auto")))
    needed = needed_bytes(weights, config, kv_dtype_bytes=kv_dtype_bytes(args), devices=devices)
    each = f" on each of {devices}" if devices > 1 else ""
    return GpuNeed(
        devices=devices,
        memory_bytes=needed,
        why=(
            f"{weights / devices / _GIB:.1f} GiB of weights{each} + {MARGIN_SHARE:.0%}, 1 GiB for"
            " the engine, and the smallest KV cache"
        ),
    )


def kv_dtype_bytes(args: Mapping[str, Any]) -> int:
    """Return the bytes per number in the KV cache on a GPU; vLLM's `auto` is the model's 16 bits.

    Args:
        args: Flags of vLLM, without dashes.
    """
    return DTYPE_BYTES.get(str(args.get("kv-cache-dtype", "auto")).split("_")[0], 2)


def model_config(model: str) -> Mapping[str, Any]:
    """Return the `config.json` of a model in a folder; empty if there is none to read."""
    try:
        folder = model_folder(model)
    except EngineStartFailed:
        return {}
    return {} if folder is None else _config(folder)


def weight_bytes(folder: Path) -> int | None:
    """Return the size of a model's weights in its files; None if there are none.

    If a folder has several formats, vLLM loads safetensors, by their index if there is one.
    """
    index = folder / "model.safetensors.index.json"
    try:
        return int(msgspec.json.decode(index.read_bytes())["metadata"]["total_size"])
    except (OSError, msgspec.DecodeError, KeyError, TypeError, ValueError):
        pass
    for pattern in ("model*.safetensors", "*.safetensors", "pytorch_model*.bin", "*.bin"):
        if files := list(folder.glob(pattern)):
            return sum(path.stat().st_size for path in files)
    return None


def _unknown_because(settings: Settings, args: Mapping[str, Any]) -> str | None:
    try:
        folder = model_folder(settings.model)
    except EngineStartFailed as error:
        return f"not known: {error}"
    if folder is None:
        return f"not known: {settings.model} is the name of a model on a hub, not a folder"
    if changed := [flag for flag in _CHANGES_WEIGHTS if args.get(flag) is not None]:
        return f"not known: engine_args change the weights ({', '.join(changed)})"
    if weight_bytes(folder) is None:
        return f"not known: there are no weights in {folder}"
    return None


def _config(folder: Path) -> Mapping[str, Any]:
    try:
        config = msgspec.json.decode((folder / "config.json").read_bytes())
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return {}
    return config if isinstance(config, dict) else {}


def _cast(config: Mapping[str, Any], dtype: str) -> float:
    """Return the factor by which loading changes the size of the weights.

    vLLM's `auto` loads float32 as 16 bits. Weights that are quantized in the files stay as they
    are.
    """
    shape = config.get("text_config") or config
    stored = shape.get("torch_dtype") or shape.get("dtype") or config.get("torch_dtype")
    if config.get("quantization_config") or stored not in DTYPE_BYTES:
        return 1.0
    target = DTYPE_BYTES.get(dtype, 2 if DTYPE_BYTES[stored] > 2 else DTYPE_BYTES[stored])
    return target / DTYPE_BYTES[stored]


def _count(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 1
