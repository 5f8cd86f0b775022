"""A batch fed to the KV model of an engine, on a simulated clock: what a window is worth."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from batch_orchestration.engines.simulated.kv_cache import KvMachine, KvModel
from batch_orchestration.estimates import derivation
from batch_orchestration.estimates.costs import Costs
from batch_orchestration.estimates.derivation import RequestTokens
from batch_orchestration.inference.window.control import Bounds, WindowControl
from batch_orchestration.inference.window.window import POLL_SECONDS

Dice = random.Random
Length = Callable[[Dice], int]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the requests of a batch are like, and the engine that they meet."""

    name: str
    prompt: Length
    answer: Length
    machine: KvMachine
    requests: int


@dataclass(kw_only=True)
class Course:
    """How a batch went."""

    seconds: float
    requests: int
    preemptions: int
    #: Width of the window, at each change.
    widths: list[int] = field(default_factory=list)

    @property
    def throughput(self) -> float:
        """Requests a second, over the whole batch."""
        return self.requests / self.seconds

    @property
    def turns(self) -> int:
        """How often the window changed its direction."""
        moves = [after - before for before, after in pairwise(self.widths)]
        return sum((first > 0) != (second > 0) for first, second in pairwise(moves))


def lengths(shape: Shape, seed: str) -> Iterator[tuple[int, int]]:
    """The requests of a shape: prompt and answer tokens."""
    dice = random.Random(seed)
    for _ in range(shape.requests):
        yield shape.prompt(dice), shape.answer(dice)


def run_batch(shape: Shape, control: WindowControl, *, seed: str = "1") -> Course:
    """Feed the batch through a window that asks the engine every second, until all is answered."""
    model = KvModel(shape.machine)
    requests = enumerate(lengths(shape, seed))
    now, next_poll = 0.0, POLL_SECONDS
    in_flight = settled = 0
    widths = [control.width]
    dry = False
    while True:
        while not dry and in_flight < control.width:
            request = next(requests, None)
            if request is None:
                dry = True
                break
            key, (prompt, answer) = request
            model.submit(key, prompt_tokens=prompt, completion_tokens=answer)
            in_flight += 1
        if model.idle:
            break
        now += model.begin_steps()
        while now >= next_poll:
            next_poll += POLL_SECONDS
            if control.note(model.metrics, in_flight=in_flight, settled=settled, now=now):
                widths.append(control.width)
        finished = len(model.end_steps())
        in_flight -= finished
        settled += finished
    return Course(
        seconds=now,
        requests=settled,
        preemptions=model.metrics.preemptions or 0,
        widths=widths,
    )


def uniform(low: int, high: int) -> Length:
    """Any length of these, each as likely."""
    return lambda dice: dice.randint(low, high)


def mixed(*kinds: tuple[float, Length]) -> Length:
    """One kind or another, by their weights."""
    return lambda dice: dice.choices([k for _, k in kinds], [w for w, _ in kinds])[0](dice)


def _machine(cache_tokens: int, max_num_seqs: int = 128) -> KvMachine:
    return KvMachine(
        cache_tokens=cache_tokens,
        max_num_seqs=max_num_seqs,
        step_seconds=0.03,
        sequence_seconds=0.0003,
        prompt_token_seconds=0.0001,
    )


SHAPES = (
    Shape(
        name="short prompts, short answers, ample cache",
        prompt=uniform(20, 80),
        answer=uniform(5, 40),
        machine=_machine(200_000),
        requests=15_000,
    ),
    Shape(
        name="short prompts, long answers, ample cache",
        prompt=uniform(20, 80),
        answer=uniform(100, 900),
        machine=_machine(200_000),
        requests=4_000,
    ),
    Shape(
        name="short prompts, long answers, tight cache",
        prompt=uniform(20, 80),
        answer=uniform(100, 900),
        machine=_machine(20_000),
        requests=3_000,
    ),
    Shape(
        name="long prompts, short answers, ample cache",
        prompt=uniform(1000, 3000),
        answer=uniform(5, 40),
        machine=_machine(600_000),
        requests=4_000,
    ),
    Shape(
        name="long prompts, short answers, tight cache",
        prompt=uniform(1000, 3000),
        answer=uniform(5, 40),
        machine=_machine(40_000),
        requests=4_000,
    ),
    Shape(
        name="long prompts, long answers, tight cache",
        prompt=uniform(500, 1500),
        answer=uniform(200, 1000),
        machine=_machine(60_000),
        requests=2_000,
    ),
    Shape(
        name="mixed, tight cache",
        prompt=mixed((0.8, uniform(20, 200)), (0.2, uniform(1000, 3000))),
        answer=mixed((0.7, uniform(5, 60)), (0.3, uniform(300, 1200))),
        machine=_machine(40_000),
        requests=4_000,
    ),
)
#: Fixed windows of a sweep.
SWEEP = (4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 136, 160, 192, 256, 512)


def sweep(shape: Shape, widths: Sequence[int] = SWEEP, *, seed: str = "1") -> dict[int, Course]:
    """Return how the batch goes through each fixed window."""
    return {width: run_batch(shape, WindowControl(width, None), seed=seed) for width in widths}


def best_of(shape: Shape, widths: Sequence[int] = SWEEP) -> tuple[int, Course]:
    """Return the best fixed window, and how the batch goes through it."""
    return max(sweep(shape, widths).items(), key=lambda item: item[1].throughput)


def tokens_of(shape: Shape) -> RequestTokens:
    """Return what a request of the shape has on average."""
    sizes = list(lengths(shape, "1"))
    return RequestTokens(
        prompt=sum(prompt for prompt, _ in sizes) / len(sizes),
        completion=sum(answer for _, answer in sizes) / len(sizes),
    )


def derived_start(shape: Shape) -> int:
    """Return the window that is derived before the first figures are there."""
    machine = shape.machine
    derived = derivation.window(
        kv_cache_tokens=machine.cache_tokens,
        max_num_seqs=machine.max_num_seqs,
        tokens=tokens_of(shape),
    )
    return int(derived.value)


def bounds_of(shape: Shape) -> Bounds:
    """Return the bounds of a controller that knows what the machine's steps cost."""
    machine = shape.machine
    costs = Costs(
        request=0.0,
        prompt_token=machine.prompt_token_seconds,
        completion_token=machine.sequence_seconds,
        step=machine.step_seconds,
    )
    held = derivation.sequences_held(machine.cache_tokens, tokens_of(shape))
    at_a_time = min(machine.max_num_seqs, held)
    return Bounds(reading_cost=derivation.reading_cost(costs, at_a_time=at_a_time))
