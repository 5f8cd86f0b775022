"""The settings of admission in this deployment."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from batch_orchestration.admission.inbox import Inbox
from batch_orchestration.admission.reading.lines import (
    BatchFileReading,
    ReadingRules,
    choose_chunk_size,
)
from batch_orchestration.admission.reading.screening import Screening
from batch_orchestration.admission.rejection import refusal
from batch_orchestration.core.batches import (
    MAX_FILE_BYTES,
    MAX_REQUESTS_PER_BATCH,
    BatchOptions,
    LinePolicy,
    OnOversize,
)
from batch_orchestration.core.requests import ANY_MODEL
from batch_orchestration.estimates.derivation import DEFAULT_CHUNK
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.queue.load import QueueRules, queue_rules
from batch_orchestration.settings import Settings


@dataclass(frozen=True, kw_only=True)
class AdmissionSettings:
    """The settings that admission depends on.

    Attributes:
        requests_per_chunk: Minimum; None to derive it for each file (`admission.reading.lines`).
        max_file_bytes: Limit of the expanded content; no byte beyond it is written anywhere.
        max_requests_per_batch: Open at once; `on_oversize` applies to larger files.
        model_required: False if an alias `*` supplies a missing `model`.
        answer_settings: Settings that answers depend on, by name; fixed in the plan.
        queue: None if files never wait.
    """

    requests_per_chunk: int | None
    max_line_bytes: int
    max_file_bytes: int = MAX_FILE_BYTES
    max_requests_per_batch: int = MAX_REQUESTS_PER_BATCH
    on_oversize: OnOversize = OnOversize.WINDOW
    line_policy: LinePolicy = LinePolicy.LENIENT
    model_required: bool = True
    answer_settings: Mapping[str, Any]
    deployment: Settings = field(default_factory=Settings)
    queue: QueueRules | None = None

    def rules(self, options: BatchOptions) -> ReadingRules:
        """Return the rules for the lines of a file with these options."""
        return ReadingRules(
            requests_per_chunk=self.requests_per_chunk or DEFAULT_CHUNK,
            max_line_bytes=self.max_line_bytes,
            model_required=self.model_required and options.model is None,
            max_tokens_cap=self.answer_settings.get("max_tokens_cap"),
        )

    def reading(self, options: BatchOptions, screening: Screening) -> BatchFileReading:
        """Return the reading of a file with these options, which screens its requests."""
        rules = self.rules(options)
        choose = partial(
            choose_chunk_size,
            configured=self.requests_per_chunk,
            most_requests=self.max_requests_per_batch,
            rules=rules,
            screening=screening,
        )
        return BatchFileReading(rules, examine=screening.examine, choose_chunk_size=choose)

    def refusal(self, reading: BatchFileReading) -> str | None:
        """Return why a file that has been read cannot become a batch; None if it can."""
        return refusal(
            reading,
            line_policy=self.line_policy,
            max_requests_per_batch=self.max_requests_per_batch,
            on_oversize=self.on_oversize,
        )


def open_inbox(settings: Settings, folder: DataFolder) -> Inbox:
    """Return the inbox of a data folder."""
    return Inbox(
        folder, settle_seconds=settings.settle_seconds, priorities=settings.inbox_priorities
    )


def admission_settings(settings: Settings) -> AdmissionSettings:
    """Return the settings of admission."""
    return AdmissionSettings(
        requests_per_chunk=settings.requests_per_chunk,
        max_line_bytes=settings.max_line_bytes,
        max_file_bytes=settings.max_file_bytes,
        max_requests_per_batch=settings.max_requests_per_batch,
        on_oversize=settings.on_oversize,
        line_policy=settings.line_policy,
        model_required=ANY_MODEL not in settings.model_aliases,
        answer_settings=settings.answer_settings(),
        deployment=settings,
        queue=queue_rules(settings),
    )
