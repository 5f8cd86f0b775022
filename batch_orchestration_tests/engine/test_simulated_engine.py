"""The simulated engine keeps the contract, and fails exactly as it is told."""

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web
from msgspec.structs import replace

from batch_orchestration.core.errors import EngineDied
from batch_orchestration.core.outcomes import Completion, Failure, FailureCode, Outcome
from batch_orchestration.engines.openai_server import OpenAIServerEngine
from batch_orchestration.engines.processes import sockets
from batch_orchestration.engines.simulated.engine import SimulatedEngine
from batch_orchestration.engines.simulated.malformed_answers import KINDS
from batch_orchestration.engines.simulated.server import SimulatedServer
from batch_orchestration.files.journal_records import OutcomeRecord, encode_record
from batch_orchestration_tests.support.engine_contract import (
    CHAT,
    EngineContract,
    ask,
    ask_and_catch,
    chat,
    parse,
)


@pytest.fixture
def engine(simulated_engine: SimulatedEngine) -> SimulatedEngine:
    asyncio.run(simulated_engine.start())
    return simulated_engine


@pytest.fixture
def set_conditions(engine: SimulatedEngine, tmp_path: Path) -> Callable[..., None]:
    """Return a function that writes the control file."""

    def write(**conditions: Any) -> None:
        (tmp_path / "control.json").write_bytes(msgspec.json.encode(conditions))

    return write


class TestContract(EngineContract):
    pass


@pytest.mark.parametrize(
    ("faults", "code", "status"),
    [
        ({"status": 500}, FailureCode.ENGINE_ERROR, 500),
        ({"status": 503}, FailureCode.ENGINE_OVERLOADED, 503),
        ({"status": 504}, FailureCode.TIMEOUT, 504),
        ({"status": 422}, FailureCode.ENGINE_REFUSED, 422),
        ({"garbage": True}, FailureCode.RESPONSE_UNREADABLE, 200),
        ({"drop": True}, FailureCode.CONNECTION_LOST, None),
        ({"hang": True}, FailureCode.TIMEOUT, None),
        ({"misspelt": True}, FailureCode.ENGINE_REFUSED, 400),
    ],
)
def test_a_fault_becomes_its_failure(
    engine: SimulatedEngine, faults: dict[str, Any], code: FailureCode, status: int | None
) -> None:
    [outcome] = ask(engine, chat("Hello.", simulate=faults))

    assert isinstance(outcome, Failure)
    assert (outcome.code, outcome.status) == (code, status)


def test_an_error_body_of_ones_own_is_passed_on_byte_for_byte(engine: SimulatedEngine) -> None:
    error = {"error": {"message": "too hot", "code": "heat"}}

    [outcome] = ask(engine, chat("Hello.", simulate={"status": 418, "error": error}))

    assert isinstance(outcome, Failure)
    assert outcome.message == "too hot"
    assert parse(outcome) == error


def test_an_overloaded_engine_says_when_to_come_back(engine: SimulatedEngine) -> None:
    faults = {"status": 429, "retry_after": 7}

    [outcome] = ask(engine, chat("Hello.", simulate=faults))

    assert isinstance(outcome, Failure)
    assert outcome.code == FailureCode.ENGINE_OVERLOADED
    assert outcome.retry_after_seconds == 7.0


def test_a_request_can_fail_a_number_of_times_and_then_succeed(engine: SimulatedEngine) -> None:
    body = chat("Hello.", simulate={"status": 500, "fail_first": 2})

    outcomes = [ask(engine, body)[0] for _ in range(3)]

    assert [outcome.status for outcome in outcomes] == [500, 500, 200]


def test_every_answer_is_marked_as_simulated(engine: SimulatedEngine) -> None:
    [answered] = ask(engine, chat("Hello."))
    [embedded] = ask(engine, b'{"input": ["one", "two"]}', endpoint="/v1/embeddings")
    [refused] = ask(engine, chat("Hello.", temperature=-1))

    for outcome in (answered, embedded, refused):
        assert parse(outcome)["system_fingerprint"] == "simulated"


def test_embeddings_come_one_for_each_input(engine: SimulatedEngine) -> None:
    [outcome] = ask(engine, b'{"input": ["one", "two"]}', endpoint="/v1/embeddings")

    assert isinstance(outcome, Completion)
    assert [row["index"] for row in parse(outcome)["data"]] == [0, 1]
    assert outcome.finish_reason is None


def test_a_faulty_attempt_does_not_change_the_answer_that_follows(engine: SimulatedEngine) -> None:
    [undisturbed] = ask(engine, chat("Hello."))
    body = chat("Hello.", simulate={"status": 500, "fail_first": 1})

    _, [disturbed] = ask(engine, body), ask(engine, body)

    assert parse(disturbed) == parse(undisturbed)


def test_a_request_that_kills_the_engine_takes_all_in_flight_along(engine: SimulatedEngine) -> None:
    slow = [chat(f"Wait {number}.", simulate={"latency_seconds": 20}) for number in range(10)]
    killer = chat("Die.", simulate={"die": True, "latency_seconds": 0.5})

    outcomes = ask_and_catch(engine, *slow, killer)

    assert all(isinstance(outcome, EngineDied) for outcome in outcomes)
    assert "was killed by SIGKILL" in str(outcomes[0])
    assert "asked to die" in str(outcomes[0])


def test_a_dead_engine_refuses_work_until_it_is_started_again(engine: SimulatedEngine) -> None:
    killer = chat("Die.", simulate={"die": True, "fail_first": 1})
    ask_and_catch(engine, killer)

    [refused] = ask_and_catch(engine, chat("Hello."))
    asyncio.run(engine.start())
    [answered, survived] = ask(engine, chat("Hello."), killer)

    assert isinstance(refused, EngineDied)
    assert isinstance(answered, Completion)
    # The attempt was noted on disk: this request kills once, not for ever.
    assert isinstance(survived, Completion)
    assert engine.starts == 2


def test_an_engine_that_died_unnoticed_is_started_anew(engine: SimulatedEngine) -> None:
    os.kill(engine.process.pid, signal.SIGKILL)

    asyncio.run(engine.start())

    [outcome] = ask(engine, chat("Hello."))
    assert isinstance(outcome, Completion)
    assert engine.starts == 2


def test_an_engine_that_runs_but_is_not_well_is_started_anew(
    engine: SimulatedEngine, set_conditions: Callable[..., None]
) -> None:
    set_conditions(unhealthy=True)

    async def start_meanwhile() -> None:
        start = asyncio.create_task(engine.start())
        while engine.starts == 1 and not start.done():
            await asyncio.sleep(0.02)
        set_conditions()
        await start

    asyncio.run(start_meanwhile())

    [outcome] = ask(engine, chat("Hello."))
    assert isinstance(outcome, Completion)
    assert engine.starts == 2


def test_an_answer_by_half_is_the_death_of_the_engine_and_no_answer(
    engine: SimulatedEngine,
) -> None:
    [aborted] = ask_and_catch(engine, chat("Hello.", simulate={"abort": True, "fail_first": 1}))
    [refused] = ask_and_catch(engine, chat("Hello."))
    asyncio.run(engine.start())
    [answered] = ask(engine, chat("Hello."))

    assert isinstance(aborted, EngineDied)
    assert "aborted its requests in flight" in str(aborted)
    assert isinstance(refused, EngineDied)
    assert isinstance(answered, Completion)
    assert engine.starts == 2


def test_stopping_twice_does_nothing_and_a_stopped_engine_can_be_started_again(
    engine: SimulatedEngine,
) -> None:
    first = asyncio.run(engine.start())
    engine.stop()
    engine.stop()

    [refused] = ask_and_catch(engine, chat("Hello."))
    second = asyncio.run(engine.start())
    [outcome] = ask(engine, chat("Hello."))

    assert isinstance(refused, EngineDied)
    assert replace(first, start_seconds=0.0) == replace(second, start_seconds=0.0)
    assert isinstance(outcome, Completion)


def test_stopping_an_engine_ends_what_is_in_flight(engine: SimulatedEngine) -> None:
    async def stop_meanwhile() -> list[Any]:
        body = chat("Wait.", simulate={"hang": True})
        call = asyncio.create_task(engine.answer("/v1/chat/completions", body, request_id="x"))
        await asyncio.sleep(0.2)
        await asyncio.to_thread(engine.stop)
        outcomes = await asyncio.gather(call, return_exceptions=True)
        await engine.disconnect()
        return list(outcomes)

    [outcome] = asyncio.run(stop_meanwhile())

    assert isinstance(outcome, EngineDied)


def test_the_control_file_slows_the_engine_down(
    engine: SimulatedEngine, set_conditions: Callable[..., None]
) -> None:
    set_conditions(latency_seconds=0.5)

    [outcome] = ask(engine, chat("Hello."))

    assert outcome.latency_seconds >= 0.5


def test_the_control_file_limits_what_the_engine_takes_at_a_time(
    engine: SimulatedEngine, set_conditions: Callable[..., None]
) -> None:
    set_conditions(latency_seconds=0.5, overloaded_above=5)

    outcomes = ask(engine, *(chat(f"Say {number}.") for number in range(8)))

    assert sorted(str(outcome.status) for outcome in outcomes) == ["200"] * 5 + ["429"] * 3


def test_the_control_file_sets_the_memory_of_the_engine(
    engine: SimulatedEngine, set_conditions: Callable[..., None]
) -> None:
    set_conditions(latency_seconds=0.3, dies_above=5)

    within = ask(engine, *(chat(f"Say {number}.") for number in range(5)))
    beyond = ask_and_catch(engine, *(chat(f"Say {number}.") for number in range(6)))

    assert all(isinstance(outcome, Completion) for outcome in within)
    assert all(isinstance(outcome, EngineDied) for outcome in beyond)
    assert "out of memory" in str(beyond[0])


def test_the_control_file_spreads_faults_the_same_way_each_time(
    engine: SimulatedEngine, set_conditions: Callable[..., None]
) -> None:
    set_conditions(statuses={"500": 0.3, "429": 0.2}, drops=0.1)
    bodies = [chat(f"Say {number}.") for number in range(200)]

    first = [outcome.status for outcome in ask(engine, *bodies)]
    engine.stop()
    asyncio.run(engine.start())
    second = [outcome.status for outcome in ask(engine, *bodies)]

    assert first == second
    assert 40 <= first.count(500) <= 80
    assert 20 <= first.count(429) <= 60
    assert 5 <= first.count(None) <= 40


def test_requests_beyond_the_engines_sequences_wait(tmp_path: Path) -> None:
    engine = SimulatedEngine(log_path=tmp_path / "engine.log", max_num_seqs=1)
    try:
        asyncio.run(engine.start())
        bodies = [chat(f"{n}", simulate={"latency_seconds": 0.2}) for n in range(3)]
        began = time.monotonic()

        ask(engine, *bodies)

        assert time.monotonic() - began >= 0.6
    finally:
        engine.stop()


def test_every_strange_answer_is_an_outcome_that_can_be_stored(engine: SimulatedEngine) -> None:
    kinds = sorted(KINDS)

    outcomes = ask(engine, *(chat("Be strange.", simulate={"strange": kind}) for kind in kinds))

    for kind, outcome in zip(kinds, outcomes, strict=True):
        assert isinstance(outcome, Completion) == kind.endswith("_usage"), kind
        record = OutcomeRecord(ordinal=1, index=0, line=1, attempt=1, at=0.0, outcome=outcome)
        assert encode_record(record)


def test_strange_answers_come_in_their_share(
    engine: SimulatedEngine, set_conditions: Callable[..., None]
) -> None:
    set_conditions(strange={"no_choices": 0.5})

    outcomes = ask(engine, *(chat(f"question {number}") for number in range(40)))

    failed = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    assert {outcome.code for outcome in failed} == {FailureCode.RESPONSE_UNREADABLE}
    assert 5 < len(failed) < 35


def test_more_requests_than_the_server_has_yet_let_in_are_all_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Unix socket has no room for more than its backlog, and nobody is told."""
    (tmp_path / "somaxconn").write_text("10")
    monkeypatch.setattr(sockets, "BACKLOG_LIMIT", tmp_path / "somaxconn")
    path = tmp_path / "socket"
    server = SimulatedServer(
        models=("m",), context_tokens=512, max_num_seqs=64, api_key="", control_path=None
    )

    async def submit() -> list[Outcome]:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path))
            listening.listen(10)
            engine = OpenAIServerEngine("http://localhost", socket=path)
            answers = [engine.answer(CHAT, chat("Hi."), request_id=f"r{n}") for n in range(64)]
            calls = asyncio.gather(*answers)
            await asyncio.sleep(0.2)
            runner = web.AppRunner(server.app())
            await runner.setup()
            await web.SockSite(runner, listening).start()
            outcomes = await calls
            await engine.disconnect()
            await runner.cleanup()
            return outcomes

    assert {type(outcome) for outcome in asyncio.run(submit())} == {Completion}
