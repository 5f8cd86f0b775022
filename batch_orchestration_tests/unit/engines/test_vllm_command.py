"""What is asked of vLLM, flag by flag."""

import sys
from pathlib import Path
from typing import Any

import pytest

from batch_orchestration.core.errors import EngineStartFailed
from batch_orchestration.engines.model_folder import find_model
from batch_orchestration.engines.vllm.flags import server_command, server_env


def command(model: str = "org/model", **options: Any) -> list[str]:
    given = {"served_model_name": "", "device": "cuda", "args": {}, **options}
    return server_command(model, Path("/tmp/ours/socket"), **given)


def value_of(flag: str, words: list[str]) -> str:
    return words[words.index(flag) + 1]


def test_the_server_is_a_module_of_this_python_at_a_unix_socket_and_no_port() -> None:
    words = command()

    assert words[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    assert value_of("--uds", words) == "/tmp/ours/socket"
    assert not {"--host", "--port"} & set(words)
    assert value_of("--model", words) == "org/model"


def test_the_model_is_served_under_its_last_part_or_a_given_name() -> None:
    assert value_of("--served-model-name", command()) == "model"
    assert value_of("--served-model-name", command(served_model_name="demo")) == "demo"


def test_a_folder_is_named_in_full_and_served_under_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()

    words = command(f"{folder}/")

    assert value_of("--model", words) == str(folder)
    assert value_of("--served-model-name", words) == "tiny"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"max-model-len": 1024}, ["--max-model-len", "1024"]),
        ({"max_model_len": 1024}, ["--max-model-len", "1024"]),
        ({"--max-model-len": 1024}, ["--max-model-len", "1024"]),
        ({"enable-auto-tool-choice": True}, ["--enable-auto-tool-choice"]),
        ({"enable-prefix-caching": False}, ["--no-enable-prefix-caching"]),
        ({"hf-overrides": {"a": [1]}}, ["--hf-overrides", '{"a":[1]}']),
        ({"lora-modules": ["a=b", "c=d"]}, ["--lora-modules", "a=b", "c=d"]),
        ({"gpu-memory-utilization": 0.5}, ["--gpu-memory-utilization", "0.5"]),
    ],
)
def test_flags_are_written_as_vllm_reads_them(args: dict[str, Any], words: list[str]) -> None:
    assert command(args=args)[-len(words) :] == words


def test_a_cpu_has_defaults_that_any_flag_overrides_or_takes_away() -> None:
    plain = command(device="cpu")
    changed = command(device="cpu", args={"dtype": "bfloat16", "enforce_eager": None})

    assert value_of("--dtype", plain) == "float32"
    assert "--enforce-eager" in plain
    assert value_of("--kv-cache-memory-bytes", plain) == str(2**30)
    assert changed.count("--dtype") == 1
    assert value_of("--dtype", changed) == "bfloat16"
    assert "--enforce-eager" not in changed
    assert "--dtype" not in command(device="cuda")


@pytest.mark.parametrize("flag", ["host", "port", "api-key", "api_key", "--model", "uds"])
def test_what_the_engine_decides_itself_may_not_be_set(flag: str) -> None:
    with pytest.raises(EngineStartFailed, match="engine_args may not set"):
        command(args={flag: "x"})


def test_no_model_and_no_folder_are_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(EngineStartFailed, match="no model to serve"):
        command("")
    with pytest.raises(EngineStartFailed, match=f"no model folder {tmp_path}/missing"):
        command(f"{tmp_path}/missing")
    with pytest.raises(EngineStartFailed, match="no model folder"):
        command(".cache/models/missing")


def test_a_name_with_at_most_one_slash_may_be_a_hubs() -> None:
    assert find_model("org/model-1.5") is None
    assert find_model("gpt2") is None


def test_the_environment_on_a_gpu_is_this(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)

    env = server_env("org/model", device="cuda", env={})

    assert env == {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_API_KEY": "",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "VLLM_SERVER_DEV_MODE": "0",
        "HF_TOKEN": None,
        "HUGGING_FACE_HUB_TOKEN": None,
    }


def test_paths_that_reach_into_the_engine_and_a_key_that_we_lack_cannot_be_switched_on() -> None:
    asked = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_API_KEY": "theirs"}

    env = server_env("m", device="cuda", env=asked)

    assert (env["VLLM_SERVER_DEV_MODE"], env["VLLM_API_KEY"]) == ("0", "")


def test_a_token_on_the_command_line_is_refused() -> None:
    with pytest.raises(EngineStartFailed, match="set HF_TOKEN in the environment"):
        command(args={"hf_token": "hf_secret"})


def test_a_local_folder_needs_no_hub_and_a_cpu_no_compiler(tmp_path: Path) -> None:
    env = server_env(str(tmp_path), device="cpu", env={"TORCH_COMPILE_DISABLE": "0"})

    assert env["HF_HUB_OFFLINE"] == "1"
    assert env["TORCH_COMPILE_DISABLE"] == "0"


def test_a_list_of_plugins_gets_the_guard_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only listed plugins are loaded, and without the guard a crash leaves orphans."""
    given = server_env("m", device="cuda", env={"VLLM_PLUGINS": "mine"})
    monkeypatch.setenv("VLLM_PLUGINS", "theirs")
    inherited = server_env("m", device="cuda", env={})

    assert given["VLLM_PLUGINS"] == "mine,batch_orchestration_parent_guard"
    assert inherited["VLLM_PLUGINS"] == "theirs,batch_orchestration_parent_guard"
