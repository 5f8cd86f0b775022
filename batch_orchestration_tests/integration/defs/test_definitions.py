"""The definitions: complete, described, and light to load."""

import shutil
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
import yaml

from batch_orchestration.definitions import definitions
from batch_orchestration.defs.launcher import LocalProcessRunLauncher
from batch_orchestration.settings import Settings

REPOSITORY = Path(__file__).resolve().parents[3]
JOBS = ("admit_batch", "submit_batch", "answer_chunks", "deliver_batch", "benchmark_engine")
HEAVY = ["vllm", "torch", "transformers", "pynvml", "pandas"]


@pytest.fixture(scope="module")
def repository():
    settings = Settings(owner="team:night-shift", _env_file=None)
    defs = definitions(settings)
    dg.Definitions.validate_loadable(defs)
    return defs.get_repository_def()


def test_importing_the_definitions_loads_nothing_heavy():
    code = (
        "import sys, batch_orchestration.definitions\n"
        f"print(sorted(set({HEAVY}) & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]

    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout

    assert output.strip() == "[]"


def test_every_asset_tells_a_person_on_call_what_it_is(repository):
    specs = list(repository.assets_defs_by_key.items())

    assert {key.to_user_string() for key, _ in specs} == {
        "batch_manifest",
        "chunk_results",
        "batch_output",
        "queue_overview",
    }
    for key, asset in specs:
        spec = asset.specs_by_key[key]
        assert len(spec.description or "") > 100
        assert spec.owners == ["team:night-shift"]
        assert spec.kinds
        assert spec.group_name in {"inbox", "inference", "delivery"}


def test_lineage_runs_from_the_file_to_the_answers(repository):
    graph = repository.asset_graph

    assert graph.get(dg.AssetKey("chunk_results")).parent_keys == {dg.AssetKey("batch_manifest")}
    assert graph.get(dg.AssetKey("batch_output")).parent_keys == {dg.AssetKey("chunk_results")}


def test_whatever_starts_an_engine_takes_turns_at_the_gpu(repository):
    ops = [repository.assets_defs_by_key[dg.AssetKey("chunk_results")].op]
    for job in ("replay_failed_requests", "benchmark_engine"):
        ops += [node.definition for node in repository.get_job(job).nodes]

    assert [op.pool for op in ops] == ["gpu"] * 3


def test_sensors_and_jobs_are_described_and_the_sensors_run(repository):
    for sensor in repository.sensor_defs:
        assert sensor.default_status is dg.DefaultSensorStatus.RUNNING
        assert sensor.description
    for name in (*JOBS, "replay_failed_requests"):
        assert repository.get_job(name).description


def test_runs_use_the_executor_that_leaves_no_orphans(repository):
    for name in ("answer_chunks", "replay_failed_requests", "__ASSET_JOB"):
        assert repository.get_job(name).executor_def is dg.in_process_executor


def test_the_instance_of_the_repository_is_valid(tmp_path, monkeypatch):
    shutil.copy(REPOSITORY / "dagster.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)

    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        assert isinstance(instance.run_launcher, LocalProcessRunLauncher)
        assert instance.run_launcher.supports_check_run_worker_health
        assert instance.run_retries_max_retries > 0
        assert not instance.run_retries_retry_on_asset_or_op_failure
        assert not instance.telemetry_enabled

    assert (tmp_path / "data/dagster/storage").is_dir()


def test_everything_of_the_instance_lies_under_the_data_folder():
    config = yaml.safe_load((REPOSITORY / "dagster.yaml").read_text())
    folders = [
        config["storage"]["sqlite"]["base_dir"],
        config["local_artifact_storage"]["config"]["base_dir"],
        config["compute_logs"]["config"]["base_dir"],
    ]

    assert all(folder.startswith("data/dagster") for folder in folders)
