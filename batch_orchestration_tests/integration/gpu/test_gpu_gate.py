"""The gate where it acts: a batch waits for a device that is not fit, and pays nothing for it."""

import json
import sys
import threading
from contextlib import ExitStack, closing

import dagster as dg
import msgspec
import pynvml  # noqa: TID253 - to know whether this machine has a GPU
import pytest

from batch_orchestration.cli.context import person
from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.core.dead_letters import Selection
from batch_orchestration.dead_letters.actions import request_replay
from batch_orchestration.files.journal import read_journal
from batch_orchestration.gpu import health as gpu_health
from batch_orchestration.gpu.fences import fence_off
from batch_orchestration.gpu.nvml import read_gpus
from batch_orchestration.settings import Device, EngineKind
from batch_orchestration.store.operations import Operations, open_replays
from batch_orchestration_tests.integration.defs.test_assets import chunk_run
from batch_orchestration_tests.support.builders import NOW, make_input, make_settled_chunk
from batch_orchestration_tests.support.command_line import CommandLine
from batch_orchestration_tests.support.deployment import Deployment
from batch_orchestration_tests.support.fake_nvml import GIB, FakeGpu, FakeNvml


@pytest.fixture
def deployment(tmp_path, monkeypatch):
    """One that is configured for vLLM on CUDA."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpu_health, "PATIENCE_SECONDS", 0.0)
    with ExitStack() as stack:
        made = Deployment(
            tmp_path,
            engine=EngineKind.VLLM,
            device=Device.CUDA,
            model="org/model",
            served_model_name="simulated-model",
        )
        yield stack.enter_context(closing(made))


@pytest.fixture
def no_gpu():
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return str(error)
    pynvml.nvmlShutdown()
    pytest.skip("this machine has a GPU")


@pytest.fixture
def install(monkeypatch):
    def put(*devices):
        monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(*devices))

    return put


def admitted(deployment, name, content):
    """Admit a file while the device is still well; afterwards it is as it was."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pynvml", FakeNvml(FakeGpu()))
        return deployment.admit(name, content)


def test_a_file_waits_in_the_inbox_for_a_gpu_that_is_not_there(deployment, no_gpu):
    path = deployment.drop("a.jsonl", make_input(12))

    reason = deployment.reason("inbox_sensor")

    assert f"gpu_unhealthy, NVML says: {no_gpu}" in reason
    assert path.exists()


def test_a_batch_waits_for_a_gpu_that_is_not_there_and_spends_no_request(deployment, no_gpu):
    """With the real library: what an NVML that cannot be found means is decided here."""
    batch_id = admitted(deployment, "a.jsonl", make_input(12))

    reason = deployment.reason("dispatch_sensor")
    by_hand = deployment.run(chunk_run(batch_id, range(3)))

    assert f"gpu_unhealthy: NVML says: {no_gpu}" in reason
    assert by_hand.success
    assert not by_hand.get_asset_materialization_events()
    assert deployment.store.batch(batch_id).status is BatchStatus.IN_PROGRESS
    for number in range(3):
        journal = deployment.folder.journal_path(batch_id, number)
        assert not journal.exists() or list(read_journal(journal)) == []
    assert list((deployment.folder.logs / "engines").glob("*")) == []
    assert f"gpu_unhealthy: NVML says: {no_gpu}" in deployment.reason("dispatch_sensor")


def test_it_goes_on_by_itself_when_the_device_is_well_again(deployment, install, monkeypatch):
    monkeypatch.setattr("batch_orchestration.dispatch.run_planning.UNFIT_SECONDS", 0.0)
    device = FakeGpu(processes={4711: 30 * GIB})
    install(device)
    batch_id = admitted(deployment, "a.jsonl", make_input(12))
    waiting = deployment.reason("dispatch_sensor")
    for _ in range(4):
        assert deployment.run(chunk_run(batch_id, range(3))).success

    device.processes.clear()
    (request,) = deployment.requests("dispatch_sensor")

    assert "gpu_unhealthy: GPU 0 (NVIDIA Test): pid 4711" in waiting
    assert request.job_name == "answer_chunks"
    assert request.tags["batch"] == batch_id


def test_a_device_that_only_the_run_finds_unfit_is_not_tried_over_and_over(deployment, install):
    """It may see another one: of another container, or of the launchpad."""
    device = FakeGpu(temperature=99)
    install(device)
    batch_id = admitted(deployment, "a.jsonl", make_input(12))
    assert deployment.run(chunk_run(batch_id, range(3))).success
    device.temperature = 40

    assert "found its device unfit; it is tried again in" in deployment.reason("dispatch_sensor")


def test_what_needs_no_engine_is_delivered_meanwhile(deployment, install):
    install(FakeGpu(temperature=99))
    batch_id = admitted(deployment, "a.jsonl", make_input(12))
    admitted(deployment, "b.jsonl", make_input(3))
    for chunk in deployment.folder.read_plan(batch_id).chunks:
        settled = make_settled_chunk(chunk)
        deployment.store.commit_chunk(
            batch_id, chunk.number, settled, run_id="r", at=NOW, seconds=1.0
        )

    (request,) = deployment.requests("dispatch_sensor")

    assert (request.job_name, request.partition_key) == ("deliver_batch", batch_id)


def test_a_driver_that_hangs_does_not_hang_the_tick(deployment, monkeypatch):
    admitted(deployment, "a.jsonl", make_input(3))
    release = threading.Event()
    monkeypatch.setattr(gpu_health, "_reader", gpu_health.GpuReader(release.wait))
    monkeypatch.setattr(gpu_health.gpu_problem, "__kwdefaults__", {"seconds": 0.1})

    reason = deployment.reason("dispatch_sensor")

    release.set()
    assert "gpu_unhealthy: NVML has not answered for" in reason


def test_a_replay_waits_too_and_pays_nothing(deployment, install):
    install(FakeGpu(remapped=(0, 0, 0, 1)))
    batch_id = admitted(deployment, "a.jsonl", make_input(3))
    (chunk,) = deployment.folder.read_plan(batch_id).chunks
    settled = make_settled_chunk(chunk, failing=(1,))
    deployment.store.commit_chunk(batch_id, 0, settled, run_id="r", at=NOW, seconds=1.0)
    folder, store = deployment.folder, deployment.store
    request_replay(batch_id, Selection(), folder=folder, store=store, actor="me", at=NOW)

    reason = deployment.reason("replay_sensor")
    config = {"ops": {"replay_dead_letters": {"config": {"batch": batch_id, "replay": 1}}}}
    by_hand = deployment.run(dg.RunRequest(job_name="replay_failed_requests", run_config=config))

    assert "gpu_unhealthy: GPU 0" in reason
    assert by_hand.success
    assert open_replays(folder) == [(batch_id, 1)]
    operations = Operations(folder, batch_id)
    assert list(operations.outcomes(operations.get(1))) == []


def test_a_cpu_that_was_chosen_asks_for_runs_whatever_nvml_says(tmp_path, install):
    install(FakeGpu(temperature=99))
    values = {"engine": EngineKind.VLLM, "served_model_name": "simulated-model"}
    with closing(Deployment(tmp_path, device=Device.CPU, **values)) as deployment:
        deployment.admit("a.jsonl", make_input(3))

        assert [r.job_name for r in deployment.requests("dispatch_sensor")] == ["answer_chunks"]


def test_the_log_of_a_run_says_that_no_gate_applies(tmp_path, caplog):
    with closing(Deployment(tmp_path)) as deployment:
        batch_id = deployment.admit("a.jsonl", make_input(2))
        with caplog.at_level("INFO", logger="batch_orchestration"):
            deployment.run(chunk_run(batch_id, range(1)))

    said = [record.message for record in caplog.records if "no GPU gate" in record.message]
    assert said == ["no GPU gate applies: BATCH_ENGINE=simulated uses no device of this machine"]


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def cli(deployment, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, value in {"DATA_DIR": deployment.folder.root, "MODEL": "org/model"}.items():
        monkeypatch.setenv(f"BATCH_{name}", str(value))
    return CommandLine(deployment.folder)


def test_the_command_shows_a_healthy_device_and_ends_with_0(cli, install):
    install(FakeGpu())

    text = cli.run("gpu").stdout

    assert all(fact in text for fact in ("GPU 0", "NVIDIA Test", "GPU-11111111-aaaa"))
    assert "79.00 GiB" in text
    assert "healthy: an engine may be started" in text


def test_the_command_ends_with_1_and_the_reasons(cli, install):
    install(FakeGpu(temperature=99, recovery=1))

    text = cli.run("gpu", exit_code=1).stdout
    answer = cli.json("gpu", exit_code=1)

    assert "unhealthy: GPU 0 (NVIDIA Test): 99 °C, 87 °C allowed" in text
    assert len(answer["reasons"]) == 2
    assert answer["devices"][0]["recovery_action"] == "gpu_reset"


def test_a_person_clears_a_fence_and_is_remembered(deployment, cli, install):
    install(FakeGpu())
    facts = read_gpus()[0]
    fence_off(deployment.folder, facts, "it fell", True, by="run-1")
    elsewhere = msgspec.structs.replace(facts, uuid="GPU-2")
    fence_off(deployment.folder, elsewhere, "it fell", True, by="run-1")

    fenced = cli.run("gpu", exit_code=1).stdout
    unknown = cli.run("gpu", "--clear", "GPU-9", exit_code=1)
    cleared = cli.run("gpu", "--clear", facts.uuid)

    assert f"gpu --clear {facts.uuid}" in fenced
    assert f"fenced are: {facts.uuid}, GPU-2" in unknown.stderr
    assert "not shown: GPU-2: fenced since" in fenced
    assert "It was: it fell" in cleared.stderr
    assert "healthy: an engine may be started" in cleared.stdout
    (file,) = (deployment.folder.fences / "cleared").iterdir()
    record = json.loads(file.read_bytes())
    assert (record["cleared_by"], record["reason"]) == (person(), "it fell")


def test_the_command_without_a_gpu_ends_with_1(cli, no_gpu):
    result = cli.run("gpu", exit_code=1)

    assert f"unhealthy: NVML says: {no_gpu}" in result.stdout


def test_the_command_on_a_cpu_says_that_there_is_no_gate(cli, no_gpu, monkeypatch):
    monkeypatch.setenv("BATCH_DEVICE", "cpu")

    result = cli.run("gpu")

    assert "no GPU gate applies: BATCH_DEVICE=cpu was chosen" in result.stdout
