"""A model's folder: its configuration, and the memory that its weights and its KV cache take."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from batch_orchestration.core.errors import EngineStartFailed

DTYPE_BYTES = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2, "fp8": 1}
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True)
class ModelFolder:
    """The files of a model, in the layout of Hugging Face; read at each access."""

    path: Path

    @property
    def config(self) -> Mapping[str, Any]:
        """`config.json`; empty if it cannot be read."""
        return self.read_json("config.json")

    @property
    def context_tokens(self) -> int | None:
        """The model's own context length; None if unknown."""
        return _positive(self.config, "max_position_embeddings") or None

    @property
    def weight_bytes(self) -> int | None:
        """Size of the weights in their files; None if there are none.

        If a folder has several formats, vLLM loads safetensors, by their index if there is one.
        """
        index = self.read_json("model.safetensors.index.json")
        try:
            return int(index["metadata"]["total_size"])
        except (KeyError, TypeError, ValueError):
            pass
        for pattern in ("model*.safetensors", "*.safetensors", "pytorch_model*.bin", "*.bin"):
            if files := list(self.path.glob(pattern)):
                return sum(file.stat().st_size for file in files)
        return None

    def loaded_bytes(self, dtype: str) -> float:
        """Return the size of the weights once vLLM has loaded them; 0 if there are none.

        vLLM's `auto` loads float32 as 16 bits. Weights that are quantized in the files stay as they
        are.

        Args:
            dtype: The flag `dtype` of vLLM.
        """
        size, config = self.weight_bytes or 0, self.config
        shape = config.get("text_config") or config
        stored = shape.get("torch_dtype") or shape.get("dtype") or config.get("torch_dtype")
        if config.get("quantization_config") or stored not in DTYPE_BYTES:
            return size
        auto = min(2, DTYPE_BYTES[stored])
        return size * DTYPE_BYTES.get(dtype, auto) / DTYPE_BYTES[stored]

    def kv_bytes_per_token(self, *, dtype_bytes: int, devices: int) -> int:
        """Return the bytes of one token in the KV cache of each device; 0 if unknown.

            2 x layers x KV heads / devices x head size x bytes per number

        This is vLLM's allocation: a key and a value per layer, head and token
        (vllm/v1/kv_cache_interface.py, `AttentionSpec.page_size_bytes`). Tensor parallelism gives
        each device its share of heads, at least one. Models with latent attention keep one
        compressed vector per layer and token instead of keys and values (ibid.,
        `MLAAttentionSpec`: `kv_lora_rank` + `qk_rope_head_dim` numbers, on every device).
        """
        # Multimodal models keep the shape of their language part separately.
        shape = self.config.get("text_config") or self.config
        layers = _positive(shape, "num_hidden_layers", "n_layer")
        heads = _positive(shape, "num_attention_heads", "n_head")
        kv_heads = _positive(shape, "num_key_value_heads") or heads
        hidden = _positive(shape, "hidden_size", "n_embd")
        head_size = _positive(shape, "head_dim") or (hidden // heads if heads else 0)
        if latent := _positive(shape, "kv_lora_rank"):
            return layers * (latent + _positive(shape, "qk_rope_head_dim")) * dtype_bytes
        return 2 * layers * max(1, kv_heads // devices) * head_size * dtype_bytes

    def read_json(self, name: str) -> Mapping[str, Any]:
        """Return the object in a file of the folder; empty if it cannot be read."""
        try:
            return msgspec.json.decode((self.path / name).read_bytes(), type=dict[str, Any])
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            return {}


def find_model(model: str) -> ModelFolder | None:
    """Return the model's folder; None if `model` is the name of a model on a hub.

    Raises:
        EngineStartFailed: No model is given, or it can only be a folder and does not exist.
    """
    if not model:
        raise EngineStartFailed("no model to serve: set BATCH_MODEL to a folder or a hub name")
    folder = Path(model).expanduser()
    if folder.is_dir():
        return ModelFolder(folder.resolve())
    if _HUB_NAME.fullmatch(model):
        return None
    raise EngineStartFailed(f"there is no model folder {folder.absolute()}")


def local_model(model: str) -> ModelFolder | None:
    """Return the model's folder; None if it is not on this machine."""
    try:
        return find_model(model)
    except EngineStartFailed:
        return None


def _positive(shape: Mapping[str, Any], *names: str) -> int:
    """Return the first of these numbers that is given; 0 if none is."""
    values = (shape.get(name) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), 0)
