"""A refused key, from the first tick to the delivered batch: only the key is mended by anyone."""

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.core.errors import EngineDied
from batch_orchestration.files.journal import replay_journal
from batch_orchestration.queue.files import read_needs_attention, read_queue
from batch_orchestration.settings import EngineKind
from batch_orchestration_tests.support.builders import make_input
from batch_orchestration_tests.support.deployment import Deployment
from batch_orchestration_tests.support.gate_server import GateServer, error
from batch_orchestration_tests.support.scripted_engine import ScriptedEngine

REVOKED = error(401, "Incorrect API key provided: sk-1\nSecond line")


@pytest.fixture
def server() -> Iterator[GateServer]:
    server = GateServer()
    yield server
    server.close()


@pytest.fixture
def deployment(tmp_path: Path, server: GateServer) -> Iterator[Deployment]:
    values = {"engine": EngineKind.REMOTE, "base_url": server.url, "model_aliases": {}}
    with closing(Deployment(tmp_path, **values)) as deployment:
        yield deployment


def pause_between_looks(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    for name in ("FIRST_PAUSE", "LONGEST_PAUSE"):
        monkeypatch.setattr(f"batch_orchestration.engines.access.{name}", seconds)


def work(deployment: Deployment) -> int:
    """One tick of dispatch and the runs that it asks for; return how many."""
    requests = deployment.requests("dispatch_sensor")
    for request in requests:
        assert deployment.run(request).success
    return len(requests)


def test_a_batch_waits_for_a_key_and_goes_on_by_itself(
    deployment: Deployment, server: GateServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pause_between_looks(monkeypatch, 1000.0)
    batch_id = deployment.admit("a.jsonl", make_input(12))
    server.script = lambda asked, before: REVOKED if before >= 3 else None
    assert work(deployment) >= 1

    refused = len(server.asked)
    reasons = [deployment.reason("dispatch_sensor") for _ in range(8)]

    assert len(server.asked) == refused, "no look before its time"
    for told in ("HTTP 401: Incorrect API key provided: sk-1", server.url, "BATCH_API_KEY"):
        assert told in reasons[-1]
    assert "looked at again in" in reasons[-1]
    (need,) = read_needs_attention(deployment.folder) or ()
    assert need.batch_id == batch_id
    assert "HTTP 401" in need.reason
    (entry,) = read_queue(deployment.folder).entries
    assert (entry.reason, "HTTP 401" in entry.detail) == ("engine_refuses_us", True)
    for number in range(3):
        path = deployment.folder.journal_path(batch_id, number)
        state = replay_journal(path, batch_id, number)
        assert (state.failed_attempts, state.suspects) == ({}, {})

    pause_between_looks(monkeypatch, 0.0)
    assert "HTTP 401" in deployment.reason("dispatch_sensor")
    assert len(server.asked) == refused + 1, "a look is one request"
    server.script = lambda asked, before: None
    deadline = time.monotonic() + 60
    while deployment.store.batch(batch_id).status is not BatchStatus.COMPLETED:
        assert time.monotonic() < deadline
        work(deployment)
    assert deployment.store.batch(batch_id).completed == 12
    assert work(deployment) == 0
    assert read_needs_attention(deployment.folder) == ()


def test_more_refused_runs_than_a_batch_may_fail_leave_it_to_go_on_by_itself(
    deployment: Deployment, server: GateServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gate that lets the look through and nothing else."""
    pause_between_looks(monkeypatch, 0.0)
    batch_id = deployment.admit("a.jsonl", make_input(5))
    server.pages = lambda path: REVOKED
    for _ in range(5):
        work(deployment)
        server.pages = lambda path: None
        server.script = lambda asked, before: REVOKED

    server.script = lambda asked, before: None
    for _ in range(4):
        work(deployment)

    assert deployment.store.batch(batch_id).status is BatchStatus.COMPLETED
    assert deployment.store.batch(batch_id).completed == 5


def test_a_dying_engine_asks_a_person_after_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ScriptedEngine(lambda body, times: EngineDied("sick"))
    monkeypatch.setattr("batch_orchestration.defs.resources.GpuResource._build", lambda *_: engine)
    with closing(Deployment(tmp_path)) as deployment:
        deployment.admit("a.jsonl", make_input(20))
        (request, *_) = deployment.requests("dispatch_sensor")
        assert not deployment.run(request).success

        asked = deployment.reason("dispatch_sensor")

        assert engine.starts <= 3
        assert "waits for a person" in asked
        assert "no request is to blame" in asked
        assert read_needs_attention(deployment.folder)
