"""Whether the wall clock may be believed: people and NTP set it, and after some boots it is wrong.

Whoever ends a batch or deletes something by the wall clock asks here first. Each question is a look
at both clocks: the wall clock, and one that counts seconds since the machine was booted, suspended
or not. As long as both advance by the same, the wall clock is believed after a while; the while is
as long as the latest jump was, within limits. What the last look saw is a small file, so that ticks
in different processes are one row of looks; after a reboot the row begins again.
"""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from batch_orchestration.engines.processes.records import boot_id
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.regular import read_regular

#: Two looks that agree are at least so far apart. NTP has set a clock within this, as a rule.
LEAST_SECONDS = 60.0
#: After a jump, however far it was, so long at most: what ends late, and what is deleted late.
EXPIRY_SECONDS, DELETION_SECONDS = 3600.0, 86400.0
#: Between two looks the clocks may differ by this, and by what NTP slews.
TOLERANCE_SECONDS, SLEW = 5.0, 0.001


class Clocks(msgspec.Struct, frozen=True):
    """One look at both clocks.

    Attributes:
        boot: Of the machine; `steady` counts from it.
        steady: Seconds since then.
        wall: POSIX seconds.
    """

    boot: str
    steady: float
    wall: float


class ClockRecord(msgspec.Struct, frozen=True):
    """What `clock.json` holds.

    Attributes:
        last: The latest look.
        since: Seconds on the steady clock; all looks from then on agree.
        jump: Seconds by which the clocks had parted before that.
    """

    last: Clocks
    since: float
    jump: float


def clock_path(folder: DataFolder) -> Path:
    """Return the path of the clock record."""
    return folder.root / "clock.json"


def read_clocks() -> Clocks:
    """Look at the clocks of this machine."""
    return Clocks(boot_id(), time.clock_gettime(time.CLOCK_BOOTTIME), time.time())


def clock_doubt(
    folder: DataFolder, *, most_seconds: float, read: Callable[[], Clocks] = read_clocks
) -> str | None:
    """Return why the wall clock is not to be believed yet, for people; None if it may be.

    Args:
        folder: The data folder, which keeps the looks.
        most_seconds: That a jump may delay the answer.
        read: Looks at the clocks.
    """
    path, now = clock_path(folder), read()
    try:
        row = _continued(_kept(path), now)
        _keep(path, row)
    except OSError as error:
        return f"whether the clock is right is not known: {error}"
    needed = min(max(LEAST_SECONDS, row.jump), most_seconds)
    agreed = now.steady - row.since
    if agreed >= needed:
        return None
    cause = f"it jumped by {row.jump:,.0f} s" if row.jump else "it was looked at for the first time"
    return (
        f"the clock may be wrong: {cause} {agreed:,.0f} s ago; it is believed in"
        f" {needed - agreed:,.0f} s"
    )


def _kept(path: Path) -> ClockRecord | None:
    try:
        return msgspec.json.decode(read_regular(path), type=ClockRecord)
    except FileNotFoundError:
        return None
    except (msgspec.DecodeError, UnicodeDecodeError):
        # Emptied by a power loss, or by a person: whatever it said, it is longer ago.
        return ClockRecord(Clocks("", 0.0, 0.0), 0.0, 0.0)


def _continued(row: ClockRecord | None, now: Clocks) -> ClockRecord:
    if row is None:
        return ClockRecord(now, now.steady, 0.0)
    wall, steady = now.wall - row.last.wall, now.steady - row.last.steady
    if row.last.boot != now.boot:
        # How long the machine was off, only the wall clock says.
        return ClockRecord(now, now.steady, abs(wall))
    jump = abs(wall - steady)
    if jump > TOLERANCE_SECONDS + SLEW * steady:
        return ClockRecord(now, now.steady, max(jump, row.jump))
    return ClockRecord(now, row.since, row.jump)


def _keep(path: Path, row: ClockRecord) -> None:
    """Replace the file. Never fsynced: one that a power loss has emptied is begun again."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(msgspec.json.encode(row))
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
