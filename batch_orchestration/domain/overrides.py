"""What is changed in a request's body on its way to the engine; everything else passes as bytes."""

from collections.abc import Mapping, Sequence

import msgspec

from batch_orchestration.domain import foreign_json
from batch_orchestration.domain.requests import UTF8_BOM, Request, as_integer

ANY_MODEL = "*"
TOKEN_LIMITS = ("max_completion_tokens", "max_tokens")
#: Cuts an object that was decoded before into the bytes of its fields.
_bytes_of_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


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


def prepare_body(request: Request, *, overrides: Overrides, served: Sequence[str]) -> bytes:
    """Return the body to send: the very bytes of the request's, unless an override applies.

    Fields that no override touches keep their bytes. A token limit that no engine takes for a
    whole number is left for it to refuse.
    """
    changed: dict[str, object] = {}
    named = request.fields.get("model")
    model = resolve_model(named, overrides=overrides, served=served)
    if model != named:
        changed["model"] = model
    if overrides.max_tokens_cap is not None and request.endpoint != "/v1/embeddings":
        changed |= _capped_limits(request.fields, overrides.max_tokens_cap)
    if not changed:
        return bytes(request.body)
    return msgspec.json.encode(_bytes_of_fields(request.body) | changed)


def _capped_limits(fields: Mapping[str, object], cap: int) -> dict[str, object]:
    given = {name: fields[name] for name in TOKEN_LIMITS if fields.get(name) is not None}
    if not given:
        return {"max_tokens": cap}
    return {name: cap for name, limit in given.items() if (as_integer(limit) or 0) > cap}


def override_line(line: bytes, fields: Mapping[str, object]) -> bytes:
    """Return a line of a batch file with fields of its body replaced; null removes a field.

    `max_tokens` replaces whichever token limit the body has. All else keeps its bytes. A line
    without a body that could be changed is returned as it is.
    """
    if not fields:
        return line
    text = line.removeprefix(UTF8_BOM)
    try:
        decoded = foreign_json.decode(text)
    except foreign_json.BadJson:
        return line
    if not isinstance(decoded, dict) or not isinstance(decoded.get("body"), dict):
        return line
    envelope = _bytes_of_fields(text)
    body = _bytes_of_fields(envelope["body"])
    given = dict(fields)
    if "max_tokens" in given and "max_completion_tokens" in body:
        given.setdefault("max_completion_tokens", given.pop("max_tokens"))
    merged: dict[str, object] = {**body, **given}
    changed = {name: value for name, value in merged.items() if given.get(name, ...) is not None}
    return msgspec.json.encode({**envelope, "body": changed})
