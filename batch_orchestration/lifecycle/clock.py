"""Whether the wall clock can be trusted: people and NTP set it, and after some boots it is wrong.

`clock_doubt` is called before a batch is ended or something is deleted by the wall clock. Each call
samples the wall clock and the steady clock, which counts seconds since boot, suspended or not. The
wall clock is trusted once both have advanced equally for as long as the latest jump, within limits.
The last sample is kept in a small file, so that ticks in different processes form one series of
samples; after a reboot the series begins again.
"""

import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from batch_orchestration.core.errors import FileDamaged, StorageError
from batch_orchestration.engines.processes.records import boot_id
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.state_file import StateFile

#: The clocks must agree for at least this long; NTP usually sets a clock within this time.
LEAST_SECONDS = 60.0
#: Longest delay after a jump of any size: of expiries, and of deletions.
EXPIRY_SECONDS, DELETION_SECONDS = 3600.0, 86400.0
#: Allowed difference between two samples: a constant, and the rate at which NTP slews a clock.
TOLERANCE_SECONDS, SLEW = 5.0, 0.001


class Clocks(msgspec.Struct, frozen=True):
    """One sample of both clocks.

    Attributes:
        boot: Boot id of the machine.
        steady: Seconds since that boot.
        wall: POSIX seconds.
    """

    boot: str
    steady: float
    wall: float


class ClockRecord(msgspec.Struct, frozen=True):
    """The content of `clock.json`.

    Attributes:
        last: The latest sample.
        since: Seconds on the steady clock; all samples from then on agree.
        jump: Seconds by which the clocks had diverged before that.
    """

    last: Clocks
    since: float
    jump: float


def clock_path(folder: DataFolder) -> Path:
    """Return the path of the clock record."""
    return folder.root / "clock.json"


def read_clocks() -> Clocks:
    """Sample the clocks of this machine."""
    return Clocks(boot_id(), time.clock_gettime(time.CLOCK_BOOTTIME), time.time())


def clock_doubt(
    folder: DataFolder, *, most_seconds: float, read: Callable[[], Clocks] = read_clocks
) -> str | None:
    """Return why the wall clock cannot be trusted yet, for people; None if it can.

    Args:
        most_seconds: Longest time that a jump causes doubt.
    """
    file, now = StateFile(clock_path(folder), ClockRecord), read()
    try:
        row = _continued(_last(file), now)
        # If a power loss empties the file, the series begins again.
        file.write_unsynced(row)
    except (OSError, StorageError) as error:
        return f"the clock cannot be checked: {error}"
    needed = min(max(LEAST_SECONDS, row.jump), most_seconds)
    agreed = now.steady - row.since
    if agreed >= needed:
        return None
    cause = f"it jumped by {row.jump:,.0f} s" if row.jump else "it was first checked"
    return (
        f"the clock may be wrong: {cause} {agreed:,.0f} s ago; it is trusted again in"
        f" {needed - agreed:,.0f} s"
    )


def _last(file: StateFile[ClockRecord]) -> ClockRecord | None:
    try:
        return file.read()
    except FileDamaged:
        # Emptied by a power loss, or by a person: taken for a jump of the longest delay.
        return ClockRecord(Clocks("", 0.0, 0.0), 0.0, 0.0)


def _continued(row: ClockRecord | None, now: Clocks) -> ClockRecord:
    if row is None:
        return ClockRecord(now, now.steady, 0.0)
    wall, steady = now.wall - row.last.wall, now.steady - row.last.steady
    if row.last.boot != now.boot:
        # Only the wall clock covers the time during which the machine was off.
        return ClockRecord(now, now.steady, abs(wall))
    jump = abs(wall - steady)
    if jump > TOLERANCE_SECONDS + SLEW * steady:
        return ClockRecord(now, now.steady, max(jump, row.jump))
    return ClockRecord(now, row.since, row.jump)
