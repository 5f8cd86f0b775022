"""The simulated engine: an OpenAI-compatible server that computes nothing and fails on request.

`python -m batch_orchestration.engines.simulated --port 8000` serves it on its own.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from batch_orchestration.engines.child_server import ChildServerEngine
from batch_orchestration.engines.memory_fallback import MemoryFallback, MemoryLevel
from batch_orchestration.engines.openai_server import DEFAULT_OPTIONS, ServerOptions
from batch_orchestration.engines.processes.process import ServerProcess
from batch_orchestration.engines.processes.sockets import BACKLOG
from batch_orchestration.engines.simulated.answers import CONTEXT_TOKENS, DEFAULT_MODEL

API_KEY_VARIABLE = "SIMULATED_ENGINE_API_KEY"
MAX_NUM_SEQS = 256


class SimulatedEngine(ChildServerEngine):
    """A child process that answers like vLLM, immediately and always the same.

    The object `simulate` of a request's body (`Faults`) and the control file (`Conditions`)
    determine its faults.

    Args:
        log_path: See `ChildServerEngine`, as for the arguments not listed here.
        models: Names of the served models.
        context_tokens: Longer requests are refused.
        max_num_seqs: Maximum number of running requests; the others wait.
        control_path: See `Conditions`; the file need not exist.
        startup_seconds: Delay before the server is ready.
        startup_error: If given, exit with this message instead of becoming ready.
        fallback: Lower memory levels reduce `max_num_seqs`.
    """

    def __init__(
        self,
        *,
        log_path: Path,
        record_path: Path | None = None,
        process: ServerProcess | None = None,
        models: Sequence[str] = (DEFAULT_MODEL,),
        context_tokens: int = CONTEXT_TOKENS,
        max_num_seqs: int = MAX_NUM_SEQS,
        control_path: Path | None = None,
        startup_seconds: float = 0.0,
        startup_error: str = "",
        fallback: MemoryFallback | None = None,
        before_start: Callable[[], None] = lambda: None,
        options: ServerOptions = DEFAULT_OPTIONS,
    ) -> None:
        top = MemoryLevel(max_num_seqs=min(max_num_seqs, options.connections))
        memory = fallback or MemoryFallback(top)
        arguments = ["--context-tokens", str(context_tokens)]
        arguments += [part for model in models for part in ("--model", model)]
        arguments += ["--startup-seconds", str(startup_seconds), "--startup-error", startup_error]
        if control_path is not None:
            arguments += ["--control", str(control_path.resolve())]

        def launch(socket: Path) -> tuple[Sequence[str], Mapping[str, str | None]]:
            command = [sys.executable, "-m", "batch_orchestration.engines.simulated"]
            slots = memory.flags.get("max-num-seqs", max_num_seqs)
            command += ["--socket", str(socket), *arguments, "--max-num-seqs", str(slots)]
            return command, {"PYTHONUNBUFFERED": "1"}

        super().__init__(
            kind="simulated",
            launch=launch,
            fallback=memory,
            log_path=log_path,
            before_start=before_start,
            record_path=record_path,
            process=process,
            options=options,
        )


def main() -> None:
    """Serve until a signal ends the process."""
    arguments = _parser().parse_args()
    if arguments.startup_error:
        sys.exit(f"RuntimeError: {arguments.startup_error}")
    time.sleep(arguments.startup_seconds)
    # Only the server needs these imports; importing this module should not wait for them.
    from aiohttp import web

    from batch_orchestration.engines.simulated.server import SimulatedServer

    server = SimulatedServer(
        models=tuple(arguments.model or [DEFAULT_MODEL]),
        context_tokens=arguments.context_tokens,
        max_num_seqs=arguments.max_num_seqs,
        api_key=os.environ.get(API_KEY_VARIABLE, ""),
        control_path=arguments.control,
    )
    web.run_app(
        server.app(),
        host=None if arguments.socket else arguments.host,
        port=None if arguments.socket else arguments.port,
        path=arguments.socket,
        backlog=BACKLOG,
        access_log=None,
        # A request that hangs must neither delay the server's end nor outlive its client.
        shutdown_timeout=0.1,
        handler_cancellation=True,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Simulated OpenAI-compatible server.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--socket", help="Unix socket to serve at, instead of a port")
    parser.add_argument("--model", action="append", help="name to answer to; repeatable")
    parser.add_argument("--context-tokens", type=int, default=CONTEXT_TOKENS)
    parser.add_argument("--max-num-seqs", type=int, default=MAX_NUM_SEQS)
    parser.add_argument(
        "--control", type=Path, help="JSON file of conditions, read when it changes"
    )
    parser.add_argument("--startup-seconds", type=float, default=0.0)
    parser.add_argument("--startup-error", default="", help="say this and exit")
    return parser
