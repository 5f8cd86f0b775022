"""Replays of dead letters: the job that runs them, and the sensor that launches it."""

import time
from typing import Any

import dagster as dg
from pydantic import Field

from batch_orchestration.core.dead_letters import Selection
from batch_orchestration.core.errors import DeadLetterError
from batch_orchestration.core.fault_isolation import Faults
from batch_orchestration.core.outcomes import FailureCode
from batch_orchestration.core.requests import ANY_MODEL
from batch_orchestration.dead_letters.actions import request_replay
from batch_orchestration.dead_letters.replaying import ReplayReport, run_replay
from batch_orchestration.defs.assets import batch_output
from batch_orchestration.defs.checks import check_again
from batch_orchestration.defs.events import output_metadata
from batch_orchestration.defs.job_factory import config_of, one_op_job
from batch_orchestration.defs.metadata import metadata_of
from batch_orchestration.defs.partitions import PRIORITY_TAG
from batch_orchestration.defs.resources import (
    GpuResource,
    SettingsResource,
    data_folder,
    open_store,
)
from batch_orchestration.defs.runs import engine_errors, free_run_key, run_state, tags_about
from batch_orchestration.dispatch.run_planning import MAX_FAILURES, RunState, backoff_left
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.queue.load import closed_gate
from batch_orchestration.queue.pause import read_pause
from batch_orchestration.settings import Settings
from batch_orchestration.store.operations import open_replays

REPLAY_TAG = "replay"
#: Ahead of every batch, however long that has waited: a person waits for the replay.
REPLAY_PRIORITY = 1_000_000
INTERVAL_SECONDS = 5


class ReplayConfig(dg.Config):
    """The failed requests to send again, and the changes to their bodies."""

    batch: str = Field(description="Id of the batch.")
    codes: list[str] = Field([], description="Only failures with these codes; empty: any code.")
    custom_ids: list[str] = Field([], description="Only these requests; empty: any.")
    limit: int | None = Field(
        None, ge=1, description="Maximum number of requests; the first in input order."
    )
    max_tokens: int | None = Field(None, ge=1, description="New token limit of each request.")
    overrides: dict[str, Any] = Field(
        {}, description="Fields of the body and their new values; null removes a field."
    )
    force: bool = Field(False, description="Run even if settings differ from the batch's.")
    replay: int | None = Field(
        None, description="Number of a replay to continue, for which other fields do not count."
    )

    def changes(self) -> dict[str, Any]:
        """Return all replaced fields of the body."""
        return self.overrides | ({"max_tokens": self.max_tokens} if self.max_tokens else {})

    def selection(self) -> Selection:
        """Return the selection of dead letters.

        Raises:
            DeadLetterError: A code is unknown.
        """
        try:
            codes = tuple(map(FailureCode, self.codes))
        except ValueError as error:
            known = ", ".join(FailureCode)
            raise DeadLetterError(f"{error}; codes are {known}") from error
        return Selection(codes=codes, custom_ids=tuple(self.custom_ids), limit=self.limit)


@one_op_job("replay_dead_letters", pool="gpu", tags={PRIORITY_TAG: str(REPLAY_PRIORITY)})
def replay_failed_requests(
    context: dg.OpExecutionContext,
    config: ReplayConfig,
    gpu: GpuResource,
    settings: SettingsResource,
) -> None:
    """Replay failed requests of a batch: all, or those with certain codes or custom_ids.

    Answers move from `errors.jsonl` to `output.jsonl`; requests that fail again stay, with their
    history. Each answer is durable as soon as it arrives; a restarted run continues where it
    stopped.
    """
    present, batch_id = gpu.in_force(settings), config.batch
    with (
        engine_errors(context, present),
        gpu.sampling(context.run.run_id, present) as sampler,
    ):
        for number in _numbers(context, config, present):
            tags = tags_about(batch_id, data_folder(present))
            tags |= {REPLAY_TAG: _tag(batch_id, number)}
            context.instance.add_run_tags(context.run.run_id, tags)
            run = gpu.run_context(context.run.run_id, present, sampler, batch_ids=[batch_id])
            _report(context, run_replay(batch_id, number, run), present)


def _numbers(context: dg.OpExecutionContext, config: ReplayConfig, settings: Settings) -> list[int]:
    """Return the numbers of the replays to run; request them first if the config names none."""
    if config.replay is not None:
        return [config.replay]
    # The same for each retry of the step and of the run.
    request_key = context.run.root_run_id or context.run.run_id
    requested = request_replay(
        config.batch,
        config.selection(),
        folder=data_folder(settings),
        store=open_store(settings),
        actor=request_key,
        at=time.time(),
        overrides=config.changes(),
        model_required=ANY_MODEL not in settings.model_aliases,
        force=config.force,
        request_key=request_key,
    )
    for left_out in requested.left_out:
        context.log.warning(f"cannot be replayed: {left_out}")
    return [replay.number for replay in requested.replays]


def _report(context: dg.OpExecutionContext, report: ReplayReport, settings: Settings) -> None:
    replay = report.replay
    context.log.info(
        f"replay {replay.number} of {replay.batch_id}: {report.answered} answered, "
        f"{report.failed} failed again"
    )
    if report.assembly is None:
        return
    metadata = output_metadata(report.assembly) | metadata_of(
        replay=replay.number, replay_answered=report.answered, replay_failed=report.failed
    )
    context.log_event(
        dg.AssetMaterialization(batch_output.key, partition=replay.batch_id, metadata=metadata)
    )
    for evaluation in check_again(replay.batch_id, settings):
        # Dagster accepts it; only its annotation is too narrow.
        context.log_event(evaluation)  # type: ignore[arg-type]


@dg.sensor(
    job=replay_failed_requests,
    minimum_interval_seconds=INTERVAL_SECONDS,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description=(
        "Launches a run for each replay that has not ended: one requested on the command line, or "
        "one whose run was lost. **A skipped tick says which replays wait, and why.**"
    ),
)
def replay_sensor(
    context: dg.SensorEvaluationContext, settings: SettingsResource
) -> dg.SensorResult | dg.SkipReason:
    """Decide from the replays on disk and Dagster's runs, so that no crash matters."""
    now = time.time()
    requests: list[dg.RunRequest] = []
    reasons: list[str] = []
    folder = data_folder(settings)
    replays = open_replays(folder)
    gate = closed_gate(read_pause(folder), settings)
    if replays and gate:
        return dg.SkipReason(str(gate))
    faults = Faults()
    for batch_id, number in replays:
        with faults.of(f"replay {number} of {batch_id}"):
            request = _request(context.instance, batch_id, number, folder, now=now)
            if isinstance(request, str):
                reasons.append(f"replay {number} of {batch_id}: {request}")
            else:
                requests.append(request)
    faults.log()
    reasons += map(str, faults)
    if not requests:
        return dg.SkipReason("; ".join(reasons) or "no replay is open")
    return dg.SensorResult(run_requests=requests)


def _request(
    instance: dg.DagsterInstance, batch_id: str, number: int, folder: DataFolder, *, now: float
) -> dg.RunRequest | str:
    """Return the run that a replay needs, or the reason why it waits."""
    tag = _tag(batch_id, number)
    records = instance.get_run_records(dg.RunsFilter(tags={REPLAY_TAG: tag}))
    states = [(state, record) for record in records if (state := run_state(record, now=now))]
    ended = [record.end_time or 0.0 for state, record in states if state is not RunState.LIVE]
    if len(ended) < len(states):
        return "is running, or waits for the engine"
    stopped = any(state is RunState.STOPPED for state, _ in states)
    # An unfit device, or an engine that refuses every request, is no failure of the replay.
    no_failure = {RunState.UNFIT, RunState.REFUSED}
    failures = sum(state not in no_failure for state, _ in states)
    if stopped or failures >= MAX_FAILURES:
        return (
            "waits for a person: its last run failed or was terminated. Re-execute that run, or"
            " take the requests back: `discard --state replaying`"
        )
    if ended and (wait := backoff_left(len(ended), max(ended), now=now)) > 0:
        return f"failed; next attempt in {wait:.0f} s"
    return dg.RunRequest(
        run_key=free_run_key(instance, f"{tag}#{len(ended)}"),
        job_name=replay_failed_requests.name,
        run_config=config_of(replay_failed_requests, batch=batch_id, replay=number),
        tags={REPLAY_TAG: tag, **tags_about(batch_id, folder)},
    )


def _tag(batch_id: str, number: int) -> str:
    return f"{batch_id}/{number}"
