"""The vLLM engine: vLLM's own OpenAI server as a child process, on a GPU or on a CPU.

vLLM itself is never imported here; its server is used over HTTP.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from batch_orchestration.engines.child_server import ChildServerEngine
from batch_orchestration.engines.memory_fallback import MemoryFallback
from batch_orchestration.engines.openai_server import DEFAULT_OPTIONS, ServerOptions
from batch_orchestration.engines.processes.process import ServerProcess
from batch_orchestration.engines.vllm.flags import flags_of, server_command, server_env, top_level


class VllmEngine(ChildServerEngine):
    """A vLLM server as a child process.

    Args:
        model: Folder or hub name.
        served_model_name: Name of the served model; the last part of `model` if empty.
        device: `cuda` or `cpu`; the latter adds defaults suited to a CPU.
        args: Server flags, `{"max-model-len": 4096, "enforce-eager": True}`. They override every
            default; None removes a default.
        env: Environment variables. They override every default; None passes on our own value.
        fallback: Begins at `top_level`; the current level's flags override `args`.
        log_path: See `ChildServerEngine`, as for the arguments after it.
    """

    def __init__(
        self,
        model: str,
        *,
        log_path: Path,
        record_path: Path | None = None,
        process: ServerProcess | None = None,
        served_model_name: str = "",
        device: str = "cuda",
        args: Mapping[str, Any] | None = None,
        env: Mapping[str, str | None] | None = None,
        fallback: MemoryFallback | None = None,
        before_start: Callable[[], None] = lambda: None,
        options: ServerOptions = DEFAULT_OPTIONS,
    ) -> None:
        given = flags_of(args or {})
        top = top_level(model, device=device, args=given, in_flight=options.connections)
        memory = fallback or MemoryFallback(top)

        def launch(socket: Path) -> tuple[Sequence[str], Mapping[str, str | None]]:
            command = server_command(
                model,
                socket,
                served_model_name=served_model_name,
                device=device,
                args={**given, **memory.flags},
            )
            return command, server_env(model, device=device, env=env or {})

        super().__init__(
            kind="vllm",
            launch=launch,
            fallback=memory,
            log_path=log_path,
            record_path=record_path,
            process=process,
            before_start=before_start,
            options=options,
        )
