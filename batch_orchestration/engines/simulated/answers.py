"""The answers of the simulated engine: a pure function of a request's body."""

import hashlib
import random
from typing import Annotated, Any

import msgspec

#: In every answer, so that no simulated one can be mistaken for a real one.
FINGERPRINT = "simulated"
#: Name of the served model if none is given.
DEFAULT_MODEL = "simulated-model"
#: Default context length; longer requests are refused.
CONTEXT_TOKENS = 8192
EMBEDDING_SIZE = 16
DEFAULT_MAX_TOKENS = 16
WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "inlet", "jetty")


class Faults(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Faults that the object `simulate` of a request's body asks for.

    Attributes:
        latency_seconds: Delay before the answer.
        fail_first: Number of attempts that the faults below affect; the next one succeeds.
        status: Answer this HTTP status with an error body.
        error: That body; OpenAI's shape with a made-up message if not given.
        retry_after: The `Retry-After` header of that answer.
        drop: Close the connection without an answer.
        garbage: Answer 200 with something that is not JSON.
        strange: Give an answer of this kind, one of `simulated.strange.KINDS`.
        hang: Never answer.
        abort: Answer partially, as a terminating vLLM answers all its requests.
        die: End the whole server at once.
        exhaust_memory: End the server as if it had run out of memory.
    """

    latency_seconds: Annotated[float, msgspec.Meta(ge=0)] | None = None
    fail_first: Annotated[int, msgspec.Meta(ge=0)] | None = None
    status: Annotated[int, msgspec.Meta(ge=400, le=599)] | None = None
    error: dict[str, Any] | None = None
    retry_after: str | float | None = None
    drop: bool = False
    garbage: bool = False
    strange: str | None = None
    hang: bool = False
    abort: bool = False
    die: bool = False
    exhaust_memory: bool = False


class Refused(Exception):
    """The body cannot be answered."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


def error_body(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """Return an error in the shape of OpenAI and vLLM."""
    kind = "NotFoundError" if status == 404 else "BadRequestError" if status < 500 else "Error"
    return {
        "error": {"message": message, "type": kind, "param": None, "code": code or status},
        "system_fingerprint": FINGERPRINT,
    }


def digest(body: dict[str, Any]) -> str:
    """Return the hash from which an answer is made: that of the body without its faults."""
    rest = {name: value for name, value in body.items() if name != "simulate"}
    return hashlib.sha256(msgspec.json.encode(rest, order="sorted")).hexdigest()


def read_faults(body: dict[str, Any]) -> Faults:
    """Return the faults that the request asks for."""
    try:
        return msgspec.convert(body.get("simulate", {}), Faults)
    except msgspec.ValidationError as error:
        raise Refused(400, f"simulate: {error}") from error


def answer_body(
    endpoint: str, body: dict[str, Any], *, models: tuple[str, ...], context_tokens: int
) -> dict[str, Any]:
    """Return the answer to a request.

    Raises:
        Refused: vLLM would refuse it, too.
    """
    model = body.get("model", models[0])
    if model not in models:
        raise Refused(404, f"The model `{model}` does not exist.")
    if endpoint == "/v1/embeddings":
        return _embeddings(body, model)
    chat = endpoint == "/v1/chat/completions"
    prompt_tokens = _chat_tokens(body) if chat else _text_tokens(body.get("prompt"))
    max_tokens = _checked_max_tokens(body, prompt_tokens, context_tokens)
    return _generation(body, model, chat, prompt_tokens, max_tokens)


def _generation(
    body: dict[str, Any], model: str, chat: bool, prompt_tokens: int, max_tokens: int
) -> dict[str, Any]:
    key = digest(body)
    dice = random.Random(key)
    natural_length = max_tokens + 1 if body.get("ignore_eos") else dice.randint(4, 24)
    words = [dice.choice(WORDS) for _ in range(min(natural_length, max_tokens))]
    text = f"[simulated] {' '.join(words)}"
    choice: dict[str, Any] = {
        "index": 0,
        "finish_reason": "stop" if natural_length <= max_tokens else "length",
        "logprobs": None,
    }
    choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-simulated-{key[:24]}",
        "object": "chat.completion" if chat else "text_completion",
        "created": 0,
        "model": model,
        "system_fingerprint": FINGERPRINT,
        "choices": [choice],
        "usage": _usage(prompt_tokens, len(words)),
    }


def _embeddings(body: dict[str, Any], model: str) -> dict[str, Any]:
    given = body.get("input")
    inputs = [text for text in (given if isinstance(given, list) else [given]) if text]
    if not inputs or not all(isinstance(text, str) for text in inputs):
        raise Refused(400, "input must be a text or a list of texts")
    words = sum(len(text.split()) for text in inputs)
    return {
        "id": f"embd-simulated-{digest(body)[:24]}",
        "object": "list",
        "created": 0,
        "model": model,
        "system_fingerprint": FINGERPRINT,
        "data": [
            {"object": "embedding", "index": index, "embedding": _vector(text)}
            for index, text in enumerate(inputs)
        ],
        "usage": _usage(words, 0),
    }


def _vector(text: str) -> list[float]:
    dice = random.Random(text)
    return [round(dice.uniform(-1, 1), 6) for _ in range(EMBEDDING_SIZE)]


def _usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _chat_tokens(body: dict[str, Any]) -> int:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "messages must be a list with at least one message")
    if not all(isinstance(message, dict) and "role" in message for message in messages):
        raise Refused(400, "each message must be an object with a role")
    return sum(_content_tokens(message.get("content")) for message in messages)


def _content_tokens(content: object) -> int:
    """Count the words of content of any shape."""
    text = content if isinstance(content, str) else msgspec.json.encode(content).decode()
    return len(text.split()) + 3


def _text_tokens(prompt: object) -> int:
    if not isinstance(prompt, str | list) or not prompt:
        raise Refused(400, "prompt must be a text or a list")
    return len(prompt.split()) if isinstance(prompt, str) else len(prompt)


def _checked_max_tokens(body: dict[str, Any], prompt_tokens: int, context_tokens: int) -> int:
    temperature = body.get("temperature")
    if isinstance(temperature, int | float) and temperature < 0:
        raise Refused(400, f"temperature must be non-negative, got {temperature}.")
    asked = body.get("max_completion_tokens", body.get("max_tokens"))
    if asked is not None and (not isinstance(asked, int) or asked < 1):
        raise Refused(400, f"max_tokens must be at least 1, got {asked}.")
    if prompt_tokens + (asked or 1) > context_tokens:
        raise Refused(
            400,
            f"This model's maximum context length is {context_tokens} tokens. However, you "
            f"requested {asked or 1} output tokens and your prompt contains {prompt_tokens} "
            "input tokens.",
        )
    return min(asked or DEFAULT_MAX_TOKENS, context_tokens - prompt_tokens)
