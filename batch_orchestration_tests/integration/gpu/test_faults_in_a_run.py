"""Care during work, on whole runs: devices that heat up, break, and are well again.

The deployment is one for vLLM on CUDA, with its gate, its watch and a made-up NVML below them. Only
the engine is the simulated one: it has the same protocol, and needs no device.
"""

import json
import sys
from collections import Counter
from contextlib import closing

import pytest

from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.defs.resources import GpuResource
from batch_orchestration.defs.runs import UNFIT_TAG
from batch_orchestration.engines.openai_server import ServerOptions
from batch_orchestration.engines.processes.records import is_running, read_record
from batch_orchestration.engines.simulated.engine import SimulatedEngine
from batch_orchestration.files.journal import read_journal
from batch_orchestration.gpu import health as gpu_health
from batch_orchestration.gpu import thermal
from batch_orchestration.gpu.fences import read_fences
from batch_orchestration.gpu.health import require_healthy_gpu
from batch_orchestration.gpu.samples import read_samples
from batch_orchestration.settings import Device, EngineKind
from batch_orchestration_tests.integration.defs.test_assets import chunk_run
from batch_orchestration_tests.support.builders import make_input
from batch_orchestration_tests.support.command_line import CommandLine
from batch_orchestration_tests.support.deployment import Deployment
from batch_orchestration_tests.support.fake_nvml import GPU_IS_LOST, FakeGpu, FakeNvml

REQUESTS, WINDOW = 60, 8


class LiveGpu(FakeGpu):
    """A device whose facts depend on what the run that uses it does."""

    at_work = staticmethod(lambda: 0)
    celsius = staticmethod(lambda in_flight: 50)
    errors = staticmethod(lambda in_flight: 0)

    @property
    def temperature(self):
        return self.celsius(self.at_work())

    @temperature.setter
    def temperature(self, value):
        pass

    @property
    def ecc(self):
        return self.errors(self.at_work())

    @ecc.setter
    def ecc(self, value):
        pass


@pytest.fixture
def gpu(monkeypatch):
    gpu = LiveGpu()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(gpu))
    return gpu


class CountedEngine(SimulatedEngine):
    """Knows how many requests it has."""

    has = 0

    async def answer(self, endpoint, body, *, request_id):
        self.has += 1
        try:
            return await super().answer(endpoint, body, request_id=request_id)
        finally:
            self.has -= 1


@pytest.fixture
def deployment(tmp_path, monkeypatch, gpu):
    def build(resource, log_path, settings):
        engine = CountedEngine(
            log_path=log_path,
            control_path=settings.data_dir / "simulated.json",
            before_start=lambda: require_healthy_gpu(settings),
            options=ServerOptions(connections=settings.in_flight),
        )
        gpu.at_work = lambda: engine.has
        return engine

    monkeypatch.setattr(GpuResource, "_build", build)
    monkeypatch.setattr(gpu_health, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr("batch_orchestration.dispatch.run_planning.UNFIT_SECONDS", 0.0)
    monkeypatch.setattr("batch_orchestration.inference.window.window.LOOK_SECONDS", 0.02)
    monkeypatch.setattr(thermal, "SHRINK_SECONDS", 0.15)
    monkeypatch.setattr(thermal, "CALM_SECONDS", 0.3)
    deployment = Deployment(
        tmp_path,
        engine=EngineKind.VLLM,
        device=Device.CUDA,
        model="org/model",
        served_model_name="simulated-model",
        in_flight=WINDOW,
        sample_seconds=0.03,
    )
    (deployment.folder.root / "simulated.json").write_text('{"latency_seconds": 0.2}')
    with closing(deployment):
        yield deployment


@pytest.fixture
def batch_id(deployment):
    return deployment.admit("a.jsonl", make_input(REQUESTS))


def run(deployment, batch_id):
    return deployment.run(chunk_run(batch_id, range(REQUESTS // 5)))


def answered_once(deployment, batch_id):
    """Whether every request has one answer, of one attempt."""
    settled = list(deployment.store.settled(batch_id))
    return [(s.index, s.attempts, bool(s.failed_attempts)) for s in settled] == [
        (index, 1, False) for index in range(REQUESTS)
    ]


def engines_at_work(deployment):
    records = (deployment.folder.logs / "engines").glob("*.process.json")
    found = [read_record(path) for path in records]
    return [record for record in found if record is not None and is_running(record.leader)]


def test_a_device_that_gets_hot_gets_less_work_then_none_and_then_all_again(
    deployment, gpu, batch_id
):
    """It is hot from its first request on, until it has had none for a while."""
    seen = ""

    def celsius(in_flight):
        nonlocal seen
        seen += "1" if in_flight else "0"
        worked = seen.lstrip("0")
        return 95 if worked and "00000" not in worked else 50

    gpu.celsius = celsius

    result = run(deployment, batch_id)

    assert result.success
    assert deployment.store.batch(batch_id).completed == REQUESTS
    assert answered_once(deployment, batch_id)
    samples = read_samples(deployment.folder, batch_id)
    hot = [s for s in samples if s.gpus[0].temperature_celsius == 95]
    later = [s for s in samples if s.at > hot[-1].at]
    assert (hot[0].in_flight > 0, hot[-1].in_flight) == (True, 0)
    assert max(s.in_flight for s in later) > 1
    assert deployment.store.query("SELECT DISTINCT gpu FROM gpu_samples")[1] == [(gpu.uuid,)]
    assert read_fences(deployment.folder) == {}


def test_errors_of_memory_end_the_run_with_all_answers_kept_and_fence_the_device(
    deployment, gpu, batch_id, monkeypatch
):
    errors = 0

    def break_at_work(in_flight):
        nonlocal errors
        errors = errors or 2 * bool(in_flight)
        return errors

    gpu.errors = break_at_work

    result = run(deployment, batch_id)
    waiting = deployment.reason("dispatch_sensor")
    by_hand = run(deployment, batch_id)

    # Ended without failure, and drained: whatever was submitted is answered.
    assert result.success
    assert by_hand.success
    run_id = result.dagster_run.run_id
    tags = deployment.instance.get_run_by_id(run_id).tags
    assert tags[UNFIT_TAG] == run_id
    entries = [
        entry
        for number in range(REQUESTS // 5)
        if (path := deployment.folder.journal_path(batch_id, number)).exists()
        for entry in read_journal(path)
    ]
    assert 0 < len(entries) < REQUESTS
    assert Counter(entry.provenance.run_id for entry in entries) == {run_id: len(entries)}
    assert all(entry.attempts == 1 and not entry.failed_attempts for entry in entries)
    assert engines_at_work(deployment) == []
    # Fenced, and waiting for it.
    fence = read_fences(deployment.folder)[gpu.uuid]
    assert (fence.by, fence.facts.ecc_uncorrectable_errors) == (run_id, 2)
    assert "2 uncorrectable memory errors (ECC) while it worked" in fence.reason
    assert f"python -m batch_orchestration gpu --clear {gpu.uuid}" in waiting
    assert deployment.store.batch(batch_id).status is BatchStatus.IN_PROGRESS

    # Reset: its count begins anew, which the next look at the gate sees.
    gpu.errors = lambda in_flight: 0
    (request,) = deployment.requests("dispatch_sensor")
    assert deployment.run(request).success

    assert read_fences(deployment.folder) == {}
    (record,) = (deployment.folder.fences / "cleared").iterdir()
    assert json.loads(record.read_bytes())["cleared_by"] == "recovery check"
    assert answered_once(deployment, batch_id)
    assert deployment.store.batch(batch_id).completed == REQUESTS


def test_a_device_that_is_lost_waits_for_a_person_and_then_goes_on(
    deployment, gpu, batch_id, monkeypatch, tmp_path
):
    gpu.errors = lambda in_flight: GPU_IS_LOST if in_flight else 0

    assert run(deployment, batch_id).success
    gpu.errors = lambda in_flight: 0
    # It is there again, but nothing shows that it is the better for it.
    waiting = deployment.reason("dispatch_sensor")
    monkeypatch.chdir(tmp_path)
    for name, value in {"DATA_DIR": deployment.folder.root, "MODEL": "org/model"}.items():
        monkeypatch.setenv(f"BATCH_{name}", str(value))
    CommandLine(deployment.folder).run("gpu", "--clear", gpu.uuid)
    (request,) = deployment.requests("dispatch_sensor")

    assert "it has fallen off the bus (nothing shows that it was reset since)" in waiting
    assert deployment.run(request).success
    assert answered_once(deployment, batch_id)
