"""A model of an engine with a KV cache, by vLLM's rules of admission and preemption. No clock.

The simulated engine runs it in real time; benchmarks and tests run it on a clock of their own.
"""

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import Hashable
from typing import Annotated

import msgspec

from batch_orchestration.engines.metrics import EngineMetrics

#: Maximum number of equal steps at once: a request that arrives meanwhile waits for all of them.
MOST_STEPS = 16
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]


class KvMachine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An engine's capacity and the duration of its steps.

    A step writes one token for each running sequence and reads the prompts just admitted:

        seconds = step + sequence x running + prompt_token x prompt tokens read

    Throughput saturates with the batch: reading the weights (`step`) is shared by all sequences.

    Attributes:
        cache_tokens: Capacity of the KV cache.
        max_num_seqs: Maximum number of running sequences.
        max_num_batched_tokens: Maximum of prompt tokens per step; its first prompt may exceed it.
    """

    cache_tokens: Positive
    max_num_seqs: Positive = 256
    max_num_batched_tokens: Positive = 2048
    step_seconds: NotNegative = 0.02
    sequence_seconds: NotNegative = 0.0001
    prompt_token_seconds: NotNegative = 0.00005


class _Sequence:
    """A request at the engine."""

    def __init__(self, key: Hashable, prompt_tokens: int, completion_tokens: int) -> None:
        self.key = key
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = max(1, completion_tokens)
        #: Tokens written before it was preempted; they are read again like a prompt.
        self.written = 0
        self.counted = False
        #: Step counts: when it was admitted, and when its last token is written.
        self.began = self.ends = 0


class KvModel:
    """Sequences that run, wait, grow, and are preempted when the cache is full.

    As in vLLM (v1/core/sched/scheduler.py): first come, first served. A sequence is admitted when a
    slot is free and the cache has room for its tokens to read. When the running sequences lack room
    for their next tokens, the one admitted last returns to the head of the queue, loses its
    computed state, and is read again later. Room is counted in tokens, not in blocks.
    """

    def __init__(self, machine: KvMachine) -> None:
        self.machine = machine
        self._waiting: deque[_Sequence] = deque()
        #: In order of admission.
        self._running: dict[int, _Sequence] = {}
        self._ends: list[tuple[int, int]] = []
        self._of_key: dict[Hashable, _Sequence] = {}
        self._numbers = itertools.count()
        self._steps = 0
        self._used = 0
        self._to_read = 0
        self._planned = 0
        self._preemptions = 0
        self._prompt_tokens = 0
        self._generation_tokens = 0

    def submit(self, key: Hashable, *, prompt_tokens: int, completion_tokens: int) -> None:
        """Add a request.

        Raises:
            ValueError: It exceeds the capacity of the cache.
        """
        if prompt_tokens + completion_tokens > self.machine.cache_tokens:
            raise ValueError("longer than the KV cache")
        sequence = self._of_key[key] = _Sequence(key, prompt_tokens, completion_tokens)
        self._waiting.append(sequence)

    def drop(self, key: Hashable) -> None:
        """Remove a request whose answer is no longer wanted."""
        sequence = self._of_key.pop(key, None)
        if sequence is None:
            return
        for number, running in self._running.items():
            if running is sequence:
                self._leave(number)
                return
        self._waiting.remove(sequence)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to compute."""
        return not self._of_key

    @property
    def metrics(self) -> EngineMetrics:
        """The metrics, as an engine reports them."""
        return EngineMetrics(
            running=len(self._running),
            waiting=len(self._waiting),
            kv_usage=self._used / self.machine.cache_tokens,
            kv_cache_tokens=self.machine.cache_tokens,
            preemptions=self._preemptions,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
        )

    def begin_steps(self) -> float:
        """Preempt and admit sequences; return the seconds that the next steps will take."""
        self._make_room()
        self._let_in()
        running = len(self._running)
        if not running:
            self._planned = 0
            return 0.0
        free = self.machine.cache_tokens - self._used
        until_end = self._next_end() - self._steps
        self._planned = max(1, min(free // running, until_end, MOST_STEPS))
        machine = self.machine
        each = machine.step_seconds + machine.sequence_seconds * running
        seconds = self._planned * each + machine.prompt_token_seconds * self._to_read
        self._to_read = 0
        return seconds

    def end_steps(self) -> list[Hashable]:
        """Count the tokens of the steps begun; return the keys of requests that are complete."""
        self._steps += self._planned
        self._used += self._planned * len(self._running)
        self._generation_tokens += self._planned * len(self._running)
        self._planned = 0
        finished = []
        while self._ends and self._ends[0][0] <= self._steps:
            _, number = heapq.heappop(self._ends)
            if number in self._running:
                finished.append(self._leave(number).key)
        for key in finished:
            self._of_key.pop(key, None)
        return finished

    def _make_room(self) -> None:
        while self._running and (
            self._used + len(self._running) > self.machine.cache_tokens and len(self._running) > 1
        ):
            sequence = self._leave(next(reversed(self._running)))
            self._preemptions += 1
            self._waiting.appendleft(sequence)

    def _let_in(self) -> None:
        while self._waiting and len(self._running) < self.machine.max_num_seqs:
            sequence = self._waiting[0]
            to_read = sequence.prompt_tokens + sequence.written
            # Each running sequence and the new one need room for their next token.
            after = self._used + to_read + len(self._running) + 1
            if self._running and after > self.machine.cache_tokens:
                return
            if self._to_read and self._to_read + to_read > self.machine.max_num_batched_tokens:
                return
            self._waiting.popleft()
            number = next(self._numbers)
            sequence.began = self._steps
            sequence.ends = self._steps + sequence.completion_tokens - sequence.written
            self._running[number] = sequence
            heapq.heappush(self._ends, (sequence.ends, number))
            self._used += to_read
            self._to_read += to_read
            if not sequence.counted:
                # vLLM counts a prompt once, however often it is read.
                sequence.counted = True
                self._prompt_tokens += sequence.prompt_tokens

    def _leave(self, number: int) -> _Sequence:
        sequence = self._running.pop(number)
        wrote = self._steps - sequence.began
        self._used -= sequence.prompt_tokens + sequence.written + wrote
        sequence.written += wrote
        return sequence

    def _next_end(self) -> int:
        while self._ends[0][1] not in self._running:
            heapq.heappop(self._ends)
        return self._ends[0][0]


class KvPace:
    """Computes requests at the speed of the machine; used within one event loop."""

    def __init__(self, machine: KvMachine) -> None:
        self._model = KvModel(machine)
        self._answered: dict[object, asyncio.Future[None]] = {}
        self._steps: asyncio.Task[None] | None = None

    @property
    def metrics(self) -> EngineMetrics:
        """The metrics of the machine."""
        return self._model.metrics

    async def compute(self, *, prompt_tokens: int, completion_tokens: int) -> None:
        """Wait until the last token of the answer would be written.

        Raises:
            ValueError: The request exceeds the capacity of the cache.
        """
        key = object()
        self._model.submit(key, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
        answered = self._answered[key] = asyncio.get_running_loop().create_future()
        if self._steps is None or self._steps.done():
            self._steps = asyncio.create_task(self._run())
        try:
            await answered
        finally:
            self._answered.pop(key, None)
            self._model.drop(key)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        at = loop.time()
        while not self._model.idle:
            # By the steps' own time; otherwise the lateness of the sleeps would add up.
            at += self._model.begin_steps()
            await asyncio.sleep(max(0.0, at - loop.time()))
            for key in self._model.end_steps():
                if (answered := self._answered.get(key)) is not None and not answered.done():
                    answered.set_result(None)
