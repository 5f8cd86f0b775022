"""Runs the model of an engine with a KV cache in real time, for the simulated engine's server."""

import asyncio

from batch_orchestration.engines.figures import EngineFigures
from batch_orchestration.engines.simulated_kv import KvMachine, KvModel


class KvPace:
    """Computes requests as slowly as the machine would; used within one event loop."""

    def __init__(self, machine: KvMachine) -> None:
        self._model = KvModel(machine)
        self._answered: dict[object, asyncio.Future[None]] = {}
        self._steps: asyncio.Task[None] | None = None

    @property
    def figures(self) -> EngineFigures:
        """What the machine tells of its work."""
        return self._model.figures

    async def compute(self, *, prompt_tokens: int, completion_tokens: int) -> None:
        """Return when the last token of the answer would be written.

        Raises:
            ValueError: The cache can never hold the request.
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
            # By the steps' own time, or else what each sleep is late would add up.
            at += self._model.begin_steps()
            await asyncio.sleep(max(0.0, at - loop.time()))
            for key in self._model.end_steps():
                if (answered := self._answered.get(key)) is not None and not answered.done():
                    answered.set_result(None)
