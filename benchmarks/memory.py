"""Peak memory of whoever holds the answers of a chunk, where they are large.

    python -m benchmarks.memory [ANSWERS] [--json FILE]

Writes `benchmarks/memory.md`, unless it is told to write the figures alone, as they are of another
commit (`BEFORE`). The simulated engine, a real child server, gives answers of about a mebibyte to
the requests of one chunk. Each step is a process of its own, started for it.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.delivery.lines import output_line
from batch_orchestration.delivery.snapshot import read_snapshot, take_snapshot
from batch_orchestration.engines.simulated.engine import SimulatedEngine
from batch_orchestration.lifecycle.cancellation import cancel
from batch_orchestration.operations.recovery import recover
from batch_orchestration_tests.support.builders import MODEL, NOW, make_line, make_plan, write_plan
from batch_orchestration_tests.support.workbench import Workbench

ANSWERS = 1000
#: Words of the simulated engine: with them an answer is about a mebibyte.
TOKENS = 175_000
IN_FLIGHT = 64
MOST_MIB = 400
PAGE = Path(__file__).with_name("memory.md")
#: In MiB, at commit 45819fb, of the same answers and on the same machine as the page (2026-11-30).
BEFORE = {
    "worker": "3,101 (the commit alone, by a process that went on after a kill within it)",
    "deliver": "3,234",
    "results": "3,228",
    "recover": "6,479",
}
#: Measured by hand at the same time.
FURTHER = """With small answers (8 chunks of 1,000 of about 2 KiB; CPU seconds, median of 3,
alternating with commit d37d32a, the last without this) reading journals and committing takes 2.06 s
instead of 2.26, and reading them from the store 0.49 s instead of 0.48: no difference that this can
tell."""


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("answers", nargs="?", type=int, default=ANSWERS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="memory-") as root:
        figures = measure(Path(root), options.answers)
    if options.json:
        options.json.write_text(json.dumps(figures))
        print(json.dumps(figures, indent=1))
        return
    PAGE.write_text(page(options.answers, figures))
    print(PAGE.read_text())


def measure(root: Path, answers: int) -> dict[str, Any]:
    """Return peak in MiB and seconds of each step."""
    large = Workbench(root / "large")
    plan = admit(large, answers, TOKENS)
    found = {"worker": step("worker", large)}
    journal = large.folder.journal_path(plan.batch_id, 0)
    size = journal.stat().st_size / answers / 2**20
    ended = Workbench(root / "ended")
    admit(ended, answers, TOKENS)
    ended.folder.journal_path(plan.batch_id, 0).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(journal, ended.folder.journal_path(plan.batch_id, 0))
    found["close-out"] = step("close_out", ended)
    for name in ("deliver", "results", "recover"):
        found[name] = step(name, large)
    return {"mebibytes": size, "steps": found}


def admit(bench: Workbench, answers: int, tokens: int, *, per_chunk: int = 0) -> BatchPlan:
    """Admit a batch of requests for answers of so many tokens."""
    content = b"".join(
        make_line(
            number,
            body={
                "model": MODEL,
                "messages": [{"role": "user", "content": f"question {number}"}],
                "max_tokens": tokens,
                "ignore_eos": True,
            },
        )
        for number in range(answers)
    )
    plan = make_plan(content, requests_per_chunk=per_chunk or answers)
    write_plan(bench.folder, plan)
    bench.folder.input_path(plan.batch_id).write_bytes(content)
    bench.store.add_batch(plan, at=NOW)
    return plan


def step(name: str, bench: Workbench) -> list[float]:
    """Run a step in a process of its own; return its peak in MiB, its seconds, and those of CPU."""
    command = [sys.executable, "-c", f"from benchmarks.memory import child; child({name!r})"]
    command.append(str(bench.folder.root))
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
    print(name, done.stdout, file=sys.stderr)
    return [float(word) for word in done.stdout.split()[-3:]]


def child(name: str) -> None:
    """Do a step, and print what `step` returns."""
    bench = Workbench(Path(sys.argv[1]))
    (batch_id,) = bench.folder.batch_ids()
    began = time.perf_counter()
    STEPS[name](bench, bench.folder.read_plan(batch_id))
    seconds = time.perf_counter() - began
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    print(peak >> 10, seconds, time.process_time())


def run_worker(bench: Workbench, plan: BatchPlan) -> None:
    """Feed, journal and commit, as a run does."""
    engine = SimulatedEngine(
        log_path=bench.folder.logs / "engine.log", models=(MODEL,), context_tokens=2 * TOKENS
    )
    try:
        bench.run(plan, engine, in_flight=IN_FLIGHT)
    finally:
        engine.stop()
    record = bench.store.batch(plan.batch_id)
    assert record.completed == plan.requests, record


def close_out_cancelled(bench: Workbench, plan: BatchPlan) -> None:
    """Cancel it, commit what is answered, and deliver."""
    cancel(
        plan.batch_id, folder=bench.folder, store=bench.store, actor="me", reason="", at=time.time()
    )
    bench.deliver(plan)


def read_results(bench: Workbench, plan: BatchPlan) -> None:
    """Read the lines of all results, as `results` does."""
    finished = take_snapshot(plan.batch_id, folder=bench.folder, store=bench.store)
    requests = read_snapshot(finished, folder=bench.folder, store=bench.store)
    assert sum(len(output_line(plan.batch_id, one)) > 1 for one in requests) == plan.requests


def make_store_anew(bench: Workbench, plan: BatchPlan) -> None:
    """Recover, which delivers again."""
    done = recover(folder=bench.folder, problem="measured", clock=time.time)
    assert done.complete, done
    assert done.batches[0].completed == plan.requests


def deliver(bench: Workbench, plan: BatchPlan) -> None:
    """Write the output."""
    bench.deliver(plan)


STEPS: dict[str, Callable[[Workbench, BatchPlan], None]] = {
    "worker": run_worker,
    "close_out": close_out_cancelled,
    "deliver": deliver,
    "results": read_results,
    "recover": make_store_anew,
}
_TITLES = {
    "worker": "worker: fed, journalled, committed",
    "close-out": "cancelled: closed out and delivered",
    "deliver": "delivered",
    "results": "`results` of the batch",
    "recover": "`recover`, and delivered again",
}


def page(answers: int, figures: dict[str, Any]) -> str:
    """Return the page."""
    steps = figures["steps"]
    rows = "\n".join(
        f"| {title} | {BEFORE.get(name, 'not measured')} | {steps[name][0]:,.0f} |"
        for name, title in _TITLES.items()
    )
    worst = max(steps[name][0] for name in _TITLES)
    return f"""# Memory where answers are large

Measured {datetime.now(UTC):%Y-%m-%d} by `python -m benchmarks.memory {answers}` on
2 cores ({platform.system()}, Python {platform.python_version()}), which had other work meanwhile.
The simulated engine (a real child server, not counted here); {answers:,} answers of
{figures["mebibytes"]:.2f} MiB in one chunk, {IN_FLIGHT} requests in flight. *Before* is commit
45819fb. Peak of the resident set (`VmHWM`) of a process that does nothing else.

| step | before, MiB | now, MiB |
|---|---:|---:|
{rows}

The most is {worst:,.0f} MiB; the aim is {MOST_MIB}.

{FURTHER}
"""


if __name__ == "__main__":
    main()
