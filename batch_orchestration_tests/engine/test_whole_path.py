"""From a dropped file to output and error files, on real vLLM with a small real model."""

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.delivery.assembly import assemble
from batch_orchestration.engines.vllm.engine import VllmEngine
from batch_orchestration_tests.support.builders import NOW, make_line
from batch_orchestration_tests.support.engine_processes import engine_core_pid
from batch_orchestration_tests.support.packaged_models import REPOSITORY, chat_model_folder
from batch_orchestration_tests.support.workbench import Workbench

pytestmark = pytest.mark.engine

REAL_FILES = REPOSITORY.parent / "shared" / "batches"
CONTEXT_TOKENS = 1024


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    engine = VllmEngine(
        str(chat_model_folder()),
        device="cpu",
        args={"max-model-len": CONTEXT_TOKENS, "kv-cache-memory-bytes": 2**29},
        log_path=tmp_path_factory.mktemp("smollm2") / "engine.log",
    )
    yield engine
    engine.stop()


class WholePath:
    """A data folder in which files are answered by the engine."""

    def __init__(self, root: Path, engine: VllmEngine) -> None:
        self.bench = Workbench(root, clock=time.time, model_aliases={"*": "smollm2-135m-instruct"})
        self.engine = engine

    def answer(self, name: str, content: bytes, **policy: Any) -> BatchPlan:
        """Admit the file, answer it, write its output; return its plan."""
        plan = self.bench.plan_of(name, content)
        served = "smollm2-135m-instruct"
        values = {"model_aliases": {"*": served}, "max_tokens_cap": 8, "in_flight": 32} | policy
        self.bench.run(plan, self.engine, answer_settings=plan.settings, **values)
        assemble(
            plan.batch_id,
            folder=self.bench.folder,
            store=self.bench.store,
            clock=lambda: NOW,
        )
        return plan

    def lines(self, plan: BatchPlan, name: str) -> list[dict[str, Any]]:
        """The lines of an output file."""
        path = self.bench.folder.outbox_path(plan.batch_id) / name
        return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path: Path, engine: VllmEngine) -> WholePath:
    return WholePath(tmp_path, engine)


@pytest.mark.parametrize(
    ("name", "completed", "failed"),
    [
        ("vllm_openai_example_batch.jsonl", 2, 0),
        ("litellm_batch_small.jsonl", 3, 0),
        ("production_stack_batch.jsonl", 2, 0),
        ("aibrix_sample_job_input.jsonl", 10, 0),
        ("batchlocallm_demo_10.jsonl", 10, 0),
        ("tandemn_duplicate_ids_input.jsonl", 5, 95),
    ],
)
def test_real_batch_files_of_other_projects_are_answered(
    path: WholePath, name: str, completed: int, failed: int
) -> None:
    file = REAL_FILES / name
    if not file.exists():
        pytest.skip("the real batch files lie beside the checkout, and there are none")

    plan = path.answer(name, file.read_bytes())

    output, errors = path.lines(plan, "output.jsonl"), path.lines(plan, "errors.jsonl")
    assert (len(output), len(errors)) == (completed, failed)
    asked = [
        json.loads(line)["custom_id"] for line in file.read_bytes().split(b"\n") if line.strip()
    ]
    assert sorted(line["custom_id"] for line in output + errors) == sorted(asked)
    assert all(line["response"]["body"]["usage"]["completion_tokens"] <= 8 for line in output)


def test_a_model_that_knows_the_answer_gives_it(path: WholePath) -> None:
    question = "What is the capital of France? Answer with one word."
    body = {"model": "any", "messages": [{"role": "user", "content": question}], "temperature": 0}

    plan = path.answer("france.jsonl", make_line(0, body=body))

    (line,) = path.lines(plan, "output.jsonl")
    assert "Paris" in line["response"]["body"]["choices"][0]["message"]["content"]


def test_what_the_engine_refuses_costs_one_row_each_with_its_own_words(path: WholePath) -> None:
    def chat(text: str = "Say yes.", **fields: Any) -> dict[str, Any]:
        return {"model": "any", "messages": [{"role": "user", "content": text}], **fields}

    impossible = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nil"}}}
    bodies = [
        chat(),
        chat("word " * 2 * CONTEXT_TOKENS),
        chat(temperature=-1),
        chat(response_format=impossible),
        {"model": "any", "messages": []},
        chat("Say no."),
    ]

    plan = path.answer(
        "refused.jsonl", b"".join(make_line(n, body=body) for n, body in enumerate(bodies))
    )

    output, errors = path.lines(plan, "output.jsonl"), path.lines(plan, "errors.jsonl")
    assert [line["custom_id"] for line in output] == ["request-0", "request-5"]
    assert [line["custom_id"] for line in errors] == [f"request-{n}" for n in (1, 2, 3, 4)]
    assert [line["response"]["status_code"] for line in errors] == [400] * 4
    assert [line["error"] for line in errors] == [None] * 4
    assert all(line["response"]["body"]["error"]["message"] for line in errors)
    codes = path.bench.store.failure_counts(plan.batch_id)
    assert codes == {"engine_refused": 3, "context_length_exceeded": 1}


def test_more_tokens_than_the_context_holds_are_refused_unless_capped(path: WholePath) -> None:
    body = {"model": "any", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 10**6}

    plan = path.answer("greedy.jsonl", make_line(0, body=body), max_tokens_cap=None)

    (line,) = path.lines(plan, "errors.jsonl")
    assert line["response"]["status_code"] == 400


def test_a_model_that_is_not_served_is_said_so(path: WholePath) -> None:
    plan = path.answer("unknown.jsonl", make_line(0), model_aliases={})

    (line,) = path.lines(plan, "errors.jsonl")
    assert line["response"]["status_code"] == 404
    assert path.bench.store.failure_counts(plan.batch_id) == {"model_not_found": 1}


def test_a_batch_survives_the_death_of_the_engine_core(path: WholePath) -> None:
    body = {"messages": [{"role": "user", "content": "Count."}], "ignore_eos": True}
    content = b"".join(make_line(n, body=body | {"model": "any", "seed": n}) for n in range(60))
    asyncio.run(path.engine.start())
    asyncio.run(path.engine.disconnect())
    server = path.engine.process.pid
    core = engine_core_pid(path.engine)

    def kill_in_mid_batch() -> None:
        time.sleep(3)
        os.kill(core, signal.SIGKILL)

    killer = threading.Thread(target=kill_in_mid_batch)
    killer.start()
    plan = path.answer("killed.jsonl", content, max_tokens_cap=16, in_flight=16)
    killer.join()

    assert path.engine.process.pid != server, "the engine was not killed in mid-batch"
    assert [line["custom_id"] for line in path.lines(plan, "output.jsonl")] == [
        f"request-{n}" for n in range(60)
    ]
    assert path.lines(plan, "errors.jsonl") == []
