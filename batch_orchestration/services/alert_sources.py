"""What there is to be told: read from what is durable, so that a daemon that was dead misses none.

The store's events, the health report, estimates and the rejected files are looked at anew at each
tick; which of it is news is decided by `domain/alert_book.py`.
"""

import contextlib
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from batch_orchestration.domain.alert_book import AlertBook, Seen
from batch_orchestration.domain.alerts import Alert, AlertKind, Severity
from batch_orchestration.domain.batches import BatchStatus
from batch_orchestration.domain.commits import BatchRecord
from batch_orchestration.domain.errors import StorageError
from batch_orchestration.domain.health import Finding, HealthReport, Level
from batch_orchestration.domain.scores import Score
from batch_orchestration.services.dagster_links import (
    batch_link,
    health_link,
    run_link,
    sensor_link,
)
from batch_orchestration.services.estimates import read_estimate
from batch_orchestration.services.wording import duration, seconds_band
from batch_orchestration.settings import Settings
from batch_orchestration.storage.files import DataFolder
from batch_orchestration.storage.health_files import read_health
from batch_orchestration.storage.heartbeat_files import read_pulse
from batch_orchestration.storage.queue_files import read_pause
from batch_orchestration.storage.store import Store
from batch_orchestration.storage.watching import Ending, Watched, watch

#: Events are looked at again so long behind the cursor: they carry the time at which they were
#: decided, and who writes them may wait ten minutes for the store before they can be seen.
LOOK_BACK_SECONDS = 3600.0
#: `health_sensor` looks every 30 s, and a tick may take a minute.
HEALTH_STALE_SECONDS = 150.0
STORE_SECONDS = 5.0
#: Scores looked at; more batches do not end within a look.
_SCORES = 50
_FROM_STORE = frozenset({AlertKind.DEAD_LETTERS, AlertKind.BATCH_LATE})


@dataclass(frozen=True, kw_only=True)
class _Rule:
    """Of which kind an ill check is an alert.

    Attributes:
        level: From which on.
        lasts: For how long it must have been ill: what mends itself within that is none.
    """

    kind: AlertKind
    level: Level
    title: str
    lasts: float = 0.0


#: By the check's name, up to a colon. A check that is not here is `health_unknown`.
_RULES = {
    "dagster": _Rule(
        kind=AlertKind.DISPATCH_STOPPED,
        level=Level.UNHEALTHY,
        title="No batch is served: dispatch_sensor does not tick",
        lasts=60.0,  # a deployment that was just started has not ticked yet
    ),
    "store": _Rule(
        kind=AlertKind.STORE_UNUSABLE, level=Level.UNHEALTHY, title="The store cannot be used"
    ),
    "disk": _Rule(kind=AlertKind.DISK_LOW, level=Level.DEGRADED, title="The disk is nearly full"),
    "queue": _Rule(
        kind=AlertKind.QUEUE_STALLED, level=Level.UNHEALTHY, title="The queue does not move"
    ),
    "worker": _Rule(
        kind=AlertKind.BATCH_STUCK,
        level=Level.UNHEALTHY,
        title="A run is stuck",
        lasts=120.0,  # by then it was to be ended and started again
    ),
    "engine": _Rule(
        kind=AlertKind.ENGINE_SILENT,
        level=Level.UNHEALTHY,
        title="The engine does not answer",
        lasts=60.0,
    ),
    "gpu": _Rule(kind=AlertKind.GPU_UNHEALTHY, level=Level.UNHEALTHY, title="The GPU is unhealthy"),
    "person": _Rule(
        kind=AlertKind.NEEDS_PERSON, level=Level.DEGRADED, title="A batch waits for a person"
    ),
}
_RESTARTS = _Rule(
    kind=AlertKind.ENGINE_RESTARTS,
    level=Level.DEGRADED,
    title="The engine is started again and again",
)
_OTHER = _Rule(
    kind=AlertKind.HEALTH_UNKNOWN, level=Level.UNHEALTHY, title="A part of the health is not known"
)
_FROM_HEALTH = frozenset({r.kind for r in _RULES.values()} | {_RESTARTS.kind, _OTHER.kind})


def look_for_alerts(*, settings: Settings, folder: DataFolder, book: AlertBook, now: float) -> Seen:
    """Return what is the case now, and what has happened since the book's cursor.

    What cannot be looked at is unknown: nothing of it is taken to be over, and no event is passed
    over.
    """
    conditions, unknown = _from_health(settings, folder, book, now)
    events = list(_rejected(settings, folder, book))
    since = max(book.began, book.cursor - LOOK_BACK_SECONDS)
    try:
        watched = watch(
            folder.duckdb, since=since, began=book.began, deadline_seconds=STORE_SECONDS
        )
        scores = _scores(folder, since)
    except StorageError:  # that it cannot be read is the health's finding
        return Seen(
            conditions=conditions, events=events, unknown=unknown | _FROM_STORE, cursor=None
        )
    events += [(a, e.at) for e in watched.endings if (a := _of_ending(e, settings)) is not None]
    events += [
        (_missed(score, settings), score.scored_at)
        for score in scores
        if _is_missed(score, settings.alert_estimate_factor)
    ]
    conditions += _dead_letters(watched, settings)
    if read_pause(folder) is None:
        conditions += _late(watched.unfinished, settings, folder, now)
    else:
        unknown = unknown | {AlertKind.BATCH_LATE}
    return Seen(conditions=conditions, events=events, unknown=unknown, cursor=now)


# --- the health -----------------------------------------------------------------------------------


def _from_health(
    settings: Settings, folder: DataFolder, book: AlertBook, now: float
) -> tuple[list[Alert], frozenset[AlertKind]]:
    report, problem = None, "health_sensor has written none yet"
    try:
        report = read_health(folder)
    except StorageError as error:
        problem = str(error)
    seen_at = book.began if report is None else max(report.at, book.began)
    if report is not None and now - report.at <= HEALTH_STALE_SECONDS:
        return list(_of_report(report, settings, folder)), frozenset()
    stale = now - seen_at
    if report is not None:
        problem = f"the last report is {duration(stale)} old"
    unknown = _FROM_HEALTH - {AlertKind.HEALTH_UNKNOWN}
    if stale <= HEALTH_STALE_SECONDS:
        return [], _FROM_HEALTH
    alert = Alert(
        key="health",
        kind=AlertKind.HEALTH_UNKNOWN,
        severity=Severity.ERROR,
        title="Nobody knows whether the deployment is well",
        cause=f"{problem}: health_sensor was stopped, or fails",
        link=sensor_link(settings, "health_sensor"),
        next_command="python -m batch_orchestration health",
    )
    return [alert], unknown


def _of_report(report: HealthReport, settings: Settings, folder: DataFolder) -> Iterator[Alert]:
    for finding in report.problems:
        family, _, about = finding.check.partition(":")
        rule = _RULES.get(family, _OTHER)
        if family == "engine" and finding.level is Level.DEGRADED:
            rule = _RESTARTS
        lasted = report.at - (finding.since or report.at)
        if finding.level >= rule.level and lasted >= rule.lasts:
            yield _of_finding(finding, rule, about, settings, folder)


def _of_finding(
    finding: Finding, rule: _Rule, about: str, settings: Settings, folder: DataFolder
) -> Alert:
    named, link = about, health_link(settings)
    if about and finding.check.startswith(("worker:", "engine:")):
        named, link = _batch_of(about, folder) or f"run {about[:8]}", run_link(settings, about)
    if rule.kind is AlertKind.NEEDS_PERSON:
        link = finding.next_command or link
    return Alert(
        key=f"{rule.kind}:{finding.check}",
        kind=rule.kind,
        severity=Severity.ERROR if finding.level is Level.UNHEALTHY else Severity.WARNING,
        title=f"{rule.title}: {named}" if named else rule.title,
        cause=finding.reason,
        link=link,
        next_command=None if finding.next_command == link else finding.next_command,
    )


def _batch_of(run_id: str, folder: DataFolder) -> str | None:
    """Return the batch that a run has in hand, as far as its heartbeat tells."""
    with contextlib.suppress(OSError):
        pulse = read_pulse(folder.heartbeat_path(run_id))
        if pulse is not None and pulse.heartbeat is not None:
            return pulse.heartbeat.batch_id
    return None


# --- the store ------------------------------------------------------------------------------------


def _of_ending(ending: Ending, settings: Settings) -> Alert | None:
    batch = ending.batch
    failed = sum(ending.failures.values())
    asked = batch.total - ending.unasked
    alert = Alert(
        key=f"ending:{batch.batch_id}:{ending.number}",
        kind=AlertKind.BATCH_FAILED,
        severity=Severity.ERROR,
        title=f"Batch {batch.batch_id} failed",
        cause=f"{ending.actor}: {ending.reason}",
        counts=ending.failures,
        link=batch_link(settings, batch.batch_id),
        next_command=f"python -m batch_orchestration status {batch.batch_id}",
    )
    if ending.status is BatchStatus.FAILED:
        return alert
    if ending.status is BatchStatus.EXPIRED:
        return msgspec.structs.replace(
            alert,
            kind=AlertKind.BATCH_EXPIRED,
            title=f"Batch {batch.batch_id} has expired",
            cause=(
                f"{ending.unasked:,} of its {batch.total:,} requests had no answer when its window"
                " ended; what was answered is delivered"
            ),
            next_command=(
                f"python -m batch_orchestration resume {batch.batch_id} --completion-window 24h"
            ),
        )
    if asked <= 0 or failed / asked <= settings.failure_budget:
        return None
    return msgspec.structs.replace(
        alert,
        kind=AlertKind.BATCH_OVER_BUDGET,
        title=f"Batch {batch.batch_id} is completed, with too many failures",
        cause=(
            f"{failed:,} of {asked:,} requests failed: {failed / asked:.1%},"
            f" {settings.failure_budget:.1%} allowed"
        ),
        next_command=f"python -m batch_orchestration failures {batch.batch_id}",
    )


def _dead_letters(watched: Watched, settings: Settings) -> list[Alert]:
    by_code: Counter[str] = Counter()
    for counts in watched.dead_letters.values():
        by_code.update(counts)
    total = by_code.total()
    if total <= settings.alert_dead_letters:
        return []
    worst = max(watched.dead_letters, key=lambda batch: sum(watched.dead_letters[batch].values()))
    alert = Alert(
        key=str(AlertKind.DEAD_LETTERS),
        kind=AlertKind.DEAD_LETTERS,
        severity=Severity.WARNING,
        title="Many requests have failed for good",
        cause=(
            f"{total:,} dead letters of {len(watched.dead_letters)} batches are neither replayed"
            f" nor discarded, more than {settings.alert_dead_letters:,}; most are of {worst}"
        ),
        counts=dict(by_code.most_common()),
        link=batch_link(settings, worst),
        next_command=f"python -m batch_orchestration failures {worst}",
    )
    return [alert]


# --- estimates ------------------------------------------------------------------------------------


def _scores(folder: DataFolder, since: float) -> Sequence[Score]:
    tables = Store(folder.duckdb, deadline_seconds=STORE_SECONDS).estimates
    if not tables.exist:
        return ()
    return [score for score in tables.scores(limit=_SCORES) if score.scored_at > since]


def _is_missed(score: Score, factor: float) -> bool:
    expected = score.expected_seconds
    return expected is not None and score.actual_seconds > factor * expected.high


def _missed(score: Score, settings: Settings) -> Alert:
    assert score.expected_seconds is not None
    return Alert(
        key=f"estimate:{score.batch_id}",
        kind=AlertKind.ESTIMATE_MISSED,
        severity=Severity.WARNING,
        title=f"The estimate of {score.batch_id} was badly missed",
        cause=(
            f"it took {duration(score.actual_seconds)} of the engine's time,"
            f" {seconds_band(score.expected_seconds)} were expected"
        ),
        link=batch_link(settings, score.batch_id),
        next_command="python -m batch_orchestration estimates",
    )


def _late(
    batches: Sequence[BatchRecord], settings: Settings, folder: DataFolder, now: float
) -> Iterator[Alert]:
    for batch in batches:
        estimate = read_estimate(folder, batch.batch_id)
        done = None if estimate is None else estimate.until_done
        began = batch.times.get(BatchStatus.IN_PROGRESS, batch.created_at)
        if done is None or now - began <= settings.alert_estimate_factor * done.high:
            continue
        yield Alert(
            key=f"{AlertKind.BATCH_LATE}:{batch.batch_id}",
            kind=AlertKind.BATCH_LATE,
            severity=Severity.WARNING,
            title=f"Batch {batch.batch_id} is far beyond its estimate",
            cause=(
                f"it was to be done after {seconds_band(done)}; {duration(now - began)} have"
                f" passed and {batch.pending:,} of {batch.total:,} requests are not committed"
            ),
            link=batch_link(settings, batch.batch_id),
            next_command=f"python -m batch_orchestration watch {batch.batch_id}",
        )


# --- files ----------------------------------------------------------------------------------------


def _rejected(
    settings: Settings, folder: DataFolder, book: AlertBook
) -> Iterator[tuple[Alert, float]]:
    """Yield the files of which nothing could be used, by what lies beside them."""
    for path in sorted(folder.rejected.glob("*.errors.json")):
        try:
            at = path.stat().st_mtime
        except FileNotFoundError:
            continue
        if at > max(book.began, book.cursor - LOOK_BACK_SECONDS):
            yield _of_rejected(path, settings, at), at


def _of_rejected(path: Path, settings: Settings, at: float) -> Alert:
    name = path.name.removesuffix(".errors.json")
    return Alert(
        key=f"rejected:{path.name}:{at:.3f}",
        kind=AlertKind.FILE_REJECTED,
        severity=Severity.WARNING,
        title=f"The file {name} was rejected",
        cause="nothing of it can be used; the file beside it lists every fault",
        link=sensor_link(settings, "inbox_sensor"),
        next_command=f"head -c 2000 {shlex.quote(str(path))}",
    )
