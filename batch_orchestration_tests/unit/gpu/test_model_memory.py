"""What a model needs of a device, against numbers that are known from elsewhere."""

import pytest

from batch_orchestration.gpu.health import kv_bytes_per_token, needed_bytes

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
def test_a_token_takes_what_its_keys_and_values_take(config, dtype_bytes, devices, per_token):
    assert kv_bytes_per_token(config, dtype_bytes=dtype_bytes, devices=devices) == per_token


def test_weights_margin_and_the_smallest_cache_are_needed():
    weights = 16 * 10**9

    needed = needed_bytes(weights, LLAMA_8B, kv_dtype_bytes=2, devices=1)

    assert needed == weights * 1.05 + 2**30 + 2048 * 128 * 1024


def test_a_model_spread_over_devices_needs_its_share_of_each():
    one = needed_bytes(10**11, LLAMA_8B, kv_dtype_bytes=2, devices=1)
    four = needed_bytes(10**11, LLAMA_8B, kv_dtype_bytes=2, devices=4)

    assert four < one / 3
