"""`kill -9` at every step of a request's life: of the run worker, and of its engine."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import dagster as dg
import pytest

from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.core.crash_points import VARIABLE, CrashPoint
from batch_orchestration.core.outcomes import Failure, FailureCode
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.store.store import Store
from batch_orchestration_tests.fault.crashing_asset import (
    PER_CHUNK,
    REQUESTS,
    lasting_deployment,
    materialize,
)
from batch_orchestration_tests.fault.crashing_batch import run_batch
from batch_orchestration_tests.fault.mixed_batches import (
    answers,
    assert_accounted,
    durable_outcomes,
    mixed_input,
)
from batch_orchestration_tests.support.builders import make_body, make_line
from batch_orchestration_tests.support.children import ROOT
from batch_orchestration_tests.support.forks import forked, run_forked
from batch_orchestration_tests.support.workbench import Workbench

CONTENT = mixed_input(90)

#: The point, and at which passing the accident happens: in the middle of the batch.
IN_A_RUN = [
    (CrashPoint.BEFORE_SUBMIT, 40),
    (CrashPoint.AFTER_SUBMIT, 40),
    (CrashPoint.BEFORE_OUTCOME, 40),
    (CrashPoint.AFTER_OUTCOME, 40),
    (CrashPoint.BEFORE_COMMIT, 3),
    (CrashPoint.AFTER_COMMIT, 3),
    (CrashPoint.BEFORE_ERRORS_RENAME, 1),
    (CrashPoint.BEFORE_OUTPUT_RENAME, 1),
    (CrashPoint.BEFORE_REPORT_RENAME, 1),
    (CrashPoint.AFTER_RENAMES, 1),
]
ASSEMBLING = [point for point, _ in IN_A_RUN[-4:]]
#: Who assembles asks no engine.
WITH_AN_ENGINE = IN_A_RUN[:-4]
IN_DAGSTER = CrashPoint.BEFORE_EVENT
IN_A_SEARCH = CrashPoint.AFTER_SUSPECT
AROUND_A_CONTROL = [CrashPoint.BEFORE_CONTROL, CrashPoint.AFTER_CONTROL]
#: Tried in `test_early_end_killed`.
IN_AN_EARLY_END = {
    CrashPoint.AFTER_EARLY_END,
    CrashPoint.BEFORE_CLOSE_OUT,
    CrashPoint.AFTER_RESUMPTION,
    CrashPoint.AFTER_REOPENING,
}
#: Tried in `test_halting_killed`.
IN_A_PAUSE = {CrashPoint.AFTER_HALT}


def admitted(
    root: Path, content: bytes = CONTENT, *, latency_seconds: float = 0.02
) -> tuple[Workbench, BatchPlan]:
    bench = Workbench(root, clock=time.time, requests_per_chunk=15)
    plan = bench.plan_of("a.jsonl", content)
    # Slow enough for a full window at the moment of the accident.
    conditions = json.dumps({"latency_seconds": latency_seconds})
    (bench.folder.root / "simulated.json").write_text(conditions)
    return bench, plan


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    bench, plan = admitted(tmp_path_factory.mktemp("undisturbed"))
    assert run_forked(run_batch, bench.folder.root, "only", "nobody") == 0
    output, errors = answers(bench.folder, plan.batch_id)
    assert (output.count(b"\n"), errors.count(b"\n")) == (80, 10)
    return output, errors


def test_every_crash_point_is_tried() -> None:
    in_a_run = {point for point, _ in IN_A_RUN}
    elsewhere = {IN_DAGSTER, IN_A_SEARCH, *AROUND_A_CONTROL} | IN_A_PAUSE
    assert in_a_run | elsewhere | IN_AN_EARLY_END == set(CrashPoint)


def test_the_name_of_no_crash_point_is_an_error_at_once() -> None:
    command = [sys.executable, "-c", "import batch_orchestration.inference.feeder"]
    environment = {**os.environ, VARIABLE: "before_lunch"}

    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )

    assert ended.returncode == 1
    assert "'before_lunch' is not a valid CrashPoint" in ended.stderr


@pytest.mark.parametrize(("point", "passing"), IN_A_RUN)
def test_a_run_worker_killed_anywhere_leaves_a_batch_that_ends_as_undisturbed(
    tmp_path: Path, undisturbed: tuple[bytes, bytes], point: CrashPoint, passing: int
) -> None:
    bench, plan = admitted(tmp_path)
    folder = bench.folder

    died = run_forked(run_batch, folder.root, "first", "worker", crash_point=f"{point}:{passing}")
    before = durable_outcomes(folder, plan)
    seen_at_death = files_seen(folder, plan)
    assert run_forked(run_batch, folder.root, "second", "nobody") == 0

    assert died == -signal.SIGKILL
    assert seen_at_death == expected_files(point)
    assert_accounted(folder, bench.store, plan)
    assert answers(folder, plan.batch_id) == undisturbed
    after = durable_outcomes(folder, plan)
    assert {index: after[index] for index in before} == before
    ran_again = any(run_id == "second" for run_id, _ in after.values())
    assert ran_again == (len(before) < plan.requests)


@pytest.mark.parametrize("seed", range(3))
def test_a_run_worker_killed_at_a_random_moment_costs_no_outcome(
    tmp_path: Path, undisturbed: tuple[bytes, bytes], seed: int
) -> None:
    """From outside, by the number of outcomes there are: not where the code has a name for it."""
    bench, plan = admitted(tmp_path)
    folder = bench.folder
    moment = random.Random(seed).randrange(1, plan.requests - 10)

    with forked(run_batch, folder.root, "first", "nobody") as worker:
        while len(durable_outcomes(folder, plan)) < moment and worker.is_alive():
            time.sleep(0.01)
        worker.kill()
    before = durable_outcomes(folder, plan)
    assert run_forked(run_batch, folder.root, "second", "nobody") == 0

    assert worker.exitcode == -signal.SIGKILL
    assert moment <= len(before) < plan.requests
    assert_accounted(folder, bench.store, plan)
    assert answers(folder, plan.batch_id) == undisturbed
    after = durable_outcomes(folder, plan)
    assert {index: after[index] for index in before} == before


@pytest.mark.parametrize(("point", "passing"), WITH_AN_ENGINE)
def test_an_engine_killed_anywhere_costs_neither_the_run_nor_a_request(
    tmp_path: Path, undisturbed: tuple[bytes, bytes], point: CrashPoint, passing: int
) -> None:
    bench, plan = admitted(tmp_path)
    folder = bench.folder

    ended = run_forked(run_batch, folder.root, "first", "engine", crash_point=f"{point}:{passing}")

    assert ended == 0
    assert (folder.root / "accident").exists()
    assert_accounted(folder, bench.store, plan)
    assert answers(folder, plan.batch_id) == undisturbed
    assert no_attempt_was_lost(bench.store, plan)


@pytest.mark.parametrize(("passing", "victim"), [(2, "worker"), (6, "engine"), (9, "worker")])
def test_the_search_for_a_deadly_request_survives_a_kill_at_any_moment(
    tmp_path: Path, passing: int, victim: str
) -> None:
    """When some of those in flight are marked, when all are, and in the middle of the halving."""
    lines = CONTENT.splitlines(keepends=True)
    # At once, while the answers to the others take their time: the window is full.
    at_once = {"die": True, "latency_seconds": 0}
    lines[44] = make_line(44, body=make_body("deadly", simulate=at_once))
    bench, plan = admitted(tmp_path, b"".join(lines), latency_seconds=0.1)
    folder = bench.folder

    died = run_forked(run_batch, folder.root, "1", victim, crash_point=f"{IN_A_SEARCH}:{passing}")
    assert run_forked(run_batch, folder.root, "2", "nobody") == 0

    assert died == (-signal.SIGKILL if victim == "worker" else 0)
    assert_accounted(folder, bench.store, plan)
    deadly = [
        settled.index
        for settled in bench.store.settled(plan.batch_id)
        if isinstance(settled.outcome, Failure)
        and settled.outcome.code is FailureCode.ENGINE_KILLED
    ]
    assert deadly == [44]
    assert no_attempt_was_lost(bench.store, plan)


@pytest.mark.parametrize("victim", ["worker", "engine"])
@pytest.mark.parametrize("point", AROUND_A_CONTROL)
def test_a_kill_around_a_control_request_neither_loses_nor_convicts_anyone(
    tmp_path: Path, point: CrashPoint, victim: str
) -> None:
    lines = CONTENT.splitlines(keepends=True)
    lines[44] = make_line(44, body=make_body("forbidden", simulate={"status": 451}))
    bench, plan = admitted(tmp_path, b"".join(lines))
    folder = bench.folder

    died = run_forked(run_batch, folder.root, "1", victim, crash_point=f"{point}:1")
    assert run_forked(run_batch, folder.root, "2", "nobody") == 0

    assert died == (-signal.SIGKILL if victim == "worker" else 0)
    assert_accounted(folder, bench.store, plan)
    refused = [s for s in bench.store.settled(plan.batch_id) if s.index == 44]
    assert [s.outcome.code for s in refused] == [FailureCode.ENGINE_REFUSED]
    assert no_attempt_was_lost(bench.store, plan)


@pytest.mark.parametrize("victim", ["worker", "engine"])
def test_a_chunk_committed_but_not_reported_is_reported_by_the_next_run(
    tmp_path: Path, victim: str
) -> None:
    """Between commit and event lies the one gap that Dagster's event log can see."""
    died = run_forked(materialize, tmp_path, victim, crash_point=f"{IN_DAGSTER}:3")
    deployment = lasting_deployment(tmp_path)
    (batch_id,) = deployment.folder.batch_ids()
    plan = deployment.folder.read_plan(batch_id)
    reported_at_death = len(deployment.statuses("chunk_results"))
    committed_at_death = len(deployment.store.chunk_reports(batch_id))

    assert run_forked(materialize, tmp_path, "nobody") == 0

    if victim == "worker":
        assert died == -signal.SIGKILL
        assert reported_at_death == 2 < committed_at_death
    else:
        assert died == 0
        assert (deployment.folder.root / "accident").exists()
        assert reported_at_death == committed_at_death == REQUESTS // PER_CHUNK
    assert deployment.statuses("chunk_results") == set(plan.chunk_keys)
    indices = [settled.index for settled in deployment.store.settled(batch_id)]
    assert indices == list(range(REQUESTS))
    everyone = deployment.instance.get_materialized_partitions(dg.AssetKey("chunk_results"))
    assert len(everyone) == REQUESTS // PER_CHUNK


def files_seen(folder: DataFolder, plan: BatchPlan) -> set[str]:
    """Files of the outbox, without those that a killed writer left under a temporary name."""
    return {p.name for p in folder.outbox_path(plan.batch_id).glob("[!.]*")}


def expected_files(point: CrashPoint) -> set[str]:
    if point not in ASSEMBLING:
        return set()
    # Both reports follow the last of these moments but one.
    visible = [{"errors.jsonl"}, {"output.jsonl"}, {"report.md", "report.html"}]
    return {name for names in visible[: ASSEMBLING.index(point)] for name in names}


def no_attempt_was_lost(store: Store, plan: BatchPlan) -> bool:
    """Whether no request has a failed attempt that it did not ask for."""
    return all(
        {attempt.code for attempt in settled.failed_attempts} <= {"engine_overloaded"}
        for settled in store.settled(plan.batch_id)
    )
