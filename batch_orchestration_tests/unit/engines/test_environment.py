"""An engine's server gets what it needs of our environment, and none of our secrets."""

import json
import subprocess
import sys

import pytest

from batch_orchestration.engines.processes.environment import child_environment
from batch_orchestration.engines.vllm.flags import server_env
from batch_orchestration.settings import Settings, settings_in_force

NEEDED = {
    "PATH": "/bin",
    "HOME": "/home/batch",
    "LANG": "C.UTF-8",
    "LC_ALL": "C",
    "LD_LIBRARY_PATH": "/usr/local/cuda/lib64",
    "LD_PRELOAD": "/usr/lib/libtcmalloc.so.4",
    "https_proxy": "http://proxy:3128",
    "NO_PROXY": "localhost",
    "CUDA_VISIBLE_DEVICES": "0",
    "NVIDIA_VISIBLE_DEVICES": "all",
    "NCCL_P2P_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "4",
    "HF_HOME": "/models",
    "TORCHINDUCTOR_CACHE_DIR": "/cache",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "2",
    "PYTHONPATH": "/x",
}
SECRET = {
    "BATCH_API_KEY": "s",
    "BATCH_SMTP_PASSWORD": "s",
    "BATCH_ALERT_WEBHOOK_URL": "s",
    "BATCH_DATA_DIR": "/data",
    "AWS_SECRET_ACCESS_KEY": "s",
    "AWS_SESSION_TOKEN": "s",
    "GOOGLE_APPLICATION_CREDENTIALS": "s",
    "AZURE_CLIENT_SECRET": "s",
    "OPENAI_API_KEY": "s",
    "NVIDIA_API_KEY": "s",
    "PYTHON_KEYRING_PASSWORD": "s",
    "HF_TOKEN": "s",
    "HUGGING_FACE_HUB_TOKEN": "s",
    "VLLM_S3_SECRET": "s",
    "GITHUB_TOKEN": "s",
    "DATABASE_URL": "postgres://u:p@h",
    "SSH_AUTH_SOCK": "/run/agent",
    "DAGSTER_CLOUD_AGENT_TOKEN": "s",
    "KUBECONFIG": "/k",
    "batch_api_key": "s",
}


def test_what_an_engine_needs_is_passed_on_and_nothing_else() -> None:
    assert child_environment({}, ours=NEEDED | SECRET) == NEEDED


def test_what_is_named_is_passed_on_or_set() -> None:
    given = {"AWS_SESSION_TOKEN": None, "NOT_THERE": None, "OMP_NUM_THREADS": "4"}

    environment = child_environment(given, ours=NEEDED | SECRET)

    assert environment == {**NEEDED, "AWS_SESSION_TOKEN": "s", "OMP_NUM_THREADS": "4"}


@pytest.mark.parametrize(("from_hub", "token"), [(True, "s"), (False, None)])
def test_a_token_of_the_hub_goes_where_the_model_comes_from_a_hub(
    from_hub: bool, token: str | None, tmp_path: object
) -> None:
    model = "org/model" if from_hub else str(tmp_path)

    environment = child_environment(server_env(model, device="cpu", env={}), ours=SECRET)

    assert environment.get("HF_TOKEN") == token
    assert environment["VLLM_API_KEY"] == ""


def test_values_for_the_engine_are_masked_where_settings_are_shown() -> None:
    settings = Settings(
        engine_env={"AWS_PROFILE": None, "MY_TOKEN": "s3cret"},  # type: ignore[dict-item]
        _env_file=None,
    )
    (shown,) = [s for s in settings_in_force(settings) if s.variable == "BATCH_ENGINE_ENV"]

    assert json.loads(shown.value) == {"AWS_PROFILE": None, "MY_TOKEN": "**********"}
    assert "s3cret" not in repr(settings)
    assert settings.engine_environment() == {"AWS_PROFILE": None, "MY_TOKEN": "s3cret"}


def test_a_setting_is_nothing_for_the_engine() -> None:
    with pytest.raises(ValueError, match="BATCH_API_KEY: settings are not for the engine"):
        Settings(engine_env={"BATCH_API_KEY": None}, _env_file=None)


HIDDEN = """
import os, sys
from batch_orchestration.engines.processes.records import group_members, identify
os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
assert identify(os.getpid()) is not None
assert identify(1) is None, identify(1)
assert [each.pid for each in group_members(os.getpgid(0))] == [os.getpid()]
print("looked")
"""


def test_processes_that_may_not_be_looked_at_are_not_ours() -> None:
    """`hidepid=1`: the folder of a stranger's process is there, and may not be read."""
    mount = 'mount -t proc -o hidepid=1 proc /proc && exec "$0" -c "$1"'
    command = ["unshare", "--mount", "setsid", "--wait", "sh", "-c", mount, sys.executable, HIDDEN]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except FileNotFoundError:
        pytest.skip("there is no `unshare` here to mount another /proc with")
    if "unshare" in found.stderr or "mount:" in found.stderr:
        pytest.skip(f"nobody may mount another /proc here: {found.stderr.strip()}")

    assert found.stdout == "looked\n", found.stderr
