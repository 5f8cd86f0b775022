"""What runs under systemd: the units are sound, and a service may end without harm to a batch."""

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from batch_orchestration_tests.fault.accidents import (
    SLOW_SECONDS,
    assert_undisturbed,
    durable_outcomes,
    wait_for_answering,
    wait_for_outcomes,
)
from batch_orchestration_tests.fault.services import (
    CODE_PORT,
    INSTALLED,
    PROGRAMS,
    UNITS,
    WORKSPACE,
    read_unit,
    services,
)
from batch_orchestration_tests.support.builders import make_input
from batch_orchestration_tests.support.dagster_processes import REPOSITORY

SERVICES = sorted(UNITS.glob("*.service"))
#: Runs once, before the others.
INSTANCE = "batch-orchestration-instance.service"
#: Runs once, when all services stop.
ENGINES = "batch-orchestration-engines.service"
LASTING = [unit for unit in SERVICES if unit.name not in (INSTANCE, ENGINES)]
REQUESTS = 60


@pytest.mark.slow
def test_services_that_end_and_are_started_again_do_no_harm_to_batches(tmp_path):
    """An upgrade stops the daemon; a code server that is killed takes every sensor with it."""
    with services(tmp_path, BATCH_REQUESTS_PER_CHUNK="20", BATCH_IN_FLIGHT="2") as site:
        site.simulate(latency_seconds=SLOW_SECONDS)
        site.drop("a.jsonl", make_input(REQUESTS))
        first = site.wait_for_batch("a")
        run = wait_for_answering(site, first)
        wait_for_outcomes(site, first, 5)

        site.end_service("daemon", signal.SIGTERM)
        before = durable_outcomes(site, first)
        site.simulate(latency_seconds=0.1)
        site.start_service("daemon")

        site.wait_for_status(first, "completed")
        assert len(before) < REQUESTS
        assert_undisturbed(site, first, REQUESTS, before)
        (answering,) = site.runs("answer_chunks", batch=first)
        assert (answering.run_id, answering.status) == (run.run_id, "SUCCESS")

        site.end_service("code", signal.SIGKILL)
        site.start_service("code")
        site.drop("b.jsonl", make_input(20))

        # A tick of a sensor, and a run that is launched.
        site.wait_for_batch("b")


@pytest.mark.parametrize("unit", LASTING, ids=lambda path: path.stem)
def test_a_service_is_started_again_for_ever_and_runs_a_program_that_exists(unit):
    service = read_unit(unit)["Service"]
    program, *_ = service["ExecStart"].split()

    assert service["Restart"] == "always"
    assert read_unit(unit)["Unit"]["StartLimitIntervalSec"] == "0"
    assert (Path(sys.executable).parent / Path(program).relative_to(PROGRAMS)).exists()


def test_dagsters_storage_is_there_before_anybody_uses_it():
    """Made by two at the same time it gets two rows of its version, and is spoilt for ever."""
    users = [unit for unit in LASTING if "dagster" in read_unit(unit)["Service"]["ExecStart"]]

    assert read_unit(UNITS / INSTANCE)["Service"]["Type"] == "oneshot"
    for unit in users:
        assert read_unit(unit)["Unit"]["Requires"] == INSTANCE
        assert INSTANCE in read_unit(unit)["Unit"]["After"].split()


def test_warm_engines_end_with_the_services():
    service = read_unit(UNITS / ENGINES)["Service"]

    assert (service["Type"], service["RemainAfterExit"]) == ("oneshot", "yes")
    assert service["ExecStop"].endswith("-m batch_orchestration engine stop --idle")


def test_only_the_daemon_leaves_its_children_alone():
    """The run workers are its children; nobody else has any that shall outlive it."""
    kept = {unit.stem for unit in SERVICES if "KillMode" in read_unit(unit)["Service"]}

    assert kept == {"batch-orchestration-daemon"}


def test_the_target_wants_each_service_and_each_belongs_to_it():
    target = read_unit(UNITS / "batch-orchestration.target")

    assert sorted(target["Unit"]["Wants"].split()) == [unit.name for unit in SERVICES]
    assert {read_unit(unit)["Unit"]["PartOf"] for unit in SERVICES} == {
        "batch-orchestration.target"
    }


def test_the_workspace_is_where_the_code_is_served():
    (location,) = yaml.safe_load(WORKSPACE.read_text())["load_from"]
    command = read_unit(UNITS / "batch-orchestration-code.service")["Service"]["ExecStart"]

    assert location["grpc_server"]["port"] == int(CODE_PORT)
    assert f"--host {location['grpc_server']['host']} --port {CODE_PORT}" in command
    assert f"--location-name {location['grpc_server']['location_name']}" in command


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_itself_has_no_complaint(tmp_path):
    """On another machine the programs are elsewhere, and there is no user of that name."""
    for unit in UNITS.iterdir():
        text = unit.read_text().replace(PROGRAMS, str(Path(sys.executable).parent))
        text = re.sub(r"^User=.*$", "User=root", text, flags=re.MULTILINE)
        (tmp_path / unit.name).write_text(text.replace(INSTALLED, str(REPOSITORY)))
    units = sorted(str(tmp_path / unit.name) for unit in UNITS.iterdir())
    verdict = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units],
        capture_output=True,
        text=True,
        check=False,
    )

    complaints = [line for line in verdict.stderr.splitlines() if "batch-orchestration" in line]
    assert (verdict.returncode, complaints) == (0, [])


@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.stem)
def test_a_service_makes_nothing_for_others_and_writes_only_where_it_has_to(unit):
    service = read_unit(unit)["Service"]

    assert service["UMask"] == "0027"
    assert service["NoNewPrivileges"] == "yes"
    assert service["ProtectSystem"] == "strict"
    assert service["ReadWritePaths"].split()[0] == f"{INSTALLED}/data"
    # It forbids chmod g+s, by which folders are shared with the group.
    assert "RestrictSUIDSGID" not in service


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.stem)
def test_systemd_calls_no_service_exposed(unit, tmp_path):
    """From 0 to 10; the daemon's, below which engines use the devices, is the highest."""
    path = tmp_path / unit.name
    path.write_text(unit.read_text().replace("User=batch", "User=daemon"))

    verdict = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=50", path],
        capture_output=True,
        text=True,
        check=False,
    )

    assert verdict.returncode == 0, verdict.stdout[-300:] + verdict.stderr
    assert "Overall exposure level" in verdict.stdout
