"""Deployment settings: the only reader of the environment.

Every setting is a `BATCH_*` environment variable or a line of `.env` in the working directory. An
unknown `BATCH_*` variable is an error, so that a misspelt limit is not silently ignored.
"""

import difflib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from dotenv import dotenv_values
from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from batch_orchestration.core.batches import (
    MAX_FILE_BYTES,
    MAX_LINE_BYTES,
    MAX_PRIORITY,
    MAX_REQUESTS_PER_BATCH,
    REJECTED,
    LinePolicy,
    OnOversize,
)
from batch_orchestration.core.requests import Overrides

PREFIX = "BATCH_"
ENV_FILE = ".env"


class EngineKind(StrEnum):
    """The kind of engine that answers requests."""

    VLLM = "vllm"
    REMOTE = "remote"
    SIMULATED = "simulated"


class Device(StrEnum):
    """The device that vLLM runs on. The CPU is used only if chosen, never as a fallback."""

    CUDA = "cuda"
    CPU = "cpu"


class SmtpSecurity(StrEnum):
    """The encryption of the connection to a mail server."""

    STARTTLS = "starttls"
    TLS = "tls"
    NONE = "none"


class Settings(BaseSettings):
    """The settings in force; `python -m batch_orchestration config` prints them with origins."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_file=ENV_FILE, extra="ignore", frozen=True,
        protected_namespaces=(), hide_input_in_errors=True,
    )  # fmt: skip

    data_dir: Path = Field(Path("data"), description="Folder of inbox, outbox, store and journals.")

    # The inbox
    settle_seconds: float = Field(
        5.0, ge=0, description="A dropped file is complete when size and mtime rest this long."
    )
    inbox_priorities: dict[str, int] = Field(
        default_factory=lambda: {"high": 10, "low": -10},
        description="Sub-folders of the inbox whose files have this priority, as JSON.",
    )
    line_policy: LinePolicy = Field(
        LinePolicy.LENIENT, description="lenient: bad lines fail alone; strict: file refused."
    )
    max_line_bytes: int = Field(
        MAX_LINE_BYTES, ge=1, description="A longer line is refused unread."
    )
    max_file_bytes: int = Field(
        MAX_FILE_BYTES, ge=1, description="A larger file, expanded, is rejected."
    )
    max_requests_per_batch: int = Field(
        MAX_REQUESTS_PER_BATCH, ge=1, description="Requests of one batch that are open at a time."
    )
    on_oversize: OnOversize = Field(
        OnOversize.WINDOW,
        description="window: a file with more is answered window by window; reject: it is refused.",
    )
    requests_per_chunk: int | None = Field(
        None,
        ge=1,
        description="Requests per chunk (= partition) at least; default: a minute's, else 1,000.",
    )

    # The queue
    max_unfinished_batches: int = Field(
        5, ge=1, description="With so many unfinished batches, files wait."
    )
    max_queued_requests: int = Field(
        100_000, ge=1, description="Unanswered requests of all unfinished batches together."
    )
    max_queued_tokens: int = Field(
        1_000_000_000, ge=1, description="Tokens expected of them, prompt and answer."
    )
    disk_reserve_bytes: int = Field(
        2 * 2**30, ge=0, description="Free disk space that admission leaves alone."
    )
    output_bytes_ratio: float = Field(
        3.0, ge=0, description="Bytes that journals, store and output take per byte of input."
    )
    source_submissions_per_hour: float = Field(
        60, gt=0, description="Files that one source may submit in the long run."
    )
    source_submissions_burst: float = Field(
        20, ge=1, description="Files that one source may submit at once."
    )
    source_requests_per_hour: float = Field(
        400_000, gt=0, description="Requests that one source may submit in the long run."
    )
    source_requests_burst: float = Field(
        200_000, ge=1, description="Requests that one source may submit at once."
    )

    # Requests
    model_aliases: dict[str, str] = Field(
        default_factory=dict,
        description='Names in `body.model` to names that the engine serves, as JSON; "*" = any.',
    )
    max_tokens_cap: int | None = Field(
        None, ge=1, description="Upper bound put on every request's max_tokens."
    )

    # The engine
    engine: EngineKind = Field(EngineKind.VLLM, description="vllm, remote or simulated.")
    device: Device = Field(Device.CUDA, description="cuda or cpu; never guessed.")
    model: str = Field("", description="Folder or hub name of the model that vLLM serves.")
    served_model_name: str = Field(
        "", description="Name to serve it under; default: its last part."
    )
    engine_args: dict[str, Any] = Field(
        default_factory=dict,
        description='Further flags of the vLLM server as JSON: {"max-model-len": 4096}.',
    )
    engine_env: dict[str, SecretStr | None] = Field(
        default_factory=dict,
        description=(
            'Variables of the vLLM server as JSON; null passes ours on: {"AWS_PROFILE": null}.'
        ),
    )
    base_url: str = Field("", description="Of a running OpenAI-compatible server (engine=remote).")
    api_key: SecretStr = Field(SecretStr(""), description="Key of that server.")
    engine_start_timeout_seconds: float = Field(900, gt=0, description="Until the engine is ready.")
    engine_restarts: int = Field(30, ge=0, description="Restarts of a dead engine in one run.")
    memory_level_retry_seconds: float = Field(
        86_400,
        ge=0,
        description="Seconds on a memory level before the next higher one is tried.",
    )
    breaker_last: int = Field(
        50, ge=1, description="Attempts looked at to tell whether the engine is sick."
    )
    breaker_failure_rate: float = Field(
        0.5, ge=0, le=1, description="Share of them that fails, above which feeding pauses."
    )
    breaker_pause_seconds: float = Field(
        10, gt=0, description="Before the first probe of a sick engine; doubles each time."
    )
    breaker_probes: int = Field(
        5, ge=1, description="Failed probes in a row after which the run fails."
    )
    hang_seconds: float = Field(
        100, gt=0, description="Without outcome or token for so long, the engine counts as stuck."
    )
    heartbeat_seconds: float = Field(5, gt=0, description="Between two heartbeats of a run worker.")
    silent_seconds: float = Field(
        60, gt=0, description="A run worker without a heartbeat for so long is ended."
    )
    gpu_max_temperature: float | None = Field(
        None, gt=0, le=150, description="°C to work at; default: 5 below slowdown, else 85."
    )
    sample_seconds: float = Field(
        5, gt=0, le=10, description="Between two looks of a run at its engine and its GPUs."
    )

    # Feeding the engine
    in_flight: int | None = Field(
        None,
        ge=1,
        description="Requests given to the engine at a time; default: as its metrics ask for.",
    )
    request_timeout_seconds: float = Field(1800, gt=0, description="One attempt of one request.")
    max_answer_bytes: int = Field(
        64 * 2**20, ge=1, description="A longer answer, decompressed, is a failure."
    )
    max_answers_in_memory_bytes: int = Field(
        256 * 2**20, ge=1, description="With more in answers that are being read, reading waits."
    )
    max_attempts: int = Field(5, ge=1, description="Attempts of a request before it is given up.")
    retry_base_delay_seconds: float = Field(0.5, ge=0, description="Back-off before attempt 2.")
    retry_max_delay_seconds: float = Field(30.0, ge=0, description="Back-off grows up to this.")
    max_retry_after_seconds: float = Field(
        600, ge=0, description="Longest wait before the next attempt that an engine may ask for."
    )
    max_failure_rate: float = Field(
        0.5, ge=0, le=1, description="Share of failures at which a batch pauses; 1 never pauses it."
    )
    chunks_per_run: int = Field(50, ge=1, le=500, description="Chunks that one run takes at most.")
    priority_ageing_seconds: float = Field(
        600, gt=0, description="Of waiting, for one more point of priority."
    )

    # Estimates
    price_per_gpu_hour: float | None = Field(
        None, ge=0, description="In any currency; estimates then say what a batch costs."
    )
    strict_windows: bool = Field(
        False, description="Refuse a batch that by the estimate cannot end within its window."
    )

    # Housekeeping: retention times; 0 means no limit
    housekeeping_cron: str = Field(
        "17 3 * * *", description="When Dagster cleans up, as cron; empty: only by command."
    )
    journal_retention_days: float = Field(
        30,
        ge=0,
        description="Journals, for `recover`, after delivery; large answers stay. 0: for ever.",
    )
    sample_retention_days: float = Field(
        30, ge=0, description="Samples of runs and GPUs, which plots are drawn from. 0: for ever."
    )
    partition_retention_days: float = Field(
        90, ge=0, description="Partitions in Dagster, after delivery. 0: for ever."
    )
    max_chunk_partitions: int = Field(
        50_000, ge=0, description="With more, the oldest delivered go earlier. 0: no bound."
    )
    run_retention_days: float = Field(
        90, ge=0, description="Dagster's runs and their events, after delivery. 0: for ever."
    )
    log_retention_days: float = Field(
        30, ge=0, description="Logs of engines, run workers and ticks. 0: for ever."
    )
    input_retention_days: float = Field(
        0, ge=0, description="Kept inputs, after delivery and without journals. 0: for ever."
    )
    rejected_retention_days: float = Field(
        0, ge=0, description="Files in inbox/rejected, with their reasons. 0: for ever."
    )
    stale_file_retention_days: float = Field(
        1, ge=0, description="What crashes left: temporary files, heartbeats. 0: for ever."
    )

    failure_budget: float = Field(
        0.05, ge=0, le=1, description="Share of failed requests above which a check warns."
    )
    owner: str = Field("team:inference", description="Owner shown in Dagster.")

    # Monitoring
    stalled_seconds: float = Field(
        900,
        gt=0,
        description="Something could run and nothing does: for so long it is no accident.",
    )
    alert_engine_restarts: int = Field(
        5, ge=0, description="Engine restarts of one batch in an hour, above which one is told."
    )
    alert_dead_letters: int = Field(
        100, ge=0, description="Unresolved dead letters, above which somebody is told."
    )
    alert_estimate_factor: float = Field(
        2.0, ge=1, description="Times the high end of its estimate, after which a batch is late."
    )
    alert_repeat_seconds: float = Field(
        14_400, ge=0, description="An alert that lasts is told again so often; 0 for never."
    )
    alert_posts_per_hour: float = Field(
        20, gt=0, description="Of one channel; what is beyond goes out later, as one digest."
    )
    alert_webhook_url: SecretStr = Field(
        SecretStr(""), description="Gets alerts as JSON that Slack and Mattermost take."
    )
    alert_email_to: str = Field("", description="Addresses that get alerts, with commas between.")
    smtp_host: str = Field("", description="Mail server for alerts.")
    smtp_port: int = Field(587, ge=1, le=65_535, description="Of the mail server.")
    smtp_security: SmtpSecurity = Field(
        SmtpSecurity.STARTTLS, description="starttls, tls or none (only for a server on this host)."
    )
    smtp_user: str = Field("", description="To log in to the mail server with.")
    smtp_password: SecretStr = Field(SecretStr(""), description="Of that user.")
    smtp_from: str = Field("", description="Sender of alerts; default: batch@ and this host.")
    alert_command: list[str] = Field(
        default_factory=list,
        description='Program that gets alerts as JSON on stdin: ["notify", "--stdin"].',
    )
    dagster_url: str = Field(
        "http://localhost:3000", description="Of Dagster's web server, for links to it."
    )

    @field_validator("base_url", "dagster_url")
    @classmethod
    def _shown_without_credentials(cls, url: str) -> str:
        if "@" in url.split("://", 1)[-1].partition("/")[0]:
            raise ValueError("holds a user, which would be shown; a key is for BATCH_API_KEY")
        return url

    @field_validator("engine_env")
    @classmethod
    def _none_of_ours(cls, env: dict[str, SecretStr | None]) -> dict[str, SecretStr | None]:
        if ours := sorted(name for name in env if name.upper().startswith(PREFIX)):
            raise ValueError(f"{', '.join(ours)}: settings are not for the engine")
        return env

    @model_validator(mode="after")
    def _what_needs_another_has_it(self) -> "Settings":
        if self.engine is EngineKind.REMOTE and not self.base_url:
            raise ValueError("BATCH_ENGINE=remote needs BATCH_BASE_URL")
        if self.alert_email_to and not self.smtp_host:
            raise ValueError("BATCH_ALERT_EMAIL_TO needs BATCH_SMTP_HOST")
        return self

    @model_validator(mode="after")
    def _silence_is_several_heartbeats(self) -> "Settings":
        if self.silent_seconds < 3 * self.heartbeat_seconds:
            raise ValueError(
                f"BATCH_SILENT_SECONDS={self.silent_seconds:g} is less than three times"
                f" BATCH_HEARTBEAT_SECONDS={self.heartbeat_seconds:g}"
            )
        return self

    @field_validator("inbox_priorities")
    @classmethod
    def _names_of_folders(cls, priorities: dict[str, int]) -> dict[str, int]:
        for name, priority in priorities.items():
            if not name or name[0] in ".~" or "/" in name or name.casefold() == REJECTED:
                raise ValueError(f"{name!r} cannot be a priority folder")
            if abs(priority) > MAX_PRIORITY:
                raise ValueError(f"priority {priority} is not within {MAX_PRIORITY} of 0")
        return priorities

    @model_validator(mode="after")
    def _a_batch_finds_room(self) -> "Settings":
        if self.max_requests_per_batch > self.max_queued_requests:
            raise ValueError(
                f"BATCH_MAX_REQUESTS_PER_BATCH={self.max_requests_per_batch} is more than"
                f" BATCH_MAX_QUEUED_REQUESTS={self.max_queued_requests}: such a batch would wait"
                " for ever"
            )
        return self

    def engine_environment(self) -> dict[str, str | None]:
        """Return the vLLM server's extra environment; None passes a variable on unchanged."""
        return {
            name: None if value is None else value.get_secret_value()
            for name, value in self.engine_env.items()
        }

    def overrides(self, model: str | None) -> Overrides:
        """Return the changes to request bodies; a given `model` answers every request."""
        return Overrides(
            model=model, aliases=self.model_aliases, max_tokens_cap=self.max_tokens_cap
        )

    def answer_settings(self) -> dict[str, Any]:
        """Return the settings that answers depend on, by name; a plan records them."""
        return {
            "engine": str(self.engine),
            "model": self.model if self.engine is EngineKind.VLLM else self.base_url,
            "engine_args": self.engine_args,
            "model_aliases": self.model_aliases,
            "max_tokens_cap": self.max_tokens_cap,
        }


@dataclass(frozen=True, kw_only=True)
class SettingInForce:
    """One setting in force, as shown to people.

    Attributes:
        value: The value as text, with secrets masked; empty if there is none.
        origin: `environment`, `.env` or `default`.
    """

    variable: str
    value: str
    origin: str
    description: str


def load_settings() -> Settings:
    """Read the settings from environment and `.env`.

    Raises:
        pydantic.ValidationError: A value is out of range or of the wrong type.
        ValueError: A `BATCH_*` variable is not a setting.
    """
    known = {_variable(name) for name in Settings.model_fields}
    given = _given(os.environ) | _given(dotenv_values(ENV_FILE))
    if unknown := sorted(given - known):
        raise ValueError("\n".join(_unknown(variable, known) for variable in unknown))
    return Settings()


def settings_in_force(settings: Settings) -> list[SettingInForce]:
    """Return every setting with its value and the value's origin, in order of definition."""
    by_environment, by_file = _given(os.environ), _given(dotenv_values(ENV_FILE))

    def origin(variable: str) -> str:
        if variable in by_environment:
            return "environment"
        return ENV_FILE if variable in by_file else "default"

    return [
        SettingInForce(
            variable=_variable(name),
            value=_as_text(getattr(settings, name)),
            origin=origin(_variable(name)),
            description=field.description or "",
        )
        for name, field in Settings.model_fields.items()
    ]


def _unknown(variable: str, known: Iterable[str]) -> str:
    alike = difflib.get_close_matches(variable, known, n=1)
    return f"{variable} is not a setting" + (f"; did you mean {alike[0]}?" if alike else "")


def _variable(field_name: str) -> str:
    return f"{PREFIX}{field_name}".upper()


def _given(variables: Mapping[str, str | None]) -> set[str]:
    return {name.upper() for name in variables if name.upper().startswith(PREFIX)}


def _as_text(value: object) -> str:
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return "" if value is None else str(value)
