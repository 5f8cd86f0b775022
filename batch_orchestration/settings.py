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
        protected_namespaces=(), hide_input_in_errors=True, use_attribute_docstrings=True,
    )  # fmt: skip

    data_dir: Path = Path("data")
    """Folder of inbox, outbox, store and journals."""

    # The inbox
    settle_seconds: float = Field(5.0, ge=0)
    """A dropped file is complete once its size and mtime are unchanged for this long."""
    inbox_priorities: dict[str, int] = Field(default_factory=lambda: {"high": 10, "low": -10})
    """Sub-folders of the inbox, each with the priority of its files, as JSON."""
    line_policy: LinePolicy = LinePolicy.LENIENT
    """lenient: a faulty line fails alone; strict: it rejects the file."""
    max_line_bytes: int = Field(MAX_LINE_BYTES, ge=1)
    """A longer line is refused unread."""
    max_file_bytes: int = Field(MAX_FILE_BYTES, ge=1)
    """A larger file, expanded, is rejected."""
    max_requests_per_batch: int = Field(MAX_REQUESTS_PER_BATCH, ge=1)
    """Requests of one batch that are open at a time."""
    on_oversize: OnOversize = OnOversize.WINDOW
    """window: a file with more requests is answered window by window; reject: it is rejected."""
    requests_per_chunk: int | None = Field(None, ge=1)
    """Minimum of requests per chunk (= partition); default: a minute's work, else 1,000."""

    # The queue
    max_unfinished_batches: int = Field(5, ge=1)
    """While this many batches are unfinished, files wait."""
    max_queued_requests: int = Field(100_000, ge=1)
    """Limit of the unanswered requests of all unfinished batches together."""
    max_queued_tokens: int = Field(1_000_000_000, ge=1)
    """Limit of their expected tokens, prompt and answer."""
    disk_reserve_bytes: int = Field(2 * 2**30, ge=0)
    """Free disk space that admission leaves unused."""
    output_bytes_ratio: float = Field(3.0, ge=0)
    """Bytes of journals, store and output per byte of input."""
    source_submissions_per_hour: float = Field(60, gt=0)
    """Files that one source may submit in the long run."""
    source_submissions_burst: float = Field(20, ge=1)
    """Files that one source may submit at once."""
    source_requests_per_hour: float = Field(400_000, gt=0)
    """Requests that one source may submit in the long run."""
    source_requests_burst: float = Field(200_000, ge=1)
    """Requests that one source may submit at once."""

    # Requests
    model_aliases: dict[str, str] = Field(default_factory=dict)
    """Names in `body.model` and the engine's names for them, as JSON; "*" = any name."""
    max_tokens_cap: int | None = Field(None, ge=1)
    """Upper limit of every request's max_tokens."""

    # The engine
    engine: EngineKind = EngineKind.VLLM
    """vllm, remote or simulated."""
    device: Device = Device.CUDA
    """cuda or cpu; never guessed."""
    model: str = ""
    """Folder or hub name of the model that vLLM serves."""
    served_model_name: str = ""
    """Name under which it is served; default: the last part of `BATCH_MODEL`."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Further flags of the vLLM server as JSON: {"max-model-len": 4096}."""
    engine_env: dict[str, SecretStr | None] = Field(default_factory=dict)
    """Variables of the vLLM server as JSON; null passes ours on: {"AWS_PROFILE": null}."""
    base_url: str = ""
    """Address of a running OpenAI-compatible server (engine=remote)."""
    api_key: SecretStr = SecretStr("")
    """Key of that server."""
    engine_start_timeout_seconds: float = Field(900, gt=0)
    """Time limit until the engine is ready."""
    engine_restarts: int = Field(30, ge=0)
    """Restarts of a dead engine in one run."""
    engine_keep_alive: float = Field(600, ge=0)
    """Seconds for which an engine stays warm after the last run; 0 ends it with its run."""
    memory_level_retry_seconds: float = Field(86_400, ge=0)
    """Time on a memory level before the next higher one is tried."""
    breaker_last: int = Field(50, ge=1)
    """Latest attempts by which the breaker judges the engine."""
    breaker_failure_rate: float = Field(0.5, ge=0, le=1)
    """Share of failures among them above which feeding pauses."""
    breaker_pause_seconds: float = Field(10, gt=0)
    """Pause before the first probe of a failing engine; doubles each time."""
    breaker_probes: int = Field(5, ge=1)
    """Failed probes in a row after which the run fails."""
    hang_seconds: float = Field(100, gt=0)
    """Time without an outcome or token after which the engine counts as hung."""
    heartbeat_seconds: float = Field(5, gt=0)
    """Interval between two heartbeats of a run worker."""
    silent_seconds: float = Field(60, gt=0)
    """A run worker without a heartbeat for this long is ended."""
    gpu_max_temperature: float | None = Field(None, gt=0, le=150)
    """Working temperature in °C; default: 5 below the slowdown temperature, else 85."""
    sample_seconds: float = Field(5, gt=0, le=10)
    """Interval between two samples of a run's engine and GPUs."""

    # Feeding the engine
    in_flight: int | None = Field(None, ge=1)
    """Requests at the engine at a time; default: follows the engine's metrics."""
    request_timeout_seconds: float = Field(1800, gt=0)
    """Time limit of one attempt of one request."""
    max_answer_bytes: int = Field(64 * 2**20, ge=1)
    """A longer answer, decompressed, is a failure."""
    max_answers_in_memory_bytes: int = Field(256 * 2**20, ge=1)
    """With more bytes in answers that are being read, reading waits."""
    max_attempts: int = Field(5, ge=1)
    """Attempts of a request before it fails for good."""
    retry_base_delay_seconds: float = Field(0.5, ge=0)
    """Back-off before attempt 2."""
    retry_max_delay_seconds: float = Field(30.0, ge=0)
    """Limit of the growing back-off."""
    max_retry_after_seconds: float = Field(600, ge=0)
    """Longest wait before the next attempt that an engine may ask for."""
    max_failure_rate: float = Field(0.5, ge=0, le=1)
    """Share of failures above which a batch pauses; 1 never pauses it."""
    chunks_per_run: int = Field(50, ge=1, le=500)
    """Maximum of chunks in one run."""
    priority_ageing_seconds: float = Field(600, gt=0)
    """Waiting time that raises the priority by one point."""

    # Estimates
    price_per_gpu_hour: float | None = Field(None, ge=0)
    """In any currency; estimates then include the price of a batch."""
    strict_windows: bool = False
    """Refuse a batch that, by its estimate, cannot end within its completion window."""

    # Housekeeping: retention times; 0 means no limit
    housekeeping_cron: str = "17 3 * * *"
    """Time at which Dagster cleans up, as cron; empty: only by command."""
    journal_retention_days: float = Field(30, ge=0)
    """Journals, for `recover`, after delivery; large answers stay. 0: no limit."""
    sample_retention_days: float = Field(30, ge=0)
    """Samples of runs and GPUs, the data of plots. 0: no limit."""
    partition_retention_days: float = Field(90, ge=0)
    """Partitions in Dagster, after delivery. 0: no limit."""
    max_chunk_partitions: int = Field(50_000, ge=0)
    """With more, the partitions that were delivered first go earlier. 0: no limit."""
    run_retention_days: float = Field(90, ge=0)
    """Dagster's runs and their events, after delivery. 0: no limit."""
    log_retention_days: float = Field(30, ge=0)
    """Logs of engines, run workers and ticks. 0: no limit."""
    input_retention_days: float = Field(0, ge=0)
    """Kept inputs, after delivery and without journals. 0: no limit."""
    rejected_retention_days: float = Field(0, ge=0)
    """Files in inbox/rejected, with their reasons. 0: no limit."""
    stale_file_retention_days: float = Field(1, ge=0)
    """Files left by crashes: temporary files, heartbeats. 0: no limit."""

    failure_budget: float = Field(0.05, ge=0, le=1)
    """Share of failed requests above which a check warns."""
    owner: str = "team:inference"
    """Owner of the assets in Dagster."""

    # Monitoring
    stalled_seconds: float = Field(900, gt=0)
    """The queue counts as stalled if work could run and none has run for this long."""
    alert_engine_restarts: int = Field(5, ge=0)
    """Engine restarts of one batch in an hour above which there is an alert."""
    alert_dead_letters: int = Field(100, ge=0)
    """Unresolved dead letters above which there is an alert."""
    alert_estimate_factor: float = Field(2.0, ge=1)
    """A batch is late after this many times the high end of its estimate."""
    alert_repeat_seconds: float = Field(14_400, ge=0)
    """Interval at which an alert that lasts is repeated; 0 for never."""
    alert_posts_per_hour: float = Field(20, gt=0)
    """Limit of one channel; alerts beyond it are sent later, as one digest."""
    alert_webhook_url: SecretStr = SecretStr("")
    """Receives alerts as JSON that Slack and Mattermost accept."""
    alert_email_to: str = ""
    """Addresses that receive alerts, separated by commas."""
    smtp_host: str = ""
    """Mail server for alerts."""
    smtp_port: int = Field(587, ge=1, le=65_535)
    """Port of the mail server."""
    smtp_security: SmtpSecurity = SmtpSecurity.STARTTLS
    """starttls, tls or none (only for a server on this host)."""
    smtp_user: str = ""
    """User at the mail server."""
    smtp_password: SecretStr = SecretStr("")
    """Password of that user."""
    smtp_from: str = ""
    """Sender of alerts; default: batch@ and this host."""
    alert_command: list[str] = Field(default_factory=list)
    """Program that receives alerts as JSON on stdin: ["notify", "--stdin"]."""
    dagster_url: str = "http://localhost:3000"
    """Address of Dagster's web server, for links."""

    @field_validator("base_url", "dagster_url")
    @classmethod
    def _without_credentials(cls, url: str) -> str:
        if "@" in url.split("://", 1)[-1].partition("/")[0]:
            raise ValueError("contains a user, which would be shown; a key is for BATCH_API_KEY")
        return url

    @field_validator("engine_env")
    @classmethod
    def _without_settings(cls, env: dict[str, SecretStr | None]) -> dict[str, SecretStr | None]:
        if ours := sorted(name for name in env if name.upper().startswith(PREFIX)):
            raise ValueError(f"{', '.join(ours)}: settings are not for the engine")
        return env

    @field_validator("inbox_priorities")
    @classmethod
    def _valid_folders(cls, priorities: dict[str, int]) -> dict[str, int]:
        for name, priority in priorities.items():
            if not name or name[0] in ".~" or "/" in name or name.casefold() == REJECTED:
                raise ValueError(f"{name!r} cannot be a priority folder")
            if abs(priority) > MAX_PRIORITY:
                raise ValueError(f"priority {priority} is not within {MAX_PRIORITY} of 0")
        return priorities

    @model_validator(mode="after")
    def _consistent(self) -> "Settings":
        if self.engine is EngineKind.REMOTE and not self.base_url:
            raise ValueError("BATCH_ENGINE=remote needs BATCH_BASE_URL")
        if self.alert_email_to and not self.smtp_host:
            raise ValueError("BATCH_ALERT_EMAIL_TO needs BATCH_SMTP_HOST")
        if self.silent_seconds < 3 * self.heartbeat_seconds:
            raise ValueError(
                f"BATCH_SILENT_SECONDS={self.silent_seconds:g} is less than three times"
                f" BATCH_HEARTBEAT_SECONDS={self.heartbeat_seconds:g}"
            )
        if self.max_requests_per_batch > self.max_queued_requests:
            raise ValueError(
                f"BATCH_MAX_REQUESTS_PER_BATCH={self.max_requests_per_batch} is more than"
                f" BATCH_MAX_QUEUED_REQUESTS={self.max_queued_requests}: such a batch would never"
                " be admitted"
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
