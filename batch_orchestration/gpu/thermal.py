"""The thermal governor: how much of its window a run may use, by the heat of its devices.

Hot devices get less work, step by step, until they get none; cool ones get it back more slowly than
they lost it. Pure: the caller reads the devices and the clock.
"""

from collections.abc import Sequence
from enum import IntEnum

import msgspec

from batch_orchestration.gpu.facts import GpuFacts
from batch_orchestration.gpu.gate import GpuLimits, max_celsius

#: Of the window, from whole to paused. A half sheds load fast, and below an eighth most of what a
#: device draws is what it draws for running at all: then only a pause helps.
SHARES = (1.0, 0.5, 0.25, 0.125, 0.0)
#: Reasons that are about heat, or a power supply that fails, in NVML's words (API reference,
#: `nvmlClocksEventReasons`): HW thermal slowdown reduces the core clocks by a factor of 2 or more,
#: SW thermal slowdown means a GPU or memory above its maximal operating temperature, HW power brake
#: slowdown an external power brake. Not `hw_slowdown`, which sums up the first and the last, and by
#: the same text is also reported while clocks merely change.
THERMAL_REASONS = frozenset(
    {"hw_thermal_slowdown", "sw_thermal_slowdown", "hw_power_brake_slowdown"}
)


class Heat(IntEnum):
    """How hot devices are, compared with what they may be."""

    COOL = 0
    BETWEEN = 1
    HOT = 2


class ThermalPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """How fast work is taken away, and given back.

    Attributes:
        shrink_seconds: A device that stays hot loses the next step after so long. A die follows its
            load within seconds, a heat sink within tens of seconds.
        calm_seconds: It must have been cool for so long before each step back: three times as long,
            so that it climbs slower than it fell.
        margin_celsius: Cool is below the limit by more than this. Between, nothing changes.
        gap_seconds: Two readings further apart than this say nothing about the time between.
    """

    shrink_seconds: float = 10.0
    calm_seconds: float = 30.0
    margin_celsius: float = 5.0
    gap_seconds: float = 15.0


class ThermalState(msgspec.Struct, frozen=True, kw_only=True):
    """What the governor remembers. Times are of any clock that only goes forward.

    Attributes:
        depth: Steps taken away: an index of `SHARES`.
        shrunk_at: When the last one was.
        calm_since: Cool ever since, and since the last step back; None if not cool.
        read_at: When the devices were last read.
    """

    depth: int = 0
    shrunk_at: float = float("-inf")
    calm_since: float | None = None
    read_at: float = float("-inf")

    @property
    def share(self) -> float:
        """Of the window, 0 to 1."""
        return SHARES[self.depth]


def heat_of(devices: Sequence[GpuFacts], limits: GpuLimits, policy: ThermalPolicy) -> Heat:
    """Return how hot the hottest device is: what one of them cannot take, the engine cannot."""
    return max((_heat(device, limits, policy) for device in devices), default=Heat.COOL)


def _heat(device: GpuFacts, limits: GpuLimits, policy: ThermalPolicy) -> Heat:
    limit, celsius = max_celsius(device, limits), device.temperature_celsius
    if THERMAL_REASONS.intersection(device.throttle_reasons or ()):
        return Heat.HOT
    if celsius is None or celsius < limit - policy.margin_celsius:
        return Heat.COOL
    return Heat.HOT if celsius > limit else Heat.BETWEEN


def next_state(
    state: ThermalState, heat: Heat, *, now: float, policy: ThermalPolicy
) -> ThermalState:
    """Return the state after one look at the devices.

    The hotter the looks, the smaller the share: two governors that are asked at the same moments
    never disagree about that. A step is given back only after `calm_seconds` without a look that is
    not cool, so within such a time the share cannot fall, rise and fall again.
    """
    calm_since = state.calm_since if now - state.read_at <= policy.gap_seconds else None
    if heat is not Heat.COOL:
        calm_since = None
    elif calm_since is None:
        calm_since = now
    after = msgspec.structs.replace(state, calm_since=calm_since, read_at=now)
    if heat is Heat.HOT and now - state.shrunk_at >= policy.shrink_seconds:
        depth = min(state.depth + 1, len(SHARES) - 1)
        return msgspec.structs.replace(after, depth=depth, shrunk_at=now)
    if state.depth and calm_since is not None and now - calm_since >= policy.calm_seconds:
        return msgspec.structs.replace(after, depth=state.depth - 1, calm_since=now)
    return after


def unknown_heat(state: ThermalState) -> ThermalState:
    """Return the state after a look at devices that could not be read: they are not known cool."""
    return msgspec.structs.replace(state, calm_since=None)


class Throttle(msgspec.Struct, frozen=True, kw_only=True):
    """How much of its window a run may use now, and whether it has to end.

    Attributes:
        share: Of the window, 0 to 1. 0 is a pause: what is in flight is kept, nothing is added.
        stop: Why the run has to end: what is in flight is answered, nothing is added, and then the
            feeder raises `GpuUnhealthy` with these words. None while it may go on.
    """

    share: float = 1.0
    stop: str | None = None
