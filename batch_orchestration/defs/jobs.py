"""Jobs: admit a claimed file, submit a file by hand, and the two that dispatch launches."""

from pathlib import Path

import dagster as dg
import msgspec
from pydantic import Field

from batch_orchestration.admission.admission import admit
from batch_orchestration.admission.inbox import Inbox
from batch_orchestration.admission.results import Admitted, AlreadyAdmitted
from batch_orchestration.admission.submit import submit
from batch_orchestration.core.batches import BatchOptions
from batch_orchestration.core.errors import BatchOrchestrationError, FileStillChanging
from batch_orchestration.defs.assets import batch_output, chunk_results
from batch_orchestration.defs.events import manifest_materialization
from batch_orchestration.defs.job_factory import one_op_job
from batch_orchestration.defs.partitions import add_partitions, name_tags
from batch_orchestration.defs.resources import SettingsResource, data_folder, open_store
from batch_orchestration.estimates.batch_estimates import read_estimate
from batch_orchestration.workers.reporter import report_phase


class AdmitConfig(dg.Config):
    """The claimed file to admit."""

    claim_id: str = Field(description="Name of a folder in `claims` of the data folder.")


class SubmitConfig(dg.Config):
    """A batch file and its author's options."""

    path: str = Field(description="File on this machine, .jsonl or .jsonl.gz; it is copied.")
    model: str | None = Field(
        None, description="Served model that answers every request, whatever the bodies say."
    )
    priority: int = Field(0, description="-1000 to 1000; higher runs earlier.")
    metadata: dict[str, str] = Field({}, description="Up to 16 pairs, echoed in the report.")
    completion_window: str = Field("24h", description="For example 24h or 1h30m.")
    user: str | None = Field(None, description="Who submits it; sources share the engine fairly.")
    max_failure_rate: float | None = Field(
        None,
        description=(
            "Share of its latest requests, 0 to 1, that may fail before the batch pauses and waits "
            "for you; 1 never pauses it. Default: BATCH_MAX_FAILURE_RATE."
        ),
    )


@one_op_job("admit_claim")
def admit_batch(
    context: dg.OpExecutionContext, config: AdmitConfig, settings: SettingsResource
) -> None:
    """Read a claimed file: it becomes a batch, or goes to `inbox/rejected` with its faults.

    `inbox_sensor` launches it; you need not.
    """
    report_phase("admitting")
    folder, store = data_folder(settings), open_store(settings)
    claim = Inbox(folder, settings).claim(config.claim_id)
    try:
        result = admit(claim, folder=folder, store=store, settings=settings)
    except FileStillChanging as still_changing:
        context.log.warning(str(still_changing))
        return
    context.log.info(str(result))
    if isinstance(result, Admitted | AlreadyAdmitted):
        plan = folder.read_plan(result.batch_id)
        context.instance.add_run_tags(context.run.run_id, name_tags(plan))
        # The partitions come last, because their keys mark all of this as done.
        context.log_event(
            manifest_materialization(
                plan, folder.input_path(plan.batch_id), read_estimate(folder, plan.batch_id)
            )
        )
        add_partitions(context.instance, plan)


@one_op_job("submit_file")
def submit_batch(
    context: dg.OpExecutionContext, config: SubmitConfig, settings: SettingsResource
) -> None:
    """Submit a file by hand: give its path, and optionally model, priority, metadata and window.

    A copy of the file and of its side-car goes into the inbox; `inbox_sensor` admits it from there.
    """
    given = config.model_dump(exclude={"path"})
    try:
        options = msgspec.convert(given, BatchOptions)
        dropped = submit(Path(config.path), options, data_folder(settings))
    except (msgspec.ValidationError, BatchOrchestrationError, OSError) as error:
        raise dg.Failure(description=f"{config.path}: {error}", allow_retries=False) from error
    context.log.info(f"{config.path} is in the inbox as {dropped}")
    context.add_output_metadata({"inbox_file": dg.MetadataValue.path(dropped)})


answer_chunks = dg.define_asset_job(
    "answer_chunks",
    selection=[chunk_results],
    description="Answer consecutive chunks with one engine. `dispatch_sensor` launches it.",
)
deliver_batch = dg.define_asset_job(
    "deliver_batch",
    selection=[batch_output],
    description="Write a batch's output files and check them. `dispatch_sensor` launches it.",
)
