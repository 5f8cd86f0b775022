"""Replays and discards over several batches, the parts of a submission, one after the other.

What was done for one part stands, whatever becomes of the next: asking again does the rest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from batch_orchestration.domain.dead_letters import Replay, Selection
from batch_orchestration.domain.errors import DeadLetterError, NothingMeant
from batch_orchestration.services.dead_letters import (
    LeftOut,
    NoneReplayable,
    RequestedReplay,
    discard,
    request_replay,
    require_some,
)
from batch_orchestration.storage.files import DataFolder
from batch_orchestration.storage.store import Store


@dataclass(frozen=True, kw_only=True)
class Discarded:
    """What was given up, and of which batches nothing could be, each with the reason.

    Attributes:
        counts: Dead letters by batch.
    """

    counts: Mapping[str, int]
    refused: Mapping[str, str]


def request_replays(
    batch_ids: Sequence[str],
    selection: Selection,
    *,
    folder: DataFolder,
    store: Store,
    actor: str,
    at: float,
    overrides: Mapping[str, Any] | None = None,
    model_required: bool = True,
    force: bool = False,
    request_key: str = "",
) -> RequestedReplay:
    """Take dead letters of each batch that has some; see `dead_letters.request_replay`.

    Args:
        batch_ids: One batch, or the parts of a submission in file order.
        selection: Which; its limit is that of all of them together.
        folder: The data folder.
        store: The store.
        actor: Run or person that asks.
        at: POSIX seconds.
        overrides: Fields of the body and their new values; None removes a field.
        model_required: False if an alias supplies a missing `model`.
        force: Replay although settings differ from those of the plan.
        request_key: Makes asking idempotent, if it is not empty.

    Raises:
        BatchNotFound: There is no such batch.
        DeadLetterError: Nothing that could be replayed is meant; the message says why.
    """
    replays: list[Replay] = []
    left_out: list[LeftOut] = []
    for batch_id in batch_ids:
        taken = sum(len(replay.indices) for replay in replays)
        left = _left(selection, taken)
        if left.limit == 0:
            break
        try:
            asked = request_replay(
                batch_id,
                left,
                folder=folder,
                store=store,
                actor=actor,
                at=at,
                overrides=overrides,
                model_required=model_required,
                force=force,
                request_key=request_key,
            )
        except NothingMeant:
            continue
        except NoneReplayable as none:
            left_out += none.left_out
            continue
        replays += asked.replays
        left_out += asked.left_out
    if not replays and left_out:
        raise NoneReplayable(left_out)
    if not replays:
        require_some({}, batch_ids, selection, store)
    return RequestedReplay(replays=replays, left_out=left_out)


def discard_each(
    batch_ids: Sequence[str],
    selection: Selection,
    *,
    reason: str,
    folder: DataFolder,
    store: Store,
    actor: str,
    at: float,
) -> Discarded:
    """Give up dead letters of each batch that has some; see `dead_letters.discard`.

    Raises:
        BatchNotFound: There is no such batch.
        DeadLetterError: Nothing was given up; the message says why.
    """
    counts: dict[str, int] = {}
    refused: dict[str, DeadLetterError] = {}
    for batch_id in batch_ids:
        left = _left(selection, sum(counts.values()))
        if left.limit == 0:
            break
        try:
            counts[batch_id] = discard(
                batch_id, left, reason=reason, folder=folder, store=store, actor=actor, at=at
            )
        except NothingMeant:
            continue
        except DeadLetterError as error:
            refused[batch_id] = error
    if not counts and refused:
        raise next(iter(refused.values()))
    if not counts:
        require_some({}, batch_ids, selection, store)
    return Discarded(counts=counts, refused={name: str(why) for name, why in refused.items()})


def _left(selection: Selection, taken: int) -> Selection:
    if selection.limit is None:
        return selection
    return msgspec.structs.replace(selection, limit=max(0, selection.limit - taken))
