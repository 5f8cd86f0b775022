"""A gate that refuses is not a request that is refused: `run_chunks` at a server that says no."""

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.core.errors import EngineRefusesUs
from batch_orchestration.core.outcomes import Completion, Failure, FailureCode
from batch_orchestration.files.journal import replay_journal
from batch_orchestration_tests.support.builders import NOW, make_line, make_plan, write_plan
from batch_orchestration_tests.support.gate_server import (
    CHAT,
    EMBEDDINGS,
    Asked,
    GateServer,
    Reply,
    error,
)
from batch_orchestration_tests.support.workbench import Workbench

LOGIN = Reply(302, b"", {"Location": "http://127.0.0.1:9/login"})
CLOSED = {
    "401 key revoked": error(401, "Incorrect API key provided", code="invalid_api_key"),
    "402 quota": error(402, "You have used up your credits"),
    "403 html": Reply(403, b"<html><head><title>Forbidden</title></head></html>"),
    "404 of a proxy": Reply(404, b"<html>\n<h1>404 Not Found</h1>\n</html>"),
    "405 of a proxy": Reply(405, b""),
    "407 proxy": Reply(407, b"Proxy Authentication Required"),
    "302 login page": LOGIN,
    "307 elsewhere": Reply(307, b"", {"Location": "http://127.0.0.1:9/v1/chat/completions"}),
    "451": Reply(451, b"Unavailable For Legal Reasons"),
    "418": Reply(418, b"short and stout"),
    "model unloaded": error(404, "The model `demo-model` does not exist.", code="model_not_found"),
    "501": Reply(501, b"not implemented"),
}
#: One of each kind: with a code, with a page, elsewhere, of a model.
IN_MID_RUN = ["401 key revoked", "403 html", "302 login page", "model unloaded"]


@pytest.fixture
def server() -> Iterator[GateServer]:
    server = GateServer()
    yield server
    server.close()


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    return Workbench(tmp_path)


def outcomes(bench: Workbench, plan: BatchPlan) -> Counter[tuple[str, int | None]]:
    """Code and status of each committed request; of an answered one `answered`."""
    settled = [settled.outcome for settled in bench.store.settled(plan.batch_id)]
    return Counter(
        ("answered" if isinstance(outcome, Completion) else str(outcome.code), outcome.status)
        for outcome in settled
    )


def admitted(bench: Workbench, content: bytes) -> BatchPlan:
    plan = make_plan(content)
    write_plan(bench.folder, plan)
    bench.folder.input_path(plan.batch_id).write_bytes(content)
    bench.store.add_batch(plan, at=NOW)
    return plan


def assert_nobody_has_paid(bench: Workbench, plan: BatchPlan) -> None:
    for chunk in plan.chunks:
        path = bench.folder.journal_path(plan.batch_id, chunk.number)
        if path.exists():
            state = replay_journal(path, plan.batch_id, chunk.number)
            assert state.failed_attempts == {}
            assert state.suspects == {}
            assert state.completed == len(state.settled)


@pytest.mark.parametrize(
    ("how", "answered_before"), [*((how, 0) for how in CLOSED), *((how, 30) for how in IN_MID_RUN)]
)
def test_a_gate_that_closes_ends_the_run_and_no_request_pays(
    bench: Workbench, server: GateServer, how: str, answered_before: int
) -> None:
    plan, reply = bench.admitted(100, requests_per_chunk=25), CLOSED[how]
    server.script = lambda asked, before: reply if before >= answered_before else None

    with pytest.raises(EngineRefusesUs, match=f"HTTP {reply.status}") as refused:
        bench.run(plan, server.engine())

    assert server.url in str(refused.value)
    assert_nobody_has_paid(bench, plan)
    assert len(server.asked) <= answered_before + 8 + 4, "the closed gate was asked on and on"
    server.script = lambda asked, before: None
    bench.run(plan, server.engine(), run_id="run-2")
    assert outcomes(bench, plan) == {("answered", 200): 100}


@pytest.mark.parametrize("status", [301, 302, 401, 402, 403, 404, 407, 451])
def test_a_gate_that_is_closed_at_the_start_is_no_engine_that_does_not_start(
    bench: Workbench, server: GateServer, status: int
) -> None:
    plan = bench.admitted(10)
    server.pages = lambda path: Reply(status, b"go away\x1b[31m\nplease", dict(LOGIN.headers))
    began = time.monotonic()

    with pytest.raises(EngineRefusesUs, match=rf"/v1/models answers HTTP {status}: go away\?\[31m"):
        bench.run(plan, server.engine())

    assert time.monotonic() - began < 100
    assert server.asked == []


@pytest.mark.parametrize("status", [401, 403, 404, 451])
def test_one_refusal_among_answers_is_its_own(
    bench: Workbench, server: GateServer, status: int
) -> None:
    plan = bench.admitted(200, requests_per_chunk=100)
    refusal = error(status, "blocked by guardrail")
    server.script = lambda asked, before: refusal if asked.number == 77 else None

    bench.run(plan, server.engine())

    assert outcomes(bench, plan) == {("answered", 200): 199, ("engine_refused", status): 1}
    (failed,) = [s for s in bench.store.settled(plan.batch_id) if isinstance(s.outcome, Failure)]
    assert failed.index == 77
    assert "blocked by guardrail" in failed.outcome.message


@pytest.mark.parametrize("status", [404, 501])
def test_an_embeddings_line_at_a_chat_model_fails_alone(
    bench: Workbench, server: GateServer, status: int
) -> None:
    embedding = make_line(0, url=EMBEDDINGS, body={"model": "demo-model", "input": "question 0"})
    plan = admitted(bench, embedding + b"".join(map(make_line, range(1, 20))))
    refusal = Reply(status, b'{"detail":"Not Found"}')
    server.script = lambda asked, before: refusal if asked.path == EMBEDDINGS else None

    bench.run(plan, server.engine(), in_flight=1)

    assert outcomes(bench, plan)["answered", 200] == 19
    assert sum(outcomes(bench, plan).values()) == 20


def test_a_thousand_refusals_by_a_content_filter_cost_a_few_probes(
    bench: Workbench, server: GateServer
) -> None:
    plan = bench.admitted(1000, requests_per_chunk=500)

    def script(asked: Asked, before: int) -> Reply | None:
        return None if asked.number is None else error(403, f"blocked (request {before})")

    server.script = script
    bench.run(plan, server.engine(), max_failure_rate=1.0)

    assert outcomes(bench, plan) == {("engine_refused", 403): 1000}
    assert len(server.probes) <= 20
    assert len(server.asked) <= 1000 + 8 + 20


def test_where_every_other_request_is_refused_the_answers_are_the_controls(
    bench: Workbench, server: GateServer
) -> None:
    plan = bench.admitted(400, requests_per_chunk=200)
    server.script = lambda asked, before: error(403, "no") if (asked.number or 0) % 2 else None

    bench.run(plan, server.engine(), max_failure_rate=1.0)

    assert outcomes(bench, plan) == {("answered", 200): 200, ("engine_refused", 403): 200}
    assert len(server.asked) <= 400 + 40


@pytest.mark.parametrize(("status", "closed"), [(401, 7), (403, 7), (404, 7), (503, 2)])
def test_a_gate_that_opens_and_closes_neither_burns_a_request_nor_stops_for_good(
    bench: Workbench, server: GateServer, status: int, closed: int
) -> None:
    """Closed for some requests of every 50: the runs that meet it go on where they were.

    An overloaded engine is asked again, three times in all; so it refuses two requests in a row at
    most, for one request may meet them all.
    """
    plan = bench.admitted(300, requests_per_chunk=50)
    refusal = error(status, "try later")
    server.script = lambda asked, before: refusal if before % 50 >= 50 - closed else None

    for run in range(60):
        try:
            bench.run(plan, server.engine(), run_id=f"run-{run}")
        except EngineRefusesUs:
            assert_nobody_has_paid(bench, plan)
        else:
            break

    assert outcomes(bench, plan) == {("answered", 200): 300}


def test_a_gate_that_lets_only_controls_through_refuses_the_requests_and_the_run_ends(
    bench: Workbench, server: GateServer
) -> None:
    plan = bench.admitted(50)
    server.script = lambda asked, before: None if asked.number is None else error(401, "not you")

    bench.run(plan, server.engine(), max_failure_rate=1.0)

    assert outcomes(bench, plan) == {("engine_refused", 401): 50}
    assert max(server.times[number] for number in range(50)) == 2


@pytest.mark.parametrize("status", [400, 413, 422])
def test_what_is_always_the_requests_own_is_asked_once_and_costs_no_control(
    bench: Workbench, server: GateServer, status: int
) -> None:
    plan = bench.admitted(40)
    server.script = lambda asked, before: error(status, "bad value")

    bench.run(plan, server.engine(), max_failure_rate=1.0)

    assert sum(outcomes(bench, plan).values()) == len(server.asked) == 40
    assert server.probes == []


def test_requests_for_a_model_that_never_was_there_fail_as_such(
    bench: Workbench, server: GateServer
) -> None:
    """The probe asks for the model that the engine names, and is answered."""
    plan = bench.admitted(30)
    server.pages = lambda path: Reply(200, b'{"data":[{"id":"m"}]}') if "models" in path else None
    missing = error(404, "The model `demo-model` does not exist.", code="model_not_found")
    server.script = lambda asked, before: missing if b"demo-model" in asked.body else None

    bench.run(plan, server.engine(), max_failure_rate=1.0)

    assert outcomes(bench, plan) == {(FailureCode.MODEL_NOT_FOUND, 404): 30}


def test_a_control_that_meets_an_overloaded_engine_is_sent_again(
    bench: Workbench, server: GateServer
) -> None:
    plan = bench.admitted(20)
    busy = iter([Reply(503), Reply(429)])

    def script(asked: Asked, before: int) -> Reply | None:
        if asked.number == 0:
            return error(403, "no")
        return next(busy, None) if asked.number is None else None

    server.script = script
    bench.run(plan, server.engine(), in_flight=1)

    assert outcomes(bench, plan) == {("answered", 200): 19, ("engine_refused", 403): 1}
    assert CHAT in {asked.path for asked in server.probes}
