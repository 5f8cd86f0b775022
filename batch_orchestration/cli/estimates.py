"""`estimates`: how accurate the estimates of the last batches were."""

import click

from batch_orchestration.cli.context import json_option, open_context, print_json
from batch_orchestration.cli.escaping import say
from batch_orchestration.cli.tables import table
from batch_orchestration.core.text import duration
from batch_orchestration.estimates.estimate import seconds_band, tokens_band
from batch_orchestration.estimates.scores import Accuracy, Score, accuracy
from batch_orchestration.estimates.scoring import LAST_BATCHES
from batch_orchestration.estimates.tables import EstimateTables

_COLUMNS = (
    *("Batch", "Answer tokens expected", "Actual", "Time expected", "Actual", "Error"),
    "In band",
)


@click.command()
@click.option(
    "--last",
    type=click.IntRange(min=1),
    default=LAST_BATCHES,
    show_default=True,
    help="Number of batches.",
)
@json_option
def estimates(last: int, as_json: bool) -> None:
    """Show the estimates of the last batches, the actual values, and the accuracy."""
    context = open_context()
    scores = EstimateTables(context.store).scores(limit=last) if context.store.exists else []
    if as_json:
        print_json({"calibration": accuracy(scores), "batches": [*map(_object, scores)]})
        return
    if not scores:
        say("No batch with an estimate has been completed yet.")
        return
    context.console.print(table(_COLUMNS, map(_row, scores)))
    for line in _summary(accuracy(scores)):
        say(line)


def _object(score: Score) -> dict[str, object]:
    return {
        "batch_id": score.batch_id,
        "scored_at": int(score.scored_at),
        "requests": score.estimate.requests,
        "basis": score.estimate.basis,
        "expected_tokens": score.estimate.tokens,
        "actual_tokens": score.actual_tokens,
        "token_error": score.token_error,
        "expected_seconds": score.estimate.seconds,
        "actual_seconds": score.actual_seconds,
        "error": score.error,
        "inside": score.inside,
    }


def _row(score: Score) -> tuple[object, ...]:
    expected = score.estimate.seconds
    return (
        score.batch_id,
        tokens_band(score.estimate.completion_tokens),
        f"{score.actual_completion_tokens:,}",
        expected and seconds_band(expected),
        duration(score.actual_seconds),
        None if score.error is None else f"{score.error:.0%}",
        None if score.inside is None else "yes" if score.inside else "no",
    )


def _summary(found: Accuracy) -> list[str]:
    lines = [f"{found.batches:,} batches scored."]
    if found.median_token_error is not None:
        lines.append(f"Tokens: median error {found.median_token_error:.0%}.")
    if found.median_error is not None and found.inside is not None:
        lines.append(
            f"Time: median error {found.median_error:.0%}; {found.inside:.0%} of"
            f" {found.with_seconds:,} within their band (80% is ideal)."
        )
    return lines
