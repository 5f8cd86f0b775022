"""A model's folder: weights and KV cache, against numbers that are known from elsewhere."""

import json
from pathlib import Path

import pytest

from batch_orchestration.engines.model_folder import ModelFolder

LLAMA_8B = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "head_dim": 128,
}
DEEPSEEK_V3 = {
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "hidden_size": 7168,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
}


@pytest.mark.parametrize(
    ("config", "dtype_bytes", "devices", "per_token"),
    [
        # 128 KiB is the figure that is everywhere quoted for Llama 3 8B.
        (LLAMA_8B, 2, 1, 128 * 1024),
        (LLAMA_8B, 1, 1, 64 * 1024),
        (LLAMA_8B, 2, 4, 32 * 1024),
        # No device has less than one head.
        (LLAMA_8B, 2, 16, 16 * 1024),
        # 70 KB is the one for DeepSeek's latent attention, on every device.
        (DEEPSEEK_V3, 2, 8, 70_272),
        ({"text_config": LLAMA_8B}, 2, 1, 128 * 1024),
        ({"n_layer": 12, "n_head": 12, "n_embd": 768}, 2, 1, 36_864),
        ({}, 2, 1, 0),
    ],
)
def test_bytes_of_a_token_in_the_kv_cache(tmp_path, config, dtype_bytes, devices, per_token):
    model = make_model(tmp_path, config=config)

    assert model.kv_bytes_per_token(dtype_bytes=dtype_bytes, devices=devices) == per_token


def make_model(
    path: Path, *, config: dict, size: int = 0, name: str = "model.safetensors"
) -> ModelFolder:
    (path / name).write_bytes(bytes(size))
    (path / "config.json").write_text(json.dumps(config))
    return ModelFolder(path)


@pytest.mark.parametrize(
    ("stored", "dtype", "loaded"),
    [
        ({"torch_dtype": "bfloat16"}, "auto", 100),
        ({"torch_dtype": "float32"}, "auto", 50),
        ({"text_config": {"dtype": "float32"}}, "auto", 50),
        ({"torch_dtype": "float32"}, "float32", 100),
        ({"torch_dtype": "float16"}, "float32", 200),
        ({"torch_dtype": "float32", "quantization_config": {"bits": 4}}, "auto", 100),
        ({}, "float32", 100),
    ],
)
def test_weights_are_cast_when_loaded(tmp_path, stored, dtype, loaded):
    assert make_model(tmp_path, config=stored, size=100).loaded_bytes(dtype) == loaded


def test_of_several_formats_the_one_that_is_loaded_counts(tmp_path):
    model = make_model(tmp_path, config={}, size=7, name="pytorch_model.bin")
    assert model.weight_bytes == 7
    make_model(tmp_path, config={}, size=5, name="consolidated.safetensors")
    make_model(tmp_path, config={}, size=4, name="model.safetensors")
    assert model.weight_bytes == 4
    index = {"metadata": {"total_size": 3}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert model.weight_bytes == 3
