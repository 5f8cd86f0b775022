"""Alert sources: observations from durable data, so that a dead daemon misses no alert.

The store's events, the health report, estimates and rejected files are read again at each tick;
`operations/alerts/state.py` decides which of them are sent.
"""

import contextlib
import logging
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import msgspec

from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.core.errors import StorageError
from batch_orchestration.core.lifecycle import FINAL
from batch_orchestration.core.outcomes import FailureCode
from batch_orchestration.core.results import BatchRecord
from batch_orchestration.core.text import duration
from batch_orchestration.estimates.batch_estimates import read_estimate
from batch_orchestration.estimates.estimate import Band, seconds_band
from batch_orchestration.estimates.scores import Score
from batch_orchestration.estimates.tables import EstimateTables
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.moving import readable_name
from batch_orchestration.operations.alerts.findings import FROM_HEALTH, from_health
from batch_orchestration.operations.alerts.state import AlertState, Observation
from batch_orchestration.operations.health.links import batch_link, sensor_link
from batch_orchestration.operations.health.report import AlertKind, Finding, Level
from batch_orchestration.queue.files import read_pause
from batch_orchestration.settings import Settings
from batch_orchestration.store import connection, rows, schema
from batch_orchestration.store.store import Store

#: Codes of requests that an early end left unsent; they are not failures.
_UNASKED = [str(FailureCode.BATCH_CANCELLED), str(FailureCode.BATCH_EXPIRED)]
_COUNTS = dict[str, dict[str, int]]


@dataclass(frozen=True, kw_only=True)
class Ending:
    """A batch has ended.

    Attributes:
        number: Of the event in the batch's history.
        failures: By code, the most frequent first; unsent requests are not counted.
        unasked: Number of requests that an early end left unsent.
    """

    batch: BatchRecord
    number: int
    at: float
    status: BatchStatus
    actor: str
    reason: str
    failures: dict[str, int] = field(default_factory=dict)
    unasked: int = 0


@dataclass(frozen=True, kw_only=True)
class Watched:
    """The result of one read of the store.

    Attributes:
        endings: Since the requested time, oldest first.
        unfinished: All batches that have not ended.
        dead_letters: Unresolved, by batch and code.
    """

    endings: tuple[Ending, ...] = ()
    unfinished: tuple[BatchRecord, ...] = ()
    dead_letters: _COUNTS = field(default_factory=dict)


def watch(path: Path, *, since: float, began: float, deadline_seconds: float) -> Watched:
    """Read the store once, in one transaction.

    Args:
        path: Of its file; a missing file gives an empty result.
        since: Endings later than this.
        began: Dead letters later than this.
        deadline_seconds: Longest wait for other processes to release the file.

    Raises:
        StorageError: It cannot be read now.
    """
    if not path.exists():
        return Watched()
    schema.migrate(path, deadline_seconds=deadline_seconds)
    with connection.reading(path, deadline_seconds=deadline_seconds) as db:
        return Watched(
            endings=tuple(_endings(db, since)),
            unfinished=tuple(_batches(db, "status NOT IN (SELECT unnest(?))", _words(FINAL))),
            dead_letters=_counts(
                db,
                "state = 'dead' AND code NOT IN (SELECT unnest(?)) AND first_failed_at > ?",
                [_UNASKED, rows.timestamp(began)],
            ),
        )


def _endings(db: duckdb.DuckDBPyConnection, since: float) -> list[Ending]:
    ends = _words(FINAL - {BatchStatus.CANCELLED})
    events = rows.select(
        db,
        "batch_events",
        ["batch_id", "number", "happened_at", "to_status", "actor", "reason"],
        "WHERE happened_at > ? AND to_status IN (SELECT unnest(?)) ORDER BY happened_at, number",
        [rows.timestamp(since), ends],
    )
    ids = sorted({row["batch_id"] for row in events})
    if not ids:
        return []
    batches = {b.batch_id: b for b in _batches(db, "batch_id IN (SELECT unnest(?))", ids)}
    counts = _counts(db, "state <> 'resolved' AND batch_id IN (SELECT unnest(?))", [ids])
    return [
        Ending(
            batch=batches[row["batch_id"]],
            number=row["number"],
            at=rows.posix_seconds(row["happened_at"]),
            status=BatchStatus(row["to_status"]),
            actor=row["actor"],
            reason=row["reason"],
            failures={c: n for c, n in found.items() if c not in _UNASKED},
            unasked=sum(found.get(code, 0) for code in _UNASKED),
        )
        for row in events
        if row["batch_id"] in batches
        for found in (counts.get(row["batch_id"], {}),)
    ]


def _batches(
    db: duckdb.DuckDBPyConnection, condition: str, values: Sequence[str]
) -> list[BatchRecord]:
    found = rows.select(db, "batches", rows.BATCHES, f"WHERE {condition}", [list(values)])
    return [rows.batch_record(row) for row in found]


def _counts(db: duckdb.DuckDBPyConnection, condition: str, parameters: Sequence[Any]) -> _COUNTS:
    found = db.execute(
        f"SELECT batch_id, code, count(*) FROM failed_requests WHERE {condition}"
        " GROUP BY ALL ORDER BY count(*) DESC, code",
        list(parameters),
    ).fetchall()
    counts: _COUNTS = {}
    for batch_id, code, number in found:
        counts.setdefault(batch_id, {})[code] = number
    return counts


def _words(statuses: frozenset[BatchStatus]) -> list[str]:
    return sorted(map(str, statuses))


logger = logging.getLogger(__name__)
#: Events are read again this far behind the cursor: they carry the time of the decision, and their
#: writer may wait ten minutes for the store before they become visible.
LOOK_BACK_SECONDS = 3600.0
STORE_SECONDS = 5.0
#: Starts of runs and engines take minutes, which would make every short batch late.
SLACK_SECONDS = 600.0
_FROM_STORE = frozenset(
    {
        *(AlertKind.BATCH_FAILED, AlertKind.BATCH_EXPIRED, AlertKind.BATCH_OVER_BUDGET),
        *(AlertKind.ESTIMATE_MISSED, AlertKind.BATCH_LATE, AlertKind.DEAD_LETTERS),
    }
)
_FROM_FILES = frozenset({AlertKind.FILE_REJECTED})


def observe(
    *, settings: Settings, folder: DataFolder, state: AlertState, now: float
) -> Observation:
    """Return the present conditions, and the events since the state's cursor.

    The kinds of a source that cannot be read are unknown: none of their conditions counts as over,
    and no event is skipped. A source that fails does not affect the others.
    """
    since = max(state.began, state.cursor - LOOK_BACK_SECONDS)
    parts = [
        _guarded("health", FROM_HEALTH, lambda: from_health(settings, folder, state, now)),
        _guarded("rejected files", _FROM_FILES, lambda: _rejected(settings, folder, since)),
        _guarded("store", _FROM_STORE, lambda: _from_store(settings, folder, state, since, now)),
    ]
    return Observation(
        findings=[finding for part in parts for finding in part.findings],
        unknown=frozenset(kind for part in parts for kind in part.unknown),
    )


def _guarded(
    name: str, kinds: frozenset[AlertKind], look: Callable[[], Observation]
) -> Observation:
    try:
        return look()
    except StorageError:  # health reports the unreadable file
        return Observation(unknown=kinds)
    except Exception as error:
        logger.exception("looking for alerts in the %s failed", name)
        broken = Finding(
            check=f"source:{name}",
            kind=AlertKind.HEALTH_UNKNOWN,
            level=Level.UNHEALTHY,
            title=f"Nobody looks at the {name} for alerts",
            reason=f"alert_sensor fails at it: {error!r}",
            next_command="python -m batch_orchestration health",
        )
        return Observation(findings=[broken], unknown=kinds)


# --- the store ------------------------------------------------------------------------------------


def _from_store(
    settings: Settings, folder: DataFolder, state: AlertState, since: float, now: float
) -> Observation:
    watched = watch(folder.duckdb, since=since, began=state.began, deadline_seconds=STORE_SECONDS)
    endings = (_of_ending(ending, settings) for ending in watched.endings)
    missed = (
        _missed(score, settings)
        for score in _scores(folder, since)
        if _is_missed(score, settings.alert_estimate_factor)
    )
    paused = read_pause(folder) is not None
    late = () if paused else _late(watched.unfinished, settings, folder, now)
    return Observation(
        findings=[*filter(None, endings), *missed, *_dead_letters(watched, settings), *late],
        unknown={AlertKind.BATCH_LATE} if paused else (),
    )


def _of_ending(ending: Ending, settings: Settings) -> Finding | None:
    batch = ending.batch
    failed = sum(ending.failures.values())
    asked = batch.total - ending.unasked
    alert = Finding(
        check=f"ending:{batch.batch_id}:{ending.number}",
        kind=AlertKind.BATCH_FAILED,
        level=Level.UNHEALTHY,
        title=f"Batch {batch.batch_id} failed",
        reason=f"{ending.actor}: {ending.reason}",
        since=ending.at,
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
            reason=(
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
        reason=(
            f"{failed:,} of {asked:,} requests failed: {failed / asked:.1%},"
            f" {settings.failure_budget:.1%} allowed"
        ),
        next_command=f"python -m batch_orchestration failures {batch.batch_id}",
    )


def _dead_letters(watched: Watched, settings: Settings) -> list[Finding]:
    by_code: Counter[str] = Counter()
    for counts in watched.dead_letters.values():
        by_code.update(counts)
    total = by_code.total()
    if total <= settings.alert_dead_letters:
        return []
    worst = max(watched.dead_letters, key=lambda batch: sum(watched.dead_letters[batch].values()))
    alert = Finding(
        check=str(AlertKind.DEAD_LETTERS),
        kind=AlertKind.DEAD_LETTERS,
        level=Level.DEGRADED,
        title="Many requests have failed for good",
        reason=(
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
    tables = EstimateTables(Store(folder.duckdb, deadline_seconds=STORE_SECONDS))
    if not tables.exist:
        return ()
    return tables.scores_since(since)


def _is_missed(score: Score, factor: float) -> bool:
    expected = score.expected_seconds
    return expected is not None and _is_beyond(score.actual_seconds, expected, factor)


def _is_beyond(seconds: float, expected: Band, factor: float) -> bool:
    return seconds > max(factor * expected.high, expected.high + SLACK_SECONDS)


def _missed(score: Score, settings: Settings) -> Finding:
    assert score.expected_seconds is not None
    return Finding(
        check=f"estimate:{score.batch_id}",
        since=score.scored_at,
        kind=AlertKind.ESTIMATE_MISSED,
        level=Level.DEGRADED,
        title=f"The estimate of {score.batch_id} was badly missed",
        reason=(
            f"it took {duration(score.actual_seconds)} of the engine's time,"
            f" {seconds_band(score.expected_seconds)} were expected"
        ),
        link=batch_link(settings, score.batch_id),
        next_command="python -m batch_orchestration estimates",
    )


def _late(
    batches: Sequence[BatchRecord], settings: Settings, folder: DataFolder, now: float
) -> Iterator[Finding]:
    for batch in batches:
        estimate = read_estimate(folder, batch.batch_id)
        done = None if estimate is None else estimate.until_done
        began = batch.times.get(BatchStatus.IN_PROGRESS, batch.created_at)
        factor = settings.alert_estimate_factor
        if done is None or not _is_beyond(now - began, done, factor):
            continue
        yield Finding(
            check=f"{AlertKind.BATCH_LATE}:{batch.batch_id}",
            kind=AlertKind.BATCH_LATE,
            level=Level.DEGRADED,
            title=f"Batch {batch.batch_id} is far beyond its estimate",
            reason=(
                f"it was to be done after {seconds_band(done)}; {duration(now - began)} have"
                f" passed and {batch.pending:,} of {batch.total:,} requests are not committed"
            ),
            link=batch_link(settings, batch.batch_id),
            next_command=f"python -m batch_orchestration watch {batch.batch_id}",
        )


# --- files ----------------------------------------------------------------------------------------


def _rejected(settings: Settings, folder: DataFolder, since: float) -> Observation:
    """Return a finding for each rejected file, from the reasons beside it."""
    events = []
    for path in sorted(folder.rejected.glob("*.errors.json")):
        with contextlib.suppress(OSError):  # gone, or a circular link: the others are reported
            if (at := path.stat().st_mtime) > since:
                events.append(_of_rejected(path, settings, at))
    return Observation(findings=events)


def _of_rejected(path: Path, settings: Settings, at: float) -> Finding:
    name = readable_name(path.name)
    return Finding(
        check=f"rejected:{name}:{at:.3f}",
        since=at,
        kind=AlertKind.FILE_REJECTED,
        level=Level.DEGRADED,
        title=f"The file {name.removesuffix('.errors.json')} was rejected",
        reason="nothing of it can be used; the file beside it lists every fault",
        link=sensor_link(settings, "inbox_sensor"),
        next_command=f"head -c 2000 {shlex.quote(str(path.with_name(name)))}",
    )
