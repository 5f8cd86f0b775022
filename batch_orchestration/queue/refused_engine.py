"""Refusals of the engine: all batches wait until a probe is accepted, then go on by themselves.

The run that is refused stores the refusal in a file (`note_refusal`). While the refusal stands, no
run that needs the engine is launched. `dispatch_sensor` probes the engine with a small request, at
growing intervals (`look_again`). When a probe is accepted, the batches go on without a person.
An engine that runs start themselves cannot be probed, so the next run serves as the probe.
"""

import asyncio
import contextlib
import logging
import time

import msgspec

from batch_orchestration.core.errors import EngineError, EngineRefusesUs, StorageError
from batch_orchestration.core.outcomes import Failure, Outcome
from batch_orchestration.engines.access import (
    MODELS_PAGE,
    RELAPSE_SECONDS,
    Refusal,
    first_line,
    lets_in,
    one_token_probe,
)
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.state_file import StateFile
from batch_orchestration.queue.files import read_queue
from batch_orchestration.settings import EngineKind, Settings
from batch_orchestration.store.operations import open_replays

logger = logging.getLogger(__name__)

#: Time limit of one probe: a whole tick has 60 s.
LOOK_SECONDS = 10.0


def note_refusal(
    refused: EngineRefusesUs, *, folder: DataFolder, settings: Settings, run_id: str, now: float
) -> Refusal:
    """Store durably that the engine refuses us.

    Raises:
        StorageError: The refusal could not be written.
    """
    before = _read(folder)
    relapse = before is not None and now - (before.let_in_at or now) < RELAPSE_SECONDS
    refusal = Refusal(
        engine=_address(settings),
        page=refused.page,
        model=refused.model,
        status=refused.status,
        line=refused.line,
        since=now,
        run_id=run_id,
        looked_at=now,
        looks=before.looks + 1 if before is not None and relapse else 0,
    )
    StateFile(folder.refusal, Refusal).write(refusal)
    return refusal


def standing_refusal(folder: DataFolder, settings: Settings, *, now: float) -> Refusal | None:
    """Return the refusal for which all batches wait; None if there is none.

    A refusal ends when a probe is accepted or the engine's address changes. For an engine that runs
    start themselves, it ends at `next_look_at`.
    """
    refusal = _read(folder)
    if refusal is None or refusal.let_in_at is not None:
        return None
    if refusal.engine != _address(settings):
        return None
    return None if not refusal.engine and now >= refusal.next_look_at else refusal


def refusal_in_words(settings: Settings) -> str | None:
    """Return the description of the standing refusal; None if there is none."""
    now = time.time()
    refusal = standing_refusal(DataFolder(settings.data_dir), settings, now=now)
    return None if refusal is None else describe(refusal, now=now)


def describe(refusal: Refusal, *, now: float) -> str:
    """Return a description of the refusal, and of the actions that a person can take."""
    left = max(0.0, refusal.next_look_at - now)
    return (
        f"the engine refuses access ({refusal.words}; {refusal.engine or 'our own'}"
        f"{refusal.page}); looked at again in {left:.0f} s. No request has paid for it, and the"
        f" batches go on by themselves. {_way_on(refusal.status)}"
    )


def look_again(folder: DataFolder, settings: Settings, *, now: float) -> Refusal | None:
    """Probe the engine if a probe is due; return the refusal that still stands.

    The engine is not probed while no queue entry or replay needs it.
    """
    refusal = standing_refusal(folder, settings, now=now)
    if refusal is None or not refusal.engine or now < refusal.next_look_at:
        return refusal
    if not _somebody_waits(folder):
        return refusal
    answer = asyncio.run(_probe(refusal, settings))
    seen = msgspec.structs.replace(refusal, looked_at=now, looks=refusal.looks + 1)
    if answer is None:
        seen = msgspec.structs.replace(seen, let_in_at=now)
        logger.warning("%s lets us in again; the batches go on", refusal.engine)
    else:
        seen = msgspec.structs.replace(seen, status=answer.status, line=first_line(answer.message))
    with contextlib.suppress(StorageError):  # the next tick probes again
        StateFile(folder.refusal, Refusal).write(seen)
    return None if answer is None else seen


def _somebody_waits(folder: DataFolder) -> bool:
    """Whether a probe is worth its token, because an entry or a replay waits."""
    try:
        queue = read_queue(folder)
        return queue is None or bool(queue.entries) or bool(open_replays(folder))
    except StorageError:
        return True


class _Said(msgspec.Struct, frozen=True):
    """The response to a probe that was refused."""

    status: int | None
    message: str


async def _probe(refusal: Refusal, settings: Settings) -> _Said | None:
    """Repeat the refused request as cheaply as possible; return the refusal, None if accepted."""
    # The CLI describes refusals without loading aiohttp.
    from batch_orchestration.engines.openai_server import OpenAIServerEngine, ServerOptions

    engine = OpenAIServerEngine(
        settings.base_url,
        api_key=settings.api_key.get_secret_value(),
        options=ServerOptions(
            timeout_seconds=LOOK_SECONDS,
            start_timeout_seconds=LOOK_SECONDS / 2,
            lost_after_seconds=0.0,
        ),
    )
    try:
        if refusal.page == MODELS_PAGE:
            await engine.start()
            return None
        probe = one_token_probe(refusal.page, refusal.model)
        outcome: Outcome = await engine.answer(probe.endpoint, probe.body, request_id="look")
    except EngineRefusesUs as refused:
        return _Said(refused.status, refused.line)
    except EngineError as error:  # the engine cannot be reached
        return _Said(None, str(error))
    finally:
        await engine.disconnect()
    if lets_in(outcome):
        return None
    assert isinstance(outcome, Failure)
    return _Said(outcome.status, outcome.message)


def _way_on(status: int | None) -> str:
    if status in {401, 403, 407}:
        return (
            "If the key is wrong, set BATCH_API_KEY and start the service again;"
            " `python -m batch_orchestration config` shows what is in force"
        )
    if status == 402:
        return "Top up the quota with whoever runs the engine"
    return (
        "If the address or the model has changed, set BATCH_BASE_URL or BATCH_MODEL_ALIASES"
        " (`python -m batch_orchestration config` shows them) and start the service again"
    )


def _address(settings: Settings) -> str:
    return settings.base_url if settings.engine is EngineKind.REMOTE else ""


def _read(folder: DataFolder) -> Refusal | None:
    try:
        return StateFile(folder.refusal, Refusal).read()
    except StorageError as error:
        # The next refused run rewrites the file.
        logger.warning("cannot tell whether the engine lets us in: %s", error)
        return None
