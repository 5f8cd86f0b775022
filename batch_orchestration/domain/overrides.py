"""What is changed in a request's body on its way to the engine; everything else passes as bytes."""

from collections.abc import Mapping, Sequence

import msgspec

from batch_orchestration.domain.requests import UTF8_BOM

ANY_MODEL = "*"
_TOKEN_LIMITS = ("max_completion_tokens", "max_tokens")
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class Overrides(msgspec.Struct, frozen=True, kw_only=True):
    """The deployment's and the batch's changes to a body.

    Attributes:
        model: Answers every request of the batch, if set.
        aliases: Names in bodies to names that the engine serves; `*` stands for any other name
            and for none.
        max_tokens_cap: Upper bound of the tokens that a request may ask for.
    """

    model: str | None = None
    aliases: Mapping[str, str] = {}
    max_tokens_cap: int | None = None


def resolve_model(name: str | None, *, overrides: Overrides, served: Sequence[str]) -> str | None:
    """Return the model that shall answer: the batch's, else an alias, else the name itself.

    A name that the engine serves is not caught by the alias `*`.
    """
    if overrides.model is not None:
        return overrides.model
    if name is not None and name in overrides.aliases:
        return overrides.aliases[name]
    if name is not None and name in served:
        return name
    return overrides.aliases.get(ANY_MODEL, name)


def prepare_body(
    body: bytes, endpoint: str, *, overrides: Overrides, served: Sequence[str]
) -> bytes:
    """Return the body to send: the very bytes given, unless an override applies.

    Fields that no override touches keep their bytes. A token limit that is not a whole number is
    left for the engine to refuse.
    """
    fields = _decode_fields(body)
    changed: dict[str, object] = {}
    named = _as_string(fields.get("model"))
    model = resolve_model(named, overrides=overrides, served=served)
    if model != named:
        changed["model"] = model
    if overrides.max_tokens_cap is not None and endpoint != "/v1/embeddings":
        changed |= _capped_limits(fields, overrides.max_tokens_cap)
    if not changed:
        return bytes(body)
    return msgspec.json.encode(fields | changed)


def _as_string(raw: msgspec.Raw | None) -> str | None:
    if raw is None:
        return None
    value = msgspec.json.decode(raw)
    return value if isinstance(value, str) else None


def _capped_limits(fields: Mapping[str, msgspec.Raw], cap: int) -> dict[str, object]:
    limits = {name: msgspec.json.decode(fields[name]) for name in _TOKEN_LIMITS if name in fields}
    given = {name: limit for name, limit in limits.items() if limit is not None}
    if not given:
        return {"max_tokens": cap}
    return {name: cap for name, limit in given.items() if type(limit) is int and limit > cap}


def override_line(line: bytes, fields: Mapping[str, object]) -> bytes:
    """Return a line of a batch file with fields of its body replaced; null removes a field.

    `max_tokens` replaces whichever token limit the body has. All else keeps its bytes. A line
    without a body that could be changed is returned as it is.
    """
    if not fields:
        return line
    try:
        envelope = _decode_fields(line.removeprefix(UTF8_BOM))
        body = _decode_fields(envelope["body"])
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, RecursionError):
        return line
    given = dict(fields)
    if "max_tokens" in given and "max_completion_tokens" in body:
        given.setdefault("max_completion_tokens", given.pop("max_tokens"))
    merged: dict[str, object] = {**body, **given}
    changed = {name: value for name, value in merged.items() if given.get(name, ...) is not None}
    return msgspec.json.encode({**envelope, "body": changed})
