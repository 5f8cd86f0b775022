"""A batch in the format of OpenAI's API, as `--json` prints it."""

import itertools
from pathlib import Path
from typing import Any

import msgspec

from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.core.lifecycle import Halt
from batch_orchestration.core.requests import Request, parse_line
from batch_orchestration.estimates.batch_estimates import read_estimate
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.input_lines import read_lines
from batch_orchestration.status.views import BatchStatusView
from batch_orchestration.workers.progress import Progress

#: Faulty lines at the head of a file that are skipped in search of its endpoint.
_LINES_READ = 100
_LINE_BYTES = 2**20
_TIMES = [status for status in BatchStatus if status is not BatchStatus.VALIDATING]
#: Fields of a run's progress that are shown as they are.
_PROGRESS = (
    *("run_id", "phase", "in_flight", "requests_per_second", "output_tokens_per_second"),
    "eta_seconds",
)


def batch_object(view: BatchStatusView, *, folder: DataFolder) -> dict[str, Any]:
    """Return OpenAI's Batch object, with paths in place of file ids.

    Times are whole POSIX seconds. Some fields are ours: `progress` is null unless a run is at work,
    `early_end` unless the batch ends or ended early, `paused` unless it is paused.
    """
    batch_id = view.batch_id
    return {
        "id": batch_id,
        "object": "batch",
        "endpoint": _endpoint(folder.input_path(batch_id)),
        "engine": view.engine or None,
        "model": view.model or None,
        "errors": None,
        "file_name": view.plan.file_name,
        "input_file": str(folder.input_path(batch_id)),
        "output_file": _path(view.output_file),
        "error_file": _path(view.error_file),
        "completion_window": view.options.completion_window,
        "status": str(view.status),
        "created_at": int(view.plan.created_at),
        "expires_at": int(view.deadline),
        **{f"{word}_at": _whole(view.times.get(word)) for word in _TIMES},
        "request_counts": {
            "total": view.total,
            "completed": view.completed,
            "failed": view.failed,
        },
        "usage": {
            "input_tokens": view.tokens[0],
            "output_tokens": view.tokens[1],
            "total_tokens": sum(view.tokens),
        },
        "metadata": dict(view.options.metadata),
        "priority": view.options.priority,
        "estimate": read_estimate(folder, batch_id),
        "progress": _progress(view.live),
        "early_end": view.early_end,
        "paused": _halt(view.halt),
        "store_problem": view.store_problem,
    }


def _halt(halt: Halt | None) -> dict[str, Any] | None:
    return None if halt is None else {"reason": halt.reason, **msgspec.to_builtins(halt)}


def _progress(live: Progress | None) -> dict[str, Any] | None:
    if live is None:
        return None
    wait = live.waiting
    return {
        **{name: getattr(live, name) for name in _PROGRESS},
        "updated_at": int(live.updated_at),
        "waiting": wait and {**msgspec.to_builtins(wait), "until": int(wait.until)},
    }


def _endpoint(input_path: Path) -> str | None:
    """Return the endpoint of the first usable request; a batch rarely has two."""
    try:
        with input_path.open("rb") as file:
            for line in itertools.islice(read_lines(file, _LINE_BYTES), _LINES_READ):
                if line.blank or line.too_long:
                    continue
                request = parse_line(
                    line.data, index=line.index, line=line.line, model_required=False
                )
                if isinstance(request, Request):
                    return request.endpoint
    except FileNotFoundError:
        pass
    return None


def _path(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)
