"""What people do about dead letters: take them out as a file, ask for a replay, give them up.

A replay or discard is first kept as a file beside the batch's journals, then applied to the store
(`store.operations`). So neither a kill in between nor the loss of the store loses it.
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
from batch_orchestration.files.data_folder import DataFolder, RawLine
from batch_orchestration.files.kept_input import OriginalLine, original_lines
from batch_orchestration.store.operations import Operations
from batch_orchestration.store.store import Store

#: More become several replays: the outcomes of one are committed together.
REPLAY_SIZE = 10_000
_BLOCK_BYTES = 2**20
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A dead letter that cannot be sent again, and why."""

    index: int
    line: int
    custom_id: str | None
    reason: str

    def __str__(self) -> str:
        name = "" if self.custom_id is None else f" ({self.custom_id})"
        return f"line {self.line}{name}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class RequestedReplay:
    """What was asked for: usually one replay; the letters that cannot be replayed stay dead."""

    replays: Sequence[Replay]
    left_out: Sequence[LeftOut] = ()

    @property
    def requests(self) -> int:
        """How many requests are replayed."""
        return sum(len(replay.indices) for replay in self.replays)


@dataclass(frozen=True, kw_only=True)
class WrittenInput:
    """How many original lines were written, and which were not."""

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
    """Take dead letters for a replay: they are `replaying` until `run_replay` has been through.

    Asking again with the same `request_key` returns the same replays.

    Args:
        batch_id: Of the batch.
        selection: Which; only those that are `dead` can be taken.
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
        DeadLetterError: None of its dead letters is meant, or none that is can be replayed.
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
            raise DeadLetterError(f"none of them can be replayed: {_listed(left_out)}")
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
    """Keep what was asked for, in as many replays as it takes."""
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
    """Give dead letters up; return how many. They stay in the queue and in the error file.

    Letters that are `replaying` are taken back first if the selection names that state: the whole
    replay is closed; what it has answered stands, the rest of it is dead again.

    Raises:
        BatchNotFound: There is no such batch.
        DeadLetterError: No reason was given, none is meant, or a replay is at work on them.
    """
    if not reason.strip():
        raise DeadLetterError("a discard needs a reason: it is all that will be known later")
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
    """Write the original requests as a batch file: their lines as they were, whole or not at all.

    Lines that never were requests are left out, unless they are asked for.

    Args:
        batch_id: Of the batch.
        selection: Which.
        path: Of the new file.
        folder: The data folder.
        store: The store.
        include_faulty: Also lines that never were requests.

    Raises:
        BatchNotFound: There is no such batch.
        DeadLetterError: The file exists, or there is nothing to write.
    """
    if path.exists():
        raise DeadLetterError(f"{path} exists and is left as it is: name another file")
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
                f"none of them ever was a request, nothing was written: {_listed(left_out)}"
            )
    return WrittenInput(written=written, left_out=left_out)


def _dead(selection: Selection) -> Selection:
    return msgspec.structs.replace(selection, states=(DeadLetterState.DEAD,))


def _require_some(
    codes: Mapping[int, FailureCode], batch_id: str, selection: Selection, store: Store
) -> None:
    """Raise `DeadLetterError` if there are none; the message says whether a replay has them."""
    if codes:
        return
    taken = msgspec.structs.replace(selection, states=(DeadLetterState.REPLAYING,), limit=None)
    replaying = len(store.dead_letter_codes(batch_id, taken))
    hint = f"; {replaying} are being replayed" if replaying else ""
    raise DeadLetterError(f"batch {batch_id} has no dead letter that is meant{hint}")


def _sort_out(
    lines: Iterator[OriginalLine], codes: Mapping[int, FailureCode]
) -> tuple[list[int], list[LeftOut]]:
    """Return the indices of what can be sent again, and what cannot."""
    sound: list[int] = []
    left_out: list[LeftOut] = []
    for line in lines:
        if isinstance(line.parsed, Fault):
            left_out.append(_left_out(line, f"is no valid request: {line.parsed.message}"))
        elif codes[line.raw.index] is FailureCode.DUPLICATE_CUSTOM_ID:
            reason = "another request of the batch has its custom_id; submit it in another file"
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
                f"replay {operation.number} of batch {operations.batch_id} is at work on them:"
                " terminate its run first, or wait for it"
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
    """Yield a whole line, however long, with a line break at its end."""
    block = b""
    with input_path.open("rb") as file:
        file.seek(line.start)
        left = line.end - line.start
        while left and (block := file.read(min(left, _BLOCK_BYTES))):
            yield block.removeprefix(UTF8_BOM) if file.tell() == len(block) else block
            left -= len(block)
    if not block.endswith(b"\n"):
        yield b"\n"
