"""What faults cost: two soaks, and the search for requests that kill the engine.

    python -m benchmarks.faults [--minutes 20] [--seed 7]

Writes `benchmarks/faults.md`. The engine is the simulated one, as a real child server: what is
measured is this package, not inference.
"""

import argparse
import json
import logging
import os
import platform
import random
import subprocess
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from math import ceil, log2
from pathlib import Path
from typing import NamedTuple

from batch_orchestration.core.outcomes import Failure, FailureCode
from batch_orchestration_tests.fault.mixed_batches import (
    assert_accounted,
    run_to_the_end,
    simulated_engine,
)
from batch_orchestration_tests.fault.soak import OTHERS, Figures, opened, soak
from batch_orchestration_tests.support.builders import make_body, make_line
from batch_orchestration_tests.support.workbench import Workbench

REQUESTS, WINDOW = 1_000, 64
GUILTY = (1, 3, 8)
#: Of the soak without Dagster, in which far more happens in the same time.
WORKERS_MINUTES = 3.0
ROOT = Path(__file__).parents[1]
PAGE = Path(__file__).with_name("faults.md")


class Poisoned(NamedTuple):
    """What became of a batch with requests that kill the engine."""

    guilty: int
    restarts: int
    bound: int
    answered: int
    convicted: int
    seconds: float


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="of the soak with Dagster")
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    logging.basicConfig(level=logging.CRITICAL)
    commit, soaks = _commit(), {}
    for stage, minutes in (("dagster", options.minutes), ("workers", WORKERS_MINUTES)):
        with tempfile.TemporaryDirectory() as root, opened(stage, Path(root)) as opened_stage:
            soaks[stage] = soak(opened_stage, seconds=60 * minutes, seed=options.seed)
        print(soaks[stage], flush=True)
    poisoned = [poison(guilty, seed=options.seed) for guilty in GUILTY]
    lines = page(soaks, poisoned, seed=options.seed, commit=commit)
    PAGE.write_text("\n".join(lines) + "\n")


def poison(guilty: int, *, seed: int) -> Poisoned:
    """Answer a batch some requests of which kill the engine each time."""
    chosen = set(random.Random(seed).sample(range(REQUESTS), guilty))
    with tempfile.TemporaryDirectory() as root:
        bench = Workbench(Path(root), clock=time.time, requests_per_chunk=100)
        plan = bench.plan_of("poison.jsonl", b"".join(_lines(chosen)))
        # Otherwise the first death would find the rest of the window answered.
        conditions = json.dumps({"latency_seconds": 0.05})
        (bench.folder.root / "simulated.json").write_text(conditions)
        engine = simulated_engine(bench.folder)
        began = time.monotonic()
        try:
            run_to_the_end(
                plan.batch_id, bench.folder, bench.store, engine, run_id="run", in_flight=WINDOW
            )
            seconds = time.monotonic() - began
        finally:
            engine.stop()
        assert_accounted(bench.folder, bench.store, plan)
        outcomes = {s.index: s.outcome for s in bench.store.settled(plan.batch_id)}
    convicted = {
        index
        for index, outcome in outcomes.items()
        if isinstance(outcome, Failure) and outcome.code is FailureCode.ENGINE_KILLED
    }
    assert convicted == chosen
    return Poisoned(
        guilty=guilty,
        restarts=engine.starts - 1,
        bound=guilty * (ceil(log2(WINDOW)) + 1) + 1,
        answered=sum(not isinstance(outcome, Failure) for outcome in outcomes.values()),
        convicted=len(convicted),
        seconds=seconds,
    )


def _lines(guilty: set[int]) -> Iterator[bytes]:
    for number in range(REQUESTS):
        faults = {"simulate": {"die": True}} if number in guilty else {}
        yield make_line(number, body=make_body(f"question {number}", **faults))


def page(
    soaks: dict[str, Figures], poisoned: list[Poisoned], *, seed: int, commit: str
) -> Iterator[str]:
    """Yield the lines of the page."""
    yield "# What faults cost"
    yield ""
    yield f"Measured {datetime.now(UTC):%Y-%m-%d} at commit `{commit}` by"
    yield f"`python -m benchmarks.faults --seed {seed}` on {os.cpu_count()} cores"
    yield f"({platform.system()}, Python {platform.python_version()}) that others used, too, with"
    yield "the **simulated engine** as a real child server: these are figures of this package, and"
    yield "say nothing about inference. Every kill is `kill -9`."
    yield ""
    yield "## Soak"
    yield ""
    yield "Batches in an endless row while accidents happen at random. `dagster` is a whole"
    yield "`dagster dev` (everything: web server, daemon, code server and run workers at once);"
    yield "`workers` is a bare run worker. What is dead is started again. One batch in four is"
    yield "refused by the engine, pauses and is resumed; one answer in 19 is strange."
    yield ""
    yield "- *file*: one that its writer replaces, or the end of a journal, is damaged."
    yield "- *needed file*: a plan or a decision is damaged, and mended some seconds later."
    yield "- *gate*: the engine refuses everything for some seconds, with 401, 402, 403, 407 or a"
    yield "  redirect."
    yield "- *disk*: data folder, Dagster's storage and all logs have no room for some seconds."
    yield ""
    yield "In the end every output file is compared with that of the same batch undisturbed: byte"
    yield "for byte, but for the number of the submission within the engine's request ids."
    yield ""
    yield "| | " + " | ".join(soaks) + " |"
    yield "|---|" + "---:|" * len(soaks)
    for name, values in _soak_rows([*soaks.values()]):
        yield f"| {name} | " + " | ".join(values) + " |"
    yield ""
    yield f"`make soak MINUTES=20 SEED={seed}` runs the one with Dagster again; what happens is"
    yield "given by the seed, what it hits by the machine."
    yield ""
    yield "## Requests that kill the engine"
    yield ""
    yield f"{REQUESTS:,} requests, k of which end the engine's process whenever it has them; at"
    yield f"most w = {WINDOW} in flight. The bound is k·(⌈log2 w⌉ + 1) + 1 restarts."
    yield ""
    yield "| k | restarts | bound | answered | `engine_killed` | seconds |"
    yield "|---:|---:|---:|---:|---:|---:|"
    for row in poisoned:
        yield (
            f"| {row.guilty} | {row.restarts} | {row.bound} | {row.answered:,} of"
            f" {REQUESTS - row.guilty:,} | {row.convicted} | {row.seconds:.1f} |"
        )


def _soak_rows(figures: list[Figures]) -> Iterator[tuple[str, list[str]]]:
    yield "duration, seconds", [f"{one.seconds:.0f}" for one in figures]
    yield "batches", [str(one.batches) for one in figures]
    yield "requests", [f"{one.requests:,}" for one in figures]
    for accident in ("worker", "daemon", "everything", *OTHERS):
        yield f"accidents: {accident}", [str(one.kills.get(accident, "-")) for one in figures]
    yield "batches that paused and were resumed", [str(one.paused) for one in figures]
    yield "requests answered", [f"{one.completed:,}" for one in figures]
    yield "requests failed, as undisturbed", [f"{one.failed:,}" for one in figures]
    yield "requests sent to an engine", [f"{one.submissions:,}" for one in figures]
    yield "**lost**", [f"**{one.lost}**" for one in figures]
    yield "**duplicated**", [f"**{one.duplicated}**" for one in figures]


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    told = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return told.stdout.strip()


if __name__ == "__main__":
    main()
