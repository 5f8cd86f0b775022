"""One pass over the pending requests of a chunk: its journal, and the requests still unsettled."""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from batch_orchestration.core.errors import JournalInUse, PlanMismatch, Shortage, UnstorableRecord
from batch_orchestration.core.outcomes import Failure, FailureCode, Outcome
from batch_orchestration.core.requests import Overrides, Request, parse_line
from batch_orchestration.core.results import Provenance
from batch_orchestration.files.journal import Journal
from batch_orchestration.files.kept_input import ChunkRef

#: Why a request cannot be drawn now, although it may be a moment later.
TransientError = Shortage | JournalInUse


class RequestPass:
    """One pass over requests of a batch: writes their journal, and settles each of them once.

    Attributes:
        overrides: Changes to the bodies of its requests.
        deadline: End of the batch's window, if this run enforces it.
        unsettled: Indices of the requests that have no outcome yet.
    """

    def __init__(
        self,
        batch_id: str,
        indices: Iterable[int],
        journal: Journal,
        *,
        overrides: Overrides,
        deadline: float = math.inf,
    ) -> None:
        self.batch_id = batch_id
        self.journal = journal
        self.overrides = overrides
        self.deadline = deadline
        self.unsettled = set(indices) - journal.state.settled

    def pending_request(self, request: Request) -> "PendingRequest":
        """Return a request with the record of its earlier attempts in the journal."""
        state = self.journal.state
        return PendingRequest(
            request=request.lean(),
            chunk=self,
            submissions=state.attempts.get(request.index, 0),
            failed_attempts=state.failed_attempts.get(request.index, 0),
            suspect_group=state.suspects.get(request.index),
        )

    @property
    def complete(self) -> bool:
        """Whether every request has an outcome."""
        return not self.unsettled


class ChunkPass(RequestPass):
    """One pass over a chunk."""

    def __init__(
        self, ref: ChunkRef, *, provenance: Provenance, overrides: Overrides, deadline: float
    ) -> None:
        self.ref = ref
        journal = Journal.open(
            ref.journal_path,
            batch_id=ref.plan.batch_id,
            number=ref.chunk.number,
            provenance=provenance,
            at=time.time(),
        )
        super().__init__(
            ref.plan.batch_id, ref.indices, journal, overrides=overrides, deadline=deadline
        )

    def pending(self) -> Iterator["PendingRequest"]:
        """Yield the requests that have no outcome yet, in file order.

        Raises:
            Shortage: No file descriptor is left; raised before the first request.
            PlanMismatch: The kept input is not the one that was admitted.
        """
        for line in self.ref.lines():
            if line.index not in self.unsettled:
                continue
            request = parse_line(line.data, index=line.index, line=line.line, model_required=False)
            if not isinstance(request, Request):
                raise PlanMismatch(
                    f"{self.ref.input_path} line {line.line} should have been refused at"
                    f" admission: {request.message}. The batch was admitted under older rules: run"
                    f" `python -m batch_orchestration cancel {self.batch_id}` to get the answers"
                    " so far, and submit the other requests as a new file"
                )
            yield self.pending_request(request)


@dataclass(kw_only=True, eq=False)
class PendingRequest:
    """A request on its way, with the record of its earlier attempts in the journal.

    Attributes:
        submissions: How often it was given to an engine, in all passes.
        failed_attempts: How many of these failed by themselves; an engine's death does not count.
        suspect_group: Isolation group of a request that an engine had when it died.
        in_flight: Whether the engine has it now.
    """

    request: Request
    chunk: RequestPass
    submissions: int
    failed_attempts: int
    suspect_group: str | None = None
    in_flight: bool = False

    def submit(self) -> None:
        """Record that the request is about to be given to the engine."""
        self.chunk.journal.record_submitted(self.request.index, self.submissions + 1, time.time())
        self.submissions += 1

    def fail_attempt(self, failure: Failure) -> None:
        """Record a failed attempt that will be followed by another one."""
        self.chunk.journal.record_failed_attempt(
            self.request.index, failure, self.submissions, time.time()
        )

    def suspect(self, group: str) -> None:
        """Record that the engine died while it had the request."""
        self.suspect_group = group
        self.chunk.journal.record_suspected(
            self.request.index, group, self.submissions, time.time()
        )

    def settle(self, outcome: Outcome) -> Outcome:
        """Record the outcome, which counts only from then on.

        Returns:
            The recorded outcome: a failure in place of an outcome that cannot be stored.
        """
        record, at = self.chunk.journal.record_outcome, time.time()
        try:
            record(self.request, outcome, self.submissions, at)
        except UnstorableRecord as refusal:
            outcome = Failure(
                code=FailureCode.RESPONSE_UNREADABLE,
                message=f"the engine's answer cannot be stored: {refusal.__cause__}",
                latency_seconds=outcome.latency_seconds,
            )
            record(self.request, outcome, self.submissions, at)
        self.chunk.unsettled.remove(self.request.index)
        return outcome
