"""Writes a Llama-shaped GGUF file as the Hugging Face folder that vLLM loads on any device.

vLLM runs GGUF on CUDA only. This needs gguf, numpy, safetensors and tokenizers; no torch.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

Weight = NDArray[np.float32]

#: llama.cpp's names of the weights in a block, and those of transformers.
BLOCK_WEIGHTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
#: The same for the weights outside the blocks.
MODEL_WEIGHTS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
#: Computed again from rope_theta by whoever loads the model.
DERIVED_WEIGHTS = {"rope_freqs"}
#: The type GGUF gives to tokens such as <|im_end|>, which no text may spell.
CONTROL_TOKEN = 3


class UnsupportedModelError(Exception):
    """The GGUF file holds a model of another shape than this module can write."""


class GgufFile:
    """A GGUF file, opened: its metadata by key and its weights by name."""

    def __init__(self, path: Path) -> None:
        self._reader = GGUFReader(path)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value of the metadata, or the default where it is missing."""
        field = self._reader.fields.get(key)
        return default if field is None else field.contents()

    def require(self, key: str) -> Any:
        """Return a value of the metadata without which there is no model."""
        value = self.get(key)
        if value is None:
            raise UnsupportedModelError(f"the GGUF file does not say {key}")
        return value

    def weights(self) -> Iterator[tuple[str, Weight]]:
        """Yield each weight with its name, dequantized."""
        for tensor in self._reader.tensors:
            yield tensor.name, dequantize(tensor.data, tensor.tensor_type).astype(np.float32)

    def special_tokens(self) -> dict[str, int]:
        """Return the ids of the tokens with a role; those not named end the text."""
        eos = int(self.require("tokenizer.ggml.eos_token_id"))
        return {
            "bos": int(self.require("tokenizer.ggml.bos_token_id")),
            "eos": eos,
            "pad": int(self.get("tokenizer.ggml.padding_token_id", eos)),
            "unk": int(self.get("tokenizer.ggml.unknown_token_id", eos)),
        }


def convert(source: Path, folder: Path) -> None:
    """Write the model in `source` into the existing, empty `folder`.

    Raises:
        UnsupportedModelError: It is not a Llama-shaped model with a byte-level BPE tokenizer.
    """
    model = GgufFile(source)
    _check_shape(model)
    weights = {name: weight.astype(np.float16) for name, weight in _renamed_weights(model)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", _config(model, tied="lm_head.weight" not in weights))
    _write_json(folder / "generation_config.json", _token_ids(model))
    _tokenizer(model).save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(model))
    template = str(model.require("tokenizer.chat_template"))
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _check_shape(model: GgufFile) -> None:
    wanted = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2"}
    for key, value in wanted.items():
        if (found := model.get(key)) != value:
            raise UnsupportedModelError(f"{key} is {found!r}; only {value!r} can be converted")


def _renamed_weights(model: GgufFile) -> Iterator[tuple[str, Weight]]:
    """Yield the weights under transformers' names and in its order of rows."""
    heads = int(model.require("llama.attention.head_count"))
    reorder: dict[str, Callable[[Weight], Weight]] = {
        "attn_q": lambda weight: _split_rotary_halves(weight, heads),
        "attn_k": lambda weight: _split_rotary_halves(
            weight, int(model.get("llama.attention.head_count_kv", heads))
        ),
    }
    for name, weight in model.weights():
        match name.removesuffix(".weight").split("."):
            case ["blk", number, part] if part in BLOCK_WEIGHTS:
                ordered = reorder[part](weight) if part in reorder else weight
                yield f"model.layers.{number}.{BLOCK_WEIGHTS[part]}.weight", ordered
            case [part] if part in MODEL_WEIGHTS:
                yield f"{MODEL_WEIGHTS[part]}.weight", weight
            case [part] if part in DERIVED_WEIGHTS:
                continue
            case _:
                raise UnsupportedModelError(f"no Llama model has a weight named {name}")


def _split_rotary_halves(weight: Weight, heads: int) -> Weight:
    """Undo llama.cpp's pairing of rows: per head, all first halves go before all second ones."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.transpose(0, 2, 1, 3).reshape(rows, columns))


def _config(model: GgufFile, *, tied: bool) -> dict[str, Any]:
    hidden = int(model.require("llama.embedding_length"))
    heads = int(model.require("llama.attention.head_count"))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float16",
        "vocab_size": len(model.require("tokenizer.ggml.tokens")),
        "hidden_size": hidden,
        "intermediate_size": int(model.require("llama.feed_forward_length")),
        "num_hidden_layers": int(model.require("llama.block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(model.get("llama.attention.head_count_kv", heads)),
        "head_dim": int(model.get("llama.rope.dimension_count", hidden // heads)),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": int(model.require("llama.context_length")),
        "rms_norm_eps": float(model.require("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": float(model.get("llama.rope.freq_base", 10_000.0)),
        "tie_word_embeddings": tied,
        **_token_ids(model),
    }


def _token_ids(model: GgufFile) -> dict[str, int]:
    ids = model.special_tokens()
    return {f"{role}_token_id": ids[role] for role in ("bos", "eos", "pad")}


def _tokenizer(model: GgufFile) -> Tokenizer:
    tokens: list[str] = model.require("tokenizer.ggml.tokens")
    kinds: list[int] = model.require("tokenizer.ggml.token_type")
    merges: list[str] = model.require("tokenizer.ggml.merges")
    left_right = [(left, right) for left, right in (merge.split(" ", 1) for merge in merges)]
    tokenizer = Tokenizer(models.BPE({text: i for i, text in enumerate(tokens)}, left_right))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_pre_tokenizers(model))
    tokenizer.decoder = decoders.ByteLevel()
    control = [text for text, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    return tokenizer


def _pre_tokenizers(model: GgufFile) -> list[pre_tokenizers.PreTokenizer]:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # SmolLM2 learnt numbers digit by digit; without this it reads 2024 as a token it rarely saw.
    if model.get("tokenizer.ggml.pre") == "smollm":
        return [pre_tokenizers.Digits(individual_digits=True), byte_level]
    return [byte_level]


def _tokenizer_config(model: GgufFile) -> dict[str, Any]:
    tokens = model.require("tokenizer.ggml.tokens")
    roles = {f"{role}_token": tokens[i] for role, i in model.special_tokens().items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": int(model.require("llama.context_length")),
        "clean_up_tokenization_spaces": False,
        **roles,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
