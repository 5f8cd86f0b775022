"""Whatever an engine answers one request, that request has one row and the batch ends."""

import json
import threading
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batch_orchestration.core.outcomes import Completion, Failure, FailureCode, Usage
from batch_orchestration.core.results import Provenance
from batch_orchestration.delivery.assembly import assemble
from batch_orchestration.engines.openai_server import OpenAIServerEngine, ServerOptions
from batch_orchestration.files import journal_records as records
from batch_orchestration.files.journal import Journal
from batch_orchestration.inference.faults.retries import RetryPolicy
from batch_orchestration.operations.recovery import recover
from batch_orchestration.workers.progress import Progress, read_progress
from batch_orchestration_tests.support.builders import make_request
from batch_orchestration_tests.support.command_line import CommandLine
from batch_orchestration_tests.support.raw_server import Answer, http, raw_server
from batch_orchestration_tests.support.scripted_engine import ScriptedEngine
from batch_orchestration_tests.support.workbench import Workbench

GOOD = b'{"id": "1", "choices": [{"message": {"content": "yes"}}], "usage": {"prompt_tokens": 3}}'


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    return Workbench(tmp_path)


def number_of(body: bytes) -> int:
    """The number of the question that a request asks; a probe has one that no request has."""
    words = json.loads(body)["messages"][0]["content"].split()
    return int(words[1]) if len(words) > 1 else 1_000


def run_against(bench: Workbench, answer: Answer, *, requests: int, run_id: str = "run-1"):
    """Run a batch against a server that answers so; return its plan."""
    plan = bench.admit_now(requests)
    with raw_server(answer) as url:
        options = ServerOptions(
            timeout_seconds=20.0,
            lost_after_seconds=5.0,
            answer_bytes=2**20,
            all_answers_bytes=2**21,
        )
        engine = OpenAIServerEngine(url, options=options)
        retry = RetryPolicy(max_attempts=2, base_delay_seconds=0.0, max_retry_after_seconds=0.0)
        bench.run(plan, engine, run_id=run_id, retry=retry)
    return plan


def check_delivered(bench: Workbench, plan, *, good: range) -> None:
    """Each request has one row; the good ones are answered; both files add up."""
    settled = {request.index: request.outcome for request in bench.store.settled(plan.batch_id)}
    assert bench.indices(plan) == list(range(plan.requests))
    assert all(isinstance(settled[index], Completion) for index in good)
    assemble(plan.batch_id, folder=bench.folder, store=bench.store, clock=time.time, actor="tester")
    outbox = bench.folder.outbox_path(plan.batch_id)
    lines = [
        json.loads(line)
        for name in ("output.jsonl", "errors.jsonl")
        for line in (outbox / name).read_bytes().splitlines()
    ]
    assert sorted(line["custom_id"] for line in lines) == sorted(
        f"request-{number}" for number in range(plan.requests)
    )


HEADS = st.sampled_from(
    [
        b"X-Request-Id: caf\xe9\xff",
        b"X-Request-Id: " + b"x" * 5_000,
        b"Retry-After: 31536000",
        b"Retry-After: " + b"9" * 400,
        b"Retry-After: Fri, 31 Dec 9999 23:59:59 GMT\r\nDate: Mon, 23 Nov 2026 20:00:00 GMT",
        b"Content-Encoding: gzip",
        b"Content-Encoding: br",
        b"Location: http://127.0.0.1:1/",
        b"Transfer-Encoding: chunked",
        b"Content-Length: 5",
        b"Content-Type: text/html; charset=utf-7",
    ]
) | st.binary(max_size=30).map(lambda value: b"X-Any: " + value)
BODIES = (
    st.binary(max_size=80)
    | st.sampled_from(
        [
            GOOD,
            GOOD.replace(b"3}", b"%d}" % 10**30),
            GOOD.replace(b"3}", b"9223372036854775807}"),
            GOOD.replace(b'"yes"', b"[" * 2_000 + b"]" * 2_000),
            GOOD.replace(b"yes", b"\\ud83d"),
            GOOD.replace(b"yes", b"\xff"),
            GOOD.replace(b"yes", b"\\u0000"),
            GOOD.replace(b'"1"', b'"\\u0000' + b"x" * 9_999 + b'"'),
            b'{"error": {"code": 429}}',
            b'{"error": {"code": 1e999}}',
            b" " * 2 * 2**20,
        ]
    )
    | st.tuples(st.integers(0, len(GOOD)), st.binary(max_size=4)).map(
        lambda change: GOOD[: change[0]] + change[1] + GOOD[change[0] + len(change[1]) :]
    )
)
STATUSES = st.sampled_from([200, 200, 201, 204, 301, 302, 400, 404, 413, 429, 500, 503, 599, 999])
RAW = st.builds(
    lambda status, heads, body: http(body, *heads, status=b"%d Any" % status),
    STATUSES,
    st.lists(HEADS, max_size=2),
    BODIES,
) | st.binary(max_size=60)


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(RAW, min_size=5, max_size=5))
def test_any_bytes_as_answers_leave_one_row_each_and_harm_no_neighbour(
    tmp_path_factory: pytest.TempPathFactory, strange: list[bytes]
) -> None:
    bench = Workbench(tmp_path_factory.mktemp("strange"))

    def answer(path: str, body: bytes) -> list[bytes]:
        number = number_of(body)
        return [strange[number] if number < len(strange) else http(GOOD)]

    plan = run_against(bench, answer, requests=12)

    check_delivered(bench, plan, good=range(len(strange), 12))


def test_counts_that_no_request_has_are_committed_cancelled_and_recovered(
    bench: Workbench,
) -> None:
    absurd = [2**63, 2**62, 10**30, -5]

    def answer(path: str, body: bytes) -> list[bytes]:
        said = absurd[number_of(body) % len(absurd)]
        return [http(GOOD.replace(b"3}", b"%d}" % said))]

    plan = run_against(bench, answer, requests=30)
    check_delivered(bench, plan, good=range(30))
    before = bench.store.batch(plan.batch_id)

    bench.folder.duckdb.unlink()
    recovery = recover(folder=bench.folder, problem="lost", clock=time.time)

    assert recovery.complete
    assert bench.store.batch(plan.batch_id).prompt_tokens == before.prompt_tokens > 2**32


def poison(bench: Workbench, monkeypatch: pytest.MonkeyPatch, plan) -> None:
    """Write a journal as an earlier version did, which took any count for true."""
    encode = msgspec.json.Encoder().encode

    def huge(record: object) -> bytes:
        return encode(record).replace(b'"prompt_tokens":777', b'"prompt_tokens":%d' % 2**63)

    monkeypatch.setattr(records, "_encode", huge)
    with Journal.open(
        bench.folder.journal_path(plan.batch_id, 0),
        batch_id=plan.batch_id,
        number=0,
        provenance=Provenance(run_id="old"),
        at=1.0,
    ) as journal:
        for index in range(10):
            answer = Completion(status=200, body=msgspec.Raw(GOOD), usage=Usage(prompt_tokens=777))
            journal.record_submitted(index, 1, 2.0)
            journal.record_outcome(make_request(index=index), answer, 1, 3.0)
    monkeypatch.undo()
    assert b"%d" % 2**63 in bench.folder.journal_path(plan.batch_id, 0).read_bytes()


def test_a_journal_with_absurd_counts_can_be_committed(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = bench.admit_now(20)
    poison(bench, monkeypatch, plan)

    bench.run(plan, ScriptedEngine())

    check_delivered(bench, plan, good=range(20))


def test_a_journal_with_absurd_counts_can_be_cancelled_and_recovered(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = bench.admit_now(20)
    poison(bench, monkeypatch, plan)

    bench.cancel(plan)
    bench.deliver(plan)
    bench.folder.duckdb.unlink()
    recovery = recover(folder=bench.folder, problem="lost", clock=time.time)

    assert recovery.complete
    codes = [
        getattr(request.outcome, "code", None) for request in bench.store.settled(plan.batch_id)
    ]
    assert codes == [None] * 10 + [FailureCode.BATCH_CANCELLED] * 10


def test_an_answer_that_cannot_be_kept_is_a_failure_of_its_request(bench: Workbench) -> None:
    """Whichever engine it is that returns what no engine should."""
    plan = bench.admit_now(10)

    def script(body: bytes, times: int) -> Completion | None:
        if number_of(body) == 3:
            return Completion(status=200, body=msgspec.Raw(b"no JSON"))
        return None

    bench.run(plan, ScriptedEngine(script))

    (failed,) = [
        request
        for request in bench.store.settled(plan.batch_id)
        if isinstance(request.outcome, Failure)
    ]
    assert failed.index == 3
    assert isinstance(failed.outcome, Failure)
    assert failed.outcome.code == FailureCode.RESPONSE_UNREADABLE
    assert "cannot be stored" in failed.outcome.message


@pytest.mark.parametrize(("window", "seconds"), [("24h", 600), ("10m", 300)])
def test_a_wait_that_the_engine_asks_for_is_shown_with_its_reason_and_its_end(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, window: str, seconds: float
) -> None:
    monkeypatch.setenv("BATCH_DATA_DIR", str(bench.folder.root))
    plan = bench.admit_now(3, completion_window=window)
    overloaded = Failure(
        code=FailureCode.ENGINE_OVERLOADED,
        message="come back tomorrow",
        status=429,
        retry_after_seconds=86_400.0,
    )
    engine = ScriptedEngine(lambda body, times: overloaded)
    asked_at = time.time()
    run = threading.Thread(target=bench.run, args=(plan, engine), daemon=True)
    run.start()

    progress = waiting_progress(bench, plan.batch_id)
    command = CommandLine(bench.folder)
    told = command.run("status", plan.batch_id).output
    overview = command.run("status").output
    as_json = command.json("status", plan.batch_id)["progress"]["waiting"]
    bench.cancel(plan)
    run.join(30)

    assert progress.waiting is not None
    assert progress.waiting.requests == 3
    assert progress.waiting.until - asked_at == pytest.approx(seconds, abs=60)
    assert "24 h 0 min (HTTP status 429): come back tomorrow" in " ".join(told.split())
    assert "3 wait as the engine asked" in " ".join(overview.split())
    assert as_json["requests"] == 3
    assert not run.is_alive()


def waiting_progress(bench: Workbench, batch_id: str) -> Progress:
    """The first progress that tells of three requests that wait."""
    for _ in range(600):
        progress = read_progress(bench.folder.progress_path(batch_id))
        if progress and progress.waiting and progress.waiting.requests == 3:
            return progress
        time.sleep(0.1)
    raise AssertionError("nothing says that requests wait")
