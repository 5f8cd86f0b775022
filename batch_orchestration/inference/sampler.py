"""Samples the status and devices of a run every few seconds, in a thread of its own.

Nothing waits for the thread. A sample that cannot be written is missing from a plot; devices that
cannot be read get no more work (see `gpu.monitor`).
"""

import logging
import threading
import time
from typing import Self

from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.gpu.monitor import DeviceMonitor
from batch_orchestration.gpu.samples import RunSample, append_sample
from batch_orchestration.gpu.thermal import Throttle
from batch_orchestration.workers.run_status import RunStatus

logger = logging.getLogger(__name__)

#: Limit on the wait for the last sample of a run: a disk or a driver may hang.
STOP_SECONDS = 10.0


class RunSampler:
    """A thread that takes samples while the context is entered.

    Args:
        status: Status of the run; the sampler sets `gpus`, others set the rest.
        seconds: Between two samples.
        watch: Monitor of the run's devices; None if it uses none.
    """

    def __init__(
        self,
        status: RunStatus,
        *,
        folder: DataFolder,
        run_id: str,
        seconds: float,
        watch: DeviceMonitor | None = None,
    ) -> None:
        self.status = status
        self._folder = folder
        self._run_id = run_id
        self._seconds = seconds
        self._watch = watch
        self._over = threading.Event()
        self._complained = False
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def __enter__(self) -> Self:
        """Start the thread, which takes the first sample at once."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take a last sample and end, even if the sample hangs."""
        self._over.set()
        self._thread.join(STOP_SECONDS)

    @property
    def watches_devices(self) -> bool:
        """Whether the samples include devices."""
        return self._watch is not None

    def throttle(self) -> Throttle:
        """Return the present throttling of the devices: none if the run uses no device."""
        return Throttle() if self._watch is None else self._watch.throttle()

    def _run(self) -> None:
        while True:
            over = self._over.is_set()
            try:
                self._sample()
            except Exception as error:  # noqa: BLE001 - sampling never stops a run; see the module
                if not self._complained:
                    self._complained = True
                    logger.warning("a sample of the run is missing: %r", error)
            if over:
                return
            self._over.wait(self._seconds)

    def _sample(self) -> None:
        status = self.status
        if self._watch is not None:
            status.gpus = self._watch.look()
        if status.primary_batch_id is None:
            return
        sample = RunSample(
            at=time.time(),
            run_id=self._run_id,
            batch_id=status.primary_batch_id,
            **status.load(),
        )
        append_sample(self._folder, status.primary_batch_id, sample)
