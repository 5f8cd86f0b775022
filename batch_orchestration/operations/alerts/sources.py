"""Alert sources: observations from durable data, so that a dead daemon misses no alert.

The store's events, the health report, estimates and rejected files are read again at each tick;
`operations/alerts/state.py` decides which of them are sent.
"""

import contextlib
import logging
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from msgspec.structs import replace

from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.core.errors import StorageError
from batch_orchestration.core.lifecycle import UNASKED_CODES
from batch_orchestration.core.results import BatchRecord
from batch_orchestration.core.text import duration
from batch_orchestration.estimates.batch_estimates import read_estimate
from batch_orchestration.estimates.estimate import Band, seconds_band
from batch_orchestration.estimates.tables import EstimateTables
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.moving import readable_name
from batch_orchestration.operations.alerts.findings import FROM_HEALTH, from_health
from batch_orchestration.operations.alerts.state import LOOK_BACK_SECONDS, AlertState, Observation
from batch_orchestration.operations.health.links import CLI, batch_link, sensor_link
from batch_orchestration.operations.health.report import AlertKind, Finding, Level
from batch_orchestration.queue.pause import read_pause
from batch_orchestration.settings import Settings
from batch_orchestration.store import rows
from batch_orchestration.store.store import Store

logger = logging.getLogger(__name__)
#: Longest wait of each query for other processes to release the store.
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
_ENDINGS = [BatchStatus.COMPLETED, BatchStatus.EXPIRED, BatchStatus.FAILED]
#: Codes of requests that an early end left unsent; they are not failures.
_UNSENT = [*map(str, UNASKED_CODES.values())]


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
    name: str, kinds: frozenset[AlertKind], source: Callable[[], Observation]
) -> Observation:
    try:
        return source()
    except StorageError:  # health reports the unreadable file
        return Observation(unknown=kinds)
    except Exception as error:
        logger.exception("no alerts about the %s can be found", name)
        broken = Finding(
            check=f"source:{name}",
            kind=AlertKind.HEALTH_UNKNOWN,
            level=Level.UNHEALTHY,
            title=f"Alerts about the {name} cannot be found",
            reason=f"alert_sensor fails: {error!r}",
            next_command=f"{CLI} health",
        )
        return Observation(findings=[broken], unknown=kinds)


# --- the store ------------------------------------------------------------------------------------


def _from_store(
    settings: Settings, folder: DataFolder, state: AlertState, since: float, now: float
) -> Observation:
    store = Store(folder.duckdb, deadline_seconds=STORE_SECONDS)
    if not store.exists:  # a lost store has no news; health reports it
        return Observation(unknown=_FROM_STORE if folder.batch_ids() else ())
    findings = [
        *_endings(store, settings, since),
        *_dead_letters(store, settings, state.began),
        *_missed(EstimateTables(store), settings, since),
    ]
    if read_pause(folder) is not None:
        return Observation(findings=findings, unknown={AlertKind.BATCH_LATE})
    return Observation(findings=[*findings, *_late(store.unfinished(), settings, folder, now)])


def _endings(store: Store, settings: Settings, since: float) -> Iterator[Finding]:
    """Yield the batches that failed, expired, or completed with too many failures."""
    with store.reading() as db:
        events = rows.select(
            db,
            "batch_events",
            ["batch_id", "number", "happened_at", "to_status", "actor", "reason"],
            "WHERE happened_at > ? AND to_status IN (SELECT unnest(?))"
            " ORDER BY happened_at, number",
            [rows.timestamp(since), [*map(str, _ENDINGS)]],
        )
        ended = sorted({event["batch_id"] for event in events})
        failures = db.execute(
            "SELECT batch_id, code, count(*) FROM failed_requests WHERE state <> 'resolved'"
            " AND batch_id IN (SELECT unnest(?::VARCHAR[])) GROUP BY ALL"
            " ORDER BY count(*) DESC, code",
            [ended],
        ).fetchall()
    counts: dict[str, dict[str, int]] = {batch_id: {} for batch_id in ended}
    for batch_id, code, count in failures:
        counts[batch_id][code] = count
    batches = store.records(ended)
    for event in events:
        if (batch := batches.get(event["batch_id"])) is not None:
            finding = _ending(event, batch, counts[batch.batch_id], settings)
            if finding is not None:
                yield finding


def _ending(
    event: rows.Row, batch: BatchRecord, counts: Mapping[str, int], settings: Settings
) -> Finding | None:
    failures = {code: count for code, count in counts.items() if code not in _UNSENT}
    failed, unsent = sum(failures.values()), sum(counts.get(code, 0) for code in _UNSENT)
    alert = Finding(
        check=f"ending:{batch.batch_id}:{event['number']}",
        kind=AlertKind.BATCH_FAILED,
        level=Level.UNHEALTHY,
        title=f"Batch {batch.batch_id} failed",
        reason=f"{event['actor']}: {event['reason']}",
        since=event["happened_at"],
        counts=failures,
        link=batch_link(settings, batch.batch_id),
        next_command=f"{CLI} status {batch.batch_id}",
    )
    if event["to_status"] == BatchStatus.FAILED:
        return alert
    if event["to_status"] == BatchStatus.EXPIRED:
        return replace(
            alert,
            kind=AlertKind.BATCH_EXPIRED,
            title=f"Batch {batch.batch_id} has expired",
            reason=(
                f"{unsent:,} of its {batch.total:,} requests had no answer when its completion"
                " window ended; the answers so far are delivered"
            ),
            next_command=f"{CLI} resume {batch.batch_id} --completion-window 24h",
        )
    sent = batch.total - unsent
    if sent <= 0 or failed / sent <= settings.failure_budget:
        return None
    return replace(
        alert,
        kind=AlertKind.BATCH_OVER_BUDGET,
        title=f"Batch {batch.batch_id} is completed, with too many failures",
        reason=(
            f"{failed:,} of {sent:,} requests failed: {failed / sent:.1%},"
            f" {settings.failure_budget:.1%} allowed"
        ),
        next_command=f"{CLI} failures {batch.batch_id}",
    )


def _dead_letters(store: Store, settings: Settings, began: float) -> Iterator[Finding]:
    with store.reading() as db:
        found = db.execute(
            "SELECT batch_id, code, count(*) FROM failed_requests WHERE state = 'dead'"
            " AND code NOT IN (SELECT unnest(?)) AND first_failed_at > ? GROUP BY ALL",
            [_UNSENT, rows.timestamp(began)],
        ).fetchall()
    by_batch, by_code = Counter[str](), Counter[str]()
    for batch_id, code, count in found:
        by_batch[batch_id] += count
        by_code[code] += count
    if by_code.total() <= settings.alert_dead_letters:
        return
    ((worst, _),) = by_batch.most_common(1)
    yield Finding(
        check=str(AlertKind.DEAD_LETTERS),
        kind=AlertKind.DEAD_LETTERS,
        level=Level.DEGRADED,
        title="Many requests have failed for good",
        reason=(
            f"{by_code.total():,} dead letters of {len(by_batch)} batches are neither replayed nor"
            f" discarded, more than {settings.alert_dead_letters:,}; most are of {worst}"
        ),
        counts=dict(by_code.most_common()),
        link=batch_link(settings, worst),
        next_command=f"{CLI} failures {worst}",
    )


# --- estimates ------------------------------------------------------------------------------------


def _is_beyond(seconds: float, expected: Band, factor: float) -> bool:
    return seconds > max(factor * expected.high, expected.high + SLACK_SECONDS)


def _missed(tables: EstimateTables, settings: Settings, since: float) -> Iterator[Finding]:
    for score in tables.scores_since(since):
        expected, actual = score.estimate.seconds, score.actual_seconds
        if expected is None or not _is_beyond(actual, expected, settings.alert_estimate_factor):
            continue
        yield Finding(
            check=f"estimate:{score.batch_id}",
            since=score.scored_at,
            kind=AlertKind.ESTIMATE_MISSED,
            level=Level.DEGRADED,
            title=f"The estimate of {score.batch_id} was badly missed",
            reason=(
                f"it took {duration(actual)} of the engine's time; the estimate was"
                f" {seconds_band(expected)}"
            ),
            link=batch_link(settings, score.batch_id),
            next_command=f"{CLI} estimates",
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
                f"the estimate was {seconds_band(done)}; {duration(now - began)} have passed, and"
                f" {batch.pending:,} of {batch.total:,} requests are not committed"
            ),
            link=batch_link(settings, batch.batch_id),
            next_command=f"{CLI} watch {batch.batch_id}",
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
        reason="no request in it can be used; the file beside it lists every fault",
        link=sensor_link(settings, "inbox_sensor"),
        next_command=f"head -c 2000 {shlex.quote(str(path.with_name(name)))}",
    )
