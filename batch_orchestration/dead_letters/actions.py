"""Operations on dead letters: write them to a file, request a replay, discard them.

A replay or discard is first written to a file beside the batch's journals, then applied to the
store (`store.operations`). Neither a crash in between nor the loss of the store loses it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from batch_orchestration.core.dead_letters import DeadLetterState, Discard, Replay, Selection
from batch_orchestration.core.errors import DeadLetterError
from batch_orchestration.core.outcomes import FailureCode
from batch_orchestration.core.requests import UTF8_BOM, Fault
from batch_orchestration.files.atomic import atomic_writer
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.input_lines import RawLine
from batch_orchestration.files.kept_input import OriginalLine, original_lines
from batch_orchestration.store.operations import Operations
from batch_orchestration.store.store import Store

#: Larger selections become several replays: the outcomes of one are committed together.
REPLAY_SIZE = 10_000
_BLOCK_BYTES = 2**20
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A dead letter that was left out of a replay or file, and the reason."""

    index: int
    line: int
    custom_id: str | None
    reason: str

    def __str__(self) -> str:
        name = "" if self.custom_id is None else f" ({self.custom_id})"
        return f"line {self.line}{name}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class RequestedReplay:
    """The replays that a request created, usually one, and the letters that stay dead."""

    replays: Sequence[Replay]
    left_out: Sequence[LeftOut] = ()

    @property
    def requests(self) -> int:
        """Number of requests in the replays."""
        return sum(len(replay.indices) for replay in self.replays)


@dataclass(frozen=True, kw_only=True)
class WrittenInput:
    """The number of original lines written, and the letters left out."""

    written: int
    left_out: Sequence[LeftOut]


def request_replay(
    batch_id: str,
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
    """Take dead letters for a replay; they are `replaying` until `run_replay` has finished.

    Idempotent for a non-empty `request_key`: a second call returns the same replays.

    Args:
        selection: Its `states` are ignored: only letters that are `dead` are taken.
        actor: Run or person that requests the replay.
        overrides: Body fields and their new values; None removes a field.
        model_required: False if an alias supplies a missing `model`.
        force: Replay even if settings differ from the plan's.
        request_key: Idempotency key; empty for none.

    Raises:
        BatchNotFound: There is no such batch.
        DeadLetterError: No dead letter is selected, or none of those selected can be replayed.
    """
    plan, operations = folder.read_plan(batch_id), Operations(folder, batch_id)
    asked = Replay(
        batch_id=batch_id,
        number=0,
        indices=(),
        actor=actor,
        at=at,
        overrides=dict(overrides or {}),
        force=force,
        request_key=request_key,
    )
    with operations.lock():
        operations.apply_to(store)
        if known := _asked_before(operations, request_key):
            return RequestedReplay(replays=known)
        codes = store.dead_letter_codes(batch_id, _dead(selection))
        _require_some(codes, batch_id, selection, store)
        required = model_required and plan.options.model is None
        lines = original_lines(plan, codes, folder, overrides=overrides, model_required=required)
        sound, left_out = _sort_out(lines, codes)
        if not sound:
            raise DeadLetterError(f"none of the requests can be replayed: {_listed(left_out)}")
        replays = list(_kept(operations, asked, sound))
        operations.apply_to(store)
    return RequestedReplay(replays=replays, left_out=left_out)


def _asked_before(operations: Operations, request_key: str) -> list[Replay]:
    return [
        operation
        for operation in operations.all()
        if isinstance(operation, Replay) and operation.request_key == request_key != ""
    ]


def _kept(operations: Operations, asked: Replay, indices: Sequence[int]) -> Iterator[Replay]:
    """Record the request as one or more replays of at most `REPLAY_SIZE` requests each."""
    for first in range(0, len(indices), REPLAY_SIZE):
        replay = msgspec.structs.replace(
            asked,
            number=operations.next_number(),
            indices=tuple(indices[first : first + REPLAY_SIZE]),
        )
        operations.add(replay)
        yield replay


def discard(
    batch_id: str,
    selection: Selection,
    *,
    reason: str,
    folder: DataFolder,
    store: Store,
    actor: str,
    at: float,
) -> int:
    """Discard dead letters and return how many. They stay in the store and in the error file.

    If the selection includes the state `replaying`, each replay that holds a selected letter is
    closed first: the outcomes that it has stand, and its other letters are dead again.

    Raises:
        BatchNotFound: There is no such batch.
        DeadLetterError: The reason is empty, no letter is selected, or a replay of them is running.
    """
    if not reason.strip():
        raise DeadLetterError("a discard needs a reason: it is recorded with each request")
    folder.read_plan(batch_id)
    operations = Operations(folder, batch_id)
    with operations.lock():
        operations.apply_to(store)
        if DeadLetterState.REPLAYING in selection.states:
            _take_back(operations, selection, store, at=at)
        codes = store.dead_letter_codes(batch_id, _dead(selection))
        _require_some(codes, batch_id, selection, store)
        operations.add(
            Discard(
                batch_id=batch_id,
                number=operations.next_number(),
                indices=tuple(codes),
                actor=actor,
                at=at,
                reason=reason.strip(),
            )
        )
        operations.apply_to(store)
    return len(codes)


def as_input(
    batch_id: str,
    selection: Selection,
    path: Path,
    *,
    folder: DataFolder,
    store: Store,
    include_faulty: bool = False,
) -> WrittenInput:
    """Write the original lines, unchanged, to a new batch file; it appears whole or not at all.

    Args:
        include_faulty: Also write lines that were never valid requests.

    Raises:
        BatchNotFound: There is no such batch.
        DeadLetterError: The file exists, or there is nothing to write.
    """
    if path.exists():
        raise DeadLetterError(f"{path} exists already: name another file")
    plan = folder.read_plan(batch_id)
    codes = store.dead_letter_codes(batch_id, selection)
    _require_some(codes, batch_id, selection, store)
    left_out: list[LeftOut] = []
    written = 0
    with atomic_writer(path) as file:
        for line in original_lines(plan, codes, folder):
            if isinstance(line.parsed, Fault) and not include_faulty:
                left_out.append(_left_out(line, line.parsed.message))
                continue
            for block in _bytes_of(line.raw, folder.input_path(batch_id)):
                file.write(block)
            written += 1
        if not written:
            raise DeadLetterError(
                "none of the lines was ever a valid request, so nothing was written:"
                f" {_listed(left_out)}"
            )
    return WrittenInput(written=written, left_out=left_out)


def _dead(selection: Selection) -> Selection:
    return msgspec.structs.replace(selection, states=(DeadLetterState.DEAD,))


def _require_some(
    codes: Mapping[int, FailureCode], batch_id: str, selection: Selection, store: Store
) -> None:
    """Raise `DeadLetterError` if there are none; its message counts letters in a replay."""
    if codes:
        return
    taken = msgspec.structs.replace(selection, states=(DeadLetterState.REPLAYING,), limit=None)
    replaying = len(store.dead_letter_codes(batch_id, taken))
    hint = f"; {replaying} are being replayed" if replaying else ""
    raise DeadLetterError(f"no dead letter of batch {batch_id} matches the selection{hint}")


def _sort_out(
    lines: Iterator[OriginalLine], codes: Mapping[int, FailureCode]
) -> tuple[list[int], list[LeftOut]]:
    """Return the indices of the requests that can be replayed, and the letters that cannot."""
    sound: list[int] = []
    left_out: list[LeftOut] = []
    for line in lines:
        if isinstance(line.parsed, Fault):
            left_out.append(_left_out(line, f"is not a valid request: {line.parsed.message}"))
        elif codes[line.raw.index] is FailureCode.DUPLICATE_CUSTOM_ID:
            reason = (
                "another request of the batch has the same custom_id; submit it in another file"
            )
            left_out.append(_left_out(line, reason))
        else:
            sound.append(line.raw.index)
    return sound, left_out


def _take_back(operations: Operations, selection: Selection, store: Store, *, at: float) -> None:
    meant = store.dead_letter_codes(
        operations.batch_id,
        msgspec.structs.replace(selection, states=(DeadLetterState.REPLAYING,)),
    )
    for operation in operations.all():
        if not isinstance(operation, Replay) or operation.closed_at is not None:
            continue
        if meant.keys().isdisjoint(operation.indices):
            continue
        if operations.running(operation):
            raise DeadLetterError(
                f"replay {operation.number} of batch {operations.batch_id} is running and includes"
                " some of them: terminate its run first, or wait until it ends"
            )
        operations.close(operation, at=at)
    operations.apply_to(store)


def _left_out(line: OriginalLine, reason: str) -> LeftOut:
    return LeftOut(
        index=line.raw.index, line=line.raw.line, custom_id=line.parsed.custom_id, reason=reason
    )


def _listed(left_out: Sequence[LeftOut]) -> str:
    shown = "; ".join(map(str, left_out[:_SHOWN]))
    more = f"; and {len(left_out) - _SHOWN} more" if len(left_out) > _SHOWN else ""
    return shown + more


def _bytes_of(line: RawLine, input_path: Path) -> Iterator[bytes]:
    """Yield a line of any length in blocks, without a byte order mark, with a final line break."""
    block = b""
    with input_path.open("rb") as file:
        file.seek(line.start)
        left = line.end - line.start
        while left and (block := file.read(min(left, _BLOCK_BYTES))):
            yield block.removeprefix(UTF8_BOM) if file.tell() == len(block) else block
            left -= len(block)
    if not block.endswith(b"\n"):
        yield b"\n"
