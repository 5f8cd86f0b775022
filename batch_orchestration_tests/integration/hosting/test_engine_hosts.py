"""Engines that outlive the runs that use them: real hosts and servers, simulated answers."""

import asyncio
import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import pytest

from batch_orchestration.core.errors import (
    EngineDied,
    EngineStartFailed,
    GpuUnhealthy,
    TooManyOpenFiles,
)
from batch_orchestration.core.outcomes import Completion
from batch_orchestration.engines.memory_fallback import MemoryLevel
from batch_orchestration.engines.memory_level_file import Descent, MemoryLevelFile, engine_name
from batch_orchestration.engines.processes.records import ProcessIdentity, group_members, identify
from batch_orchestration.engines.simulated.engine import SimulatedEngine
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.gpu.faults import Fence
from batch_orchestration.gpu.fences import put_up_fence
from batch_orchestration.hosting import hosts as host_functions
from batch_orchestration.hosting import records as host_records
from batch_orchestration.hosting.hosted_process import HostedProcess
from batch_orchestration.hosting.hosts import end_engines, end_leftovers, running_engines
from batch_orchestration.hosting.records import EngineSpec, HostRecord, hosts_lock, running_hosts
from batch_orchestration_tests.support.forks import forked

WARM = 600.0
BODY = b'{"model": "simulated-model", "messages": [{"role": "user", "content": "Hello"}]}'


class Hosts:
    """The hosts of one data folder, and engines of runs that use them."""

    def __init__(self, root: Path) -> None:
        self.folder = DataFolder(root)
        self.folder.create()
        self._engines: list[SimulatedEngine] = []

    def engine(
        self,
        run_id: str,
        *,
        model: str = "one",
        keep_alive_seconds: float = WARM,
        before_start: Callable[[], None] = lambda: None,
        memory_level: dict[str, Any] | None = None,
        **options: Any,
    ) -> SimulatedEngine:
        log_path = self.folder.logs / "engines" / f"{run_id}.log"
        engine = SimulatedEngine(
            log_path=log_path,
            process=HostedProcess(
                name="simulated engine",
                log_path=log_path,
                folder=self.folder,
                spec=lambda: EngineSpec(
                    kind="simulated",
                    model=model,
                    device="simulated",
                    configured={"model_files": [("config.json", 1, 2)]},
                    memory_level=memory_level or {},
                ),
                keep_alive_seconds=keep_alive_seconds,
            ),
            before_start=before_start,
            **options,
        )
        self._engines.append(engine)
        return engine

    def records(self) -> list[HostRecord]:
        return [record for _, record in running_hosts(self.folder)]

    def leases(self) -> list[int]:
        return [engine.state.leases for engine in running_engines(self.folder) if engine.state]

    def end(self) -> None:
        for engine in self._engines:
            engine.release()
        end_engines(self.folder, only_idle=False)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    hosts = Hosts(tmp_path / "data")
    yield hosts
    hosts.end()


def answer(engine: SimulatedEngine) -> int:
    """Start an engine and have it answer; return the pid of its server."""

    async def start_and_ask() -> None:
        await engine.start()
        try:
            outcome = await engine.answer("/v1/chat/completions", BODY, request_id="r")
        finally:
            await engine.disconnect()
        assert isinstance(outcome, Completion)

    asyncio.run(start_and_ask())
    return engine.process.pid or 0


def ask(engine: SimulatedEngine) -> None:
    """Give an engine that was started before a request."""

    async def once() -> None:
        try:
            await engine.answer("/v1/chat/completions", BODY, request_id="r")
        finally:
            await engine.disconnect()

    asyncio.run(once())


def is_gone(pid: int) -> bool:
    return identify(pid) is None


def wait_until(state: Callable[[], bool], *, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not state():
        assert time.monotonic() < deadline, "the state never came"
        time.sleep(0.02)


def use_for_ever(root: Path, run_id: str) -> None:
    """A run in a process of its own, which holds its lease until it is killed."""
    engine = Hosts(root).engine(run_id)
    answer(engine)
    (root / run_id).touch()
    time.sleep(600)


def test_the_next_run_uses_the_engine_that_the_last_one_left_warm(hosts: Hosts) -> None:
    first, second = hosts.engine("first"), hosts.engine("second")
    pid = answer(first)
    first.release()
    wait_until(lambda: hosts.leases() == [0])
    assert answer(second) == pid
    assert second.info == first.info
    assert (first.starts, second.starts) == (1, 0)


def test_an_engine_that_nothing_uses_ends_after_the_keep_alive_time(hosts: Hosts) -> None:
    engine = hosts.engine("run", keep_alive_seconds=0.5)
    pid = answer(engine)
    time.sleep(1.0)  # It is used, so time does not count.
    assert not is_gone(pid)
    engine.release()
    wait_until(lambda: is_gone(pid) and not hosts.records())
    assert not list((hosts.folder.logs / "engines").glob("*.process.json"))


def test_a_killed_run_frees_its_lease_and_leaves_the_engine_warm(hosts: Hosts) -> None:
    with forked(use_for_ever, hosts.folder.root, "run") as run:
        wait_until((hosts.folder.root / "run").exists)
        assert hosts.leases() == [1]
        run.kill()
        wait_until(lambda: hosts.leases() == [0])
    answer(later := hosts.engine("later"))
    assert later.starts == 0


def test_the_engine_of_a_killed_host_dies_and_the_run_starts_another(hosts: Hosts) -> None:
    engine = hosts.engine("run")
    pid = answer(engine)
    [record] = hosts.records()
    os.kill(record.host.pid, signal.SIGKILL)
    wait_until(lambda: is_gone(pid))
    with pytest.raises(EngineDied, match="lost"):
        ask(engine)
    assert answer(engine) != pid
    assert [path.name for path in hosts.folder.engines.glob("*.host.json")] == [
        path.name for path, _ in running_hosts(hosts.folder)
    ]


def test_nothing_holds_memory_when_host_and_run_are_killed_together(hosts: Hosts) -> None:
    with forked(use_for_ever, hosts.folder.root, "run") as run:
        wait_until((hosts.folder.root / "run").exists)
        [record] = hosts.records()
        [engine] = running_engines(hosts.folder)
        server = engine.state.pid
        assert server is not None
        os.kill(record.host.pid, signal.SIGKILL)
        run.kill()
        wait_until(lambda: not group_members(server))


def test_an_engine_that_dies_while_idle_is_replaced(hosts: Hosts) -> None:
    first = hosts.engine("first")
    pid = answer(first)
    first.release()
    os.kill(pid, signal.SIGKILL)
    assert answer(hosts.engine("second")) != pid
    wait_until(lambda: len(hosts.records()) == 1)


def test_the_death_of_a_leased_engine_is_told_with_its_reason(hosts: Hosts) -> None:
    engine = hosts.engine("run")
    os.kill(answer(engine), signal.SIGKILL)
    with pytest.raises(EngineDied, match="was killed by SIGKILL"):
        ask(engine)


def test_two_runs_that_attach_at_once_share_one_engine(hosts: Hosts) -> None:
    engines = [hosts.engine(f"run-{number}") for number in range(4)]
    threads = [threading.Thread(target=answer, args=(engine,)) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({engine.process.pid for engine in engines}) == 1
    assert hosts.leases() == [4]


def test_an_idle_engine_ends_before_another_one_starts(hosts: Hosts) -> None:
    first = hosts.engine("first", model="one")
    pid = answer(first)
    first.release()
    gone: list[bool] = []
    second = hosts.engine("second", model="two", before_start=lambda: gone.append(is_gone(pid)))
    answer(second)
    assert gone == [True]
    assert [record.spec.model for record in hosts.records()] == ["two"]


def test_an_engine_in_use_is_not_ended_for_another(hosts: Hosts) -> None:
    first, second = hosts.engine("first", model="one"), hosts.engine("second", model="two")
    pid = answer(first)
    answer(second)
    assert answer(first) == pid
    assert sorted(record.spec.model for record in hosts.records()) == ["one", "two"]


def test_nothing_is_started_when_the_device_is_unfit(hosts: Hosts) -> None:
    def unfit() -> None:
        raise GpuUnhealthy("too hot")

    with pytest.raises(GpuUnhealthy):
        answer(hosts.engine("run", before_start=unfit))
    assert not hosts.records()
    answer(hosts.engine("other"))


def test_an_engine_that_does_not_start_leaves_no_host(hosts: Hosts) -> None:
    with pytest.raises(EngineStartFailed, match="no such model"):
        answer(hosts.engine("run", startup_error="no such model"))
    wait_until(lambda: not hosts.records())


def test_a_fence_ends_an_idle_engine_at_once(hosts: Hosts) -> None:
    engine = hosts.engine("run")
    pid = answer(engine)
    put_up_fence(hosts.folder, Fence(uuid="GPU-1", reason="Xid 79", at=1.0, by="run", boot_id=""))
    time.sleep(1.0)
    assert not is_gone(pid)  # The run that uses it decides.
    engine.release()
    wait_until(lambda: is_gone(pid))


def test_a_pause_that_releases_the_gpu_ends_an_idle_engine_at_once(hosts: Hosts) -> None:
    engine = hosts.engine("run")
    pid = answer(engine)
    engine.release()
    hosts.folder.paused.write_bytes(msgspec.json.encode({"actor": "me", "release_gpu": False}))
    time.sleep(1.0)
    assert not is_gone(pid)
    hosts.folder.paused.write_bytes(msgspec.json.encode({"actor": "me", "release_gpu": True}))
    wait_until(lambda: is_gone(pid))


def test_a_record_of_an_earlier_boot_is_nobody(hosts: Hosts) -> None:
    engine = hosts.engine("run")
    answer(engine)
    [(path, record)] = running_hosts(hosts.folder)
    other_boot = ProcessIdentity(record.host.pid, record.host.started, "another boot")
    before = msgspec.structs.replace(record, host=other_boot)
    copy = path.with_name("0000.host.json")
    copy.write_bytes(msgspec.json.encode(before))
    assert len(hosts.records()) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"host": 1}'])
def test_a_damaged_record_stops_no_engine_from_starting(hosts: Hosts, content: bytes) -> None:
    hosts.folder.engines.mkdir(exist_ok=True)
    (hosts.folder.engines / "0000.host.json").write_bytes(content)
    answer(hosts.engine("run"))
    assert len(hosts.records()) == 1


def test_an_engine_whose_time_runs_out_while_a_run_attaches_is_used_or_replaced(
    hosts: Hosts,
) -> None:
    for number in range(6):
        engine = hosts.engine(f"run-{number}", keep_alive_seconds=0.01)
        answer(engine)
        engine.release()
        time.sleep(0.05 * number)
    wait_until(lambda: not hosts.records())


def test_stopping_ends_idle_engines_and_no_others(hosts: Hosts) -> None:
    idle, used = hosts.engine("idle", model="idle"), hosts.engine("used", model="used")
    answer(idle)
    answer(used)
    idle.release()
    wait_until(lambda: sorted(hosts.leases()) == [0, 1])
    assert end_engines(hosts.folder, only_idle=True) == 1
    wait_until(lambda: [record.spec.model for record in hosts.records()] == ["used"])
    answer(used)


def test_a_run_that_stops_a_stuck_engine_gets_another(hosts: Hosts) -> None:
    engine = hosts.engine("run")
    pid = answer(engine)
    engine.stop()
    assert is_gone(pid)
    assert answer(engine) != pid


def test_a_host_that_is_terminated_ends_its_engine(hosts: Hosts) -> None:
    engine = hosts.engine("run")
    pid = answer(engine)
    [record] = hosts.records()
    os.kill(record.host.pid, signal.SIGTERM)
    wait_until(lambda: is_gone(pid) and not hosts.records())
    assert not list(hosts.folder.engines.glob("*.host.json"))


def test_an_engine_that_ends_idle_on_a_lower_memory_level_is_tried_on_a_higher_one_next(
    hosts: Hosts,
) -> None:
    levels = MemoryLevelFile(hosts.folder.memory_levels)
    low = (MemoryLevel(max_num_seqs=8),)
    for model in ("one", "other"):
        levels.remember(engine_name(model, "simulated", "hash"), low, at=100.0)
    engine = hosts.engine("run", keep_alive_seconds=0.1, memory_level={"max-num-seqs": 8})
    answer(engine)
    engine.release()
    wait_until(lambda: not hosts.records())

    assert levels.recall(engine_name("one", "simulated", "hash")) == Descent(levels=low, since=0.0)
    assert levels.recall(engine_name("other", "simulated", "hash")) == Descent(
        levels=low, since=100.0
    )


def test_asking_for_the_state_does_not_keep_an_engine_warm(hosts: Hosts) -> None:
    engine = hosts.engine("run", keep_alive_seconds=1.0)
    answer(engine)
    engine.release()
    # Each look at the leases is such a question.
    wait_until(lambda: hosts.leases() == [])


def test_a_run_that_gives_up_while_a_shared_engine_starts_leaves_it_to_the_others(
    hosts: Hosts,
) -> None:
    first, second = hosts.engine("first", startup_seconds=3.0), hosts.engine("second")
    starting = threading.Thread(target=answer, args=(first,))
    starting.start()
    wait_until(lambda: len(hosts.records()) == 1)

    async def give_up() -> None:
        start = asyncio.create_task(second.start())
        while hosts.leases() != [2]:
            await asyncio.sleep(0.02)
        start.cancel()
        await asyncio.wait([start])

    asyncio.run(give_up())
    second.release()
    starting.join()

    assert first.starts == 1
    assert answer(first) == first.process.pid
    assert hosts.leases() == [1]


def test_a_run_whose_engine_another_run_stops_gets_a_new_one_and_suspects_nothing(
    hosts: Hosts,
) -> None:
    first, second = hosts.engine("first"), hosts.engine("second")
    assert answer(first) == answer(second)
    first.stop()
    with pytest.raises(EngineDied) as death:
        ask(second)

    assert death.value.deliberate
    answer(second)


def test_the_death_of_an_engine_is_not_deliberate(hosts: Hosts) -> None:
    engine = hosts.engine("run")
    os.kill(answer(engine), signal.SIGKILL)
    with pytest.raises(EngineDied) as death:
        ask(engine)

    assert not death.value.deliberate


def test_a_host_that_does_not_answer_is_killed_before_another_engine_starts(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (host_functions, host_records):
        monkeypatch.setattr(module, "END_SECONDS", 1.0, raising=False)
    first = hosts.engine("first", model="one")
    pid = answer(first)
    first.release()
    [record] = hosts.records()
    os.kill(record.host.pid, signal.SIGSTOP)
    gone: list[bool] = []
    answer(hosts.engine("second", model="two", before_start=lambda: gone.append(is_gone(pid))))

    assert gone == [True]


def test_an_engine_ends_when_idle_though_the_lock_is_unusable(hosts: Hosts) -> None:
    engine = hosts.engine("run", keep_alive_seconds=0.5)
    pid = answer(engine)
    lock = hosts.folder.engines / "hosts.lock"
    lock.unlink()
    lock.mkdir()
    engine.release()
    wait_until(lambda: is_gone(pid))
    lock.rmdir()


def test_a_record_is_not_removed_while_it_cannot_be_read(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(hosts.engine("run"))

    def no_descriptor(path: Path) -> BinaryIO:
        raise TooManyOpenFiles(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("batch_orchestration.files.state_file.open_regular", no_descriptor)
        with pytest.raises(TooManyOpenFiles), hosts_lock(hosts.folder):
            end_leftovers(hosts.folder)
    assert len(hosts.records()) == 1


def test_a_host_that_another_user_owns_is_left_alone_and_shown(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = answer(hosts.engine("run"))

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(host_records.socket, "socket", lambda *_: RefusedSocket())
        patch.setattr(host_functions.os, "kill", refuse)
        assert end_engines(hosts.folder, only_idle=False) == 0
        [shown] = running_engines(hosts.folder)
    assert shown.state is None
    assert not is_gone(pid)


def test_a_host_of_another_version_is_not_killed(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = answer(hosts.engine("run"))
    with monkeypatch.context() as patch:
        patch.setattr(host_records, "HostState", HostRecord)
        assert end_engines(hosts.folder, only_idle=True) == 0
    assert not is_gone(pid)
    assert hosts.leases() == [1]


class RefusedSocket:
    """A socket whose path another user may not enter."""

    def settimeout(self, seconds: float) -> None: ...

    def connect(self, path: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    def close(self) -> None: ...
