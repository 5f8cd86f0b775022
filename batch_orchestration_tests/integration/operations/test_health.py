"""Health: each check finds what it is for, and fails closed where it cannot be done."""

import os
import threading
import time
from contextlib import closing, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import dagster as dg
import pytest

from batch_orchestration.admission.inbox import Inbox
from batch_orchestration.core.errors import GpuUnreadable
from batch_orchestration.defs.health import deployment_is_healthy
from batch_orchestration.files.state_file import StateFile
from batch_orchestration.gpu import health as gpu_health
from batch_orchestration.operations.health import checks as health_checks
from batch_orchestration.operations.health import examine as health
from batch_orchestration.operations.health.report import Finding, HealthReport, Level
from batch_orchestration.queue.entries import (
    EntryKind,
    EntryState,
    NeedsAttention,
    Pause,
    WaitReason,
)
from batch_orchestration.queue.pause import pause
from batch_orchestration_tests.support.builders import NOW, make_batch, make_input, make_settings
from batch_orchestration_tests.support.command_line import CommandLine
from batch_orchestration_tests.support.deployment import Deployment
from batch_orchestration_tests.support.health_bench import HealthBench, entry


@pytest.fixture
def make_bench(tmp_path, monkeypatch):
    monkeypatch.setattr(health, "STORE_SECONDS", 0.2)
    return lambda **settings: HealthBench(tmp_path, **settings)


@pytest.fixture
def bench(make_bench):
    made = make_bench()
    made.tick()
    return made


def test_a_deployment_that_ticks_is_healthy_and_says_so_of_every_check(bench):
    report = bench.look()

    assert report.level is Level.HEALTHY, report.summary
    assert {found.check for found in report.findings} == set(health_checks.CHECKS)


def test_a_check_that_raises_or_finds_nothing_is_unhealthy_by_its_name(bench):
    def broken(context):
        yield Finding(check="disk", level=Level.HEALTHY, reason="so far")
        raise RuntimeError("the disk is on fire")

    raised, empty = bench.look(checks={"disk": broken, "gpu": lambda context: ()}).findings

    assert (raised.check, raised.level) == ("disk", Level.UNHEALTHY)
    assert "the disk is on fire" in raised.reason
    assert (empty.check, empty.level) == ("gpu", Level.UNHEALTHY)


def test_a_check_that_hangs_is_unhealthy_in_time_and_asked_by_one_thread_only(bench):
    asked, answer = [], threading.Event()

    def hanging(look):
        asked.append(look)
        answer.wait(200)
        yield Finding(check="gpu", level=Level.HEALTHY, reason="at last")

    began = time.monotonic()
    checks = {"disk": health_checks.disk, "gpu": hanging}
    looks = [bench.look(checks=checks, seconds=0.3) for _ in range(3)]

    assert time.monotonic() - began < 100
    assert all([found.check for found in look.problems] == ["gpu"] for look in looks)
    assert "has not answered" in looks[-1].summary
    assert len(asked) == 1
    answer.set()
    assert bench.look(checks={"gpu": hanging}, seconds=5).level is Level.HEALTHY


# --- Dagster --------------------------------------------------------------------------------------


def test_a_daemon_that_never_ran_is_unhealthy(make_bench):
    found = make_bench().find("dagster")

    assert found.level is Level.UNHEALTHY
    assert "dagster dev" in found.next_command


@pytest.mark.parametrize(
    ("age", "level"),
    [
        *((5, Level.HEALTHY), (100, Level.DEGRADED), (1000, Level.UNHEALTHY)),
        (-3600, Level.DEGRADED),  # from the future
    ],
)
def test_a_daemon_that_fell_silent_is_known_by_its_last_tick(bench, age, level):
    bench.now += age

    assert bench.find("dagster").level is level


def test_a_sensor_that_fails_while_the_daemon_runs_is_told_from_a_dead_daemon(bench):
    bench.now += 1000
    bench.watch()
    bench.now += 30

    found = bench.find("dagster")

    assert found.level is Level.UNHEALTHY
    assert "the daemon runs" in found.reason
    assert "/sensors/dispatch_sensor" in found.next_command


# --- store and disk -------------------------------------------------------------------------------


def test_a_locked_store_is_degraded_and_after_a_while_unhealthy(bench):
    with bench.locked():
        levels = []
        for _ in range(3):
            bench.tick()
            levels.append({f.check: f.level for f in bench.watch().findings}["store"])
            bench.now += health_checks.LOCKED_SECONDS / 2

    assert levels == [Level.DEGRADED, Level.DEGRADED, Level.UNHEALTHY]
    assert bench.find("store").level is Level.HEALTHY


def test_a_store_that_is_gone_or_damaged_leads_to_recover(bench):
    make_batch(bench.folder, 3)
    bench.folder.duckdb.unlink()

    gone = bench.find("store")
    bench.folder.duckdb.write_bytes(b"no database" * 1000)
    damaged = bench.find("store")

    assert (gone.level, damaged.level) == (Level.UNHEALTHY, Level.UNHEALTHY)
    assert "recover" in gone.next_command
    assert "recover" in damaged.next_command


def test_looking_makes_no_store_and_leaves_nothing_behind(bench):
    bench.folder.duckdb.unlink()
    before = sorted(path.name for path in bench.folder.root.iterdir())

    assert bench.find("store").level is Level.HEALTHY
    assert sorted(path.name for path in bench.folder.root.iterdir()) == before


def test_a_folder_that_does_not_exist_is_unhealthy_and_not_made(make_bench, tmp_path):
    bench = make_bench()
    bench.folder = replace(bench.folder, root=tmp_path / "elsewhere")

    assert bench.find("store").level is Level.UNHEALTHY
    assert bench.find("disk").level is Level.UNHEALTHY
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("free_gib", "level"), [(5, Level.HEALTHY), (1, Level.DEGRADED), (0.2, Level.UNHEALTHY)]
)
def test_the_disk_is_judged_by_the_reserve(make_bench, monkeypatch, free_gib, level):
    bench = make_bench(disk_reserve_bytes=2 * 2**30)
    stats = SimpleNamespace(
        f_bavail=int(free_gib * 2**30), f_frsize=1, f_files=10**6, f_favail=10**6
    )
    monkeypatch.setattr(os, "statvfs", lambda path: stats)

    assert bench.find("disk").level is level


# --- the queue ------------------------------------------------------------------------------------


def test_a_queue_in_which_nothing_moves_though_it_could_is_unhealthy_after_a_while(bench):
    for _ in range(2):
        bench.tick(entry())
        assert bench.watch().level is Level.HEALTHY
        bench.now += bench.in_force.stalled_seconds / 2

    bench.tick(entry())

    found = bench.find("queue")
    assert found.level is Level.UNHEALTHY
    assert "a-1b2c3d4e" in found.reason


@pytest.mark.parametrize(
    "later",
    [
        [entry(pending=9)],
        [entry("b-1b2c3d4e")],
        [entry(), entry("b-1b2c3d4e", state=EntryState.RUNNING)],
        [entry(reason=WaitReason.GPU_UNHEALTHY)],
        [entry(reason=WaitReason.QUEUE_FULL)],
    ],
    ids=["fewer are pending", "another is next", "one is at work", "no device", "no room"],
)
def test_a_queue_that_moves_or_is_kept_is_not_stalled(bench, later):
    bench.tick(entry())
    bench.watch()
    bench.now += 2 * bench.in_force.stalled_seconds
    bench.tick(*later)

    assert bench.find("queue").level is Level.HEALTHY


def test_a_queue_is_not_stalled_while_a_run_lives(bench):
    for _ in range(3):
        bench.tick(entry())
        bench.beat()
        assert bench.watch().level is Level.HEALTHY
        bench.now += bench.in_force.stalled_seconds


def test_a_file_whose_admissions_fail_again_and_again_stalls_the_queue(bench):
    path = bench.folder.inbox / "people.jsonl"
    path.write_bytes(make_input(2))
    inbox = Inbox(bench.folder, make_settings(settle_seconds=0))
    (claim,) = inbox.claim_ready(now=time.time() + 1)
    os.utime(claim.path.with_name("claim.json"), (NOW, NOW))
    found = []
    for _ in range(2):
        bench.tick(
            entry("people.jsonl", batch_id=None, kind=EntryKind.FILE, state=EntryState.WAITING)
        )
        bench.beat()  # of an admission that will fail, too
        found.append(bench.find("queue"))
        bench.now += bench.in_force.stalled_seconds + 1

    assert [finding.level for finding in found] == [Level.HEALTHY, Level.UNHEALTHY]
    assert "people.jsonl was taken from the inbox" in found[1].reason


def test_a_paused_queue_is_degraded_and_says_who_and_how_to_go_on(bench):
    pause(bench.folder, Pause(at=NOW - 3600, actor="mallory", reason="new disks"))

    found = bench.find("queue")

    assert found.level is Level.DEGRADED
    assert "mallory paused it 1 h 0 min ago: new disks" in found.reason
    assert found.next_command.endswith("resume")


def test_a_batch_that_waits_for_a_person_is_named_with_its_run(bench):
    need = NeedsAttention(batch_id="b-1", run_id="run-9", reason="waits for a person: it broke")
    bench.tick(entry("b-1"), needs=(need,))

    found = bench.find("person:b-1")

    assert found.level is Level.DEGRADED
    assert found.next_command == "http://localhost:3000/runs/run-9"


def test_a_damaged_queue_file_is_unhealthy_and_no_traceback(bench):
    bench.folder.queue.write_bytes(b"{")

    assert bench.find("queue").level is Level.UNHEALTHY
    assert bench.find("dagster").level is Level.UNHEALTHY


# --- runs and engines -----------------------------------------------------------------------------


def test_slow_is_not_stuck(bench):
    bench.beat(progress_at=bench.now - 100, patience_seconds=101)
    slow = bench.find("worker:run-1")
    bench.beat(progress_at=bench.now - 100, patience_seconds=99, in_flight=7, window=8)
    stuck = bench.find("worker:run-1")

    assert slow.level is Level.HEALTHY
    assert stuck.level is Level.UNHEALTHY
    assert "stuck" in stuck.reason
    assert bench.find("engine:run-1").level is Level.UNHEALTHY


def test_a_live_process_without_a_word_is_unhealthy(bench):
    bench.beat(at=bench.now - bench.in_force.silent_seconds - 1)

    assert "silent" in bench.find("worker:run-1").reason
    assert bench.find("worker:run-1").level is Level.UNHEALTHY


@pytest.mark.parametrize(("age", "level"), [(5, Level.DEGRADED), (120, Level.UNHEALTHY)])
def test_a_worker_of_another_boot_is_gone_whoever_has_its_pid(bench, age, level):
    bench.beat(boot_id="another", at=bench.now - age)

    found = bench.find("worker:run-1")

    assert found.level is level
    assert "is gone" in found.reason


def test_a_heartbeat_that_can_only_be_heard_is_not_healthy(bench):
    bench.beat()
    path = bench.folder.heartbeat_path("run-1")
    path.write_bytes(b'{"run_id": 3}')
    levels = []
    for age in (5, bench.in_force.silent_seconds + 5):
        os.utime(path, (bench.now - age, bench.now - age))
        levels.append(bench.find("worker:run-1").level)

    assert levels == [Level.DEGRADED, Level.UNHEALTHY]


def test_an_event_loop_that_does_not_come_round_is_stuck_though_the_heart_beats(bench):
    bench.beat(loop_at=bench.now - bench.in_force.silent_seconds - 1)

    assert "event loop" in bench.find("worker:run-1").reason
    assert bench.find("worker:run-1").level is Level.UNHEALTHY


def test_a_batch_at_work_without_any_heartbeat_is_degraded_until_its_run_says_it_is_done(bench):
    plan = make_batch(bench.folder, 3)
    bench.tick(entry(plan.batch_id, state=EntryState.RUNNING))
    cli = CommandLine(bench.folder)
    levels = []
    for phase in ("feeding", "done"):
        cli.progress(plan, phase=phase, updated_at=bench.now)
        levels.append(bench.find("workers").level)

    assert levels == [Level.DEGRADED, Level.HEALTHY]


def test_an_engine_that_is_started_again_and_again_is_degraded(bench):
    bench.beat(restarts=bench.in_force.alert_engine_restarts + 1)

    assert bench.find("engine:run-1").level is Level.DEGRADED


class _Server(HTTPServer):
    status = 200
    other_status = 200
    location = None

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.asked = []


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.path, self.headers["Authorization"]))
        is_health = self.path == "/health"
        self.send_response(self.server.status if is_health else self.server.other_status)
        if self.server.location:
            self.send_header("Location", self.server.location)
        self.end_headers()

    def log_message(self, *arguments):
        pass


@contextmanager
def _serving():
    with _Server(("127.0.0.1", 0), _Handler) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield made
        made.shutdown()


@pytest.fixture
def server():
    with _serving() as made:
        yield made


@pytest.mark.parametrize(
    ("status", "models", "level"),
    [
        (200, 500, Level.HEALTHY),
        (404, 200, Level.HEALTHY),
        (405, 200, Level.HEALTHY),
        (404, 404, Level.UNHEALTHY),
        (404, 401, Level.UNHEALTHY),
        (401, 200, Level.UNHEALTHY),
        (403, 200, Level.UNHEALTHY),
        (429, 200, Level.DEGRADED),
        (503, 200, Level.UNHEALTHY),
    ],
)
def test_a_remote_engine_is_asked(make_bench, server, status, models, level):
    server.status, server.other_status = status, models
    bench = make_bench(engine="remote", base_url=f"http://127.0.0.1:{server.server_port}/v1")

    found = bench.find("engine")

    assert found.level is level
    if {status, models} & {401, 403}:
        assert "BATCH_API_KEY" in found.next_command


def test_the_key_of_a_remote_engine_goes_to_nobody_whom_a_redirect_names(make_bench, server):
    with _serving() as stranger:
        server.status = 302
        server.location = f"http://127.0.0.1:{stranger.server_port}/stolen"
        base_url = f"http://127.0.0.1:{server.server_port}/v1"
        bench = make_bench(engine="remote", base_url=base_url, api_key="s3cret")

        assert bench.find("engine").level is Level.UNHEALTHY
        assert server.asked == [("/health", "Bearer s3cret")]
        assert stranger.asked == []


@pytest.mark.parametrize("key", ["s3cret", "s3cret\nbroken"])
def test_a_remote_engine_that_is_not_there_is_unhealthy_and_its_key_is_not_told(make_bench, key):
    bench = make_bench(engine="remote", base_url="http://127.0.0.1:9", api_key=key)

    found = bench.find("engine")

    assert found.level is Level.UNHEALTHY
    assert "s3cret" not in repr(found)


def test_a_gpu_that_cannot_be_read_is_unhealthy(make_bench, monkeypatch):
    def unreadable():
        raise GpuUnreadable("NVML is not there")

    monkeypatch.setattr(gpu_health, "_reader", gpu_health.GpuReader(unreadable))
    bench = make_bench(engine="vllm", device="cuda", model="org/model")

    found = bench.find("gpu")

    assert found.level is Level.UNHEALTHY
    assert "NVML is not there" in found.reason


# --- in Dagster -----------------------------------------------------------------------------------


def verdicts(instance):
    """What the check said, newest first."""
    records = instance.event_log_storage.get_asset_check_execution_history(
        dg.AssetCheckKey(dg.AssetKey("queue_overview"), "deployment_is_healthy"), limit=20
    )
    return [record.evaluation for record in records]


def test_the_sensor_writes_what_it_found_and_reports_only_what_is_new(tmp_path):
    with closing(Deployment(tmp_path, disk_reserve_bytes=0)) as deployment:
        before = deployment.reason("health_sensor")
        deployment.reason("dispatch_sensor")
        after = [deployment.reason("health_sensor") for _ in range(2)]
        found = StateFile(deployment.folder.health, HealthReport).read()

        told = verdicts(deployment.instance)

    assert before.startswith("unhealthy: dagster: dispatch_sensor has never completed a tick")
    assert after == ["healthy", "healthy"]
    assert found.level is Level.HEALTHY
    assert [verdict.passed for verdict in told] == [True, False]
    assert told[1].severity is dg.AssetCheckSeverity.ERROR
    assert "Next: systemctl restart" in told[1].metadata["dagster"].value


def test_a_person_can_have_the_check_look_now(tmp_path):
    with closing(Deployment(tmp_path, disk_reserve_bytes=0)) as deployment:
        deployment.reason("dispatch_sensor")
        result = dg.materialize(
            [deployment_is_healthy],
            instance=deployment.instance,
            resources={"settings": deployment.settings},
            selection=dg.AssetSelection.all_asset_checks(),
        )

    assert result.success
    assert [evaluation.passed for evaluation in result.get_asset_check_evaluations()] == [True]
