"""Runs the one batch of a data folder, of which every request is refused; dies at a crash point."""

from pathlib import Path

from batch_orchestration_tests.support.halting_bench import HaltingBench, refusing


def take_step(root: Path, step: str) -> None:
    """Do one of `run`, `resume`."""
    bench = HaltingBench(root)
    (batch_id,) = bench.folder.batch_ids()
    plan = bench.folder.read_plan(batch_id)
    if step == "run":
        bench.run(plan, refusing("question"))
    else:
        bench.go_on(plan)
