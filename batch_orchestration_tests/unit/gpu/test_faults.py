"""Fences come down by what a device can be seen to have gone through, and by nothing less."""

import msgspec
import pytest

from batch_orchestration.gpu.facts import GpuFacts
from batch_orchestration.gpu.faults import Fence, holds_because

WELL = GpuFacts(
    index=0,
    uuid="GPU-1",
    name="Test",
    ecc_uncorrectable_errors=0,
    remap_pending=False,
    remap_failed=False,
    recovery_action="none",
)


def facts(**changed):
    return msgspec.structs.replace(WELL, **changed)


def fence(then, *, boot_id="boot-1"):
    return Fence(uuid="GPU-1", at=1.0, reason="r", by="run", boot_id=boot_id, facts=then)


@pytest.mark.parametrize(
    ("then", "now", "boot", "holds"),
    [
        # The count began anew: the device was reset, or its driver loaded again.
        (facts(ecc_uncorrectable_errors=2), WELL, "boot-1", None),
        # The machine was restarted.
        (facts(remap_pending=True), WELL, "boot-2", None),
        (facts(recovery_action="node_reboot"), WELL, "boot-2", None),
        (None, WELL, "boot-2", None),
        # A card that tells nothing of all that.
        (
            GpuFacts(index=0, uuid="GPU-1", name="T"),
            GpuFacts(index=0, uuid="GPU-1", name="T"),
            "boot-2",
            None,
        ),
        # A fault that merely no longer shows.
        (facts(remap_pending=True), WELL, "boot-1", "nothing shows that it was reset"),
        (facts(recovery_action="gpu_reset"), WELL, "boot-1", "nothing shows that it was reset"),
        (None, WELL, "boot-1", "nothing shows that it was reset"),
        # The fault is still there, or another one is.
        (facts(ecc_uncorrectable_errors=2), facts(ecc_uncorrectable_errors=1), "boot-2", "1 unc"),
        (facts(ecc_uncorrectable_errors=2), facts(remap_pending=True), "boot-2", "remapped"),
        (facts(ecc_uncorrectable_errors=2), facts(remap_failed=True), "boot-2", "replaced"),
        (facts(remap_pending=True), facts(recovery_action="bus_reset"), "boot-2", "bus_reset"),
        # What the device says cannot be, or is not said any more.
        (None, facts(temperature_celsius=-99), "boot-2", "nonsense"),
        (
            facts(ecc_uncorrectable_errors=2),
            facts(ecc_uncorrectable_errors=None),
            "boot-2",
            "no longer reports",
        ),
    ],
)
def test_a_fence_comes_down_after_a_reset_that_left_no_fault(then, now, boot, holds):
    why = holds_because(fence(then), now, boot_id=boot)

    assert (why is None) if holds is None else (holds in why)


def test_a_fence_that_cannot_be_read_is_for_a_person():
    unreadable = Fence(uuid="GPU-1", at=0.0, reason="damaged", by="nobody")

    assert "nothing shows" in holds_because(unreadable, WELL, boot_id="boot-2")
