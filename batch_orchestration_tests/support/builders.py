"""Builders of domain values for tests: each with sensible defaults, each argument overridable."""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from batch_orchestration.core.batches import BatchOptions, BatchPlan, Chunk, batch_id, identity
from batch_orchestration.core.foreign_json import decode
from batch_orchestration.core.outcomes import Completion, Failure, FailureCode, Outcome, Usage
from batch_orchestration.core.requests import Request, parse_line
from batch_orchestration.core.results import Attempt, Provenance, SettledRequest
from batch_orchestration.engines.memory_demand import memory_demand
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.input_lines import RawLine, new_digest, read_lines
from batch_orchestration.files.state_file import StateFile
from batch_orchestration.lifecycle.clock import read_clocks
from batch_orchestration.settings import Settings

#: Limits of the queue that no test reaches.
UNLIMITED: dict[str, Any] = {
    **dict.fromkeys(("max_unfinished_batches", "max_queued_requests"), 10**9),
    **dict.fromkeys(("source_submissions_burst", "source_requests_burst"), 10**9),
    "max_queued_tokens": 10**15,
    "disk_reserve_bytes": 0,
}


def make_settings(**fields: Any) -> Settings:
    """Settings with chunks of ten, an engine without known limits, and a queue without any."""
    values: dict[str, Any] = {
        "engine": "remote",
        "base_url": "http://engine.invalid/v1",
        "requests_per_chunk": 10,
        "max_line_bytes": 2 * 2**20,
        **UNLIMITED,
    }
    return Settings(**{**values, **fields}, _env_file=None)


#: Settings on which answers depend, as in plans and runs of tests.
ANSWER_SETTINGS = make_settings().answer_settings()
ENDPOINT = "/v1/chat/completions"
MODEL = "demo-model"
#: Any instant; a whole number, so that it survives every representation of time.
NOW = 1_760_000_000.0


def make_body(text: str = "hello", **fields: Any) -> dict[str, Any]:
    """A chat body that asks `text`."""
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **fields}


def make_line(number: int = 0, **fields: Any) -> bytes:
    """One line of a batch file, with its line break; a field set to `...` is left out."""
    envelope = {
        "custom_id": f"request-{number}",
        "method": "POST",
        "url": ENDPOINT,
        "body": make_body(f"question {number}"),
        **fields,
    }
    given = {name: value for name, value in envelope.items() if value is not ...}
    return json.dumps(given, ensure_ascii=False).encode() + b"\n"


def make_request(
    body: bytes | dict[str, Any] | None = None, *, endpoint: str = ENDPOINT, index: int = 0
) -> Request:
    """The request of `make_line(index)`, or one with exactly this body."""
    if body is None:
        body = make_body(f"question {index}")
    written = body if isinstance(body, bytes) else json.dumps(body, ensure_ascii=False).encode()
    return Request(
        index=index,
        line=index + 1,
        custom_id=f"request-{index}",
        endpoint=endpoint,
        body=msgspec.Raw(written),
        fields=decode(written),
    )


def make_input(requests: int, *, prompt: str = "question {}") -> bytes:
    """A batch file of so many usable lines; the prompts contain the number of the request."""
    return b"".join(
        make_line(number, body=make_body(prompt.format(number))) for number in range(requests)
    )


def make_plan(
    content: bytes,
    *,
    file_name: str = "candidates.jsonl",
    requests_per_chunk: int = 10,
    faulty: int = 0,
    options: BatchOptions | None = None,
    settings: dict[str, Any] | None = None,
    created_at: float = NOW,
) -> BatchPlan:
    """The plan of a batch file, every line break of which ends a line."""
    # `NOW` is long ago by the clock that runs look at.
    options = options or BatchOptions(completion_window="36500d")
    sha256 = hashlib.sha256(content).hexdigest()
    settings = settings or ANSWER_SETTINGS
    chunks = make_chunks(
        content,
        requests_per_chunk=requests_per_chunk,
        max_tokens_cap=settings.get("max_tokens_cap"),
    )
    return BatchPlan(
        batch_id=batch_id(file_name, identity(sha256, options)),
        identity=identity(sha256, options),
        file_name=file_name,
        sha256=sha256,
        size_bytes=len(content),
        requests=sum(chunk.requests for chunk in chunks),
        faulty=faulty,
        chunks=chunks,
        options=options,
        settings=settings,
        created_at=created_at,
    )


def make_chunks(
    content: bytes, *, requests_per_chunk: int = 10, max_tokens_cap: int | None = None
) -> tuple[Chunk, ...]:
    """Cut a file after every so many requests; trailing blank lines belong to the last chunk."""
    lines = list(read_lines(io.BytesIO(content), max_line_bytes=2**24))
    requests = [line for line in lines if not line.blank]
    firsts = requests[::requests_per_chunk]
    starts = [0, *(line.start for line in firsts[1:])]
    ends = [*starts[1:], len(content)]
    chunks = []
    for number, (first, start, end) in enumerate(zip(firsts, starts, ends, strict=False)):
        digest = new_digest()
        digest.update(content[start:end])
        chunk = Chunk(
            number=number,
            first_index=first.index,
            requests=len(requests[first.index : first.index + requests_per_chunk]),
            first_line=1 if start == 0 else first.line,
            start=start,
            end=end,
            digest=digest.hexdigest(),
            memory=memory_demand(_usable(lines, start, end), max_tokens_cap=max_tokens_cap),
        )
        chunks.append(chunk)
    return tuple(chunks)


def _usable(lines: Iterable[RawLine], start: int, end: int) -> Iterator[Request]:
    for line in lines:
        if start <= line.start < end and not line.blank:
            parsed = parse_line(line.data, index=line.index, line=line.line, model_required=False)
            if isinstance(parsed, Request):
                yield parsed


def believe_the_clock(folder: DataFolder) -> None:
    """Write down that the clocks of this machine have agreed for long."""
    clocks = read_clocks()
    row = {"last": clocks, "since": clocks.steady - 10 * 86400, "jump": 0.0}
    (folder.root / "clock.json").write_bytes(msgspec.json.encode(row))


def write_plan(folder: DataFolder, plan: BatchPlan) -> None:
    StateFile(folder.plan_path(plan.batch_id), BatchPlan).write(plan)


def make_batch(
    folder: DataFolder,
    requests: int,
    *,
    requests_per_chunk: int = 10,
    name: str | None = None,
    settings: dict[str, Any] | None = None,
    at: float = NOW,
    **options: Any,
) -> BatchPlan:
    """Write input and plan of a batch into a data folder, as admission does; the store lacks it.

    Args:
        name: Of the file; the prompts then begin with it.
        options: Fields of `BatchOptions`.
    """
    folder.create()
    content = make_input(requests, prompt=f"{name} {{}}." if name else "question {}")
    plan = make_plan(
        content,
        file_name=f"{name or 'candidates'}.jsonl",
        requests_per_chunk=requests_per_chunk,
        # `NOW` is long ago by the clock that runs look at.
        options=BatchOptions(**{"completion_window": "36500d", **options}),
        settings=settings,
        created_at=at,
    )
    write_plan(folder, plan)
    folder.input_path(plan.batch_id).write_bytes(content)
    return plan


def make_completion(text: str = "42", **fields: Any) -> Completion:
    """A chat completion that says `text`."""
    answer = {"choices": [{"message": {"role": "assistant", "content": text}}]}
    values = {
        "status": 200,
        "body": msgspec.Raw(json.dumps(answer, ensure_ascii=False).encode()),
        "request_id": "chatcmpl-1",
        "finish_reason": "stop",
        "usage": Usage(prompt_tokens=7, completion_tokens=3),
        "latency_seconds": 0.25,
    }
    return Completion(**{**values, **fields})


def make_failure(code: FailureCode = FailureCode.ENGINE_REFUSED, **fields: Any) -> Failure:
    """A failure that the engine answered with 400."""
    values = {
        "message": "the engine said no",
        "status": 400,
        "body": msgspec.Raw(b'{"error": {"message": "the engine said no"}}'),
        "request_id": "chatcmpl-2",
        "latency_seconds": 0.125,
    }
    return Failure(code=code, **{**values, **fields})


def make_provenance(run_id: str = "run-1", **fields: Any) -> Provenance:
    """A run of the simulated engine."""
    values = {
        "engine": "simulated",
        "engine_version": "simulated 1",
        "model": MODEL,
        "settings_hash": "0123456789abcdef",
    }
    return Provenance(run_id=run_id, **{**values, **fields})


def make_attempt(code: FailureCode = FailureCode.TIMEOUT, *, at: float = NOW) -> Attempt:
    """A failed attempt."""
    return Attempt(at=at, code=str(code), message="no answer in 1 s")


def make_settled(index: int = 0, outcome: Outcome | None = None, **fields: Any) -> SettledRequest:
    """A settled request: a completion at the first attempt."""
    values = {
        "line": index + 1,
        "custom_id": f"request-{index}",
        "endpoint": ENDPOINT,
        "body": json.dumps(make_body(f"question {index}")).encode(),
        "outcome": make_completion(f"answer {index}") if outcome is None else outcome,
        "attempts": 1,
        "failed_attempts": (),
        "settled_at": NOW,
        "provenance": make_provenance(),
    }
    return SettledRequest(index=index, **{**values, **fields})


def make_settled_chunk(chunk: Chunk, *, failing: tuple[int, ...] = ()) -> list[SettledRequest]:
    """Settle every request of a chunk; those with an index in `failing` fail."""
    return [
        make_settled(index, make_failure() if index in failing else None)
        for index in range(chunk.first_index, chunk.first_index + chunk.requests)
    ]
