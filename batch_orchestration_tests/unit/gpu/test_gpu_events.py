"""Xids are heard by who listens, and missed by nobody who does."""

import pytest

from batch_orchestration.core.errors import GpuUnreadable
from batch_orchestration.gpu.nvml import ListeningReader, read_gpus
from batch_orchestration_tests.support.fake_nvml import (
    GPU_IS_LOST,
    NO_LIBRARY,
    NOT_SUPPORTED,
    FakeGpu,
)


def xids(reader):
    return [gpu.xids for gpu in reader.read()]


def test_every_xid_since_the_first_look_is_told_with_its_device(install):
    first, second = FakeGpu(uuid="GPU-1", xids=[48]), FakeGpu(uuid="GPU-2")
    install(first, second)
    reader = ListeningReader()

    before = xids(reader)
    second.xids += [13, 79]
    heard = xids(reader)
    first.xids += [63]

    assert before == [(), ()]
    assert heard == [(), (13, 79)]
    assert xids(reader) == [(63,), (13, 79)]
    assert [gpu.xids for gpu in read_gpus()] == [(), ()]


def test_an_instance_is_told_the_xids_of_its_device(install, monkeypatch):
    whole = FakeGpu(mig=(1, 1))
    whole.instances["MIG-5"] = FakeGpu(uuid="MIG-5", parent=whole)
    install(whole)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-5")
    reader = ListeningReader()
    reader.read()
    whole.xids += [95]

    assert xids(reader) == [(95,)]


@pytest.mark.parametrize("error", [NOT_SUPPORTED, GPU_IS_LOST], ids=str)
def test_a_device_that_cannot_be_listened_to_is_read_all_the_same(install, error, caplog):
    caplog.set_level("INFO")
    second = FakeGpu(uuid="GPU-2")
    install(FakeGpu(uuid="GPU-1", events=error), second)
    reader = ListeningReader()
    reader.read()
    second.xids += [79]

    assert xids(reader) == [(), (79,)]
    assert "cannot listen for Xids of GPU 0" in caplog.text


def test_without_nvml_it_is_as_unreadable_as_ever_and_listens_once_it_is_there(install):
    nvml = install(FakeGpu(), init=NO_LIBRARY)
    reader = ListeningReader()
    with pytest.raises(GpuUnreadable, match="Shared Library Not Found"):
        reader.read()
    nvml.init = None
    reader.read()
    nvml.devices[0].xids += [79]

    assert xids(reader) == [(79,)]
    assert nvml.open == 1


def test_a_lost_device_does_not_hide_what_was_heard(install):
    device = FakeGpu()
    install(device)
    reader = ListeningReader()
    reader.read()
    device.xids += [79]
    device.handle = GPU_IS_LOST
    with pytest.raises(GpuUnreadable) as raised:
        reader.read()
    device.handle = None

    assert raised.value.lost == 0
    assert xids(reader) == [(79,)]


def test_the_real_library_on_a_machine_without_a_gpu_is_unreadable():
    try:
        found = read_gpus()
    except GpuUnreadable as error:
        with pytest.raises(GpuUnreadable, match=str(error)):
            ListeningReader().read()
    else:
        assert [gpu.uuid for gpu in ListeningReader().read()] == [gpu.uuid for gpu in found]
