"""The wall clock is believed when it has agreed with the steady one for long enough."""

import time
from pathlib import Path

import pytest

from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.lifecycle.clock import (
    DELETION_SECONDS,
    EXPIRY_SECONDS,
    Clocks,
    clock_doubt,
    read_clocks,
)

DAY = 86400.0
YEARS = 20 * 365 * DAY
START = 1_800_000_000.0


class Machine:
    """Two clocks that tests move; each look is one of another process."""

    def __init__(self, root: Path) -> None:
        self.folder = DataFolder(root)
        self.boot, self.steady, self.wall = "boot-1", 100.0, START

    def passes(self, seconds: float) -> None:
        self.steady += seconds
        self.wall += seconds

    def restarts(self, *, off_seconds: float = 0.0) -> None:
        self.boot, self.steady = self.boot + "+", 10.0
        self.wall += off_seconds

    def doubts(self, most_seconds: float = EXPIRY_SECONDS) -> bool:
        clocks = Clocks(self.boot, self.steady, self.wall)
        return clock_doubt(self.folder, most_seconds=most_seconds, read=lambda: clocks) is not None

    def seconds_of_doubt(self, most_seconds: float, *, every: float = 5.0) -> float:
        began = self.steady
        while self.doubts(most_seconds):
            self.passes(every)
            assert self.steady - began < 2 * DAY
        return self.steady - began


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    machine = Machine(tmp_path)
    machine.seconds_of_doubt(EXPIRY_SECONDS)
    return machine


def test_two_looks_a_minute_apart_must_agree(tmp_path: Path) -> None:
    machine = Machine(tmp_path)

    assert machine.seconds_of_doubt(EXPIRY_SECONDS) == 60


def test_looks_far_apart_count_as_well_also_across_a_suspension(machine: Machine) -> None:
    machine.passes(3 * DAY)

    assert not machine.doubts()


@pytest.mark.parametrize("jump", [2 * DAY, -2 * DAY, YEARS, -YEARS])
def test_a_clock_that_is_set_far_is_not_believed_for_an_hour(machine: Machine, jump: float) -> None:
    machine.wall += jump

    assert machine.seconds_of_doubt(EXPIRY_SECONDS) == 3600


@pytest.mark.parametrize("jump", [YEARS, -YEARS])
def test_nothing_is_deleted_for_a_day_after_a_far_jump(machine: Machine, jump: float) -> None:
    machine.wall += jump

    assert machine.seconds_of_doubt(DELETION_SECONDS, every=60.0) == DAY


def test_a_typo_that_is_mended_at_once_is_doubted_from_its_mending(machine: Machine) -> None:
    machine.wall += 2 * DAY
    assert machine.doubts()
    machine.passes(30)
    machine.wall -= 2 * DAY

    assert machine.seconds_of_doubt(EXPIRY_SECONDS) == 3600


def test_a_small_correction_costs_a_minute_and_slewing_nothing(machine: Machine) -> None:
    machine.wall += 20
    assert machine.seconds_of_doubt(EXPIRY_SECONDS) == 60

    for _ in range(1000):
        machine.passes(5)
        machine.wall += 0.0025
        assert not machine.doubts()


def test_a_restart_is_doubted_for_as_long_as_the_machine_seems_to_have_been_off(
    machine: Machine,
) -> None:
    machine.restarts(off_seconds=600)
    assert machine.seconds_of_doubt(EXPIRY_SECONDS) == 600

    machine.restarts(off_seconds=-YEARS)  # no battery: 1970 until NTP has been asked
    machine.passes(50)
    assert machine.doubts()
    machine.wall += YEARS
    assert machine.seconds_of_doubt(EXPIRY_SECONDS) == 3600


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff", b'{"last": 1}'])
def test_a_damaged_file_is_begun_again(machine: Machine, damage: bytes) -> None:
    (machine.folder.root / "clock.json").write_bytes(damage)

    assert machine.seconds_of_doubt(EXPIRY_SECONDS) >= 60


def test_the_clocks_of_this_machine_are_read() -> None:
    clocks = read_clocks()

    assert abs(clocks.wall - time.time()) < 5
    assert clocks.steady > 0
    assert len(clocks.boot) == 36
