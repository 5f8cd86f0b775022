"""`estimates`: how accurate the estimates of the last batches were."""

from collections.abc import Sequence

import click
from rich.table import Table
from rich.text import Text

from batch_orchestration.cli.context import json_option, open_context, print_json
from batch_orchestration.cli.escaping import say
from batch_orchestration.core.text import duration
from batch_orchestration.estimates.estimate import seconds_band, tokens_band
from batch_orchestration.estimates.scores import Accuracy, Score, accuracy
from batch_orchestration.estimates.scoring import LAST_BATCHES
from batch_orchestration.estimates.tables import EstimateTables


@click.command()
@click.option(
    "--last",
    type=click.IntRange(min=1),
    default=LAST_BATCHES,
    show_default=True,
    help="So many batches.",
)
@json_option
def estimates(last: int, as_json: bool) -> None:
    """Show the estimates of the last batches beside the actual values, and their accuracy."""
    context = open_context()
    scores = EstimateTables(context.store).scores(limit=last) if context.store.exists else []
    if as_json:
        print_json({"calibration": accuracy(scores), "batches": [*map(_object, scores)]})
        return
    if not scores:
        say("No batch with an estimate is completed yet.")
        return
    context.console.print(_table(scores))
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


def _table(scores: Sequence[Score]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("Batch", "Answer tokens expected", "Actual", "Time expected", "Actual", "Error",
                   "In band"):  # fmt: skip
        table.add_column(column, overflow="fold")
    for score in scores:
        expected = score.estimate.seconds
        table.add_row(
            Text(score.batch_id),
            tokens_band(score.estimate.completion_tokens),
            f"{score.actual_completion_tokens:,}",
            "" if expected is None else seconds_band(expected),
            duration(score.actual_seconds),
            "" if score.error is None else f"{score.error:.0%}",
            {None: "", True: "yes", False: "no"}[score.inside],
        )
    return table


def _summary(found: Accuracy) -> list[str]:
    lines = [f"{found.batches:,} batches scored."]
    if found.median_token_error is not None:
        lines.append(f"Tokens: median error {found.median_token_error:.0%}.")
    if found.median_error is not None and found.inside is not None:
        lines.append(
            f"Time: median error {found.median_error:.0%}; {found.inside:.0%} of"
            f" {found.with_seconds:,} within their band (80% would be just right)."
        )
    return lines
