"""Real vLLM on a CPU keeps the contract, dies, comes back, and refuses what it cannot serve."""

import asyncio
import os
import shutil
import signal
import stat
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from batch_orchestration.core.errors import EngineDied, EngineStartFailed
from batch_orchestration.core.outcomes import Completion, Failure, FailureCode, Outcome
from batch_orchestration.engines.processes.records import read_record
from batch_orchestration.engines.vllm.engine import VllmEngine
from batch_orchestration_tests.support.engine_contract import EngineContract, ask, chat, parse
from batch_orchestration_tests.support.engine_processes import (
    LOOPBACK,
    count_running,
    engine_core_pid,
    tcp_listeners,
    wait_until_unwell,
)
from batch_orchestration_tests.support.packaged_models import embedding_model_folder

pytestmark = pytest.mark.engine

#: As long as the context allows: a second or more.
LONG = [chat(f"{n}", max_tokens=480, ignore_eos=True) for n in range(20)]
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}},
    "required": ["colour"],
    "additionalProperties": False,
}


@pytest.fixture
def engine(vllm_engine: VllmEngine) -> VllmEngine:
    asyncio.run(vllm_engine.start())  # anew, where the test before has killed it
    return vllm_engine


class TestContract(EngineContract):
    pass


def test_the_identity_has_vllms_version(engine: VllmEngine) -> None:
    identity = asyncio.run(engine.start())

    assert identity.kind == "vllm"
    assert identity.version.startswith("vllm 0.")
    assert identity.models == ("tiny",)


def test_it_answers_at_a_socket_that_is_ours_alone_and_at_no_port(engine: VllmEngine) -> None:
    record = read_record(engine.process.log_path.with_suffix(".process.json"))
    assert record is not None

    ports = {member.pid: tcp_listeners(member.pid) for member in [record.leader, *record.members]}

    assert stat.S_IMODE(Path(record.socket).parent.stat().st_mode) == 0o700
    assert ports.pop(record.leader.pid) == ports.pop(engine_core_pid(engine)) == []
    # Where the workers' parts of torch meet; none of it speaks HTTP or answers requests.
    assert all(port.startswith(LOOPBACK) for worker in ports.values() for port in worker)


def test_bodies_pass_through_unchanged(engine: VllmEngine) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "colour", "schema": SCHEMA}}
    body = chat(
        "Which?", n=2, logprobs=True, seed=1, temperature=1, max_tokens=60, response_format=schema
    )

    [outcome] = ask(engine, body)

    choices = parse(outcome)["choices"]
    assert len(choices) == 2
    assert "colour" in choices[0]["message"]["content"]
    assert choices[0]["logprobs"]["content"]


def test_an_impossible_schema_is_refused_and_harms_nobody(engine: VllmEngine) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}

    refused, answered = ask(engine, chat("Hello.", response_format=schema), chat("Hello."))

    assert refused.status == 400
    assert isinstance(answered, Completion)


def test_an_engine_core_that_was_killed_with_nothing_in_flight_is_noticed_by_the_next_start(
    engine: VllmEngine,
) -> None:
    core = engine_core_pid(engine)
    os.kill(core, signal.SIGKILL)
    wait_until_unwell(engine)

    asyncio.run(engine.start())

    answers = ask(engine, *LONG)
    assert all(isinstance(answer, Completion) for answer in answers)
    assert engine_core_pid(engine) != core


@pytest.mark.parametrize("spoilt", ["config.json", "model.safetensors"])
def test_a_model_that_does_not_load_fails_the_start_with_the_reason(
    tiny_model: Path, tmp_path: Path, spoilt: str
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / spoilt).write_text('{"model_type": "no-such-architecture"}')
    engine = VllmEngine(str(folder), device="cpu", log_path=tmp_path / "engine.log")

    with pytest.raises(EngineStartFailed) as caught:
        asyncio.run(engine.start())

    reason = {"config.json": "no-such-architecture", "model.safetensors": "Error"}[spoilt]
    assert "exited with status 1 before it was ready" in str(caught.value)
    assert reason in str(caught.value).partition("Last lines")[0]
    assert not (tmp_path / "engine.process.json").exists()


def test_a_pooling_model_answers_embeddings(tmp_path: Path) -> None:
    engine = VllmEngine(
        str(embedding_model_folder()),
        served_model_name="minilm",
        device="cpu",
        args={"runner": "pooling", "max-model-len": 256},
        log_path=tmp_path / "engine.log",
    )
    texts = ["The cat sat down.", "A kitten took a seat.", "Bonds fell on Monday."]
    bodies = [msgspec.json.encode({"model": "minilm", "input": text}) for text in texts]

    try:
        asyncio.run(engine.start())
        outcomes = ask(engine, *bodies, endpoint="/v1/embeddings")
        [too_long] = ask(
            engine, msgspec.json.encode({"input": "cat " * 999}), endpoint="/v1/embeddings"
        )
    finally:
        engine.stop()

    cat, kitten, bonds = (np.array(parse(outcome)["data"][0]["embedding"]) for outcome in outcomes)
    assert cat @ kitten > 0.5 > 0.3 > cat @ bonds
    assert all(isinstance(o, Completion) and o.usage.prompt_tokens > 3 for o in outcomes)
    assert isinstance(too_long, Failure)
    assert too_long.code == FailureCode.CONTEXT_LENGTH_EXCEEDED


# Last, as nobody starts again what the last of them kills.
@pytest.mark.parametrize("killed_by", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_engine_core_is_the_death_of_all_in_flight(
    engine: VllmEngine, killed_by: signal.Signals
) -> None:
    core = engine_core_pid(engine)

    async def kill_meanwhile() -> tuple[list[object], float]:
        calls = await submit_and_halt(engine, core)
        os.kill(core, killed_by)
        os.kill(core, signal.SIGCONT)
        began = time.monotonic()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        seconds = time.monotonic() - began
        await engine.disconnect()
        return list(outcomes), seconds

    outcomes, seconds = asyncio.run(kill_meanwhile())

    assert [type(outcome) for outcome in outcomes] == [EngineDied] * len(LONG)
    assert seconds < 40


async def submit_and_halt(engine: VllmEngine, core: int) -> list[asyncio.Task[Outcome]]:
    """Submit `LONG` and halt the core while it works on all of it, however slow this machine is."""
    for _ in range(10):
        calls = [
            asyncio.create_task(engine.answer("/v1/chat/completions", body, request_id=f"r{n}"))
            for n, body in enumerate(LONG)
        ]
        while await count_running(engine) < len(calls) and not any(c.done() for c in calls):
            await asyncio.sleep(0.01)
        os.kill(core, signal.SIGSTOP)
        # What it had answered before is delivered by the time the server answers twice.
        await count_running(engine)
        if await count_running(engine) == len(calls) and not any(call.done() for call in calls):
            return calls
        os.kill(core, signal.SIGCONT)
        await asyncio.gather(*calls)
    raise AssertionError("the core was never seen at work on everything")
