"""Cancels the one batch of a data folder, or delivers it, and dies at a crash point.

Run as a program: `CRASH_POINT=… python -m batch_orchestration_tests.fault.crashing_closing FOLDER
cancel|look|deliver|resume`.
"""

import sys
from pathlib import Path

from batch_orchestration_tests.closing_bench import ClosingBench


def main(root: Path, step: str) -> None:
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


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
