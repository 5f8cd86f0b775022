"""Recount: reads the files in the outbox again and checks them against the plan."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import msgspec

from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.core.lifecycle import UNASKED_CODES
from batch_orchestration.delivery.lines import output_line_id
from batch_orchestration.delivery.outbox import OutboxFiles
from batch_orchestration.workers.reporter import report_progress


class _ErrorHead(msgspec.Struct):
    code: str = ""


class _LineHead(msgspec.Struct):
    id: str
    error: _ErrorHead | None = None


UNASKED = frozenset(map(str, UNASKED_CODES.values()))
_decode_head = msgspec.json.Decoder(_LineHead).decode


@dataclass(frozen=True, kw_only=True)
class Recount:
    """The contents of the outbox files, compared with the plan.

    Attributes:
        total: Requests of the plan.
        completed: Lines of the output file.
        failed: Lines of the error file.
        unasked: Error lines that count as no failure: the batch ended before their turn.
        problem: First request without a line, or line without a request; None if there is neither.
        partial: Whether the files are partial, so that requests may be missing.
    """

    total: int
    completed: int
    failed: int
    unasked: int
    problem: str | None
    partial: bool

    @property
    def failure_rate(self) -> float:
        """Share of failures among the requests whose turn came, 0 to 1."""
        asked = (self.done if self.partial else self.total) - self.unasked
        return (self.failed - self.unasked) / asked if asked else 0.0

    @property
    def done(self) -> int:
        """Lines in both files."""
        return self.completed + self.failed


def recount(plan: BatchPlan, files: OutboxFiles) -> Recount:
    """Check that each request of the plan, in order, is in exactly one of the two files.

    In partial files a request may be in neither. Memory use does not grow with the files: both are
    in input order and read side by side.
    """
    with ExitStack() as stack:
        outputs, errors = _Lines(files.output, stack), _Lines(files.errors, stack)
        problem = _problem(plan, outputs, errors, partial=files.partial)
        return Recount(
            total=plan.requests,
            completed=outputs.count(),
            failed=errors.count(),
            unasked=errors.unasked,
            problem=problem,
            partial=files.partial,
        )


def _problem(plan: BatchPlan, outputs: "_Lines", errors: "_Lines", *, partial: bool) -> str | None:
    for index in range(plan.requests):
        expected = output_line_id(plan.batch_id, index)
        places = outputs.take(expected) + errors.take(expected)
        if places == 2:
            return f"request {index} of {plan.batch_id} is in both files"
        if places == 0 and not partial:
            return (
                f"request {index} of {plan.batch_id} has no line where it belongs:"
                f" {outputs} and {errors}"
            )
        report_progress()
    if outputs.rest or errors.rest:
        return f"a line is of no request, comes twice or out of order: {outputs} and {errors}"
    return None


class _Lines:
    """A cursor over the lines of one file, with one line of look-ahead."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._name = path.name
        #: Counted so far; complete once `count` has returned.
        self.unasked = 0
        self._ids = self._line_ids(path, stack)
        self._taken = 0
        self._head = next(self._ids, None)

    def __str__(self) -> str:
        return f"{self._name} line {self._taken + 1} is {self._head or 'its end'}"

    @property
    def rest(self) -> bool:
        """Whether a line is left."""
        return self._head is not None

    def take(self, line_id: str) -> bool:
        """Advance to the next line if the current one has this id; return whether it has."""
        if self._head != line_id:
            return False
        self._taken += 1
        self._head = next(self._ids, None)
        return True

    def count(self) -> int:
        """Return the number of lines, including those not yet read."""
        return self._taken + (1 if self.rest else 0) + sum(1 for _ in self._ids)

    def _line_ids(self, path: Path, stack: ExitStack) -> Iterator[str]:
        for line in stack.enter_context(path.open("rb")):
            try:
                head = _decode_head(line)
            except msgspec.DecodeError as error:
                yield f"unreadable ({error})"
                continue
            self.unasked += head.error is not None and head.error.code in UNASKED
            yield head.id
