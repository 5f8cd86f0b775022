"""The window that the engine, its memory and its device's health make narrow together."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from batch_orchestration.engines.memory_fallback import MemoryFallback, MemoryLevel
from batch_orchestration.gpu.thermal import Throttle
from batch_orchestration.inference.faults.oom_recovery import OomRecovery
from batch_orchestration.inference.window import window as request_window
from batch_orchestration.inference.window.window import RequestWindow
from batch_orchestration.workers.run_status import RunStatus
from batch_orchestration_tests.support.workbench import make_policy


def make_window(
    in_flight: int, throttle: Callable[[], Throttle], *, most: int = 256
) -> RequestWindow:
    run = SimpleNamespace(
        policy=make_policy(in_flight=in_flight), throttle=throttle, status=RunStatus()
    )
    return RequestWindow(run, memory=OomRecovery(MemoryFallback(MemoryLevel()), in_flight=most))


@pytest.mark.parametrize(
    ("width", "most", "share", "limit"),
    [
        (256, 256, 1.0, 256),
        (256, 64, 1.0, 64),
        (64, 256, 1.0, 64),
        (256, 256, 0.5, 128),
        (256, 100, 0.5, 50),
        (256, 8, 0.125, 1),
        (10, 10, 0.25, 2),
        (3, 3, 0.1, 1),  # Only a share of 0 is a pause.
        (256, 256, 0.0, 0),
    ],
)
def test_the_narrowest_party_decides(width: int, most: int, share: float, limit: int) -> None:
    window = make_window(width, lambda: Throttle(share=share), most=most)

    assert window.limit == limit
    assert window.is_limited == (limit < width)


def test_it_opens_as_soon_as_somebody_leaves_or_the_pause_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(request_window, "LOOK_SECONDS", 0.001)
    taken, throttle = [1, 1], Throttle()
    window = make_window(2, lambda: throttle)

    async def one_more() -> list[bool]:
        nonlocal throttle
        waiting = asyncio.create_task(window.open(lambda: sum(taken)))
        await asyncio.sleep(0)
        seen = [waiting.done()]
        taken.pop()
        window.check_again()
        seen.append(await waiting)
        throttle = Throttle(share=0.0)
        paused = asyncio.create_task(window.open(lambda: 0))
        await asyncio.sleep(0.005)
        seen.append(paused.done())
        throttle = Throttle()
        return [*seen, await paused]

    assert asyncio.run(one_more()) == [False, True, False, True]


def test_a_stop_ends_the_wait_even_of_a_full_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_window, "LOOK_SECONDS", 0.001)
    throttle = Throttle()
    window = make_window(1, lambda: throttle)

    async def stopped() -> bool:
        nonlocal throttle
        waiting = asyncio.create_task(window.open(lambda: 1))
        await asyncio.sleep(0.005)
        throttle = Throttle(stop="Xid 79")
        return await waiting

    assert asyncio.run(stopped()) is False
