"""Scores the estimate of a delivered batch, and stores its measurements for later estimates."""

from collections.abc import Callable
from dataclasses import dataclass

from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.core.outcomes import FailureCode
from batch_orchestration.core.results import BatchTotals
from batch_orchestration.estimates.batch_estimates import read_estimate, read_profile
from batch_orchestration.estimates.scores import Accuracy, Score, accuracy
from batch_orchestration.estimates.tables import EstimateTables
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.store.store import Store

#: Number of latest batches in the calibration.
LAST_BATCHES = 20
#: Codes of an early end: such a batch cannot be compared with an estimate of the whole.
_CUT_SHORT = (FailureCode.BATCH_CANCELLED, FailureCode.BATCH_EXPIRED)


@dataclass(frozen=True)
class Scored:
    """A batch's score, and the accuracy of the latest estimates up to it."""

    score: Score
    accuracy: Accuracy


def score_batch(
    plan: BatchPlan,
    totals: BatchTotals,
    *,
    folder: DataFolder,
    store: Store,
    clock: Callable[[], float],
) -> Scored | None:
    """Score the estimate of a batch whose requests all have an outcome. Idempotent.

    Measurements and a sample of the answers are stored for later estimates.

    Returns:
        None without an estimate, without an answer, or if the batch ended early.
    """
    tables = EstimateTables(store)
    estimate = read_estimate(folder, plan.batch_id)
    if estimate is None or any(totals.failures_by_code[str(code)] for code in _CUT_SHORT):
        return None
    score = tables.score_of(plan.batch_id)
    if score is None:
        runs = tables.measure(plan.batch_id, estimate)
        if not runs:
            return None
        score = Score(
            batch_id=plan.batch_id,
            scored_at=clock(),
            estimate=estimate,
            actual_prompt_tokens=sum(run.prompt_tokens for run in runs),
            actual_completion_tokens=sum(run.completion_tokens for run in runs),
            actual_seconds=sum(run.seconds for run in runs),
        )
        profile = read_profile(folder, plan.batch_id)
        answered = [] if profile is None else tables.answers_to(plan.batch_id, profile.sample)
        tables.add_score(score, runs, answered)
    past = tables.scores(limit=LAST_BATCHES, until=score.scored_at)
    return Scored(score, accuracy(past))
