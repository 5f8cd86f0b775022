"""An NVML that tests make up, in place of the real one."""

import sys

import pytest

from batch_orchestration_tests.support.fake_nvml import FakeNvml


@pytest.fixture
def install(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def put(*devices, **fields):
        nvml = FakeNvml(*devices, **fields)
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        return nvml

    return put
