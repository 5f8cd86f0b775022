"""What a window that follows the engine is worth: against a sweep of fixed ones, simulated.

    python benchmarks/window.py

A model of an engine with a KV cache (`engines/simulated/kv_cache.py`: vLLM's rules of admission and
preemption) on a simulated clock. Each shape of batch goes through every fixed window of the sweep,
and through windows that follow the engine: from the width that is derived, and from two bad ones.
Then the same on machines whose steps cost otherwise, with a controller that knows it from
measurements, and with one that does not. Prints markdown tables.
"""

import dataclasses
from collections.abc import Iterator

import msgspec

from batch_orchestration.inference.window.control import Bounds, WindowControl
from batch_orchestration_tests.support.window_simulation import (
    SHAPES,
    Course,
    Shape,
    best_of,
    bounds_of,
    derived_start,
    run_batch,
)

BAD_STARTS = (8, 1024)
#: Seconds of a step, of a sequence in it, and of a prompt token that is read.
MACHINES = {
    "as above": (0.03, 0.0003, 0.0001),
    "prompts cost three times as much": (0.03, 0.0003, 0.0003),
    "a wide batch gains little": (0.01, 0.0005, 0.0001),
    "prompts cost a fifth, a wide batch gains much": (0.03, 0.0001, 0.00002),
}


def following(shape: Shape, start: int, bounds: Bounds) -> Course:
    """Return how the batch goes through a window that follows the engine."""
    return run_batch(shape, WindowControl(start, bounds))


def shape_rows() -> Iterator[str]:
    """Yield the table of shapes."""
    yield "| batch and cache | best fixed | derived | from derived | turns | from 8 | from 1024 |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for shape in SHAPES:
        width, best = best_of(shape)
        start = derived_start(shape)
        bounds = bounds_of(shape)
        course = following(shape, start, bounds)
        bad = [following(shape, each, bounds).throughput / best.throughput for each in BAD_STARTS]
        yield (
            f"| {shape.name} | {width} | {start} | {course.throughput / best.throughput:.1%} |"
            f" {course.turns} | {bad[0]:.1%} | {bad[1]:.1%} |"
        )


def machine_rows() -> Iterator[str]:
    """Yield the table of machines: each shape with a tight cache."""
    yield "| machine | batch | best fixed | costs measured | costs assumed |"
    yield "|---|---|---:|---:|---:|"
    for name, (step, sequence, prompt_token) in MACHINES.items():
        for shape in SHAPES:
            if "tight" not in shape.name or "short answers" in shape.name:
                continue
            machine = msgspec.structs.replace(
                shape.machine,
                step_seconds=step,
                sequence_seconds=sequence,
                prompt_token_seconds=prompt_token,
            )
            altered = dataclasses.replace(shape, machine=machine)
            width, best = best_of(altered)
            ratios = [
                following(altered, derived_start(altered), bounds).throughput / best.throughput
                for bounds in (bounds_of(altered), Bounds())
            ]
            batch = shape.name.removesuffix(", tight cache")
            yield f"| {name} | {batch} | {width} | {ratios[0]:.1%} | {ratios[1]:.1%} |"


if __name__ == "__main__":
    for row in shape_rows():
        print(row, flush=True)
    print()
    for row in machine_rows():
        print(row, flush=True)
