"""Chooses the batch that a run feeds next: its own, or one that is before it in the queue.

A run that holds the engine also serves co-scheduled batches, its guests: those that are before its
own in the order of service and need exactly the same engine. A guest with more whole points of
priority overtakes at the next request; a guest that is first only by fair share or deadline
overtakes at the next chunk. The run reads the order from `queue.json` alone, never from the store.

If a batch before its own needs another engine, the run makes room: it begins no further chunk,
finishes begun ones, and leaves the rest to a later run. It does the same while the queue is paused.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator

from batch_orchestration.core.errors import StorageError
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.inference.batch_work import BatchWork
from batch_orchestration.inference.chunk_pass import PendingRequest, TransientError
from batch_orchestration.queue.entries import EntryKind, EntryState, QueueEntry, QueueView
from batch_orchestration.queue.files import read_queue
from batch_orchestration.queue.ordering import whole_points
from batch_orchestration.store.operations import replay_asked_since

logger = logging.getLogger(__name__)

#: Between checks of the queue.
LOOK_SECONDS = 1.0
#: The same for replays, which are spread over many folders.
REPLAY_LOOK_SECONDS = 5.0
#: An older queue file is no longer being updated; its order may be obsolete.
STALE_SECONDS = 60.0
#: A replay requested this shortly before the run began may have come too late to be chosen.
REPLAY_MARGIN_SECONDS = 30.0


class Turns:
    """Draws requests of the run's own batch, and of guests when it is their turn.

    Args:
        own: The run's own batch.
        settings_hash: Hash of the settings in force; guests must be planned with the same.
        most_guest_chunks: After this many the run makes room for others, its own batch included.
        invite: Attaches a guest.
        cramped: Whether the engine's context was cut so far that a guest's requests may not fit.
    """

    def __init__(
        self,
        own: BatchWork,
        *,
        folder: DataFolder,
        settings_hash: str,
        most_guest_chunks: int,
        invite: Callable[[str], BatchWork],
        cramped: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._own = own
        self._folder = folder
        self._settings_hash = settings_hash
        self._most_guest_chunks = most_guest_chunks
        self._invite = invite
        self._cramped = cramped
        self._clock = clock
        self._began_at = clock()
        self._looked_at = 0.0
        self._queue_changed_at = 0
        self._sought_replays_at = 0.0
        self._a_replay_waits = False
        self._view: QueueView | None = None
        #: Before our own batch when the run began; Dagster chose this run nevertheless.
        self._were_before: frozenset[str] | None = None
        #: The entries before our own batch that this engine can serve, in the order of service.
        self._before: list[QueueEntry] = []
        #: Latest known points of every batch that was ever in the queue.
        self._points_by_batch: dict[str | None, int] = {}
        self._current = own
        self.guests: dict[str, BatchWork] = {}
        self._unwelcome: set[str] = set()
        #: Why no further chunk is begun; None if one may be.
        self.held: str | None = None

    def pending(self) -> Iterator[PendingRequest | TransientError]:
        """Yield requests, each of the batch whose turn it is, until our own batch has nothing left.

        Raises:
            PlanMismatch: The kept input of our own batch is not the one that was admitted.
            StorageError: A journal of our own batch is unusable.
        """
        while (work := self._next()) is not None:
            self._current = work
            if (drawn := self._draw(work)) is not None:
                yield drawn

    def _draw(self, work: BatchWork) -> PendingRequest | TransientError | None:
        try:
            return work.draw()
        except Exception as error:  # a guest's errors are left to the guest's own run
            if work is self._own:
                raise
            self._dismiss(work.plan.batch_id, error)
            return None

    def _next(self) -> BatchWork | None:
        self.look()
        begun = [work for work in (self._own, *self.guests.values()) if work.mid_chunk]
        if self.held is not None or not self._own.can_draw:
            return self._first(begun)
        best = next(self._ready_guests(), self._own)
        if best is self._own and not best.mid_chunk and begun:
            # A chunk begun for a guest is finished first.
            return self._first(begun)
        current = self._current
        if current.mid_chunk and self._points(best) <= self._points(current):
            return current
        return best

    def _first(self, works: list[BatchWork]) -> BatchWork | None:
        return self._current if self._current in works else next(iter(works), None)

    def _points(self, work: BatchWork) -> float:
        return self._points_by_batch.get(work.plan.batch_id, float("-inf"))

    def _ready_guests(self) -> Iterator[BatchWork]:
        """Yield the guests that have something to draw now, in the order of service."""
        for entry in self._before:
            work = self._guest(entry.batch_id or "")
            if work is not None and work.can_draw:
                yield work

    def _guest(self, batch_id: str) -> BatchWork | None:
        if batch_id in self._unwelcome:
            return None
        if batch_id not in self.guests:
            try:
                self.guests[batch_id] = self._invite(batch_id)
            except Exception as error:  # noqa: BLE001 - see `_draw`
                self._dismiss(batch_id, error)
                return None
            logger.info(
                "%s goes before %s in the queue and is served by this run, too",
                batch_id,
                self._own.plan.batch_id,
            )
        return self.guests[batch_id]

    def _dismiss(self, batch_id: str, error: Exception) -> None:
        logger.warning("%s is left to its own run: %s", batch_id, error)
        self._unwelcome.add(batch_id)
        if batch_id in self.guests:
            self.guests[batch_id].leave()

    # --- looking ----------------------------------------------------------------------------------

    def look(self) -> None:
        """Take in changes, at most once per `LOOK_SECONDS`; called also while nothing is drawn."""
        now = self._clock()
        if 0 <= now - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at = now
        self._read_queue()
        fresh = self._view is not None and now - self._view.at <= STALE_SECONDS
        self._take_order(self._view.entries if fresh and self._view is not None else ())
        self._release_guests()
        reason = self._reason_to_hold()
        if reason is not None and self.held is None:
            logger.info("%s begins no further chunk: %s", self._own.plan.batch_id, reason)
        self.held = reason

    def _read_queue(self) -> None:
        try:
            changed_at = self._folder.queue.stat().st_mtime_ns
            if changed_at != self._queue_changed_at:
                self._view = read_queue(self._folder)
                self._queue_changed_at = changed_at
        except (OSError, StorageError) as error:
            # Without the queue file the run goes on as if it were alone.
            logger.debug("no queue: %s", error)
            self._view = None

    def _take_order(self, entries: tuple[QueueEntry, ...]) -> None:
        ids = [entry.batch_id for entry in entries]
        self._before = []
        if self._own.plan.batch_id not in ids:
            return
        place = ids.index(self._own.plan.batch_id)
        self._points_by_batch |= {
            entry.batch_id: whole_points(entry.effective_priority) for entry in entries
        }
        self._before = [entry for entry in entries[:place] if _wants_engine(entry)]
        if self._were_before is None:
            self._were_before = frozenset(entry.id for entry in self._before)

    def _release_guests(self) -> None:
        """Stop serving guests that end early, or whose answers cannot be committed."""
        for batch_id, work in self.guests.items():
            if batch_id in self._unwelcome:
                continue
            try:
                over = work.ends_early() or work.committer.gave_up
            except Exception as error:  # noqa: BLE001 - see `_draw`
                self._dismiss(batch_id, error)
                continue
            if over:
                logger.info("%s is served no more", batch_id)
                self._unwelcome.add(batch_id)
                work.leave()

    def _reason_to_hold(self) -> str | None:
        if self._folder.paused.exists():
            return "the queue is paused"
        if sum(work.chunks_drawn for work in self.guests.values()) >= self._most_guest_chunks:
            return f"it has served {self._most_guest_chunks} chunks of other batches, the limit"
        other = next((entry for entry in self._before if not self._can_serve(entry)), None)
        self._before = [entry for entry in self._before if self._can_serve(entry)]
        if other is not None and self._is_news(other):
            return f"{other.id} is more urgent and needs another engine"
        if self._replay_waits():
            return "a replay waits for the engine"
        return None

    def _can_serve(self, entry: QueueEntry) -> bool:
        return entry.settings_hash == self._settings_hash and not self._cramped()

    def _is_news(self, entry: QueueEntry) -> bool:
        """Whether to give the engine up for this entry.

        That is so only for a batch that overtook this one after the run began, and only for higher
        priority. A batch that was first before could not run when this run was chosen, and may not
        be able to run now. Fair share is not worth a restart of the engine each time.
        """
        more = self._points_by_batch[entry.batch_id] > self._points(self._own)
        return more and entry.id not in (self._were_before or ())

    def _replay_waits(self) -> bool:
        """Whether a replay was requested since the run began: an older one could not run then."""
        now = self._clock()
        if not 0 <= now - self._sought_replays_at < REPLAY_LOOK_SECONDS:
            self._sought_replays_at = now
            since = self._began_at - REPLAY_MARGIN_SECONDS
            with contextlib.suppress(StorageError):  # keeps the latest result
                self._a_replay_waits = replay_asked_since(self._folder, since)
        return self._a_replay_waits


def _wants_engine(entry: QueueEntry) -> bool:
    return (
        entry.kind is EntryKind.BATCH
        and entry.batch_id is not None
        and entry.state in (EntryState.ADMITTED, EntryState.RUNNING)
        and entry.reason is None
    )
