"""Dispatch: which runs each unfinished batch needs next, decided from durable state.

Dagster's runs are passed in as plain `KnownRun`s; no state is kept between calls. A batch that
keeps failing gets no further run until a person steps in.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from batch_orchestration.core.lifecycle import EarlyEnd, Halt
from batch_orchestration.core.results import BatchRecord, ChunkReport
from batch_orchestration.dispatch.batch_window import chunks_by_window, consecutive
from batch_orchestration.queue.entries import NeedsAttention
from batch_orchestration.queue.halts import what_helps

#: Failed runs in a row, without a commit in between, after which a batch needs attention.
MAX_FAILURES = 3
#: Wait after the first failure; each further failure doubles it, up to the longest.
BACKOFF_SECONDS = 30.0
LONGEST_BACKOFF_SECONDS = 900.0
#: Wait after a run found its device unfit, even if this process finds the device fit.
UNFIT_SECONDS = 30.0
#: Dagster creates runs one by one; a run over 50 partitions takes a second.
MAX_NEW_RUNS = 4
#: A batch gets no further answering run while this many, including those of more urgent batches,
#: wait for the engine: enough to keep the engine busy until the next tick, but few enough that a
#: batch that becomes urgent hardly waits behind earlier runs.
MAX_QUEUED_RUNS = 2


class RunState(StrEnum):
    """The state of a run, as far as it matters to dispatch."""

    #: Queued, running, or about to be retried by Dagster itself.
    LIVE = "live"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    #: Ended by a person, or unable to succeed without one.
    STOPPED = "stopped"
    #: Ended before a person resumed the batch: no reason to wait.
    SUPERSEDED = "superseded"
    #: Ended well, without an engine: the device was unfit.
    UNFIT = "unfit"
    #: Ended well: the engine refused access, and nothing was recorded.
    REFUSED = "refused"


@dataclass(frozen=True, kw_only=True)
class KnownRun:
    """A run of a batch, as reported by Dagster.

    Attributes:
        chunks: Numbers of its chunks; None for a run that makes the output.
        ended_at: 0 while it is live.
        reason: Why it was stopped.
        queued: Whether it is live, but has not begun.
        terminated: Whether a person stopped it.
    """

    run_id: str
    batch_id: str
    chunks: range | None
    state: RunState
    ended_at: float = 0.0
    reason: str = ""
    queued: bool = False
    terminated: bool = False


@dataclass(frozen=True, kw_only=True)
class NeededRun:
    """A run that a batch needs.

    Attributes:
        chunks: Consecutive chunks to answer; None for the run that makes the output.
        attempt: Number of runs of this batch that ended before.
        priority: Among the runs that wait for the engine; higher goes first.
    """

    batch: BatchRecord
    chunks: range | None
    attempt: int
    priority: int

    @property
    def key(self) -> str:
        """Unique for this attempt, so that repeated requests start only one run."""
        what = f"{self.chunks[0]:05d}-{self.chunks[-1]:05d}" if self.chunks else "output"
        return f"{self.batch.batch_id}/{what}#{self.attempt}"

    @property
    def title(self) -> str:
        """Description of the run, for people."""
        if not self.chunks:
            return f"{self.batch.batch_id}, output"
        return f"{self.batch.batch_id}, chunks {self.chunks[0]} to {self.chunks[-1]}"


@dataclass(frozen=True, kw_only=True)
class Dispatch:
    """The runs needed next, and why the others wait: one line per reason.

    Attributes:
        needs: The waiting batches that need attention.
    """

    needed: tuple[NeededRun, ...]
    waiting: tuple[str, ...]
    needs: tuple[NeedsAttention, ...] = ()


class _Wait(NamedTuple):
    """Why a run is not started now; `asks` is the run that a person must look at, if any."""

    reason: str
    asks: str | None = None


def dispatch(
    batches: Iterable[BatchRecord],
    runs: Iterable[KnownRun],
    *,
    reports: Callable[[str], Mapping[int, ChunkReport]],
    chunks_per_run: int,
    most_requests: int,
    now: float,
    priorities: Mapping[str, int] | None = None,
    no_engine: str | None = None,
    refused_run: str | None = None,
    early_ends: Mapping[str, EarlyEnd] | None = None,
    halts: Mapping[str, Halt] | None = None,
) -> Dispatch:
    """Decide which runs are needed, at most `MAX_NEW_RUNS` of them.

    Repeated calls return the same runs with the same keys until these appear among `runs`.

    Args:
        batches: Unfinished batches, in the order of service.
        runs: All runs of these batches in Dagster, in any order.
        reports: Looks up the committed chunks of a batch: `Store.chunk_reports`.
        chunks_per_run: Upper bound of the chunks in a run.
        most_requests: Open requests per batch at a time, from its first unfinished chunks.
        priorities: Of the runs, by batch id; by default the priority of the batch.
        no_engine: Why no engine can be started now; only outputs are made then.
        refused_run: The run to which the engine refused access, if that is the reason of
            `no_engine`; the batches then need attention.
        early_ends: Early ends of batches, which are delivered once no run works on them.
        halts: Of paused batches, which get no engine until a person has decided.

    Raises:
        StorageError: The store cannot be read.
    """
    needed: list[NeededRun] = []
    waiting: list[str] = []
    needs: dict[str, NeedsAttention] = {}
    queued = 0
    for batch, known in _with_runs(batches, runs):
        priority = (priorities or {}).get(batch.batch_id, batch.options.priority)
        if early_end := (early_ends or {}).get(batch.batch_id):
            last = _last_run(batch, known, early_end, priority=priority, now=now)
            if isinstance(last, NeededRun):
                needed.append(last)
            else:
                _wait_whole(batch.batch_id, last, waiting, needs)
            continue
        committed = reports(batch.batch_id)
        if len(committed) < batch.chunks and (halt := (halts or {}).get(batch.batch_id)):
            _wait_whole(batch.batch_id, _paused(batch.batch_id, halt), waiting, needs)
            continue
        queued += sum(run.queued and run.chunks is not None for run in known)
        windows = chunks_by_window(
            batch, committed, most_requests=most_requests, chunks_per_run=chunks_per_run
        )
        for run, wait in _remaining(batch, windows, committed, known, priority, now):
            _take_note(needs, batch.batch_id, wait)
            if run.chunks is not None and no_engine is not None:
                wait = _Wait(no_engine, asks=refused_run)
                _take_note(needs, batch.batch_id, wait)
            if wait is not None:
                waiting.append(f"{run.title}: {wait.reason}")
            elif run.chunks is None:
                needed.append(run)
            elif queued < MAX_QUEUED_RUNS:
                queued += 1
                needed.append(run)
    return Dispatch(
        needed=tuple(needed[:MAX_NEW_RUNS]), waiting=tuple(waiting), needs=tuple(needs.values())
    )


def _with_runs(
    batches: Iterable[BatchRecord], runs: Iterable[KnownRun]
) -> Iterator[tuple[BatchRecord, list[KnownRun]]]:
    """Yield each batch with its runs."""
    found: dict[str, list[KnownRun]] = {}
    for run in runs:
        found.setdefault(run.batch_id, []).append(run)
    for batch in batches:
        yield batch, found.get(batch.batch_id, [])


def _paused(batch_id: str, halt: Halt) -> _Wait:
    return _Wait(f"{halt}. To go on: {what_helps(batch_id)}", asks=halt.actor)


def _wait_whole(
    batch_id: str, wait: _Wait, waiting: list[str], needs: dict[str, NeedsAttention]
) -> None:
    """Record once, for the whole batch, why it gets no run."""
    waiting.append(f"{batch_id}: {wait.reason}")
    _take_note(needs, batch_id, wait)


def _take_note(needs: dict[str, NeedsAttention], batch_id: str, wait: _Wait | None) -> None:
    """Add the batch to those that need attention, if it does; the first reason is kept."""
    if wait is not None and wait.asks is not None:
        needs.setdefault(
            batch_id, NeedsAttention(batch_id=batch_id, run_id=wait.asks, reason=wait.reason)
        )


def backoff_left(failures: int, ended_at: float, *, now: float) -> float:
    """Return the seconds until a retry after failures in a row; negative if the wait is over."""
    delay = min(LONGEST_BACKOFF_SECONDS, BACKOFF_SECONDS * 2.0 ** min(failures - 1, 20))
    # An end in the future was recorded by a clock that was ahead.
    return min(ended_at, now) + delay - now


def _remaining(
    batch: BatchRecord,
    windows: Iterable[Sequence[range]],
    committed: Mapping[int, ChunkReport],
    known: Sequence[KnownRun],
    priority: int,
    now: float,
) -> Iterator[tuple[NeededRun, _Wait | None]]:
    """Yield the runs that no live run covers, each with the reason why it is not started now.

    They are those of the first window that goes on by itself. A window of which all the rest waits
    for a person does not hold back the windows after it.
    """
    live = [run for run in known if run.state is RunState.LIVE]
    attempt = len(known) - len(live)
    last_commit_at = max((report.committed_at for report in committed.values()), default=0.0)

    def needed(chunks: range | None) -> tuple[NeededRun, _Wait | None]:
        run = NeededRun(batch=batch, chunks=chunks, attempt=attempt, priority=priority)
        return run, _reason_to_wait(run, known, last_commit_at=last_commit_at, now=now)

    done = True
    for window in windows:
        done = False
        left = [chunks for run in window for chunks in _without(run, live)]
        runs = [needed(chunks) for chunks in left]
        yield from runs
        is_at_work = left != list(window)
        if is_at_work or any(wait is None or wait.asks is None for _, wait in runs):
            return
    if done and all(run.chunks is not None for run in live):
        yield needed(None)


def _without(chunks: range, live: Iterable[KnownRun]) -> Iterator[range]:
    """Yield the parts of a range that no live run covers."""
    covered = {number for run in live for number in run.chunks or ()}
    yield from consecutive([n for n in chunks if n not in covered], chunks.stop)


def _last_run(
    batch: BatchRecord, known: Sequence[KnownRun], early_end: EarlyEnd, *, priority: int, now: float
) -> NeededRun | _Wait:
    """Return the run that delivers a batch after its early end, or why it must wait."""
    live = [run for run in known if run.state is RunState.LIVE]
    attempt = len(known) - len(live)
    needed = NeededRun(batch=batch, chunks=None, attempt=attempt, priority=priority)
    if live:
        return _Wait(f"{early_end}; run {live[0].run_id[:8]} is about to end")
    wait = _reason_to_wait(needed, known, last_commit_at=0.0, now=now)
    return needed if wait is None else wait


def _reason_to_wait(
    needed: NeededRun, known: Sequence[KnownRun], *, last_commit_at: float, now: float
) -> _Wait | None:
    before = sorted(
        (run for run in known if run.state is not RunState.LIVE and _same_work(run, needed)),
        key=lambda run: run.ended_at,
    )
    if needed.chunks is None:
        # Before the last commit there was nothing to deliver: such a run wrote partial files.
        before = [run for run in before if run.ended_at > last_commit_at]
    if not before:
        return None
    latest = before[-1]
    if latest.state is RunState.STOPPED:
        return _Wait(
            f"waits for a person: run {latest.run_id[:8]} {latest.reason}. {_way_on(needed)}",
            asks=latest.run_id,
        )
    if latest.state is RunState.UNFIT and (wait := latest.ended_at + UNFIT_SECONDS - now) > 0:
        return _Wait(
            f"run {latest.run_id[:8]} found its device unfit; it is tried again in {wait:.0f} s"
        )
    failures = [
        run for run in before if run.state is RunState.FAILED and run.ended_at > last_commit_at
    ]
    if len(failures) >= MAX_FAILURES:
        return _Wait(
            f"waits for a person: {len(failures)} runs failed in a row, the latest is"
            f" {latest.run_id[:8]}. Mend the cause that its page shows. {_way_on(needed)}",
            asks=latest.run_id,
        )
    if failures:
        wait = backoff_left(len(failures), latest.ended_at, now=now)
        if wait > 0:
            return _Wait(f"run {latest.run_id[:8]} failed; next attempt in {wait:.0f} s")
    return None


def _same_work(run: KnownRun, needed: NeededRun) -> bool:
    if run.chunks is None or needed.chunks is None:
        return run.chunks is None and needed.chunks is None
    return run.chunks.start < needed.chunks.stop and needed.chunks.start < run.chunks.stop


def _way_on(needed: NeededRun) -> str:
    if needed.chunks is None:
        return f"To go on, materialize partition {needed.batch.batch_id} of batch_output"
    return "To go on, re-execute that run or materialize the missing partitions of chunk_results"
