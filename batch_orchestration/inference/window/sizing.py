"""Sizes a run's engine and window from present facts: devices, model, batch, earlier runs."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from batch_orchestration.core.errors import StorageError
from batch_orchestration.engines.base import EngineInfo
from batch_orchestration.engines.model_folder import DTYPE_BYTES, local_model
from batch_orchestration.engines.vllm.flags import flags_of, whole_number
from batch_orchestration.estimates import derivation
from batch_orchestration.estimates.batch_estimates import read_estimate
from batch_orchestration.estimates.derivation import (
    MOST_IN_FLIGHT,
    READING_COST,
    Derived,
    RequestTokens,
    request_tokens,
)
from batch_orchestration.estimates.engine import engine_in_force
from batch_orchestration.estimates.estimate import Estimate
from batch_orchestration.estimates.tables import EstimateTables
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.gpu.facts import GpuFacts
from batch_orchestration.gpu.health import (
    LEAST_TOKENS,
    GpuCheck,
    check_gpu,
    kv_dtype_bytes,
    no_gate,
)
from batch_orchestration.hosting.hosts import idle_pids
from batch_orchestration.inference.window.control import Bounds
from batch_orchestration.settings import Device, EngineKind, Settings
from batch_orchestration.store.store import Store

logger = logging.getLogger(__name__)

#: vLLM's flags that fix its memory; if one of them is set, no share of the memory is derived.
_MEMORY_FLAGS = frozenset({"gpu-memory-utilization", "kv-cache-memory-bytes"})


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """The derived settings of a run.

    Attributes:
        flags: Flags of the engine's command; those set by `BATCH_ENGINE_ARGS` are never among them.
        derived: The derived values, with their derivation.
        tokens: Tokens of a request of the run's batches; None if they have no estimate.
        reading_cost: Cost of a prompt token, in generated tokens.
        in_flight: Value of `BATCH_IN_FLIGHT`; None if the window is derived, too.
    """

    flags: Mapping[str, Any] = field(default_factory=dict)
    derived: tuple[Derived, ...] = ()
    tokens: RequestTokens | None = None
    reading_cost: float = READING_COST
    in_flight: int | None = None

    @property
    def most_in_flight(self) -> int:
        """The greatest width that the window may reach."""
        return self.in_flight or MOST_IN_FLIGHT

    @property
    def bounds(self) -> Bounds | None:
        """Limits within which the window follows the engine; None if the window was set."""
        if self.in_flight:
            return None
        return Bounds(most=MOST_IN_FLIGHT, reading_cost=self.reading_cost)

    def window(self, engine: EngineInfo) -> Derived:
        """Return the initial window for an engine that was started."""
        if self.in_flight:
            return Derived(name="window", value=self.in_flight, why="as set by BATCH_IN_FLIGHT")
        return derivation.window(
            kv_cache_tokens=engine.kv_cache_tokens,
            max_num_seqs=engine.max_num_seqs,
            tokens=self.tokens,
        )


def size_run(
    settings: Settings, *, folder: DataFolder, store: Store, batch_ids: Sequence[str]
) -> Sizing:
    """Derive the settings of a run for these batches, and log them; unknown values are left out.

    Reads the devices if the engine is to run on one of this machine's.
    """
    estimates = [read_estimate(folder, batch_id) for batch_id in batch_ids]
    sized = Sizing(tokens=request_tokens(estimates), in_flight=settings.in_flight)
    cache = _cache_known(settings, store)
    if settings.engine is EngineKind.VLLM:
        args = flags_of(settings.engine_args)
        gpu = None if no_gate(settings) is not None else check_gpu(settings)
        share = None
        if gpu is not None and not _MEMORY_FLAGS & args.keys():
            share = memory_share_of(gpu, reusable=idle_pids(folder))
        cache = cache or _cache_expected(settings, args, gpu, share)
        slots = None if "max-num-seqs" in args else _slots(settings, cache, sized)
        sized = _with(sized, [each for each in (share, slots) if each is not None])
    return replace(sized, reading_cost=_reading_cost(estimates, cache, sized.tokens))


def _with(sized: Sizing, derived: Sequence[Derived]) -> Sizing:
    for each in derived:
        logger.info("%s", each)
    flags = flags_of({each.name: each.value for each in derived})
    return replace(sized, flags=flags, derived=tuple(derived))


def _slots(settings: Settings, cache: int | None, sized: Sizing) -> Derived | None:
    on_cpu = settings.device is Device.CPU
    most = derivation.MOST_SEQUENCES_ON_CPU if on_cpu else derivation.MOST_SEQUENCES
    return derivation.sequences(
        kv_cache_tokens=cache, tokens=sized.tokens, most=min(most, sized.most_in_flight)
    )


def _reading_cost(
    estimates: Sequence[Estimate | None], cache: int | None, tokens: RequestTokens | None
) -> float:
    measured = next((each for each in estimates if each is not None and each.costs), None)
    if measured is None:
        return READING_COST
    at_a_time = float(measured.at_a_time)
    if cache is not None and tokens is not None:
        at_a_time = min(at_a_time, derivation.sequences_held(cache, tokens))
    return derivation.reading_cost(measured.costs, at_a_time=at_a_time)


def memory_share_of(gpu: GpuCheck, *, reusable: frozenset[int] = frozenset()) -> Derived | None:
    """Return the share of memory to claim on the devices that the engine will use.

    None if the memory of one of them is unknown.

    Args:
        reusable: Pids of warm engines, which are ended before another one starts.
    """
    devices = gpu.devices[: gpu.need.devices]
    known = [
        (each.memory_free_bytes + _held_by(each, reusable), each.memory_total_bytes)
        for each in devices
        if each.memory_free_bytes is not None and each.memory_total_bytes
    ]
    if len(known) < gpu.need.devices:
        return None
    return derivation.memory_share(known, needed_bytes=gpu.need.memory_bytes)


def _held_by(device: GpuFacts, pids: frozenset[int]) -> int:
    return sum(each.memory_bytes or 0 for each in device.processes or () if each.pid in pids)


def _cache_known(settings: Settings, store: Store) -> int | None:
    """Return the KV cache's tokens in the latest run of the same engine; None if unknown."""
    if not store.exists:
        return None
    try:
        facts = EstimateTables(store).engine_info(engine_in_force(settings))
    except StorageError as error:
        logger.warning("cannot read what the engine reported at its last start: %s", error)
        return None
    return None if facts is None else facts.kv_cache_tokens


def _cache_expected(
    settings: Settings,
    args: Mapping[str, Any],
    gpu: GpuCheck | None,
    share: Derived | None,
) -> int | None:
    """Return the KV cache's tokens expected from the model's shape; None if unknown."""
    model = local_model(settings.model)
    if model is None:
        return None
    if settings.device is Device.CPU:
        cache_bytes = whole_number(engine_in_force(settings).args.get("kv-cache-memory-bytes"))
        dtype = str(engine_in_force(settings).args.get("dtype"))
        per_token = model.kv_bytes_per_token(dtype_bytes=DTYPE_BYTES.get(dtype, 4), devices=1)
        return cache_bytes // per_token if cache_bytes and per_token else None
    if gpu is None or share is None or gpu.need.memory_bytes is None:
        return None
    total = min(each.memory_total_bytes or 0 for each in gpu.devices[: gpu.need.devices])
    return derivation.cache_tokens(
        claimed_bytes=share.value * total,
        needed_bytes=gpu.need.memory_bytes,
        least_tokens=LEAST_TOKENS,
        bytes_per_token=model.kv_bytes_per_token(
            dtype_bytes=kv_dtype_bytes(args), devices=gpu.need.devices
        ),
    )
