"""All engines of a data folder that outlive their runs: which there are, and how they are ended."""

import contextlib
import logging
import os
import signal
import time

import msgspec

from batch_orchestration.engines.processes.records import (
    POLL_SECONDS,
    ProcessIdentity,
    end_recorded,
    group_members,
    is_running,
)
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.hosting.records import (
    ANSWER_SECONDS,
    END_SECONDS,
    RECORD_SUFFIX,
    Ask,
    HostConnection,
    HostGone,
    HostRecord,
    HostState,
    hosts_lock,
    running_hosts,
)

logger = logging.getLogger(__name__)


class RunningEngine(msgspec.Struct, frozen=True, kw_only=True):
    """An engine and its host."""

    record: HostRecord
    state: HostState


def running_engines(folder: DataFolder) -> list[RunningEngine]:
    """Return the engines that run, used or warm, oldest first.

    An engine is left out if its host does not answer.
    """
    found = []
    for _, record in running_hosts(folder):
        state = _asked(record, Ask())
        if state is not None and state.ended is None:
            found.append(RunningEngine(record=record, state=state))
    return sorted(found, key=lambda engine: engine.record.started_at)


def idle_pids(folder: DataFolder) -> frozenset[int]:
    """Return the pids of the engines that nothing uses: their memory is there for another one."""
    idle = [each.state.pid for each in running_engines(folder) if not each.state.leases]
    return frozenset(member.pid for pid in idle if pid is not None for member in group_members(pid))


def end_engines(folder: DataFolder, *, only_idle: bool) -> int:
    """End the engines of the folder, and wait until they are gone; return how many.

    Runs that use one restart it, unless they are to end themselves.
    """
    with hosts_lock(folder):
        if only_idle:
            return end_idle_engines(folder)
        return sum(_told_to_end(record, Ask(what="stop")) for _, record in running_hosts(folder))


def end_idle_engines(folder: DataFolder) -> int:
    """End the engines that nothing uses, and wait until they are gone; return how many.

    The caller holds `hosts_lock`.
    """
    return sum(_told_to_end(record, Ask(what="stop idle")) for _, record in running_hosts(folder))


def end_leftovers(folder: DataFolder) -> bool:
    """End the servers that killed hosts and runs left; return whether there was one.

    The caller holds `hosts_lock`: a host that has just been started is not recorded yet.
    """
    paths = set(folder.engines.glob(f"*{RECORD_SUFFIX}"))
    for path in paths - {path for path, _ in running_hosts(folder)}:
        path.unlink(missing_ok=True)
    ended = [end_recorded(path) for path in (folder.logs / "engines").glob("*.process.json")]
    return any(ended)


def _told_to_end(record: HostRecord, ask: Ask) -> bool:
    state = _asked(record, ask, seconds=END_SECONDS)
    if state is None and is_running(record.host):
        logger.warning("engine host %d does not answer and is killed", record.host.pid)
        # The kernel kills its server; what vLLM started follows within two seconds.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(record.host.pid, signal.SIGKILL)
        _wait_until_gone(record.host)
        return True
    return state is not None and state.ended is not None


def _wait_until_gone(process: ProcessIdentity) -> None:
    deadline = time.monotonic() + END_SECONDS
    while is_running(process) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def _asked(record: HostRecord, ask: Ask, *, seconds: float = ANSWER_SECONDS) -> HostState | None:
    try:
        connection = HostConnection.open(record)
    except HostGone as error:
        logger.info("%s", error)
        return None
    try:
        return connection.ask(ask, seconds=seconds)
    except HostGone as error:
        logger.info("%s", error)
        return None
    finally:
        connection.close()
