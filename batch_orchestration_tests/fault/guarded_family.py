"""A process with a child that has registered the parent guard, for tests that kill the parent.

`python -m batch_orchestration_tests.fault.guarded_family <start method>`
"""

import multiprocessing
import os
import sys
import time

from batch_orchestration.engines.processes import parent_guard


def child() -> None:
    parent_guard.register()
    parent_guard.register()
    print(os.getpid(), flush=True)
    time.sleep(120)


if __name__ == "__main__":
    process = multiprocessing.get_context(sys.argv[1]).Process(target=child)
    process.start()
    process.join()
