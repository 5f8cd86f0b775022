"""Figures as people read them: durations, tokens, bands."""

from batch_orchestration.domain.estimates import Band, Estimate


def duration(seconds: float) -> str:
    """Return a duration for people: `48.2 s`, `3 min 20 s`, `2 h 5 min`."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def seconds_band(band: Band) -> str:
    """Return a band of seconds: `3 min 20 s (2 min 50 s to 4 min 5 s)`."""
    return f"{duration(band.mid)} ({duration(band.low)} to {duration(band.high)})"


def tokens_band(band: Band) -> str:
    """Return a band of tokens: `1,200 (900 to 1,800)`."""
    return f"{band.mid:,.0f} ({band.low:,.0f} to {band.high:,.0f})"


def estimate_rows(estimate: Estimate) -> list[tuple[str, str]]:
    """Return an estimate as names and texts, for a table; what is not known is said to be."""
    time = "not known: this engine was never measured; the job benchmark_engine does it"
    if estimate.seconds is not None:
        time = seconds_band(estimate.seconds)
        time += f", by {estimate.measurements:,} measurements"
    if estimate.start_seconds is not None:
        time += f"; engine start {duration(estimate.start_seconds)}"
    answers = f"{tokens_band(estimate.completion_tokens)}, {estimate.from_history:.0%} by history"
    rows = [
        ("Expected prompt tokens", f"{tokens_band(estimate.prompt_tokens)} by {estimate.basis}"),
        ("Expected completion tokens", answers),
        ("Expected time", time),
    ]
    if estimate.price is not None:
        price = estimate.price
        rows.append(("Expected price", f"{price.mid:,.2f} ({price.low:,.2f} to {price.high:,.2f})"))
    if warning := window_warning(estimate):
        rows.append(("Warning", warning))
    return rows


def window_warning(estimate: Estimate) -> str | None:
    """Return a sentence about a completion window that will hardly be met; None if it will."""
    done = estimate.until_done
    if done is None or estimate.window_seconds is None or not estimate.may_miss_window:
        return None
    verdict = "cannot" if estimate.cannot_meet_window else "may not"
    return (
        f"by the estimate it {verdict} end within its completion window of"
        f" {duration(estimate.window_seconds)}: {duration(done.low)} to {duration(done.high)},"
        f" {duration(estimate.ahead_seconds)} of them behind other batches"
    )
