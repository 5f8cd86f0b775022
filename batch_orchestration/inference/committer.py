"""Commits complete chunks beside the feed, which never waits for a commit."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from batch_orchestration.core.crash_points import CrashPoint, crash_point
from batch_orchestration.core.errors import Shortage, StoreLocked
from batch_orchestration.core.fault_isolation import concerns_everyone
from batch_orchestration.core.results import ChunkReport
from batch_orchestration.files.journal import JournalEntry, read_journal
from batch_orchestration.files.kept_input import ChunkRef, busy_seconds, settled_requests
from batch_orchestration.store.store import Store
from batch_orchestration.workers.run_status import RunStatus

logger = logging.getLogger(__name__)

#: A commit takes a tenth of a second; a longer one waits for a lock and may be abandoned.
STOP_SECONDS = 10.0
#: Between two attempts, while the store is locked or the disk is full.
RETRY_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Committed:
    """A chunk in the store; `reused` if it was there before this run asked."""

    report: ChunkReport
    reused: bool


#: The result of each chunk, in the order of commit, or an exception that ends the work; then None.
Results = queue.SimpleQueue[Committed | BaseException | None]


class Committer:
    """A thread that takes complete chunks in order and commits each in one transaction.

    A locked store or a full disk delays the commits, with a warning in the log, for as long as it
    lasts: the journals are safe, and the feed goes on.

    Args:
        known: Called from this thread with the chunks that the store held when the work began.
        results: Queue for the result of each chunk; several committers can share it.
        is_guest: Log errors instead of reporting them, and leave the batch to its own run.
        status: Each attempt that finds the store locked or the disk full is noted there.
    """

    def __init__(
        self,
        store: Store,
        *,
        batch_id: str,
        run_id: str,
        known: Callable[[Iterable[ChunkReport]], None],
        results: Results | None = None,
        is_guest: bool = False,
        status: RunStatus,
    ) -> None:
        self._status = status
        self._store = store
        self._batch_id = batch_id
        self._run_id = run_id
        self._note_known = known
        self._waiting: queue.SimpleQueue[tuple[ChunkRef, str | None] | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._known: dict[int, ChunkReport] = {}
        self._is_guest = is_guest
        #: Whether the work ended by an error that was only logged.
        self.gave_up = False
        self.results: Results = queue.SimpleQueue() if results is None else results
        self._thread = threading.Thread(target=self._run, name="committer", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def add(self, ref: ChunkRef, *, memory_level: str | None = None) -> None:
        """Queue a chunk whose journal is complete and closed."""
        self._waiting.put((ref, memory_level))

    def finish(self) -> None:
        """Signal that nothing more will be added."""
        self._waiting.put(None)

    def stop(self) -> None:
        """Drop the queue (its journals stay) and wait a while for the commit in progress."""
        self._stopping.set()
        self._waiting.put(None)
        if self._thread.ident is not None:
            self._thread.join(STOP_SECONDS)

    @property
    def backlog(self) -> int:
        """Complete chunks that wait for their commit."""
        return self._waiting.qsize()

    def _run(self) -> None:
        try:
            self._when_possible(self._learn_known)
            self._commit_all()
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
            if self._is_guest:
                self.gave_up = True
                logger.warning("batch %s is left to its own run: %s", self._batch_id, error)
            else:
                self.results.put(error)
        finally:
            self.results.put(None)

    def _commit_all(self) -> None:
        """Commit chunk after chunk; the error of a single chunk is raised after the others."""
        first: Exception | None = None
        while (chunk := self._waiting.get()) is not None and not self._stopping.is_set():
            try:
                self._when_possible(partial(self._commit, *chunk))
            except Exception as error:
                if concerns_everyone(error):
                    raise
                logger.warning("%s cannot be committed: %s", chunk[0].key, error)
                first = first or error
        if first is not None:
            raise first

    def _when_possible(self, step: Callable[[], None]) -> None:
        while not self._stopping.is_set():
            try:
                step()
            except (StoreLocked, Shortage) as transient:
                logger.warning(
                    "commits of batch %s wait (%d complete chunks); the answers are in the"
                    " journals and requests are still sent: %s",
                    self._batch_id,
                    self.backlog,
                    transient,
                )
                self._status.note_progress()
                self._stopping.wait(RETRY_SECONDS)
            else:
                return

    def _learn_known(self) -> None:
        self._known = self._store.chunk_reports(self._batch_id)
        self._note_known(self._known.values())

    def _commit(self, ref: ChunkRef, memory_level: str | None) -> None:
        if (report := self._known.get(ref.chunk.number)) is not None:
            self.results.put(Committed(report=report, reused=True))
            return
        entries = {entry.index: entry for entry in read_journal(ref.journal_path)}
        if self._others_answered(entries.values()) and self._committed_meanwhile(ref):
            return
        crash_point(CrashPoint.BEFORE_COMMIT)
        report = self._store.commit_chunk(
            self._batch_id,
            ref.chunk.number,
            settled_requests(ref, entries),
            run_id=self._run_id,
            at=time.time(),
            seconds=busy_seconds(entries.values()),
            memory_level=memory_level,
        )
        crash_point(CrashPoint.AFTER_COMMIT)
        self._known[ref.chunk.number] = report
        logger.info(
            "committed %s: %d answered, %d failed, %d attempts in %.1f s",
            ref.key,
            report.completed,
            report.failed,
            report.attempts,
            report.seconds,
        )
        self.results.put(Committed(report=report, reused=False))

    def _others_answered(self, entries: Iterable[JournalEntry]) -> bool:
        return all(entry.provenance.run_id != self._run_id for entry in entries)

    def _committed_meanwhile(self, ref: ChunkRef) -> bool:
        """Whether another run has committed the chunk since; if so, hand out its report."""
        self._known |= self._store.chunk_reports(self._batch_id)
        if (report := self._known.get(ref.chunk.number)) is None:
            return False
        self.results.put(Committed(report=report, reused=True))
        return True
