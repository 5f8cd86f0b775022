"""`report.md`: a finished batch, for the person who looks at it at three in the morning."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime

from batch_orchestration.domain.batches import BatchPlan
from batch_orchestration.domain.commits import BatchRecord, ChunkReport
from batch_orchestration.domain.estimates import Band
from batch_orchestration.domain.lifecycle import Closing
from batch_orchestration.domain.submissions import Submission
from batch_orchestration.services.scoring import Scored
from batch_orchestration.services.tallies import Tally
from batch_orchestration.services.wording import duration as duration
from batch_orchestration.services.wording import seconds_band, tokens_band

#: More chunks than these are summed up by the slowest.
CHUNKS_SHOWN = 20
#: A message that repeats a whole prompt tells too much and helps nobody.
MESSAGE_LENGTH = 200

Row = Sequence[object]


def render_report(
    plan: BatchPlan,
    record: BatchRecord,
    tally: Tally,
    chunks: Mapping[int, ChunkReport],
    *,
    outbox: str,
    scored: Scored | None = None,
    closing: Closing | None = None,
) -> str:
    """Return the report as Markdown; the same figures always give the same text.

    It holds ids, codes and messages, never prompts or answers.

    Args:
        plan: Of the batch.
        record: Of the batch; only times that a second assembly does not change are read.
        tally: Of all its requests.
        chunks: Their reports by number.
        outbox: Folder of the files, as a person would write it.
        scored: The estimate made at admission, beside what it took.
        closing: Why it ended early; None if it did not.
    """
    sections = [
        f"# {plan.batch_id}",
        _headline(tally),
        _early_end(plan.batch_id, tally, closing),
        _summary(plan, record, tally),
        _failures(plan.batch_id, tally),
        _engines(plan, tally),
        _estimate(scored),
        _chunks(list(chunks.values())),
        _files(outbox, tally),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _headline(tally: Tally) -> str:
    text = f"{tally.completed:,} of {tally.total:,} requests answered, {tally.failed:,} failed."
    if tally.simulated:
        text += (
            "\n\n> **Simulated engine.** These answers were made up to try the machinery out; "
            "no model was asked."
        )
    return text


def _early_end(batch_id: str, tally: Tally, closing: Closing | None) -> str:
    if closing is None:
        return ""
    unasked = tally.failures_by_code[closing.code]
    return (
        f"> **{str(closing.status).capitalize()}** by {_cell(closing.actor)},"
        f" {_moment(closing.at)}: {_cell(closing.reason) or 'no reason given'}.\n"
        f"> {unasked:,} requests were left without an answer and are in `errors.jsonl` as"
        f" `{closing.code}`; everything that was answered is delivered.\n"
        f"> To ask the rest: `python -m batch_orchestration resume {batch_id}`."
    )


def _summary(plan: BatchPlan, record: BatchRecord, tally: Tally) -> str:
    rows: list[Row] = [
        ("File", plan.file_name),
        ("Requests", f"{tally.total:,}"),
        ("Answered", f"{tally.completed:,}"),
        ("Failed", f"{tally.failed:,} ({tally.failure_rate:.2%})"),
        ("Refused at admission", f"{plan.faulty:,}"),
        ("Prompt tokens", f"{tally.prompt_tokens:,}"),
        ("Completion tokens", f"{tally.completion_tokens:,}"),
        ("Attempts", f"{tally.attempts:,} for {tally.submitted:,} submitted requests"),
        ("Admitted", _moment(plan.created_at)),
    ]
    if tally.first_at is not None and tally.last_at is not None:
        rows += [
            ("First submission", _moment(tally.first_at)),
            ("Last outcome", _moment(tally.last_at)),
            ("Duration", duration(tally.run_seconds)),
            ("Wait before it", duration(max(0.0, tally.first_at - plan.created_at))),
            ("Requests per second", f"{tally.requests_per_second:,.2f}"),
            ("Output tokens per second", f"{tally.output_tokens_per_second:,.1f}"),
        ]
    rows += [(f"Metadata `{key}`", value) for key, value in record.options.metadata.items()]
    return "## Figures\n\n" + _table(("", ""), rows)


def _failures(batch_id: str, tally: Tally) -> str:
    if not tally.failed:
        return ""
    rows = [
        (f"`{code}`", f"{count:,}", example.custom_id or f"(line {example.line})", example.message)
        if place == 0
        else ("", "", example.custom_id or f"(line {example.line})", example.message)
        for code, count in sorted(tally.failures_by_code.items(), key=lambda item: -item[1])
        for place, example in enumerate(tally.examples[code])
    ]
    return (
        "## Failures\n\n"
        + _table(("Code", "Requests", "First of them", "Message"), rows)
        + f"\n\nAll of them: `python -m batch_orchestration failures {batch_id}`. "
        "What a code means and what helps: `docs/failure-modes.md`."
    )


def _engines(plan: BatchPlan, tally: Tally) -> str:
    rows = [
        (
            use.engine,
            use.version,
            use.model,
            f"`{use.settings_hash}`" + ("" if use.settings_hash == plan.settings_hash else " (!)"),
            f"{count:,}",
        )
        for use, count in sorted(tally.engines.items())
    ]
    if not rows:
        return "## Engine\n\nNone was asked: no request was usable."
    text = "## Engine\n\n" + _table(("Engine", "Version", "Model", "Settings", "Requests"), rows)
    if any(use.settings_hash != plan.settings_hash for use in tally.engines):
        text += f"\n\n(!) Not the settings of the plan, `{plan.settings_hash}`: "
        text += "the run was forced, or a replay changed the requests."
    return text


def _chunks(chunks: list[ChunkReport]) -> str:
    heading = f"## Chunks ({len(chunks):,})\n\n"
    shown = sorted(chunks, key=lambda chunk: chunk.number)
    if len(chunks) > CHUNKS_SHOWN:
        shown = sorted(chunks, key=lambda chunk: (-chunk.seconds, chunk.number))[:CHUNKS_SHOWN]
        heading += f"The {CHUNKS_SHOWN} slowest:\n\n"
    columns = ("Chunk", "Requests", "Failed", "Attempts", "Output tokens", "Seconds", "Tokens/s")
    return heading + _table(
        columns,
        (
            (
                f"{chunk.number:05d}",
                f"{chunk.requests:,}",
                f"{chunk.failed:,}",
                f"{chunk.attempts:,}",
                f"{chunk.completion_tokens:,}",
                f"{chunk.seconds:,.1f}",
                f"{chunk.completion_tokens / chunk.seconds:,.1f}" if chunk.seconds else "",
            )
            for chunk in shown
        ),
    )


def _files(outbox: str, tally: Tally) -> str:
    return (
        "## Files\n\n"
        f"In `{outbox}`, lines in the order of the input:\n\n"
        f"- `output.jsonl`: {tally.completed:,} answers\n"
        f"- `errors.jsonl`: {tally.failed:,} failures\n"
    ).rstrip()


def render_submission_report(
    submission: Submission,
    parts: Sequence[BatchRecord],
    failures_by_code: Mapping[str, int],
    *,
    outbox: str,
) -> str:
    """Return the report of a submission whose parts have all ended, as Markdown.

    Args:
        submission: What was split.
        parts: In file order.
        failures_by_code: Of all parts.
        outbox: Folder of the submission's files, as a person would write it.
    """
    completed = sum(part.completed for part in parts)
    failed = sum(part.failed for part in parts)
    figures: list[Row] = [
        ("File", submission.file_name),
        ("Requests", f"{submission.requests:,}, in {len(parts):,} parts"),
        ("Answered", f"{completed:,}"),
        ("Failed", f"{failed:,} ({failed / max(1, submission.requests):.2%})"),
        ("Refused at admission", f"{submission.faulty:,}"),
        ("Prompt tokens", f"{sum(part.prompt_tokens for part in parts):,}"),
        ("Completion tokens", f"{sum(part.completion_tokens for part in parts):,}"),
        ("Split", _moment(submission.created_at)),
        *((f"Metadata `{key}`", text) for key, text in submission.options.metadata.items()),
    ]
    codes = sorted(failures_by_code.items(), key=lambda item: -item[1])
    rows = [
        (
            part.batch_id,
            str(part.status),
            f"{part.total:,}",
            f"{part.completed:,}",
            f"{part.failed:,}",
            f"{part.completion_tokens:,}",
        )
        for part in parts
    ]
    head = ("Part", "Status", "Requests", "Answered", "Failed", "Completion tokens")
    sections = [
        f"# {submission.submission_id}",
        f"{completed:,} of {submission.requests:,} requests answered, {failed:,} failed.",
        "## Figures\n\n" + _table(("", ""), figures),
        "## Failures\n\n"
        + _table(("Code", "Requests"), [(f"`{code}`", f"{count:,}") for code, count in codes])
        + f"\n\nAll of them: `python -m batch_orchestration failures {submission.submission_id}`."
        if codes
        else "",
        "## Parts\n\n" + _table(head, rows) + "\n\nEach has a report of its own in its folder.",
        "## Files\n\n"
        f"In `{outbox}`, lines of all parts in the order of the input:\n\n"
        f"- `output.jsonl`: {completed:,} answers\n"
        f"- `errors.jsonl`: {failed:,} failures",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _estimate(scored: Scored | None) -> str:
    if scored is None:
        return ""
    score, past = scored.score, scored.calibration
    rows = [
        _compared("Prompt tokens", score.expected_prompt_tokens, score.actual_prompt_tokens),
        _compared("Completion tokens", score.expected_tokens, score.actual_tokens),
    ]
    if score.expected_seconds is None:
        rows.append(("Engine busy", "not known: never measured", duration(score.actual_seconds)))
    else:
        expected = seconds_band(score.expected_seconds)
        rows.append(("Engine busy", expected, duration(score.actual_seconds)))
    text = "## Estimate\n\nMade at admission; prompt tokens by "
    text += f"{score.basis}. A band is meant to hold eight of ten.\n\n"
    text += _table(("", "Expected (10 to 90 %)", "Actual"), rows)
    if score.error is not None:
        place = "inside" if score.inside else "outside"
        text += f"\n\nThe time was off by {score.error:.0%}, {place} the band. "
    if past.median_error is not None and past.inside is not None:
        text += (
            f"Over the last {past.with_seconds:,} batches up to this one: median error"
            f" {past.median_error:.0%}, inside the band {past.inside:.0%}."
        )
    return text.rstrip()


def _compared(name: str, band: Band, actual: int) -> Row:
    return name, tokens_band(band), f"{actual:,}"


def _moment(posix_seconds: float) -> str:
    return datetime.fromtimestamp(posix_seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _table(header: Row, rows: Iterable[Row]) -> str:
    lines = [_line(header), _line(["---"] * len(header))]
    lines += [_line(row) for row in rows]
    return "\n".join(lines)


def _line(cells: Row) -> str:
    return "| " + " | ".join(_cell(str(cell)) for cell in cells) + " |"


def _cell(text: str) -> str:
    """Keep foreign text from breaking the table or the page."""
    flat = " ".join(text.split())
    if len(flat) > MESSAGE_LENGTH:
        flat = flat[: MESSAGE_LENGTH - 1] + "…"
    return flat.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
