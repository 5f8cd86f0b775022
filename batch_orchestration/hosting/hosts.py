"""All engines of a data folder that outlive their runs: which there are, and how they are ended."""

import contextlib
import logging
import os
import signal
import time

import msgspec

from batch_orchestration.engines.processes.records import (
    POLL_SECONDS,
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
    HostOfOtherVersion,
    HostRecord,
    HostState,
    hosts_lock,
    running_hosts,
)

logger = logging.getLogger(__name__)


class RunningEngine(msgspec.Struct, frozen=True, kw_only=True):
    """An engine and its host.

    Attributes:
        state: None if the host does not answer, or does not answer this user.
    """

    record: HostRecord
    state: HostState | None


def running_engines(folder: DataFolder) -> list[RunningEngine]:
    """Return the engines that run, used or warm, oldest first."""
    found = []
    for _, record in running_hosts(folder):
        state = _asked(record, Ask())
        if state is None or state.ended is None:
            found.append(RunningEngine(record=record, state=state))
    return sorted(found, key=lambda engine: engine.record.started_at)


def idle_pids(folder: DataFolder) -> frozenset[int]:
    """Return the pids of the engines that nothing uses: their memory is there for another one."""
    states = [engine.state for engine in running_engines(folder)]
    idle = [each.pid for each in states if each is not None and each.pid and not each.leases]
    return frozenset(member.pid for pid in idle for member in group_members(pid))


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
    """Ask a host to end its engine; kill a host that does not answer. Return whether it ended."""
    try:
        return _ask(record, ask, seconds=END_SECONDS).ended is not None
    except HostOfOtherVersion as error:
        logger.warning("%s", error)
        return False
    except HostGone as error:
        logger.info("%s", error)
    if not is_running(record.host):
        return False
    try:
        # The kernel kills its server, too; what vLLM started follows within two seconds.
        os.kill(record.host.pid, signal.SIGKILL)
    except PermissionError:
        return False  # It belongs to another user.
    except ProcessLookupError:
        return True
    logger.warning("engine host %d did not answer and is killed", record.host.pid)
    deadline = time.monotonic() + END_SECONDS
    while is_running(record.host) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return not is_running(record.host)


def _asked(record: HostRecord, ask: Ask) -> HostState | None:
    try:
        return _ask(record, ask, seconds=ANSWER_SECONDS)
    except HostGone as error:
        logger.info("%s", error)
        return None


def _ask(record: HostRecord, ask: Ask, *, seconds: float) -> HostState:
    with contextlib.closing(HostConnection.open(record)) as connection:
        return connection.ask(ask, seconds=seconds)
