"""What the driver says of GPUs only to who listens when it happens: Xids."""

import logging
from collections import defaultdict
from typing import Any

import msgspec

from batch_orchestration.domain.gpu import GpuFacts
from batch_orchestration.telemetry.gpu import import_nvml, read_gpus, text_of

logger = logging.getLogger(__name__)


class ListeningReader:
    """Reads the GPUs, and has heard every Xid of them since it first did.

    NVML keeps events for who has registered until they are fetched, so that none is missed between
    two looks. Where it cannot be listened to, that is said once; what a device reports is read all
    the same. Once it listens, it does until the process ends.
    """

    def __init__(self) -> None:
        self._nvml: Any = None
        self._events: Any = None
        self._complained = False
        self._heard: defaultdict[str, list[int]] = defaultdict(list)

    def read(self) -> tuple[GpuFacts, ...]:
        """Return the facts of the GPUs as `read_gpus` does, with their Xids.

        Raises:
            GpuUnreadable: As there.
        """
        if self._events is None:
            self._listen()
        self._fetch()
        return tuple(
            msgspec.structs.replace(gpu, xids=tuple(self._heard[gpu.hardware_uuid]))
            for gpu in read_gpus()
        )

    def _listen(self) -> None:
        nvml = import_nvml()
        try:
            nvml.nvmlInit()
        except nvml.NVMLError:
            # Reading says what is wrong with NVML itself.
            return
        try:
            events = nvml.nvmlEventSetCreate()
            for index in range(nvml.nvmlDeviceGetCount()):
                self._register(nvml, index, events)
        except nvml.NVMLError as error:
            self._complain("the GPUs", error)
            nvml.nvmlShutdown()
        else:
            self._nvml, self._events = nvml, events

    def _register(self, nvml: Any, index: int, events: Any) -> None:
        wanted = nvml.nvmlEventTypeXidCriticalError
        try:
            device = nvml.nvmlDeviceGetHandleByIndex(index)
            if nvml.nvmlDeviceGetSupportedEventTypes(device) & wanted:
                nvml.nvmlDeviceRegisterEvents(device, wanted, events)
        except nvml.NVMLError as error:
            # Another device may well be the one that is used.
            self._complain(f"GPU {index}", error)

    def _complain(self, which: str, error: Exception) -> None:
        if not self._complained:
            self._complained = True
            logger.info("Xids of %s are not listened to: %s", which, error)

    def _fetch(self) -> None:
        while self._events is not None:
            try:
                event = self._nvml.nvmlEventSetWait_v2(self._events, 0)
                heard = self._heard[text_of(self._nvml.nvmlDeviceGetUUID(event.device))]
            except self._nvml.NVMLError:
                # None is left (`NVMLError_Timeout`), or the device is lost, which reading tells.
                return
            if event.eventType & self._nvml.nvmlEventTypeXidCriticalError:
                heard.append(int(event.eventData))
