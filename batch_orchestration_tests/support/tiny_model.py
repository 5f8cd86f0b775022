"""Makes a chat model of random weights in a fraction of a second: vLLM without meaning.

It answers deterministic noise, so tests look at ids, counts, usage and errors. Asked for JSON by a
schema, it answers readable text all the same.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

END_OF_TEXT, TURN_STARTS, TURN_ENDS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTROL_TOKENS = [END_OF_TEXT, TURN_STARTS, TURN_ENDS]
TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}

LAYERS = 2
HIDDEN = 64
INTERMEDIATE = 128
HEADS = 2
KEY_VALUE_HEADS = 1
HEAD_SIZE = 32  # the smallest that vLLM's attention takes on a CPU
CONTEXT_TOKENS = 2048

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""


def make_tiny_model(folder: Path) -> Path:
    """Write the model into `folder`, which is made if need be; the same bytes every time."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = _vocabulary()
    _tokenizer(vocabulary).save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config())
    _write_json(folder / "config.json", _config(len(vocabulary)))
    _write_json(folder / "generation_config.json", TOKEN_IDS)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    save_file(_weights(len(vocabulary)), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _vocabulary() -> dict[str, int]:
    """Return one token a byte: any text is readable, and its length in tokens is plain."""
    tokens = [*CONTROL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    return {token: number for number, token in enumerate(tokens)}


def _tokenizer(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    control = [AddedToken(text, special=True, normalized=False) for text in CONTROL_TOKENS]
    tokenizer.add_special_tokens(control)
    return tokenizer


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": TURN_STARTS,
        "eos_token": TURN_ENDS,
        "pad_token": TURN_ENDS,
        "unk_token": END_OF_TEXT,
        "model_max_length": CONTEXT_TOKENS,
        "clean_up_tokenization_spaces": False,
    }


def _config(vocabulary_size: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": vocabulary_size,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "head_dim": HEAD_SIZE,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": CONTEXT_TOKENS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": True,
        **TOKEN_IDS,
    }


def _weights(vocabulary_size: int) -> dict[str, NDArray[np.float32]]:
    random = np.random.default_rng(seed=0)

    def noise(rows: int, columns: int) -> NDArray[np.float32]:
        return (0.2 * random.standard_normal((rows, columns))).astype(np.float32)

    ones = np.ones(HIDDEN, dtype=np.float32)
    weights = {"model.embed_tokens.weight": noise(vocabulary_size, HIDDEN)}
    for layer in range(LAYERS):
        block = {
            "input_layernorm": ones,
            "self_attn.q_proj": noise(HEADS * HEAD_SIZE, HIDDEN),
            "self_attn.k_proj": noise(KEY_VALUE_HEADS * HEAD_SIZE, HIDDEN),
            "self_attn.v_proj": noise(KEY_VALUE_HEADS * HEAD_SIZE, HIDDEN),
            "self_attn.o_proj": noise(HIDDEN, HEADS * HEAD_SIZE),
            "post_attention_layernorm": ones,
            "mlp.gate_proj": noise(INTERMEDIATE, HIDDEN),
            "mlp.up_proj": noise(INTERMEDIATE, HIDDEN),
            "mlp.down_proj": noise(HIDDEN, INTERMEDIATE),
        }
        weights |= {f"model.layers.{layer}.{part}.weight": value for part, value in block.items()}
    return weights | {"model.norm.weight": ones}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
