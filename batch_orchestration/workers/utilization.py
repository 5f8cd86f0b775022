"""A run's account: where its wall time went, moment by moment. Clocks are passed in.

A run looks at itself many times a second; the time between two looks is charged to what it saw at
the first of them, and is divided twice.

**Between the batches** that it serves (its own and its guests): by how many requests each has in
flight then. With none in flight, as while the engine starts, the time is its own batch's.

**Between the parts** of an account. While an engine is ready, each place that it could fill counts
alike: 60 requests in flight of 80 that it could run are 3/4 of the time busy and 1/4 lost. Half a
window gives more than half of the throughput, so what counts as lost here is an upper bound; the
tokens per second while full and over all are told beside it, and need no such assumption.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import msgspec

from batch_orchestration.engines.figures import EngineMetrics


class Utilization(msgspec.Struct, frozen=True, kw_only=True):
    """Wall time of all runs of a batch, in seconds. What is not lost is `kept_seconds`.

    Attributes:
        wall_seconds: From the start of each run's work to its end, runs added up.
        start_up_seconds: Until the engine was ready.
        feed_gap_seconds: The engine could have had more to do and was not given it.
        drain_seconds: Nothing was left to give, and the last answers came in.
        commit_seconds: Everything was answered and not yet committed.
        engine_busy_seconds: The engine had something to compute, by its own metrics.
        held_seconds: The engine could have had more, and was given less on purpose: heat.
        narrow_seconds: Of the kept time: the window was full, and the engine let nothing wait. A
            wider window might have done more; how much more nobody knows.
        tokens: Written by the engine, by its own counter where it has one.
        full_seconds: The engine was full, between two readings of that counter.
        full_tokens: Written in that time.
        runs: How many runs worked for the batch.
    """

    wall_seconds: float
    start_up_seconds: float
    feed_gap_seconds: float
    drain_seconds: float
    commit_seconds: float
    engine_busy_seconds: float
    held_seconds: float = 0.0
    narrow_seconds: float = 0.0
    tokens: float = 0.0
    full_seconds: float = 0.0
    full_tokens: float = 0.0
    runs: int = 0

    @property
    def kept_seconds(self) -> float:
        """Wall time in which the engine was fully used."""
        lost = self.start_up_seconds + self.feed_gap_seconds + self.held_seconds
        return max(0.0, self.wall_seconds - lost - self.drain_seconds - self.commit_seconds)

    @property
    def fraction(self) -> float:
        """Share of the wall time in which the engine was fully used, 0 to 1."""
        return self.kept_seconds / self.wall_seconds if self.wall_seconds > 0 else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Over the whole wall time."""
        return self.tokens / self.wall_seconds if self.wall_seconds > 0 else 0.0

    @property
    def full_tokens_per_second(self) -> float | None:
        """While the engine was full; None if it never was for as long as between two readings."""
        return self.full_tokens / self.full_seconds if self.full_seconds > 0 else None


#: With this share of its places filled the engine is called full, when rates are compared.
FULL = 0.95


class Stage(StrEnum):
    """What a run does."""

    #: The engine is not ready: at the beginning, or after it died.
    STARTING = "starting"
    FEEDING = "feeding"
    #: Nothing is left to ask.
    COMMITTING = "committing"


@dataclass(frozen=True, kw_only=True)
class RunSnapshot:
    """What a run sees of itself at one moment.

    Attributes:
        in_flight: Requests that the engine has.
        by_batch: How the batches share in them; in any unit.
        window: How many it may have now.
        unheld_window: How many it might have if nothing held the run back, such as heat.
        dry: Nothing is left to give.
        engine: Its figures as last read.
        tokens: Counter of tokens written by the engine, by the answers that arrived.
        restarts: Counter of engines that were started again in this run.
    """

    stage: Stage
    in_flight: int = 0
    by_batch: Mapping[str, int] = field(default_factory=dict)
    window: int = 0
    unheld_window: int = 0
    dry: bool = False
    engine: EngineMetrics | None = None
    tokens: int = 0
    restarts: int = 0


class TimeBreakdown(msgspec.Struct, frozen=True, kw_only=True):
    """What one run did with its wall time for one batch; the parts add up to `wall_seconds`.

    Attributes:
        began_at: POSIX seconds, as is `updated_at`.
        busy_seconds: The engine had all that it could run.
        held_seconds: It could have run more, and the run was told to give it less: heat.
        engine_busy_seconds: It had anything to compute, by its own metrics where it has some.
        narrow_seconds: Of the busy time: the window was full and nothing waited at the engine. It
            might have run more; how much more nobody knows.
        tokens: Written for the batch, by the engine's counter where it has one: up to its last
            reading.
        full_seconds: The engine was full, between two readings of that counter.
        full_tokens: Written then.
        engine_restarts: Of dead engines; counted with the run's own batch.
    """

    batch_id: str
    run_id: str
    began_at: float = 0.0
    updated_at: float = 0.0
    wall_seconds: float = 0.0
    start_up_seconds: float = 0.0
    busy_seconds: float = 0.0
    feed_gap_seconds: float = 0.0
    held_seconds: float = 0.0
    drain_seconds: float = 0.0
    commit_seconds: float = 0.0
    engine_busy_seconds: float = 0.0
    narrow_seconds: float = 0.0
    tokens: float = 0.0
    full_seconds: float = 0.0
    full_tokens: float = 0.0
    engine_restarts: float = 0.0

    def after(self, earlier: "TimeBreakdown") -> "TimeBreakdown":
        """Return this account with what the same run had done for the batch before."""
        summed = {name: getattr(self, name) + getattr(earlier, name) for name in QUANTITIES}
        began_at = min(self.began_at, earlier.began_at)
        return msgspec.structs.replace(self, began_at=began_at, **summed)


#: The fields of an account that are added up.
QUANTITIES = tuple(
    name
    for name in TimeBreakdown.__struct_fields__
    if name not in ("batch_id", "run_id", "began_at", "updated_at")
)


class TimeAccountant:
    """Keeps the accounts of one run, one for each batch that it serves.

    What the engine could run is the window; but if it lets requests wait although the window is
    full, it is what ran then. What it has of that is what is in flight, less the share that had not
    arrived at it when its figures were last read: about once a second.

    Args:
        own: The batch that the run is about.
    """

    def __init__(self, own: str) -> None:
        self._own = own
        self._at = 0.0
        self._moment: RunSnapshot | None = None
        self._quantities: dict[str, dict[str, float]] = {own: dict.fromkeys(QUANTITIES, 0.0)}
        self._restarts = 0
        self._engine: EngineMetrics | None = None
        #: Share of what is in flight that the engine has; the rest is on its way to it, or back.
        self._arrived = 1.0
        #: How many the engine runs at a time, once it was seen to let others wait.
        self._places: int | None = None
        #: Which counter of tokens was read last, and what it said.
        self._counter = ("", 0)
        #: Since the last reading of the tokens: seconds, and those of them that were busy.
        self._stretch = [0.0, 0.0]

    def observe(self, moment: RunSnapshot, now: float) -> None:
        """Charge the time since the last look; `now` in seconds of a clock that never goes back."""
        before, self._moment = self._moment, moment
        if before is None:
            self._restarts = moment.restarts
        seconds, self._at = now - self._at, now
        if before is not None and seconds > 0:
            self._charge_time(before, seconds)
        if moment.stage is not Stage.COMMITTING:
            self._read(moment)

    def accounts(self) -> dict[str, dict[str, float]]:
        """Return the quantities of each batch, by their names in `TimeBreakdown`."""
        return self._quantities

    def _charge_time(self, moment: RunSnapshot, seconds: float) -> None:
        parts = self._parts(moment)
        computing = _is_computing(moment)
        narrow = parts.get("busy_seconds", 0.0) * _is_narrow(moment)
        for batch_id, share in self._shares(moment).items():
            for name, part in parts.items():
                self._charge(batch_id, name, seconds * share * part)
            self._charge(batch_id, "wall_seconds", seconds * share)
            self._charge(batch_id, "engine_busy_seconds", seconds * share * computing)
            self._charge(batch_id, "narrow_seconds", seconds * share * narrow)
        self._stretch[0] += seconds
        self._stretch[1] += seconds * parts.get("busy_seconds", 0.0)

    def _charge(self, batch_id: str, name: str, amount: float) -> None:
        if batch_id not in self._quantities:
            self._quantities[batch_id] = dict.fromkeys(QUANTITIES, 0.0)
        self._quantities[batch_id][name] += amount

    def _shares(self, moment: RunSnapshot) -> dict[str, float]:
        total = sum(moment.by_batch.values())
        if moment.stage is not Stage.FEEDING or not moment.in_flight or not total:
            return {self._own: 1.0}
        return {batch_id: count / total for batch_id, count in moment.by_batch.items() if count}

    def _parts(self, moment: RunSnapshot) -> dict[str, float]:
        """Return how a moment is divided between the parts of an account; their sum is 1."""
        if moment.stage is Stage.STARTING:
            return {"start_up_seconds": 1.0}
        if moment.stage is Stage.COMMITTING:
            return {"commit_seconds": 1.0}
        could = max(1, min(self._places or moment.unheld_window, moment.unheld_window))
        busy = min(1.0, self._arrived * moment.in_flight / could)
        if moment.dry:
            return {"busy_seconds": busy, "drain_seconds": 1.0 - busy}
        is_held = moment.window < moment.unheld_window
        held = min(1.0 - busy, max(0, could - moment.window) / could) if is_held else 0.0
        return {
            "busy_seconds": busy,
            "held_seconds": held,
            "feed_gap_seconds": 1.0 - busy - held,
        }

    def _read(self, moment: RunSnapshot) -> None:
        """Take in the counters, and what the engine tells each time that it was asked anew."""
        self._charge(self._own, "engine_restarts", max(0, moment.restarts - self._restarts))
        self._restarts = max(self._restarts, moment.restarts)
        figures = moment.engine
        if figures is not None and figures.generation_tokens is not None:
            if figures is not self._engine:
                self._count_tokens(moment, "engine", figures.generation_tokens)
        elif self._counter[0] != "engine":
            # Whoever has told once only missed a question: the next answer tells of this time, too.
            self._count_tokens(moment, "answers", moment.tokens)
        if figures is None:
            self._arrived = 1.0
        elif figures is not self._engine:
            self._learn_places(figures, moment)
            self._learn_arrived(figures, moment)
        self._engine = figures

    def _learn_places(self, figures: EngineMetrics, moment: RunSnapshot) -> None:
        running = figures.running or 0
        window_is_full = moment.in_flight >= moment.window
        lets_wait = bool(figures.waiting) and window_is_full and running > 0
        if lets_wait or (self._places is not None and running > self._places):
            self._places = running

    def _learn_arrived(self, figures: EngineMetrics, moment: RunSnapshot) -> None:
        """Take in what is at the engine: who feeds too slowly has a full window all the same."""
        self._arrived = 1.0
        if figures.running is not None and moment.in_flight:
            has = figures.running + (figures.waiting or 0)
            self._arrived = min(1.0, has / moment.in_flight)

    def _count_tokens(self, moment: RunSnapshot, counter: str, value: int) -> None:
        """Charge the tokens since the last reading; a counter that fell has begun anew."""
        (known, before), self._counter = self._counter, (counter, value)
        (seconds, busy), self._stretch = self._stretch, [0.0, 0.0]
        if counter != known:
            return
        written = value - before if value >= before else value
        is_full = busy >= FULL * seconds
        for batch_id, share in self._shares(moment).items():
            self._charge(batch_id, "tokens", written * share)
            if is_full:
                self._charge(batch_id, "full_tokens", written * share)
                self._charge(batch_id, "full_seconds", seconds * share)


def _is_computing(moment: RunSnapshot) -> bool:
    if moment.stage is not Stage.FEEDING or not moment.in_flight:
        return False
    figures = moment.engine
    if figures is None or (figures.running is None and figures.waiting is None):
        return True
    return bool(figures.running or figures.waiting)


def _is_narrow(moment: RunSnapshot) -> bool:
    """Whether a wider window might do more: it is full, and the engine runs all that it has."""
    if moment.engine is None or moment.engine.waiting is None or moment.dry:
        return False
    return moment.engine.waiting == 0 and moment.in_flight >= FULL * moment.window


def kept(accounts: Iterable[TimeBreakdown]) -> Utilization | None:
    """Add up the accounts of a batch, over all runs that worked for it; None if there are none."""
    accounts = list(accounts)
    if not accounts:
        return None
    total = {name: sum(getattr(account, name) for account in accounts) for name in QUANTITIES}
    return Utilization(
        runs=len(accounts),
        **{name: total[name] for name in Utilization.__struct_fields__ if name in total},
    )
