"""What the care for a device allows a run at this moment."""

import msgspec


class DeviceCare(msgspec.Struct, frozen=True, kw_only=True):
    """How much of its window a run may use now, and whether it has to end.

    Attributes:
        share: Of the window, 0 to 1. 0 is a pause: what is in flight is kept, nothing is added.
        stop: Why the run has to end: what is in flight is answered, nothing is added, and then the
            feeder raises `GpuUnhealthy` with these words. None while it may go on.
    """

    share: float = 1.0
    stop: str | None = None
