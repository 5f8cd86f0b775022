"""The vLLM engine: vLLM's own OpenAI server as a child process, on a GPU or on a CPU.

vLLM itself is never imported here: its server is spoken to over HTTP.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from batch_orchestration.domain.rungs import Ladder, Rung
from batch_orchestration.engines.own_server import OwnServerEngine
from batch_orchestration.engines.reading import DEFAULT_LIMITS, AnswerLimits
from batch_orchestration.engines.vllm_flags import flag_name, server_command, server_env, top_rung


class VllmEngine(OwnServerEngine):
    """A vLLM server of our own.

    Args:
        model: Folder or hub name.
        served_model_name: Name that it answers to; the last part of `model` if empty.
        device: `cuda` or `cpu`; the latter brings defaults fit for a CPU.
        args: Server flags, `{"max-model-len": 4096, "enforce-eager": True}`; they win over every
            default, and None takes a default away.
        env: Environment variables; they win over every default, and None passes one of ours on.
        make_ladder: Given `top_rung`; the flags of the ladder's rung win over `args`.
        log_path: See `OwnServerEngine`, as for everything below.
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
        make_ladder: Callable[[Rung], Ladder] = Ladder,
        before_start: Callable[[], None] = lambda: None,
        timeout_seconds: float = 1800.0,
        start_timeout_seconds: float = 900.0,
        connections: int = 1024,
        limits: AnswerLimits = DEFAULT_LIMITS,
    ) -> None:
        given = {flag_name(name): value for name, value in (args or {}).items()}
        ladder = make_ladder(top_rung(model, device=device, args=given, in_flight=connections))

        def launch(socket: Path) -> tuple[Sequence[str], Mapping[str, str | None]]:
            command = server_command(
                model,
                socket,
                served_model_name=served_model_name,
                device=device,
                args={**given, **ladder.flags},
            )
            return command, server_env(model, device=device, env=env or {})

        super().__init__(
            kind="vllm",
            launch=launch,
            ladder=ladder,
            log_path=log_path,
            record_path=record_path,
            before_start=before_start,
            timeout_seconds=timeout_seconds,
            start_timeout_seconds=start_timeout_seconds,
            connections=connections,
            limits=limits,
        )
