"""Dispatch: which runs each unfinished batch needs next, decided from what is durable.

Dagster's runs come in as plain `KnownRun`s; nothing is remembered between two calls. A batch that
keeps failing is left alone until a person steps in.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from typing import NamedTuple

from batch_orchestration.core.lifecycle import EarlyEnd, Halt
from batch_orchestration.core.results import BatchRecord, ChunkReport
from batch_orchestration.queue.entries import NeedsAttention
from batch_orchestration.queue.halts import what_helps

#: Failed runs in a row, without a commit in between, after which a person is asked.
MAX_FAILURES = 3
#: Wait after the first failure, doubled by each further one, up to the longest.
BACKOFF_SECONDS = 30.0
LONGEST_BACKOFF_SECONDS = 900.0
#: After a run found its device unfit, whatever this process thinks of the device.
UNFIT_SECONDS = 30.0
#: Dagster creates runs one by one, and one over 50 partitions takes it a second.
MAX_NEW_RUNS = 4
#: Answering runs that wait for the engine, those of more urgent batches included, beyond which a
#: batch gets no further one: enough for the engine to go on until the next tick, and so few that
#: hardly any was asked for before what is urgent now.
MAX_QUEUED_RUNS = 2


class RunState(StrEnum):
    """What became of a run, as far as dispatch cares."""

    #: Queued, running, or about to be retried by Dagster itself.
    LIVE = "live"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    #: Ended by a person, or hopeless without one.
    STOPPED = "stopped"
    #: Ended before a person resumed the batch: no reason to wait.
    SUPERSEDED = "superseded"
    #: Ended well, without an engine: the device was not fit for one.
    UNFIT = "unfit"
    #: Ended well: the engine did not let us in, and nothing was recorded.
    REFUSED = "refused"


@dataclass(frozen=True, kw_only=True)
class KnownRun:
    """A run of a batch, as Dagster tells it.

    Attributes:
        chunks: Numbers of the chunks that it is about; None for a run that makes the output.
        ended_at: POSIX seconds; 0 while it is live.
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
        attempt: How many runs of this batch ended before.
        priority: Among the runs that wait for the engine; higher goes first.
    """

    batch: BatchRecord
    chunks: range | None
    attempt: int
    priority: int

    @property
    def key(self) -> str:
        """Unique for this attempt, so that it is started once however often it is asked for."""
        what = f"{self.chunks[0]:05d}-{self.chunks[-1]:05d}" if self.chunks else "output"
        return f"{self.batch.batch_id}/{what}#{self.attempt}"

    @property
    def title(self) -> str:
        """What it is, for people."""
        if not self.chunks:
            return f"{self.batch.batch_id}, output"
        return f"{self.batch.batch_id}, chunks {self.chunks[0]} to {self.chunks[-1]}"


@dataclass(frozen=True, kw_only=True)
class Dispatch:
    """What is needed next, and why the rest has to wait: one line per reason.

    Attributes:
        needs: The batches among those that wait which wait for a person.
    """

    needed: tuple[NeededRun, ...]
    waiting: tuple[str, ...]
    needs: tuple[NeedsAttention, ...] = ()


class _Wait(NamedTuple):
    """Why a run is not asked for now; `asks` is the run that asks a person, if one does."""

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
    closings: Mapping[str, EarlyEnd] | None = None,
    halts: Mapping[str, Halt] | None = None,
) -> Dispatch:
    """Decide which runs are needed, at most `MAX_NEW_RUNS` of them.

    Asking again before the runs show among `runs` gives the same runs with the same keys.

    Args:
        batches: The unfinished ones, in the order of service.
        runs: All runs of these batches that Dagster knows, in any order.
        reports: Looks up the committed chunks of a batch: `Store.chunk_reports`.
        chunks_per_run: Upper bound of the chunks in a run.
        most_requests: Of one batch, open at a time: those of its first unfinished chunks.
        now: POSIX seconds.
        priorities: Of the runs, by batch id; without it that of the batch.
        no_engine: Why no engine can be started now: then only outputs are made.
        refused_run: The run that the engine did not let in, if that is why: a person is asked.
        closings: Of the batches that end early: they are delivered once no run is at work on them.
        halts: Of the batches that are paused: these get no engine until a person has decided.

    Raises:
        StorageError: The store cannot be read.
    """
    needed: list[NeededRun] = []
    waiting: list[str] = []
    needs: dict[str, NeedsAttention] = {}
    queued = 0
    for batch, known in _with_runs(batches, runs):
        priority = (priorities or {}).get(batch.batch_id, batch.options.priority)
        if closing := (closings or {}).get(batch.batch_id):
            last = _last_run(batch, known, closing, priority=priority, now=now)
            if isinstance(last, NeededRun):
                needed.append(last)
            else:
                _wait_whole(batch.batch_id, last, waiting, needs)
            continue
        committed = reports(batch.batch_id)
        last_commit_at = max((report.committed_at for report in committed.values()), default=0.0)
        if len(committed) < batch.chunks and (halt := (halts or {}).get(batch.batch_id)):
            _wait_whole(batch.batch_id, _paused(batch.batch_id, halt), waiting, needs)
            continue
        queued += sum(run.queued and run.chunks is not None for run in known)
        for run in _remaining(batch, committed, known, chunks_per_run, most_requests, priority):
            wait = _reason_to_wait(run, known, last_commit_at=last_commit_at, now=now)
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
    """Yield each batch with those of the runs that are about it."""
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
    """Say once of a whole batch why it gets no run."""
    waiting.append(f"{batch_id}: {wait.reason}")
    _take_note(needs, batch_id, wait)


def _take_note(needs: dict[str, NeedsAttention], batch_id: str, wait: _Wait | None) -> None:
    """Add the batch to those that wait for a person, if it does; the first reason is told."""
    if wait is not None and wait.asks is not None:
        needs.setdefault(
            batch_id, NeedsAttention(batch_id=batch_id, run_id=wait.asks, reason=wait.reason)
        )


def backoff_left(failures: int, ended_at: float, *, now: float) -> float:
    """Return seconds until what failed so often in a row may be tried again; negative if it may."""
    delay = min(LONGEST_BACKOFF_SECONDS, BACKOFF_SECONDS * 2.0 ** min(failures - 1, 20))
    # What has ended in the future, ended by a clock that was ahead.
    return min(ended_at, now) + delay - now


def _open_chunks(
    batch: BatchRecord, committed: Collection[int], most_requests: int
) -> Sequence[int]:
    """Return the unfinished chunks that may be answered now, in file order; at least one.

    They are those of a window, which moves on once all of it is committed: so whoever is more
    urgent by then goes first, and no run is about a chunk or two.
    """
    missing = sorted(set(range(batch.chunks)).difference(committed))
    width = max(1, most_requests // batch.requests_per_chunk)
    return [number for number in missing if number // width == missing[0] // width]


def _remaining(
    batch: BatchRecord,
    committed: Collection[int],
    known: Sequence[KnownRun],
    chunks_per_run: int,
    most_requests: int,
    priority: int,
) -> Iterator[NeededRun]:
    """Yield what no live run is about: runs over open chunks, or the one for the output."""
    live = [run for run in known if run.state is RunState.LIVE]
    attempt = len(known) - len(live)
    open_chunks = _open_chunks(batch, committed, most_requests)
    if not open_chunks and all(run.chunks is not None for run in live):
        yield NeededRun(batch=batch, chunks=None, attempt=attempt, priority=priority)
    left = [n for n in open_chunks if all(n not in (run.chunks or ()) for run in live)]
    for chunks in _consecutive(left, chunks_per_run):
        yield NeededRun(batch=batch, chunks=chunks, attempt=attempt, priority=priority)


def _last_run(
    batch: BatchRecord, known: Sequence[KnownRun], closing: EarlyEnd, *, priority: int, now: float
) -> NeededRun | _Wait:
    """Return the run that delivers a batch which ends early, or why not now."""
    live = [run for run in known if run.state is RunState.LIVE]
    attempt = len(known) - len(live)
    needed = NeededRun(batch=batch, chunks=None, attempt=attempt, priority=priority)
    if live:
        return _Wait(f"{closing}; run {live[0].run_id[:8]} is about to end")
    wait = _reason_to_wait(needed, known, last_commit_at=0.0, now=now)
    return needed if wait is None else wait


def _consecutive(numbers: Sequence[int], longest: int) -> Iterator[range]:
    """Cut ascending numbers into ranges without gaps, none across a multiple of `longest`.

    The fixed grid keeps a later attempt on the range of the first one.
    """
    for _, places in groupby(enumerate(numbers), key=lambda p: (p[1] - p[0], p[1] // longest)):
        members = [number for _, number in places]
        yield range(members[0], members[-1] + 1)


def _reason_to_wait(
    needed: NeededRun, known: Sequence[KnownRun], *, last_commit_at: float, now: float
) -> _Wait | None:
    before = sorted(
        (run for run in known if run.state is not RunState.LIVE and _same_work(run, needed)),
        key=lambda run: run.ended_at,
    )
    if needed.chunks is None:
        # Earlier there was nothing to deliver: such a run was to write partial files.
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
