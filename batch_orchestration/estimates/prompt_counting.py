"""Counts prompt tokens as vLLM does, with the model's own tokenizer and chat template.

The library `tokenizers` comes with vLLM. Without it, or without the model's `tokenizer.json`,
estimates are based on characters.
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from batch_orchestration.engines.model_folder import ModelFolder
from batch_orchestration.estimates.profile import prompt_texts

logger = logging.getLogger(__name__)

#: Tokens that ChatML adds, used if no template can be rendered.
TOKENS_PER_MESSAGE, TOKENS_PER_CONVERSATION = 4, 3
#: Limit on the tokenized part of a prompt; the count of the rest is extrapolated.
CHARACTERS_TOKENIZED = 50_000
_CHAT = "/v1/chat/completions"

Render = Callable[[Sequence[Mapping[str, Any]]], str]


class PromptCounter:
    """Counts tokens for one model.

    Args:
        encode: Returns the number of tokens of a text, with or without the special tokens that the
            model adds.
        render: Applies the chat template to a conversation; None without a template.
    """

    def __init__(self, encode: Callable[[str, bool], int], render: Render | None) -> None:
        self._encode = encode
        self._render = render

    def text_tokens(self, text: str) -> int:
        """Return the exact number of tokens of a text, without special tokens."""
        return self._encode(text, False)

    def prompt_tokens(self, endpoint: str, body: Mapping[str, Any]) -> int | None:
        """Return the approximate tokens of a body's prompt; None if it has no text."""
        texts = prompt_texts(endpoint, body)
        if not texts:
            return None
        if endpoint != _CHAT:
            return sum(self._estimate(text, special=True) for text in texts)
        if self._render is not None and (rendered := self._rendered(body)) is not None:
            return self._estimate(rendered, special=False)
        around = TOKENS_PER_CONVERSATION + TOKENS_PER_MESSAGE * len(body["messages"])
        return around + sum(self._estimate(text, special=False) for text in texts)

    def _estimate(self, text: str, *, special: bool) -> int:
        if len(text) <= CHARACTERS_TOKENIZED:
            return self._encode(text, special)
        beginning = self._encode(text[:CHARACTERS_TOKENIZED], special)
        return round(beginning * len(text) / CHARACTERS_TOKENIZED)

    def _rendered(self, body: Mapping[str, Any]) -> str | None:
        messages = [
            {**message, "content": "".join(prompt_texts(_CHAT, {"messages": [message]}))}
            for message in body["messages"]
            if isinstance(message, dict)
        ]
        try:
            return None if self._render is None else self._render(messages)
        except Exception as error:  # noqa: BLE001 - a template is third-party code
            logger.debug("the chat template does not render: %s", error)
            return None


def prompt_counter(folder: Path | None) -> PromptCounter | None:
    """Return the token counter of the model in a folder; None if it is not available."""
    if folder is None or not (folder / "tokenizer.json").is_file():
        return None
    return _load(folder, (folder / "tokenizer.json").stat().st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _load(folder: Path, modified: int) -> PromptCounter | None:
    try:
        # Comes with vLLM; a deployment with a remote engine may lack it.
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except ImportError:
        return None
    except Exception as error:  # noqa: BLE001 - the library raises Exception itself
        logger.warning("cannot use %s/tokenizer.json: %s", folder, error)
        return None
    # Embedding models come with both; the engine uses neither.
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(text: str, special: bool) -> int:
        return len(tokenizer.encode(text, add_special_tokens=special).ids)

    return PromptCounter(encode, _template(folder))


def _template(folder: Path) -> Render | None:
    config = ModelFolder(folder).read_json("tokenizer_config.json")
    source = _template_source(folder, config)
    if source is None:
        return None
    try:
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        template = environment.from_string(source)
    except Exception as error:  # noqa: BLE001 - see above
        logger.warning("cannot use the chat template of %s: %s", folder, error)
        return None
    special = {
        name: token.get("content", "") if isinstance(token, dict) else token or ""
        for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        for token in [config.get(name)]
    }

    def render(messages: Sequence[Mapping[str, Any]]) -> str:
        return template.render(messages=messages, add_generation_prompt=True, **special)

    return render


def _template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    source = config.get("chat_template")
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source}
        source = named.get("default")
    return source if isinstance(source, str) else None
