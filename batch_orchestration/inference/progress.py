"""The progress of a batch while a run works on it: counted, written to a file, logged."""

import logging
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.core.outcomes import Completion, Outcome
from batch_orchestration.core.requests import Request
from batch_orchestration.core.results import ChunkReport
from batch_orchestration.engines.base import EngineInfo
from batch_orchestration.estimates.batch_estimates import read_estimate
from batch_orchestration.estimates.profile import shape_of_request
from batch_orchestration.estimates.remaining import RemainingWork
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.kept_input import ChunkRef
from batch_orchestration.workers.progress import Meter, Progress, Wait, write_progress

logger = logging.getLogger(__name__)

#: One line a minute is enough for a job that runs for hours.
LOG_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class CommittedChunk:
    """A committed chunk of the run's own batch or of a guest, with the progress of its batch.

    Attributes:
        reused: Whether the store held it before this run.
        utilization: Utilization of the own batch's time by this run so far; None for a guest.
    """

    report: ChunkReport
    reused: bool
    engine: EngineInfo | None
    progress: Progress
    utilization: float | None = None


class RunProgress:
    """Adds up committed outcomes, outcomes of earlier passes in journals, and new outcomes.

    Used from the feed's thread; `snapshot` and `learn_committed` from any.
    """

    def __init__(
        self,
        plan: BatchPlan,
        path: Path,
        *,
        run_id: str,
        chunks: Sequence[ChunkRef],
        remaining: RemainingWork | None = None,
        max_tokens_cap: int | None = None,
    ) -> None:
        self.phase = "starting engine"
        self.in_flight = 0
        self.waiting: Wait | None = None
        self._plan = plan
        self._path = path
        self._run_id = run_id
        self._mine = {ref.chunk.number for ref in chunks}
        self._meter = Meter()
        self._remaining = remaining
        self._cap = max_tokens_cap
        #: Settled in chunks that are not this run's: completed, failed.
        self._elsewhere = (0, 0)
        #: Settled by earlier passes in chunks of this run: completed, failed.
        self._found = [0, 0]
        self._logged_at = time.monotonic()

    def learn_committed(self, reports: Iterable[ChunkReport]) -> None:
        """Record the chunks that the store holds."""
        others = [report for report in reports if report.number not in self._mine]
        self._elsewhere = (
            sum(report.completed for report in others),
            sum(report.failed for report in others),
        )

    def count_found(self, completed: int, failed: int) -> None:
        """Count outcomes of earlier passes in one of this run's chunks."""
        self._found[0] += completed
        self._found[1] += failed

    def count(self, outcome: Outcome, request: Request) -> None:
        """Count an outcome that has just become durable."""
        if self._remaining is not None:
            shape = shape_of_request(request, max_tokens_cap=self._cap)
            self._remaining.count(shape, outcome)
        if isinstance(outcome, Completion):
            self._meter.completed += 1
            self._meter.prompt_tokens += outcome.usage.prompt_tokens
            self._meter.completion_tokens += outcome.usage.completion_tokens
        else:
            self._meter.failed += 1

    @property
    def completion_tokens(self) -> int:
        """Counter of tokens in the answers that this run got."""
        return self._meter.completion_tokens

    def begin_feeding(self) -> None:
        """Record that the engine is ready: rates count from now."""
        self._meter.forget_rates()
        self._meter.sample(time.monotonic())
        if self._remaining is not None:
            self._remaining.begin(time.monotonic())
        self.write("feeding")

    def tick(self) -> None:
        """Sample the rates and write the progress file; call about once a second."""
        self._meter.sample(time.monotonic())
        if self._remaining is not None:
            self._remaining.sample(time.monotonic())
        self.write(self.phase)
        if time.monotonic() - self._logged_at >= LOG_SECONDS:
            self._logged_at = time.monotonic()
            self._log()

    @property
    def pending(self) -> int:
        """Requests of the batch without an outcome."""
        found, elsewhere, meter = self._found, self._elsewhere, self._meter
        return self._plan.requests - sum(found) - sum(elsewhere) - meter.completed - meter.failed

    @property
    def rates(self) -> tuple[float, float]:
        """Recent requests and output tokens per second."""
        return self._meter.rates()

    def write(self, phase: str) -> None:
        """Write the progress file. A full disk must not stop the run."""
        self.phase = phase
        if phase != "feeding":
            self.waiting = None
        try:
            write_progress(self._path, self.snapshot())
        except OSError as error:
            logger.warning("cannot write %s: %s", self._path, error)

    def snapshot(self) -> Progress:
        """Return the present progress of the batch."""
        completed = self._elsewhere[0] + self._found[0] + self._meter.completed
        failed = self._elsewhere[1] + self._found[1] + self._meter.failed
        requests_per_second, tokens_per_second = self._meter.rates()
        return Progress(
            batch_id=self._plan.batch_id,
            run_id=self._run_id,
            pid=os.getpid(),
            updated_at=time.time(),
            phase=self.phase,
            total=self._plan.requests,
            completed=completed,
            failed=failed,
            in_flight=self.in_flight,
            prompt_tokens=self._meter.prompt_tokens,
            completion_tokens=self._meter.completion_tokens,
            requests_per_second=requests_per_second,
            output_tokens_per_second=tokens_per_second,
            eta_seconds=self._eta_seconds(self.pending, requests_per_second),
            waiting=self.waiting,
        )

    def _eta_seconds(self, pending: int, requests_per_second: float) -> float | None:
        """Return the seconds left, by the tokens left if they are known, else by the requests."""
        if self._remaining is not None:
            return self._remaining.seconds_left(pending)
        return pending / requests_per_second if requests_per_second else None

    def _log(self) -> None:
        now = self.snapshot()
        logger.info(
            "%s: %d of %d requests done (%.1f %%), %d failed, %d in flight,"
            " %.1f requests/s, %.0f output tokens/s, ETA %s",
            now.batch_id,
            now.done,
            now.total,
            100 * now.done / now.total,
            now.failed,
            now.in_flight,
            now.requests_per_second,
            now.output_tokens_per_second,
            "unknown" if now.eta_seconds is None else f"{now.eta_seconds:.0f} s",
        )


def remaining_work(folder: DataFolder, batch_id: str) -> RemainingWork | None:
    """Return a tracker of the remaining work of a batch; None if it has no estimate."""
    estimate = read_estimate(folder, batch_id)
    return None if estimate is None else RemainingWork(estimate)
