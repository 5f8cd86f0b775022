"""The launchpad names no host, key, file or code, and reads no secret."""

import dagster as dg
import pytest
from dagster._core.errors import DagsterLaunchFailedError
from pydantic import SecretStr

from batch_orchestration.definitions import definitions
from batch_orchestration.defs.launcher import refuse_names_of_variables
from batch_orchestration.defs.resources import GpuResource, RunFlags
from batch_orchestration.settings import EngineKind, Settings

#: Jobs that start an engine; `answer_chunks` is also what a backfill launches.
ENGINE_JOBS = ("answer_chunks", "replay_failed_requests", "benchmark_engine")
KEY, ADDRESS = "s3cret-key", "http://engine.internal:8000"


@pytest.fixture(scope="module")
def settings():
    return Settings(
        engine=EngineKind.REMOTE,
        base_url=ADDRESS,
        api_key=SecretStr(KEY),
        engine_args={"hf-overrides": {"token": KEY}, "max_model_len": 4096},
        _env_file=None,
    )


@pytest.fixture(scope="module")
def repository(settings):
    return definitions(settings).get_repository_def()


def refusal(repository, job, fields):
    """What Dagster says of a job whose form has these fields of the engine's resource."""
    config = {"resources": {"gpu": {"config": fields}}}
    if job == "replay_failed_requests":
        config["ops"] = {"replay_dead_letters": {"config": {"batch": "any"}}}
    with pytest.raises(dg.DagsterInvalidConfigError) as refused:
        dg.validate_run_config(repository.get_job(job), config)
    return str(refused.value)


@pytest.mark.parametrize("job", ENGINE_JOBS)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("base_url", "http://evil.example"),
        ("api_key", {"env": "BATCH_SMTP_PASSWORD"}),
        ("engine", "remote"),
        ("device", "cpu"),
        ("model", "evil/model"),
        ("served_model_name", "demo"),
        ("engine_args", {"trust-remote-code": True}),
        ("env", {"LD_PRELOAD": "/tmp/evil.so"}),
    ],
)
def test_the_launchpad_changes_no_field_but_those_of_the_list(repository, job, field, value):
    assert f'unexpected config entry "{field}"' in refusal(repository, job, {field: value})


@pytest.mark.parametrize("job", ENGINE_JOBS)
@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("trust_remote_code", True),
        ("trust-remote-code", True),
        ("middleware", ["evil.module"]),
        ("tool_parser_plugin", "/tmp/evil.py"),
        ("chat_template", "/etc/passwd"),
        ("download_dir", "/tmp"),
        ("allowed_local_media_path", "/"),
        ("kv_transfer_config", {"kv_ip": "evil.example"}),
    ],
)
def test_a_flag_that_names_a_host_a_file_or_code_is_refused(repository, job, flag, value):
    assert f'unexpected config entry "{flag}"' in refusal(repository, job, {"flags": {flag: value}})


@pytest.mark.parametrize("value", ["4096 --trust-remote-code", ["1", "--trust-remote-code"], {}])
def test_a_flag_of_the_list_is_a_number_and_carries_no_other_flag(repository, value):
    assert "max_model_len" in refusal(
        repository, "answer_chunks", {"flags": {"max_model_len": value}}
    )


def test_flags_of_the_list_win_over_those_of_the_settings_however_these_are_written(settings):
    gpu = GpuResource(flags=RunFlags(max_model_len=512, seed=7), start_timeout_seconds=60.0)

    in_force = gpu.in_force(settings)

    assert in_force.engine_args == {
        "hf-overrides": {"token": KEY},
        "max-model-len": 512,
        "seed": 7,
    }
    assert (in_force.base_url, in_force.api_key) == (settings.base_url, settings.api_key)
    assert in_force.engine_start_timeout_seconds == 60.0
    assert in_force.request_timeout_seconds == settings.request_timeout_seconds


def test_the_form_shows_neither_the_key_nor_the_address_nor_the_flags(repository):
    for job in ENGINE_JOBS:
        field = repository.get_job(job).run_config_schema.config_type.fields["resources"]
        assert KEY not in repr(field.default_value)
        assert ADDRESS not in repr(field.default_value)


@pytest.mark.parametrize(
    "config",
    [
        {"ops": {"cancel": {"config": {"reason": {"env": "BATCH_SMTP_PASSWORD"}}}}},
        {"ops": {"submit_file": {"config": {"path": {"env": "AWS_SECRET_ACCESS_KEY"}}}}},
        {"ops": {"submit_file": {"config": {"metadata": {"a": {"env": "BATCH_API_KEY"}}}}}},
        {"ops": {"submit_file": {"config": {"metadata": {"metadata": {"env": "HOME"}}}}}},
        {"ops": {"replay_dead_letters": {"config": {"custom_ids": ["x", {"env": "HOME"}]}}}},
        {"resources": {"gpu": {"config": {"flags": {"seed": {"env": "PIN"}}}}}},
        {"loggers": {"console": {"config": {"name": {"env": "HOME"}}}}},
    ],
)
def test_no_config_of_a_run_has_the_worker_read_its_environment(config):
    with pytest.raises(DagsterLaunchFailedError, match="names an environment variable at"):
        refuse_names_of_variables(config)


def test_a_persons_own_pairs_may_be_called_env():
    refuse_names_of_variables(
        {
            "ops": {
                "submit_file": {"config": {"path": "/x.jsonl", "metadata": {"env": "prod"}}},
                "replay_dead_letters": {"config": {"overrides": {"env": "prod"}}},
            }
        }
    )
