"""The report on a finished batch, for the person who looks at it at three in the morning.

`report.md` and `report.html` are the same document. It holds ids, codes and messages, never prompts
or answers.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from batch_orchestration.domain.batches import BatchPlan
from batch_orchestration.domain.commits import BatchRecord, ChunkReport
from batch_orchestration.domain.estimates import Band
from batch_orchestration.domain.kept import Kept
from batch_orchestration.domain.lifecycle import Closing
from batch_orchestration.domain.submissions import Submission
from batch_orchestration.services.documents import (
    Block,
    Bullets,
    Code,
    Heading,
    Paragraph,
    Quote,
    Strong,
    Table,
    Text,
)
from batch_orchestration.services.report_figures import ReportFigures
from batch_orchestration.services.scoring import Scored
from batch_orchestration.services.tallies import Tally
from batch_orchestration.services.wording import duration as duration
from batch_orchestration.services.wording import seconds_band, tokens_band

#: More chunks than these are summed up by the slowest.
CHUNKS_SHOWN = 20

Row = Sequence[Text]
Blocks = list[Block]
_NO_FIGURES = ReportFigures()


def report_blocks(
    plan: BatchPlan,
    record: BatchRecord,
    tally: Tally,
    chunks: Mapping[int, ChunkReport],
    *,
    outbox: str,
    scored: Scored | None = None,
    closing: Closing | None = None,
    figures: ReportFigures = _NO_FIGURES,
) -> Blocks:
    """Return the report; the same figures always give the same one.

    Args:
        plan: Of the batch.
        record: Of the batch; only times that a second assembly does not change are read.
        tally: Of all its requests.
        chunks: Their reports by number.
        outbox: Folder of the files, as a person would write it.
        scored: The estimate made at admission, beside what it took.
        closing: Why it ended early; None if it did not.
        figures: Of the batch over time.
    """
    return [
        Heading(1, plan.batch_id),
        *_headline(tally),
        *_early_end(plan.batch_id, tally, closing),
        *_summary(plan, record, tally),
        *figures.pictures,
        *_latencies(figures),
        *_failures(plan.batch_id, tally),
        *_timeline(plan, figures),
        *_kept(figures.kept),
        *_estimate(scored),
        *_engines(plan, tally),
        *_chunks(list(chunks.values())),
        *_files(outbox, tally.completed, tally.failed, "lines in the order of the input"),
    ]


def _headline(tally: Tally) -> Blocks:
    answered = f"{tally.completed:,} of {tally.total:,} requests answered"
    blocks: Blocks = [Paragraph(f"{answered}, {tally.failed:,} failed.")]
    if tally.simulated:
        made_up = " These answers were made up to try the machinery out; no model was asked."
        blocks.append(Quote([(Strong("Simulated engine."), made_up)]))
    return blocks


def _early_end(batch_id: str, tally: Tally, closing: Closing | None) -> Blocks:
    if closing is None:
        return []
    unasked = tally.failures_by_code[closing.code]
    reason = closing.reason or "no reason given"
    return [
        Quote(
            [
                (
                    Strong(str(closing.status).capitalize()),
                    f" by {closing.actor}, {_moment(closing.at)}: {reason}.",
                ),
                (
                    f"{unasked:,} requests were left without an answer and are in ",
                    *(Code("errors.jsonl"), " as ", Code(closing.code)),
                    "; everything that was answered is delivered.",
                ),
                (
                    "To ask the rest: ",
                    Code(f"python -m batch_orchestration resume {batch_id}"),
                    ".",
                ),
            ]
        )
    ]


def _summary(plan: BatchPlan, record: BatchRecord, tally: Tally) -> Blocks:
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
    rows += _metadata(record.options.metadata)
    return [Heading(2, "Figures"), Table(("", ""), rows)]


def _metadata(metadata: Mapping[str, str]) -> list[Row]:
    return [(("Metadata", Code(key)), value) for key, value in metadata.items()]


def _latencies(figures: ReportFigures) -> Blocks:
    found = figures.latencies
    if found is None:
        return []
    header = ("Answered", "p50", "p90", "p95", "p99", "max")
    times = (found.p50, found.p90, found.p95, found.p99, found.longest)
    row = (f"{found.answered:,}", *(_latency(seconds) for seconds in times))
    return [
        Heading(2, "Latency"),
        Table(header, [row]),
        Paragraph("From the submission of the attempt that was answered to its answer."),
    ]


def _latency(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds < 1 else duration(seconds)


def _failures(batch_id: str, tally: Tally) -> Blocks:
    if not tally.failed:
        return []
    rows: list[Row] = []
    for code, count in _by_frequency(tally.failures_by_code):
        for place, example in enumerate(tally.examples[code]):
            what: Row = ("", "") if place else (Code(code), f"{count:,}")
            rows.append((*what, example.custom_id or f"(line {example.line})", example.message))
    return [
        Heading(2, "Failures"),
        Table(("Code", "Requests", "First of them", "Message"), rows),
        Paragraph(
            (
                *_all_failures(batch_id),
                " What a code means and what helps: ",
                *(Code("docs/failure-modes.md"), "."),
            )
        ),
    ]


def _all_failures(batch_id: str) -> tuple[str | Code, ...]:
    return "All of them: ", Code(f"python -m batch_orchestration failures {batch_id}"), "."


def _by_frequency(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: -item[1])


def _timeline(plan: BatchPlan, figures: ReportFigures) -> Blocks:
    if not figures.timeline:
        return []
    rows = [
        (_moment(moment.at), f"+{duration(max(0.0, moment.at - plan.created_at))}", moment.what)
        for moment in figures.timeline
    ]
    return [Heading(2, "Timeline"), Table(("When", "After", "What"), rows)]


def _kept(kept: Kept | None) -> Blocks:
    if kept is None or kept.wall_seconds <= 0:
        return []
    lost = (
        ("Engine fully used", kept.kept_seconds),
        ("Lost: engine starting", kept.start_up_seconds),
        ("Lost: could have been given more", kept.feed_gap_seconds),
        ("Lost: held back, for the device was hot", kept.held_seconds),
        ("Lost: waiting for the last answers", kept.drain_seconds),
        ("Lost: committing after the last answer", kept.commit_seconds),
    )
    rows = [(name, duration(time), f"{time / kept.wall_seconds:.1%}") for name, time in lost]
    return [
        Heading(2, "Where the time went"),
        Paragraph(
            (
                Strong(f"{kept.fraction:.1%} of the raw engine was kept"),
                f", of {duration(kept.wall_seconds)} that runs worked on this batch. By its own"
                f" metrics the engine had something to compute for"
                f" {duration(kept.engine_busy_seconds)}.",
            )
        ),
        Table(("", "Time", "Share"), rows),
    ]


def _engines(plan: BatchPlan, tally: Tally) -> Blocks:
    heading = Heading(2, "Engine")
    if not tally.engines:
        return [heading, Paragraph("None was asked: no request was usable.")]
    rows = [
        (
            use.engine,
            use.version,
            use.model,
            (Code(use.settings_hash), *(() if use.settings_hash == plan.settings_hash else "!")),
            f"{count:,}",
        )
        for use, count in sorted(tally.engines.items())
    ]
    blocks: Blocks = [heading, Table(("Engine", "Version", "Model", "Settings", "Requests"), rows)]
    if any(use.settings_hash != plan.settings_hash for use in tally.engines):
        blocks.append(
            Paragraph(
                (
                    *("! Not the settings of the plan, ", Code(plan.settings_hash)),
                    ": the run was forced, or a replay changed the requests.",
                )
            )
        )
    return blocks


def _chunks(chunks: list[ChunkReport]) -> Blocks:
    blocks: Blocks = [Heading(2, f"Chunks ({len(chunks):,})")]
    shown = sorted(chunks, key=lambda chunk: chunk.number)
    if len(chunks) > CHUNKS_SHOWN:
        shown = sorted(chunks, key=lambda chunk: (-chunk.seconds, chunk.number))[:CHUNKS_SHOWN]
        blocks.append(Paragraph(f"The {CHUNKS_SHOWN} slowest:"))
    columns = ("Chunk", "Requests", "Failed", "Attempts", "Output tokens", "Seconds", "Tokens/s")
    rows = [
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
    ]
    return [*blocks, Table(columns, rows)]


def _files(outbox: str, completed: int, failed: int, order: str) -> Blocks:
    return [
        Heading(2, "Files"),
        Paragraph(("In ", Code(outbox), f", {order}:")),
        Bullets(
            [
                (Code("output.jsonl"), f": {completed:,} answers"),
                (Code("errors.jsonl"), f": {failed:,} failures"),
            ]
        ),
    ]


def submission_blocks(
    submission: Submission,
    parts: Sequence[BatchRecord],
    failures_by_code: Mapping[str, int],
    *,
    outbox: str,
) -> Blocks:
    """Return the report of a submission whose parts have all ended.

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
        *_metadata(submission.options.metadata),
    ]
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
    answered = f"{completed:,} of {submission.requests:,} requests answered"
    return [
        Heading(1, submission.submission_id),
        Paragraph(f"{answered}, {failed:,} failed."),
        *(Heading(2, "Figures"), Table(("", ""), figures)),
        *_submission_failures(submission.submission_id, failures_by_code),
        *(Heading(2, "Parts"), Table(head, rows)),
        Paragraph("Each has a report of its own in its folder."),
        *_files(outbox, completed, failed, "lines of all parts in the order of the input"),
    ]


def _submission_failures(submission_id: str, failures_by_code: Mapping[str, int]) -> Blocks:
    if not failures_by_code:
        return []
    rows = [(Code(code), f"{count:,}") for code, count in _by_frequency(failures_by_code)]
    return [
        Heading(2, "Failures"),
        Table(("Code", "Requests"), rows),
        Paragraph(_all_failures(submission_id)),
    ]


def _estimate(scored: Scored | None) -> Blocks:
    if scored is None:
        return []
    score, past = scored.score, scored.calibration
    rows: list[Row] = [
        _compared("Prompt tokens", score.expected_prompt_tokens, score.actual_prompt_tokens),
        _compared("Completion tokens", score.expected_tokens, score.actual_tokens),
    ]
    if score.expected_seconds is None:
        rows.append(("Engine busy", "not known: never measured", duration(score.actual_seconds)))
    else:
        expected = seconds_band(score.expected_seconds)
        rows.append(("Engine busy", expected, duration(score.actual_seconds)))
    made = f"Made at admission; prompt tokens by {score.basis}."
    blocks: Blocks = [
        Heading(2, "Estimate"),
        Paragraph(f"{made} A band is meant to hold eight of ten."),
        Table(("", "Expected (10 to 90 %)", "Actual"), rows),
    ]
    verdict = []
    if score.error is not None:
        place = "inside" if score.inside else "outside"
        verdict.append(f"The time was off by {score.error:.0%}, {place} the band.")
    if past.median_error is not None and past.inside is not None:
        verdict.append(
            f"Over the last {past.with_seconds:,} batches up to this one: median error"
            f" {past.median_error:.0%}, inside the band {past.inside:.0%}."
        )
    return [*blocks, Paragraph(" ".join(verdict))] if verdict else blocks


def _compared(name: str, band: Band, actual: int) -> Row:
    return name, tokens_band(band), f"{actual:,}"


def _moment(posix_seconds: float) -> str:
    return datetime.fromtimestamp(posix_seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
