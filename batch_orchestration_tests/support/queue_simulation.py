"""The queue on a fake clock: the real rules of order, capacity and rates over an imagined engine.

The engine answers chunk by chunk, each at the same rate; before each chunk the order is computed
again. Admission is decided whenever a job arrived or ended, and every few chunks.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from batch_orchestration.queue.capacity import Load
from batch_orchestration.queue.decision import decide
from batch_orchestration.queue.demand import Limits
from batch_orchestration.queue.entries import EntryKind, EntryState, QueueEntry, WaitReason
from batch_orchestration.queue.ordering import effective_priority, order, whole_points
from batch_orchestration.queue.rate_limits import SourceRates

START = 1_760_000_000.0
CHUNK = 1000
REQUESTS_PER_SECOND = 100.0
TOKENS_PER_REQUEST = 500
QUANTUM = CHUNK / REQUESTS_PER_SECOND
SHARE_SECONDS = 3600.0
AGEING_SECONDS = 60.0

#: Given jobs, the time and the tokens of each source: the jobs, the next one first.
Ordering = Callable[[Sequence[QueueEntry], float, Mapping[str, float]], list[QueueEntry]]


def make_job(
    name: str, *, source: str, requests: int, deadline: float, priority: int = 0, at: float = START
) -> QueueEntry:
    """A file that has just arrived."""
    job = QueueEntry(
        kind=EntryKind.FILE, id=name, source=source, priority=priority, arrived_at=at,
        deadline=deadline, state=EntryState.WAITING, requests=requests,
    )  # fmt: skip
    return with_pending(job, requests)


def with_pending(job: QueueEntry, requests: int, **fields: EntryState) -> QueueEntry:
    """The job when so many of its requests are left."""
    return msgspec.structs.replace(
        job,
        pending=requests,
        tokens=requests * TOKENS_PER_REQUEST,
        engine_seconds=requests / REQUESTS_PER_SECOND,
        **fields,
    )


def starvation_bound(priority: int, others: int, *, ageing_seconds: float) -> float:
    """The seconds after which no newcomer of priority `others` goes before `priority`."""
    return max(0.0, others - priority + 1) * ageing_seconds


@dataclass(frozen=True, kw_only=True)
class Quantum:
    """One chunk: the job that was served, and the admitted ones that waited."""

    at: float
    served: QueueEntry
    waiting: tuple[QueueEntry, ...]


@dataclass(kw_only=True)
class History:
    """Every quantum, every admission with the jobs passed over, every load."""

    quanta: list[Quantum] = field(default_factory=list)
    admitted: list[tuple[float, QueueEntry, tuple[QueueEntry, ...]]] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    ended: dict[str, float] = field(default_factory=dict)


def by_the_rules(
    jobs: Sequence[QueueEntry], now: float, served: Mapping[str, float]
) -> list[QueueEntry]:
    """The order of service as it is."""
    ordered = order(
        jobs, now=now, ageing_seconds=AGEING_SECONDS, quantum_seconds=QUANTUM, served=served
    )
    assert all(f"priority {entry.priority} and" in entry.detail for entry in ordered)
    by_id = {job.id: job for job in jobs}
    return [by_id[entry.id] for entry in ordered]


def first_in_first_out(
    jobs: Sequence[QueueEntry], now: float, served: Mapping[str, float]
) -> list[QueueEntry]:
    """A negative control."""
    return sorted(jobs, key=lambda job: (job.arrived_at, job.id))


def priority_without_ageing(
    jobs: Sequence[QueueEntry], now: float, served: Mapping[str, float]
) -> list[QueueEntry]:
    """A negative control."""
    return sorted(jobs, key=lambda job: (-job.priority, job.arrived_at, job.id))


def fair_share_alone(
    jobs: Sequence[QueueEntry], now: float, served: Mapping[str, float]
) -> list[QueueEntry]:
    """A negative control: right about priorities, blind to deadlines."""
    by_id = {job.id: job for job in jobs}
    blind = [msgspec.structs.replace(job, deadline=None) for job in jobs]
    return [by_id[job.id] for job in by_the_rules(blind, now, served)]


def random_jobs(seed: int, count: int = 200) -> list[QueueEntry]:
    """Files of all kinds, more than the engine can keep up with for a while."""
    chance = random.Random(seed)
    jobs = []
    at = START
    for number in range(count):
        at += chance.expovariate(1 / 25.0)
        requests = chance.choice([5, 200, 900, 1000, 3000, 8000, 20_000])
        job = make_job(
            f"job-{number:03d}",
            source=chance.choice("aaabbcd"),
            priority=chance.choice([-10, 0, 0, 0, 1, 1, 10]),
            at=at,
            requests=requests,
            deadline=at + chance.choice([60, 600, 3600, 86_400]) + 2 * requests / 100,
        )
        jobs.append(job)
    return jobs


def crowd(seed: int, count: int = 30) -> list[QueueEntry]:
    """Equals that come at once, with windows that leave the engine little time to spare."""
    chance = random.Random(seed)
    jobs, needed = [], 0.0
    for number in range(count):
        requests = chance.choice([500, 1000, 3000])
        needed += requests / REQUESTS_PER_SECOND
        name = f"job-{chance.randrange(10**6):06d}-{number}"
        source = chance.choice("aab")
        jobs.append(
            make_job(name, source=source, requests=requests, deadline=START + needed + 15.0)
        )
    return jobs


class Simulation:
    """One engine, one inbox, a clock."""

    def __init__(
        self,
        jobs: Iterable[QueueEntry],
        ordering: Ordering,
        *,
        limits: Limits,
        rates: SourceRates | None,
    ):
        self._coming = sorted(jobs, key=lambda job: (job.arrived_at, job.id))
        self._ordering = ordering
        self._limits = limits
        self._rates = rates or SourceRates()
        self._counts_rates = rates is not None
        self._inbox: dict[str, QueueEntry] = {}
        self._admitted: dict[str, QueueEntry] = {}
        self._served: list[tuple[float, str, int]] = []
        self._counted = (0, 0)
        self.clock = START
        self.history = History()

    def run(self) -> History:
        while self._coming or self._inbox or self._admitted:
            while self._coming and self._coming[0].arrived_at <= self.clock:
                job = self._coming.pop(0)
                self._inbox[job.id] = job
            self._admit()
            if self._admitted:
                self._serve()
            else:
                self.clock = self._next_change()
        return self.history

    def _order(self, jobs: Mapping[str, QueueEntry]) -> list[QueueEntry]:
        served: dict[str, float] = {}
        for at, source, tokens in self._served:
            if at >= self.clock - SHARE_SECONDS:
                served[source] = served.get(source, 0.0) + tokens
        return self._ordering(list(jobs.values()), self.clock, served)

    def _admit(self) -> None:
        unchanged = (len(self._inbox), len(self._admitted)) == self._counted
        if not self._inbox or (unchanged and self._admitted and len(self.history.quanta) % 5):
            return
        decided = decide(
            self._order({**self._admitted, **self._inbox}),
            load=self._load(),
            rates=self._rates,
            limits=self._limits,
            now=self.clock,
        )
        reasons = {entry.id: entry.reason for entry in decided}
        for entry in decided:
            if not entry.admissible:
                continue
            job = self._inbox.pop(entry.id)
            self._admitted[job.id] = with_pending(
                job, entry.pending or 0, state=EntryState.ADMITTED
            )
            if self._counts_rates:
                self._rates = self._rates.plus(job.source, job.requests or 0, now=self.clock)
            passed_over = tuple(
                other
                for other in self._inbox.values()
                if reasons[other.id] not in (None, WaitReason.SUBMISSION_RATE)
            )
            self.history.admitted.append((self.clock, job, passed_over))
        assert all(reasons[name] for name in self._inbox), "each file that waits has a reason"
        self.history.loads.append(self._load())
        self._counted = (len(self._inbox), len(self._admitted))

    def _load(self) -> Load:
        left = sum(job.pending or 0 for job in self._admitted.values())
        return Load(batches=len(self._admitted), requests=left, tokens=left * TOKENS_PER_REQUEST)

    def _serve(self) -> None:
        job, *waiting = self._order(self._admitted)
        self.history.quanta.append(Quantum(at=self.clock, served=job, waiting=tuple(waiting)))
        pending = job.pending or 0
        answered = min(CHUNK, pending)
        self.clock += answered / REQUESTS_PER_SECOND
        self._served.append((self.clock, job.source, answered * TOKENS_PER_REQUEST))
        if answered < pending:
            self._admitted[job.id] = with_pending(job, pending - answered)
        else:
            del self._admitted[job.id]
            self.history.ended[job.id] = self.clock

    def _next_change(self) -> float:
        moments = [self._coming[0].arrived_at] if self._coming else []
        moments += [
            self.clock + self._rates.retry_after(job.source, job.requests, now=self.clock) + 0.001
            for job in self._inbox.values()
        ]
        return min(moments)


def late_by_choice(quantum: Quantum) -> set[str]:
    """The jobs that could be in time by the order of deadlines, and no longer after a quantum.

    Computed apart from the code under test, over the jobs with as many whole points.
    """
    everyone = [quantum.served, *quantum.waiting]
    points = {job.id: _whole_points(job, quantum.at) for job in everyone}
    level = [job for job in everyone if points[job.id] == max(points.values())]
    left = (quantum.served.pending or 0) - CHUNK
    after = [with_pending(job, max(0, left)) if job is quantum.served else job for job in level]
    later = quantum.at + min(QUANTUM, quantum.served.engine_seconds or 0.0)
    return _in_time(level, quantum.at) - _in_time(after, later)


def feasible(jobs: Sequence[QueueEntry]) -> bool:
    """Whether some order of whole jobs keeps every deadline, by trying all."""
    return any(
        all(
            START + math.fsum(job.engine_seconds or 0.0 for job in orders[: place + 1])
            <= (job.deadline or 0.0)
            for place, job in enumerate(orders)
        )
        for orders in itertools.permutations(jobs)
    )


def _whole_points(job: QueueEntry, now: float) -> int:
    aged = effective_priority(job.priority, job.arrived_at, now=now, ageing_seconds=AGEING_SECONDS)
    return whole_points(aged)


def _in_time(jobs: Iterable[QueueEntry], clock: float) -> set[str]:
    kept = set()
    for job in sorted(jobs, key=lambda job: (job.deadline, job.arrived_at, job.id)):
        clock += job.engine_seconds or 0.0
        if clock <= (job.deadline or 0.0) + 1e-6:
            kept.add(job.id)
    return kept
