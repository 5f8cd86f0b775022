"""How much memory of a device a model needs at least, from its shape alone."""

from collections.abc import Mapping
from typing import Any

#: Tokens for which the gate wants room in the KV cache: with less, vLLM does not start even on the
#: gentlest rung of the memory ladder.
LEAST_TOKENS = 2048
#: Of the CUDA context, the engine's workspace and the activations of the smallest step.
MARGIN_BYTES = 2**30
#: Of the weights, for what is padded and copied while they are loaded.
MARGIN_SHARE = 0.05
DTYPE_BYTES = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2, "fp8": 1}


def needed_bytes(
    weight_bytes: float, config: Mapping[str, Any], *, kv_dtype_bytes: int, devices: int
) -> int:
    """Return what must be free on each device for a model to be served at all.

        weights / devices x 1.05 + 1 GiB + tokens x KV bytes per token,
        KV bytes per token = 2 x layers x KV heads / devices x head size x bytes per number

    The second is what vLLM allocates: a key and a value per layer, head and token
    (vllm/v1/kv_cache_interface.py, `AttentionSpec.page_size_bytes`); tensor parallelism gives each
    device its share of heads, at least one. Models with latent attention keep one compressed vector
    per layer and token instead of keys and values (ibid., `MLAAttentionSpec`: `kv_lora_rank` +
    `qk_rope_head_dim` numbers, on every device). Tokens are `LEAST_TOKENS`: the least, not the
    comfortable; the more is free above it, the more requests run at a time.

    Args:
        weight_bytes: Of all weights, as they will be on the devices.
        config: The model's `config.json`; where it does not tell the shape, the KV cache counts 0.
        kv_dtype_bytes: Bytes per number in the KV cache.
        devices: Over which the model is spread.
    """
    per_token = kv_bytes_per_token(config, dtype_bytes=kv_dtype_bytes, devices=devices)
    weights = weight_bytes / devices * (1 + MARGIN_SHARE)
    return round(weights + MARGIN_BYTES + LEAST_TOKENS * per_token)


def kv_bytes_per_token(config: Mapping[str, Any], *, dtype_bytes: int, devices: int) -> int:
    """Return what one token takes in the KV cache of each device; 0 if the shape is not told."""
    # Models that also see or hear keep the shape of their language part apart.
    shape = config.get("text_config") or config
    layers = _whole(shape, "num_hidden_layers", "n_layer")
    heads = _whole(shape, "num_attention_heads", "n_head")
    kv_heads = _whole(shape, "num_key_value_heads") or heads
    hidden = _whole(shape, "hidden_size", "n_embd")
    head_size = _whole(shape, "head_dim") or (hidden // heads if heads else 0)
    if latent := _whole(shape, "kv_lora_rank"):
        return layers * (latent + _whole(shape, "qk_rope_head_dim")) * dtype_bytes
    return 2 * layers * max(1, kv_heads // devices) * head_size * dtype_bytes


def _whole(shape: Mapping[str, Any], *names: str) -> int:
    values = (shape.get(name) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), 0)
