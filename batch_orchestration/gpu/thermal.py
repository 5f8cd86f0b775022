"""Thermal throttling: the share of its window that a run may use, by the heat of its devices.

Hot devices get less work, step by step, down to none; cool ones get it back more slowly than they
lost it. Pure: the caller reads the devices and the clock.
"""

from collections.abc import Sequence
from enum import IntEnum

import msgspec

from batch_orchestration.gpu.facts import GpuFacts
from batch_orchestration.gpu.gate import limit_celsius

#: Shares of the window, from whole to paused. Halving sheds load fast. Below an eighth, most of the
#: power that a device draws is its base load, and only a pause helps.
SHARES = (1.0, 0.5, 0.25, 0.125, 0.0)
#: Reasons about heat or a failing power supply, in NVML's words (API reference,
#: `nvmlClocksEventReasons`): HW thermal slowdown reduces the core clocks by a factor of 2 or more,
#: SW thermal slowdown means a GPU or memory above its maximal operating temperature, HW power brake
#: slowdown an external power brake. `hw_slowdown` is left out: it combines the first and the last,
#: and by the same reference is also reported while clocks merely change.
THERMAL_REASONS = frozenset(
    {"hw_thermal_slowdown", "sw_thermal_slowdown", "hw_power_brake_slowdown"}
)
#: A device that stays hot loses a step at each such interval. A die follows its load within
#: seconds, a heat sink within tens of seconds.
SHRINK_SECONDS = 10.0
#: Time to be cool before each step back: three times as long, so that the share rises more slowly
#: than it fell.
CALM_SECONDS = 30.0
#: Cool is below the limit by more than this. Between, nothing changes.
MARGIN_CELSIUS = 5.0
#: Readings further apart than this prove nothing about the time between.
GAP_SECONDS = 15.0


class Heat(IntEnum):
    """How hot devices are, relative to their limit."""

    COOL = 0
    BETWEEN = 1
    HOT = 2


class ThermalState(msgspec.Struct, frozen=True, kw_only=True):
    """The state of the throttling. Times are of any clock that only goes forward.

    Attributes:
        depth: Number of steps taken away: an index of `SHARES`.
        shrunk_at: Time of the last of them.
        calm_since: Start of the cool time since the latest step back; None if not cool.
        read_at: Time of the latest reading.
    """

    depth: int = 0
    shrunk_at: float = float("-inf")
    calm_since: float | None = None
    read_at: float = float("-inf")

    @property
    def share(self) -> float:
        """Share of the window, 0 to 1."""
        return SHARES[self.depth]


def heat_of(devices: Sequence[GpuFacts], max_celsius: float | None = None) -> Heat:
    """Return the heat of the hottest device, which limits the engine as a whole.

    Args:
        max_celsius: See `gate.limit_celsius`.
    """
    return max((_heat(device, max_celsius) for device in devices), default=Heat.COOL)


def _heat(device: GpuFacts, max_celsius: float | None) -> Heat:
    limit, celsius = limit_celsius(device, max_celsius), device.temperature_celsius
    if THERMAL_REASONS.intersection(device.throttle_reasons or ()):
        return Heat.HOT
    if celsius is None or celsius < limit - MARGIN_CELSIUS:
        return Heat.COOL
    return Heat.HOT if celsius > limit else Heat.BETWEEN


def next_state(state: ThermalState, heat: Heat, *, now: float) -> ThermalState:
    """Return the state after one reading of the devices.

    Of two states with readings at the same moments, the one with hotter readings never has the
    larger share. A step back needs `CALM_SECONDS` of cool readings only, so within that time the
    share cannot fall, rise and fall again.
    """
    calm_since = state.calm_since if now - state.read_at <= GAP_SECONDS else None
    if heat is not Heat.COOL:
        calm_since = None
    elif calm_since is None:
        calm_since = now
    after = msgspec.structs.replace(state, calm_since=calm_since, read_at=now)
    if heat is Heat.HOT and now - state.shrunk_at >= SHRINK_SECONDS:
        depth = min(state.depth + 1, len(SHARES) - 1)
        return msgspec.structs.replace(after, depth=depth, shrunk_at=now)
    if state.depth and calm_since is not None and now - calm_since >= CALM_SECONDS:
        return msgspec.structs.replace(after, depth=state.depth - 1, calm_since=now)
    return after


def unknown_heat(state: ThermalState) -> ThermalState:
    """Return the state after a failed reading: the devices are not known to be cool."""
    return msgspec.structs.replace(state, calm_since=None)


class Throttle(msgspec.Struct, frozen=True, kw_only=True):
    """The share of its window that a run may use now, and whether the run must end.

    Attributes:
        share: 0 to 1. 0 is a pause: requests in flight are kept, none are added.
        stop: Why the run must end; None while it may go on. Requests in flight are answered, none
            are added, and then the feeder raises `GpuUnhealthy` with this text.
    """

    share: float = 1.0
    stop: str | None = None
