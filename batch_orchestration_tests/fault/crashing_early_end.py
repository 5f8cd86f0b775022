"""Cancels the one batch of a data folder, or delivers it, and dies at a crash point."""

from pathlib import Path

from batch_orchestration_tests.support.closing_bench import ClosingBench


def take_step(root: Path, step: str) -> None:
    """Do one of `cancel`, `look`, `deliver`, `resume`."""
    bench = ClosingBench(root)
    (batch_id,) = bench.folder.batch_ids()
    plan = bench.folder.read_plan(batch_id)
    if step == "cancel":
        bench.cancel(plan)
    elif step == "look":
        bench.look()
    elif step == "deliver":
        bench.deliver(plan)
    elif step == "resume":
        bench.resume(plan)
