"""A run in a process that may open few files: says how it went as one line of JSON.

`python -m batch_orchestration_tests.fault.limited_run FOLDER REQUESTS PER_CHUNK SOFT HARD PORT`
asks a server at that port with a window of 1,024; port 0 stands for an engine in the process
itself, which takes every descriptor away for a while in the middle of the batch.
"""

import contextlib
import json
import os
import resource
import sys
import threading
from pathlib import Path

from batch_orchestration.engines.base import Engine
from batch_orchestration.engines.openai_server import OpenAIServerEngine
from batch_orchestration.inference.open_files import raise_open_file_limit
from batch_orchestration.store.connection import replacing
from batch_orchestration_tests.support.scripted_engine import ScriptedEngine
from batch_orchestration_tests.support.workbench import Workbench

WINDOW = 1024
#: Longer than between two looks at decisions and at obstacles.
STARVING_SECONDS = 3.0


class Thief:
    """Takes every descriptor that is left, once, and gives them back after a while.

    Not while DuckDB is at work, which would end the process.
    """

    def __init__(self, store: Path) -> None:
        self._store = store
        self.taken: list[int] = []

    def script(self, body: bytes, submitted: int) -> None:
        if b"question 40" in body and not self.taken:
            with replacing(self._store), contextlib.suppress(OSError):
                while True:
                    self.taken.append(os.open(os.devnull, os.O_RDONLY))
            threading.Timer(STARVING_SECONDS, self._give_back).start()

    def _give_back(self) -> None:
        for descriptor in self.taken:
            os.close(descriptor)


def main() -> None:
    root, *numbers = sys.argv[1:]
    requests, per_chunk, soft, hard, port = map(int, numbers)
    bench = Workbench(Path(root))
    plan = bench.admitted(requests, requests_per_chunk=per_chunk)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    limit = raise_open_file_limit()
    thief = Thief(bench.folder.duckdb)
    engine: Engine = ScriptedEngine(thief.script)
    if port:
        engine = OpenAIServerEngine(f"http://127.0.0.1:{port}")
    commits = bench.run(plan, engine, in_flight=WINDOW if port else 8)
    result = {
        "limit": limit,
        "stolen": len(thief.taken),
        "committed": len(commits),
        "indices": bench.indices(plan),
        "completed": sum(commit.report.completed for commit in commits),
        "attempts": sum(commit.report.attempts for commit in commits),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
