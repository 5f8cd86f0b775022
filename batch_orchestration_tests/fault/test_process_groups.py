"""A server is ended with its whole group, also by a later process, and nobody else is."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from batch_orchestration.core.errors import EngineStartFailed
from batch_orchestration.engines.processes.process import EngineProcess
from batch_orchestration.engines.processes.records import (
    ProcessIdentity,
    ProcessRecord,
    end_recorded,
    group_members,
    identify,
    is_running,
    read_record,
    write_record,
)
from batch_orchestration_tests.fault.processes import (
    FAMILY,
    ended_within,
    kill,
    nobody,
    wait_for_group,
    wait_until,
)


@pytest.fixture
def process(tmp_path: Path) -> Iterator[EngineProcess]:
    process = EngineProcess(
        name="test server",
        log_path=tmp_path / "server.log",
        record_path=tmp_path / "server.process.json",
    )
    yield process
    process.stop()


def test_stopping_ends_the_whole_group_and_the_record(
    process: EngineProcess, tmp_path: Path
) -> None:
    process.spawn(FAMILY, {})
    members = wait_for_group(process.pid, 3)

    process.stop()
    process.stop()

    assert ended_within(0.1, members)
    assert process.pid is None
    assert process.exit_reason() == "was stopped"
    assert not (tmp_path / "server.process.json").exists()


def test_a_group_that_ignores_sigterm_is_killed(process: EngineProcess) -> None:
    process.spawn(["sh", "-c", "trap '' TERM; echo deaf; while :; do sleep 1; done"], {})
    wait_until(lambda: process.last_log_lines(1) == ["deaf"])
    members = group_members(process.pid or 0)

    process.stop(grace_seconds=0.3)

    assert members
    assert ended_within(0.1, members)


def test_children_that_outlive_their_server_are_ended_too(process: EngineProcess) -> None:
    process.spawn(["sh", "-c", "sleep 300 & exit 3"], {})
    wait_until(lambda: process.exit_reason() is not None)
    orphans = group_members(process.pid or 0)

    process.stop()

    assert len(orphans) == 1
    assert ended_within(0.1, orphans)
    assert process.exit_reason() == "exited with status 3"


def test_a_server_hears_nothing_on_stdin_and_writes_to_its_log(process: EngineProcess) -> None:
    process.spawn(["sh", "-c", "cat; echo $WORD; echo to-stderr >&2"], {"WORD": "hello"})
    wait_until(lambda: process.exit_reason() is not None)

    assert process.last_log_lines(5) == ["hello", "to-stderr"]


def test_a_command_that_does_not_exist_ends_at_once(process: EngineProcess) -> None:
    process.spawn(["/no/such/program"], {})

    wait_until(lambda: process.exit_reason() is not None)

    assert "No such file or directory" in "".join(process.last_log_lines(5))


def test_a_server_outlives_the_thread_that_asked_for_it(process: EngineProcess) -> None:
    """The parent-death signal is sent when the spawning *thread* ends."""
    thread = threading.Thread(target=process.spawn, args=(FAMILY, {}))
    thread.start()
    thread.join()

    time.sleep(0.5)

    assert process.exit_reason() is None


@pytest.fixture
def family() -> Iterator[list[ProcessIdentity]]:
    """A process group that nobody's death ends, leader first."""
    leader = subprocess.Popen(FAMILY, start_new_session=True)
    members = wait_for_group(leader.pid, 3)
    yield members
    for member in members:
        kill(member)
    leader.wait()


def record_of(family: list[ProcessIdentity], owner: ProcessIdentity | None = None) -> ProcessRecord:
    leader, *members = family
    return ProcessRecord(
        leader=leader, owner=owner or nobody(), members=tuple(members), command=tuple(FAMILY)
    )


def test_a_left_over_group_is_ended_by_its_record(
    family: list[ProcessIdentity], tmp_path: Path
) -> None:
    write_record(tmp_path / "record.json", record_of(family))

    assert end_recorded(tmp_path / "record.json")

    assert ended_within(0.1, family)
    assert not end_recorded(tmp_path / "record.json")


def test_a_left_over_group_is_found_by_a_member_when_its_leader_is_gone(
    family: list[ProcessIdentity], tmp_path: Path
) -> None:
    write_record(tmp_path / "record.json", record_of(family))
    os.kill(family[0].pid, signal.SIGKILL)

    assert end_recorded(tmp_path / "record.json")

    assert ended_within(0.1, family)


@pytest.mark.parametrize("field", ["started", "boot_id"])
def test_a_process_that_only_has_the_recorded_pid_is_left_alone(
    family: list[ProcessIdentity], tmp_path: Path, field: str
) -> None:
    other = {"started": 1} if field == "started" else {"boot_id": "another boot"}
    strangers = [msgspec.structs.replace(member, **other) for member in family]
    write_record(tmp_path / "record.json", record_of(strangers))

    assert not end_recorded(tmp_path / "record.json")

    assert all(is_running(member) for member in family)


def test_an_engine_whose_owner_lives_is_left_alone(
    process: EngineProcess, family: list[ProcessIdentity], tmp_path: Path
) -> None:
    record = record_of(family, owner=identify(os.getpid()))
    write_record(tmp_path / "server.process.json", record)

    assert not end_recorded(tmp_path / "server.process.json")
    with pytest.raises(EngineStartFailed, match="which still runs"):
        process.spawn(FAMILY, {})

    assert all(is_running(member) for member in family)


def test_a_new_server_first_ends_what_an_earlier_process_left(
    process: EngineProcess, family: list[ProcessIdentity], tmp_path: Path
) -> None:
    write_record(tmp_path / "server.process.json", record_of(family))

    process.spawn(FAMILY, {})

    assert ended_within(0.1, family)
    assert process.exit_reason() is None


def test_an_unreadable_record_stops_nothing(process: EngineProcess, tmp_path: Path) -> None:
    (tmp_path / "server.process.json").write_text('{"leader": ')

    process.spawn(FAMILY, {})

    assert read_record(tmp_path / "server.process.json") is not None
