"""Runs the one batch of a data folder, of which every request is refused; dies at a crash point.

Run as a program: `CRASH_POINT=… python -m batch_orchestration_tests.fault.crashing_halt FOLDER
run|resume`.
"""

import sys
from pathlib import Path

from batch_orchestration_tests.halting_bench import HaltingBench, refusing


def main(root: Path, step: str) -> None:
    bench = HaltingBench(root)
    (batch_id,) = bench.folder.batch_ids()
    plan = bench.folder.read_plan(batch_id)
    if step == "run":
        bench.run(plan, refusing("question"))
    else:
        bench.go_on(plan)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
