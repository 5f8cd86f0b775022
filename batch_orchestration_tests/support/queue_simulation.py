"""The queue on a fake clock: the real rules of order, room and rates over one imagined engine.

The engine answers chunk by chunk, each at the same rate; before each chunk it is asked anew whose
turn it is. Admission is decided whenever somebody came or went, and every few chunks.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from batch_orchestration.queue.capacity import Demand, Limits, Load
from batch_orchestration.queue.decision import Rules, Standing, decide
from batch_orchestration.queue.entries import EntryKind, EntryState, QueueEntry, WaitReason
from batch_orchestration.queue.ordering import Candidate, OrderPolicy, Place, order, whole_points
from batch_orchestration.queue.rate_limits import RateLimits, SourceRates

START = 1_760_000_000.0
CHUNK = 1000
REQUESTS_PER_SECOND = 100.0
TOKENS_PER_REQUEST = 500
QUANTUM = CHUNK / REQUESTS_PER_SECOND
SHARE_SECONDS = 3600.0
POLICY = OrderPolicy(ageing_seconds=60.0, quantum_seconds=QUANTUM)

#: Given those who want something, the time and what sources were served: everyone, best first.
Ordering = Callable[[Sequence[Candidate], float, Mapping[str, float]], list[str]]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A submission; times in POSIX seconds."""

    id: str
    source: str
    priority: int
    arrived_at: float
    requests: int
    deadline: float
    left: int

    @property
    def seconds(self) -> float:
        """What the engine still needs for it."""
        return self.left / REQUESTS_PER_SECOND

    @property
    def candidate(self) -> Candidate:
        return Candidate(
            id=self.id,
            source=self.source,
            priority=self.priority,
            arrived_at=self.arrived_at,
            deadline=self.deadline,
            seconds=self.seconds,
            work=float(self.left * TOKENS_PER_REQUEST),
        )


@dataclass(frozen=True, kw_only=True)
class Quantum:
    """One chunk: who was served, and who else was admitted and waited."""

    at: float
    served: Job
    waiting: tuple[Job, ...]


@dataclass(kw_only=True)
class History:
    """What happened: every quantum, every admission, every load."""

    quanta: list[Quantum] = field(default_factory=list)
    admitted: list[tuple[float, Job, tuple[Job, ...]]] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    ended: dict[str, float] = field(default_factory=dict)


def by_the_rules(
    candidates: Sequence[Candidate], now: float, served: Mapping[str, float]
) -> list[str]:
    """The order of service as it is."""
    places = order(candidates, now=now, policy=POLICY, served=served)
    assert all(explains(place) for place in places)
    return [place.candidate.id for place in places]


def explains(place: Place) -> bool:
    """Whether a place is explained by its own numbers."""
    return f"priority {place.candidate.priority} and" in place.why and ";" in place.why


def first_in_first_out(
    candidates: Sequence[Candidate], now: float, served: Mapping[str, float]
) -> list[str]:
    """A negative control."""
    return [c.id for c in sorted(candidates, key=lambda c: (c.arrived_at, c.id))]


def priority_without_ageing(
    candidates: Sequence[Candidate], now: float, served: Mapping[str, float]
) -> list[str]:
    """A negative control."""
    return [c.id for c in sorted(candidates, key=lambda c: (-c.priority, c.arrived_at, c.id))]


def fair_share_alone(
    candidates: Sequence[Candidate], now: float, served: Mapping[str, float]
) -> list[str]:
    """A negative control: right about priorities, deaf to deadlines."""
    return by_the_rules([replace(c, deadline=None) for c in candidates], now, served)


def random_jobs(seed: int, count: int = 200) -> list[Job]:
    """Submissions of all kinds, more than the engine can keep up with for a while."""
    chance = random.Random(seed)
    jobs = []
    at = START
    for number in range(count):
        at += chance.expovariate(1 / 25.0)
        requests = chance.choice([5, 200, 900, 1000, 3000, 8000, 20_000])
        jobs.append(
            Job(
                id=f"job-{number:03d}",
                source=chance.choice("aaabbcd"),
                priority=chance.choice([-10, 0, 0, 0, 1, 1, 10]),
                arrived_at=at,
                requests=requests,
                deadline=at + chance.choice([60, 600, 3600, 86_400]) + 2 * requests / 100,
                left=requests,
            )
        )
    return jobs


def crowd(seed: int, count: int = 30) -> list[Job]:
    """Equals that come at once, with windows that leave the engine little time to spare."""
    chance = random.Random(seed)
    jobs, needed = [], 0.0
    for number in range(count):
        requests = chance.choice([500, 1000, 3000])
        needed += requests / REQUESTS_PER_SECOND
        jobs.append(
            Job(
                id=f"job-{chance.randrange(10**6):06d}-{number}",
                source=chance.choice("aab"),
                priority=0,
                arrived_at=START,
                requests=requests,
                deadline=START + needed + 15.0,
                left=requests,
            )
        )
    return jobs


class Simulation:
    """One engine, one inbox, a clock."""

    def __init__(
        self, jobs: Iterable[Job], ordering: Ordering, *, limits: Limits, rates: RateLimits | None
    ):
        self._coming = sorted(jobs, key=lambda job: (job.arrived_at, job.id))
        self._ordering = ordering
        self._limits = limits
        self._rates = SourceRates(limits=rates or RateLimits())
        self._counts_rates = rates is not None
        self._inbox: dict[str, Job] = {}
        self._admitted: dict[str, Job] = {}
        self._served: list[tuple[float, str, float]] = []
        self._counted = (0, 0)
        self.clock = START
        self.history = History()

    def run(self) -> History:
        while self._coming or self._inbox or self._admitted:
            self._arrive()
            self._admit()
            if self._admitted:
                self._serve()
            else:
                self.clock = self._next_change()
        return self.history

    def _arrive(self) -> None:
        while self._coming and self._coming[0].arrived_at <= self.clock:
            job = self._coming.pop(0)
            self._inbox[job.id] = job

    def _served_of_late(self) -> dict[str, float]:
        served: dict[str, float] = {}
        for at, source, tokens in self._served:
            if at >= self.clock - SHARE_SECONDS:
                served[source] = served.get(source, 0.0) + tokens
        return served

    def _order(self, jobs: Mapping[str, Job]) -> list[Job]:
        candidates = [job.candidate for job in jobs.values()]
        return [jobs[i] for i in self._ordering(candidates, self.clock, self._served_of_late())]

    def _admit(self) -> None:
        unchanged = (len(self._inbox), len(self._admitted)) == self._counted
        if not self._inbox or (unchanged and self._admitted and len(self.history.quanta) % 5):
            return
        everyone = self._order({**self._admitted, **self._inbox})
        load = self._load()
        decision = decide(
            [self._standing(job) for job in everyone],
            load=load,
            rates=self._rates,
            rules=Rules(limits=self._limits),
            now=self.clock,
        )
        reasons = {entry.id: entry.reason for entry in decision.entries}
        assert all(
            (reasons[job_id] is None) == (job_id in decision.admissible) for job_id in self._inbox
        ), "who is not admitted is told why"
        for job_id in decision.admissible:
            job = self._admitted[job_id] = self._inbox.pop(job_id)
            if self._counts_rates:
                self._rates = self._rates.plus(job.source, job.requests, now=self.clock)
            passed_over = tuple(
                other
                for other in self._inbox.values()
                if reasons[other.id] not in (None, WaitReason.SUBMISSION_RATE)
            )
            self.history.admitted.append((self.clock, job, passed_over))
        self.history.loads.append(self._load())
        self._counted = (len(self._inbox), len(self._admitted))

    def _standing(self, job: Job) -> Standing:
        admitted = job.id in self._admitted
        return Standing(
            entry=QueueEntry(
                kind=EntryKind.BATCH if admitted else EntryKind.FILE,
                id=job.id,
                source=job.source,
                priority=job.priority,
                effective_priority=job.priority,
                state=EntryState.ADMITTED if admitted else EntryState.WAITING,
                place=0,
            ),
            demand=Demand(requests=job.left, tokens=job.left * TOKENS_PER_REQUEST, size_bytes=0),
        )

    def _load(self) -> Load:
        left = sum(job.left for job in self._admitted.values())
        return Load(batches=len(self._admitted), requests=left, tokens=left * TOKENS_PER_REQUEST)

    def _serve(self) -> None:
        job, *waiting = self._order(self._admitted)
        self.history.quanta.append(Quantum(at=self.clock, served=job, waiting=tuple(waiting)))
        answered = min(CHUNK, job.left)
        self.clock += answered / REQUESTS_PER_SECOND
        self._served.append((self.clock, job.source, float(answered * TOKENS_PER_REQUEST)))
        if answered < job.left:
            self._admitted[job.id] = replace(job, left=job.left - answered)
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
    """Who could still be in time by the order of deadlines, and no longer can after a quantum.

    Reckoned apart from the code under test, over those with as many whole points.
    """
    everyone = [quantum.served, *quantum.waiting]
    points = {job.id: _points(job, quantum.at) for job in everyone}
    level = [job for job in everyone if points[job.id] == max(points.values())]
    answered = min(CHUNK, quantum.served.left)
    after = [
        replace(job, left=job.left - answered) if job is quantum.served else job for job in level
    ]
    later = quantum.at + answered / REQUESTS_PER_SECOND
    return _in_time(level, quantum.at) - _in_time(after, later)


def feasible(jobs: Sequence[Job]) -> bool:
    """Whether some order of whole jobs keeps every deadline, by trying all."""
    return any(
        all(
            START + math.fsum(job.seconds for job in orders[: place + 1]) <= job.deadline
            for place, job in enumerate(orders)
        )
        for orders in itertools.permutations(jobs)
    )


def _points(job: Job, now: float) -> int:
    waited = (now - job.arrived_at) / POLICY.ageing_seconds
    return whole_points(job.priority + max(0.0, waited))


def _in_time(jobs: Iterable[Job], clock: float) -> set[str]:
    kept = set()
    for job in sorted(jobs, key=lambda job: (job.deadline, job.arrived_at, job.id)):
        clock += job.seconds
        if clock <= job.deadline + 1e-6:
            kept.add(job.id)
    return kept
