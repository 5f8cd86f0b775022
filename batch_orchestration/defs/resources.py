"""Resources of the definitions, all of them built from `Settings`."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field, PrivateAttr

from batch_orchestration.engines.base import Engine
from batch_orchestration.engines.memory_fallback import MemoryFallback, MemoryLevel
from batch_orchestration.engines.memory_level_file import MemoryLevelFile
from batch_orchestration.engines.openai_server import OpenAIServerEngine, ServerOptions
from batch_orchestration.engines.simulated.answers import DEFAULT_MODEL
from batch_orchestration.engines.simulated.engine import MAX_NUM_SEQS, SimulatedEngine
from batch_orchestration.engines.vllm.engine import VllmEngine
from batch_orchestration.engines.vllm.flags import flag_name, flags_of, top_level
from batch_orchestration.estimates.derivation import DEFAULT_IN_FLIGHT
from batch_orchestration.estimates.engine import engine_in_force
from batch_orchestration.estimates.tables import cache_engine_info
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.sharing import share
from batch_orchestration.gpu.health import device_monitor, no_gate, require_healthy_gpu
from batch_orchestration.gpu.sample_table import SampleTaker
from batch_orchestration.hosting.hosted_process import device_of, hosted_process
from batch_orchestration.hosting.hosts import end_idle_engines, end_leftovers
from batch_orchestration.hosting.records import hosts_lock
from batch_orchestration.inference.faults.oom_recovery import remembered_fallback
from batch_orchestration.inference.faults.retries import BreakerPolicy, RetryPolicy
from batch_orchestration.inference.policy import RunContext, RunPolicy
from batch_orchestration.inference.sampler import RunSampler
from batch_orchestration.inference.window.sizing import Sizing, size_run
from batch_orchestration.settings import EngineKind, Settings
from batch_orchestration.store.store import Store
from batch_orchestration.workers.reporter import status_of_this_worker
from batch_orchestration.workers.run_status import RunStatus

logger = logging.getLogger(__name__)
#: At the end of a run; the engine's own figures are not worth a longer wait for the store.
REMEMBER_SECONDS = 10.0
#: Samples are not worth a wait at all: those not stored now are stored later.
SAMPLES_SECONDS = 1.0
#: Pause after an engine left by a killed run has been ended.
SETTLE_SECONDS = 2.0

#: The deployment's settings, unchanged; the run's record never shows them.
SettingsResource = dg.ResourceParam[Settings]


def data_folder(settings: Settings) -> DataFolder:
    """Return the data folder; create it if it is missing."""
    folder = DataFolder(settings.data_dir)
    folder.create()
    for name in settings.inbox_priorities:  # created, so that users see the allowed names
        (folder.inbox / name).mkdir(exist_ok=True)
        share(folder.inbox / name)
    return folder


def open_store(settings: Settings, *, deadline_seconds: float = 600.0) -> Store:
    """Return the store; it waits for a locked file until the deadline."""
    return Store(data_folder(settings).duckdb, deadline_seconds=deadline_seconds)


def sample_taker(settings: Settings) -> SampleTaker:
    """Return a sample taker whose store waits for hardly any lock."""
    store = open_store(settings, deadline_seconds=SAMPLES_SECONDS)
    return SampleTaker(folder=data_folder(settings), store=store)


def run_policy(settings: Settings, sizing: Sizing) -> RunPolicy:
    """Return the policy of a run of this deployment."""
    return RunPolicy(
        in_flight=settings.in_flight or DEFAULT_IN_FLIGHT,
        bounds=sizing.bounds,
        derive=sizing.window,
        retry=RetryPolicy(
            max_attempts=settings.max_attempts,
            base_delay_seconds=settings.retry_base_delay_seconds,
            max_delay_seconds=settings.retry_max_delay_seconds,
            max_retry_after_seconds=settings.max_retry_after_seconds,
        ),
        engine_restarts=settings.engine_restarts,
        hang_seconds=settings.hang_seconds,
        start_timeout_seconds=settings.engine_start_timeout_seconds,
        breaker=BreakerPolicy(
            last=settings.breaker_last,
            failure_rate=settings.breaker_failure_rate,
            pause_seconds=settings.breaker_pause_seconds,
            probes=settings.breaker_probes,
        ),
        model_aliases=settings.model_aliases,
        max_tokens_cap=settings.max_tokens_cap,
        answer_settings=settings.answer_settings(),
        max_failure_rate=settings.max_failure_rate,
        guest_chunks=settings.chunks_per_run,
    )


class RunFlags(dg.Config):
    """Flags of vLLM's server that one run may set differently from `BATCH_ENGINE_ARGS`.

    An allow-list of numbers and switches: a user of the launchpad can name no host, key, file or
    code.
    """

    max_model_len: int | None = Field(default=None, ge=1, description="Longest request, in tokens.")
    max_num_seqs: int | None = Field(default=None, ge=1, description="Requests computed at a time.")
    max_num_batched_tokens: int | None = Field(
        default=None, ge=1, description="Tokens computed in one step."
    )
    gpu_memory_utilization: float | None = Field(
        default=None, gt=0, le=1, description="Share of the device's memory."
    )
    kv_cache_memory_bytes: int | None = Field(
        default=None, ge=1, description="Size of the KV cache, in place of that share."
    )
    enforce_eager: bool | None = Field(default=None, description="Start sooner, compute slower.")
    seed: int | None = Field(default=None, ge=0, description="Seed of the sampling.")

    def over(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """Return the deployment's flags, overridden by this run's."""
        given = flags_of(self.model_dump(exclude_none=True))
        kept = {name: value for name, value in args.items() if flag_name(name) not in given}
        return kept | given


class GpuResource(dg.ConfigurableResource):
    """The engine that answers requests, and the device under it.

    The engine starts only when a chunk has pending requests, unless an earlier run left it warm. It
    is kept from one retry of the step to the next, and released when the run ends.

    Only the deployment's settings choose the engine, its address and its key: fields of this
    resource can be changed in the launchpad, and are kept with the run.
    """

    flags: RunFlags = Field(
        default=RunFlags(), description="Flags of vLLM that differ in this run."
    )
    start_timeout_seconds: float | None = Field(
        default=None, gt=0, description="In place of BATCH_ENGINE_START_TIMEOUT_SECONDS."
    )
    request_timeout_seconds: float | None = Field(
        default=None, gt=0, description="In place of BATCH_REQUEST_TIMEOUT_SECONDS."
    )

    _engine: Engine | None = PrivateAttr(None)
    _settings: Settings | None = PrivateAttr(None)
    _sizing: Sizing = PrivateAttr(default_factory=Sizing)

    def in_force(self, settings: Settings) -> Settings:
        """Return the settings with the launchpad's changes to the engine."""
        changes: dict[str, Any] = {"engine_args": self.flags.over(settings.engine_args)}
        if self.start_timeout_seconds is not None:
            changes["engine_start_timeout_seconds"] = self.start_timeout_seconds
        if self.request_timeout_seconds is not None:
            changes["request_timeout_seconds"] = self.request_timeout_seconds
        return settings.model_copy(update=changes)

    @property
    def sizing(self) -> Sizing:
        """The sizes derived for the run's engine; empty before there is one."""
        return self._sizing

    def for_run(self, run_id: str, settings: Settings, *, batch_ids: Sequence[str] = ()) -> Engine:
        """Return the run's engine, not started yet; the same one each time.

        Engines left by a killed host or run are ended first: they hold device memory. The engine
        checks a GPU before each start of vLLM on it, and raises `GpuUnhealthy` if it is unhealthy.

        Args:
            batch_ids: The batches that the engine is sized for (`inference.window.sizing`).
        """
        if self._engine is None:
            folder = data_folder(settings)
            with hosts_lock(folder):
                ended = end_leftovers(folder)
                if not settings.engine_keep_alive:
                    ended = bool(end_idle_engines(folder)) or ended
            if ended and no_gate(settings) is None:
                # The free memory is measured next, and the driver takes a while to release it.
                time.sleep(SETTLE_SECONDS)
            if (without := no_gate(settings)) is not None:
                logger.info(without)
            self._sizing = size_run(
                settings,
                folder=folder,
                store=open_store(settings, deadline_seconds=REMEMBER_SECONDS),
                batch_ids=batch_ids,
            )
            self._engine = self._build(folder.logs / "engines" / f"{run_id}.log", settings)
            self._settings = settings
        return self._engine

    def run_context(
        self, run_id: str, settings: Settings, sampler: RunSampler, *, batch_ids: Sequence[str]
    ) -> RunContext:
        """Return what the parts of a run share, with the engine of `for_run`."""
        engine = self.for_run(run_id, settings, batch_ids=batch_ids)
        return RunContext(
            engine=engine,
            folder=data_folder(settings),
            store=open_store(settings),
            run_id=run_id,
            policy=run_policy(settings, self._sizing),
            status=sampler.status,
            throttle=sampler.throttle,
        )

    def sampling(self, run_id: str, settings: Settings) -> RunSampler:
        """Return a context manager that samples a run and monitors its devices."""
        return RunSampler(
            status_of_this_worker() or RunStatus(),
            folder=data_folder(settings),
            run_id=run_id,
            seconds=settings.sample_seconds,
            watch=device_monitor(settings, run_id=run_id),
        )

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Iterator["GpuResource"]:
        """Provide the resource to a run, and release its engine however the run ends."""
        try:
            yield self
        finally:
            if self._engine is not None:
                self._engine.release()
                self._remember(self._engine)

    def _remember(self, engine: Engine) -> None:
        if self._settings is not None:
            store = open_store(self._settings, deadline_seconds=REMEMBER_SECONDS)
            cache_engine_info(engine, engine_in_force(self._settings), store, at=time.time())

    def _build(self, log_path: Path, settings: Settings) -> Engine:
        most = self._sizing.most_in_flight
        options = ServerOptions(
            timeout_seconds=settings.request_timeout_seconds,
            start_timeout_seconds=settings.engine_start_timeout_seconds,
            connections=most,
            answer_bytes=settings.max_answer_bytes,
            all_answers_bytes=settings.max_answers_in_memory_bytes,
        )
        match settings.engine:
            case EngineKind.VLLM:
                device = str(settings.device)
                args = {**self._sizing.flags, **settings.engine_args}
                top = top_level(settings.model, device=device, args=args, in_flight=most)
                fallback = self._fallback(settings, top)
                return VllmEngine(
                    settings.model,
                    log_path=log_path,
                    served_model_name=settings.served_model_name,
                    device=device,
                    args=args,
                    env=settings.engine_environment(),
                    fallback=fallback,
                    process=hosted_process(settings, fallback, log_path=log_path),
                    before_start=partial(require_healthy_gpu, settings),
                    options=options,
                )
            case EngineKind.REMOTE:
                return OpenAIServerEngine(
                    settings.base_url,
                    api_key=settings.api_key.get_secret_value(),
                    options=options,
                )
            case EngineKind.SIMULATED:
                top = MemoryLevel(max_num_seqs=min(MAX_NUM_SEQS, most))
                fallback = self._fallback(settings, top)
                return SimulatedEngine(
                    log_path=log_path,
                    models=[settings.served_model_name or DEFAULT_MODEL],
                    control_path=data_folder(settings).root / "simulated.json",
                    fallback=fallback,
                    process=hosted_process(settings, fallback, log_path=log_path),
                    options=options,
                )

    def _fallback(self, settings: Settings, top: MemoryLevel) -> MemoryFallback:
        return remembered_fallback(
            top,
            memory=MemoryLevelFile(data_folder(settings).memory_levels),
            model=settings.model or str(settings.engine),
            device=device_of(settings),
            args=settings.engine_args,
            retry_seconds=settings.memory_level_retry_seconds,
            derived=tuple(self._sizing.flags),
        )
