"""Fences on disk: durable, read by the gate, and in doubt they stand."""

import sys

import msgspec
import pytest

from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.gpu import fences as fencing
from batch_orchestration.gpu.facts import GpuFacts
from batch_orchestration.gpu.faults import Fence
from batch_orchestration.gpu.fences import (
    RECOVERY_CHECK,
    fence_off,
    fence_path,
    read_fences,
    standing_fences,
)
from batch_orchestration.gpu.health import check_gpu, gpu_problem
from batch_orchestration.settings import Settings
from batch_orchestration_tests.support.fake_nvml import FakeGpu, FakeNvml

SICK = GpuFacts(index=0, uuid="GPU-1", name="Test", ecc_uncorrectable_errors=2)
WELL = GpuFacts(index=0, uuid="GPU-1", name="Test", ecc_uncorrectable_errors=0)


@pytest.fixture
def folder(tmp_path):
    return DataFolder(tmp_path)


@pytest.fixture
def boot(monkeypatch):
    """Restart the machine."""

    def restart(name):
        monkeypatch.setattr(fencing, "boot_id", lambda: name)

    restart("boot-1")
    return restart


def test_a_fence_keeps_what_was_known_and_stands_while_the_fault_does(folder, boot):
    assert fence_off(folder, SICK, "2 errors", False, by="run-1")

    fence = read_fences(folder)["GPU-1"]
    assert (fence.reason, fence.by, fence.boot_id) == ("2 errors", "run-1", "boot-1")
    assert fence.facts == SICK
    assert fence.at > 0
    (why,) = standing_fences(folder, [SICK]).values()
    assert why.startswith("fenced since 20")
    assert "UTC: 2 errors (2 uncorrectable memory errors (ECC)" in why
    assert fence_path(folder, "GPU-1").exists()


def test_the_first_fence_stands(folder, boot):
    fence_off(folder, SICK, "first", False, by="run-1")

    assert fence_off(folder, WELL, "second", False, by="run-2")
    assert read_fences(folder)["GPU-1"].reason == "first"


def test_a_recovered_device_is_freed_and_that_is_kept(folder, boot):
    fence_off(folder, SICK, "2 errors", False, by="run-1")

    assert standing_fences(folder, [WELL]) == {}
    assert read_fences(folder) == {}
    (record,) = (folder.fences / "cleared").iterdir()
    cleared = msgspec.json.decode(record.read_bytes(), type=Fence)
    assert (cleared.cleared_by, cleared.reason) == (RECOVERY_CHECK, "2 errors")


def test_a_lost_device_is_freed_by_a_restart_alone(folder, boot):
    fence_off(folder, SICK, "lost", True, by="run-1")

    before = standing_fences(folder, [WELL])
    boot("boot-2")
    unseen = standing_fences(folder, [])

    assert "nothing shows that it was reset" in before["GPU-1"]
    assert unseen["GPU-1"].endswith("lost")
    assert standing_fences(folder, [WELL]) == {}


def test_an_instance_fences_its_whole_device(folder, boot):
    instance = GpuFacts(index=0, uuid="MIG-1", name="T", mig_instance=True, device_uuid="GPU-1")
    fence_off(folder, instance, "fault", False, by="run-1")

    assert list(standing_fences(folder, [WELL])) == ["GPU-1"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b'{"uuid": 3}', b"[]"])
def test_a_fence_that_cannot_be_read_stands_even_after_a_restart(folder, boot, content):
    path = fence_path(folder, "GPU-1")
    path.parent.mkdir()
    path.write_bytes(content)
    boot("boot-2")

    (why,) = standing_fences(folder, [WELL]).values()

    assert "is unreadable" in why
    assert path.read_bytes() == content


def test_fences_that_nobody_can_list_stand_for_every_device(folder):
    folder.fences.parent.mkdir(exist_ok=True)
    folder.fences.write_text("not a folder")

    assert "it is unknown" in standing_fences(folder, [WELL])["GPU-1"]


def test_a_fence_that_cannot_be_removed_stands(folder, boot):
    fence_off(folder, SICK, "2 errors", False, by="run-1")
    (folder.fences / "cleared").write_text("not a folder")

    assert "cannot be removed" in standing_fences(folder, [WELL])["GPU-1"]
    assert list(read_fences(folder)) == ["GPU-1"]


def test_a_fence_that_cannot_be_written_is_said(folder, caplog):
    folder.fences.parent.mkdir(exist_ok=True)
    folder.fences.write_text("not a folder")

    assert not fence_off(folder, SICK, "2 errors", False, by="run-1")
    assert "cannot be fenced" in caplog.text


# --- the gate -------------------------------------------------------------------------------------


@pytest.fixture
def settings(folder):
    return Settings(engine="vllm", device="cuda", data_dir=folder.root, _env_file=None)


@pytest.fixture
def install(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def put(*devices):
        monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(*devices))

    return put


def test_the_gate_names_the_fence_and_what_clears_it(folder, boot, settings, install):
    install(FakeGpu(uuid="GPU-1"))
    fence_off(folder, WELL, "it fell", True, by="run-1")

    problem = gpu_problem(settings)

    assert "GPU 0 (NVIDIA Test): fenced since" in problem
    assert "it fell (nothing shows that it was reset since)" in problem
    assert "python -m batch_orchestration gpu --clear GPU-1" in problem
    boot("boot-2")
    assert gpu_problem(settings) is None
    assert read_fences(folder) == {}


def test_only_the_fenced_device_is_kept_from_work(folder, boot, settings, install, monkeypatch):
    install(FakeGpu(uuid="GPU-1"), FakeGpu(uuid="GPU-2"))
    fence_off(folder, WELL, "it fell", True, by="run-1")

    first = check_gpu(settings).healthy
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")

    assert not first
    assert check_gpu(settings).healthy
    assert list(read_fences(folder)) == ["GPU-1"]
