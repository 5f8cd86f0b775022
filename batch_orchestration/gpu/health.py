"""GPU health: whether an engine may be started on this machine's device now, and why not."""

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from batch_orchestration.core.errors import EngineStartFailed, GpuUnhealthy, GpuUnreadable
from batch_orchestration.core.waiting import BackgroundCall
from batch_orchestration.engines.model_folder import DTYPE_BYTES, ModelFolder, find_model
from batch_orchestration.engines.processes.records import group_members, is_running, read_record
from batch_orchestration.engines.vllm.flags import flags_of
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.gpu.facts import GpuFacts
from batch_orchestration.gpu.fences import fence_off, standing_fences
from batch_orchestration.gpu.gate import GpuNeed, unhealthy_reasons
from batch_orchestration.gpu.monitor import DeviceMonitor
from batch_orchestration.gpu.nvml import ListeningReader, read_gpus
from batch_orchestration.settings import Device, EngineKind, Settings

#: Tokens for which the gate requires room in the KV cache: with less, vLLM does not start even at
#: the lowest memory level.
LEAST_TOKENS = 2048
#: For the CUDA context, the engine's workspace and the activations of the smallest step.
MARGIN_BYTES = 2**30
#: Share of the weights, for padding and copies while they are loaded.
MARGIN_SHARE = 0.05


def needed_bytes(weight_bytes: float, *, kv_bytes_per_token: int, devices: int) -> int:
    """Return the memory that must be free on each device for a model to be served at all.

        weights / devices x 1.05 + 1 GiB + `LEAST_TOKENS` x KV bytes per token

    This is a minimum: the more memory is free beyond it, the more requests run at a time.

    Args:
        weight_bytes: Size of all weights as they will be on the devices.
        kv_bytes_per_token: See `ModelFolder.kv_bytes_per_token`.
        devices: Number of devices over which the model is spread.
    """
    weights = weight_bytes / devices * (1 + MARGIN_SHARE)
    return round(weights + MARGIN_BYTES + LEAST_TOKENS * kv_bytes_per_token)


logger = logging.getLogger(__name__)
#: NVML takes milliseconds for a device, and a second if the driver must first wake it up.
READ_SECONDS = 5.0
#: After an engine's end, the driver releases its memory within a second or two. A run repeats its
#: check for this long before it considers the device unfit.
PATIENCE_SECONDS = 6.0
_LOOK_SECONDS = 1.0
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
    while no_gate(settings) is None and (
        problem := check_gpu(settings, seconds=seconds, starting=True).problem
    ):
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


def check_gpu(
    settings: Settings, *, seconds: float = READ_SECONDS, starting: bool = False
) -> GpuCheck:
    """Read the devices, and judge them if the settings use any.

    Fences of devices that have visibly recovered come down (see `gpu.fences`).

    Args:
        starting: An engine is about to be started beside those that run. By default, an engine
            that runs counts as the one that is asked about, with memory of its own.
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
        is_there = bool(own) and not starting
        judged = msgspec.structs.replace(need, memory_bytes=None) if is_there else need
        seen = () if isinstance(readings, GpuUnreadable) else readings
        fences = standing_fences(DataFolder(settings.data_dir), seen)
        against = partial(unhealthy_reasons, readings, need=judged, own=own, fences=fences)
        reasons = against(max_celsius=settings.gpu_max_temperature)
        throttled = bool(own and reasons) and not against(max_celsius=math.inf)
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
        max_celsius=settings.gpu_max_temperature,
        fence_off=partial(fence_off, folder, by=run_id),
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
    devices = math.prod(_count(args.get(flag)) for flag in _SPREADING)
    model = _measurable_model(settings, args)
    if isinstance(model, str):
        return GpuNeed(devices=devices, why=f"not known: {model}")
    weights = model.loaded_bytes(str(args.get("dtype", "auto")))
    per_token = model.kv_bytes_per_token(dtype_bytes=kv_dtype_bytes(args), devices=devices)
    each = f" on each of {devices}" if devices > 1 else ""
    return GpuNeed(
        devices=devices,
        memory_bytes=needed_bytes(weights, kv_bytes_per_token=per_token, devices=devices),
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


def _measurable_model(settings: Settings, args: Mapping[str, Any]) -> ModelFolder | str:
    """Return the model, or why the memory for its weights is unknown."""
    try:
        folder = find_model(settings.model)
    except EngineStartFailed as error:
        return str(error)
    if folder is None:
        return f"{settings.model} is the name of a model on a hub, not a folder"
    if changed := [flag for flag in _CHANGES_WEIGHTS if args.get(flag) is not None]:
        return f"engine_args change the weights ({', '.join(changed)})"
    return f"there are no weights in {folder.path}" if folder.weight_bytes is None else folder


def _count(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 1
