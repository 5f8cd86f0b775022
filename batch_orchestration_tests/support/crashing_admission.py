"""Admits a dropped file and dies by SIGKILL before the n-th change to the disk, for each n.

As a program: `python -m …support.crashing_admission SCENARIO FOLDER STRIDE`.
After each death the claims are admitted again in a new process; prints what became of the files,
one JSON line per n. Each process is forked from here, so that nothing is imported twice.
"""

import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from gzip import compress
from pathlib import Path
from typing import Any

from batch_orchestration.admission.claims import ClaimFolder
from batch_orchestration_tests.support.builders import make_input, make_line
from batch_orchestration_tests.support.workbench import Workbench

META = b'{"priority": 7}'
CONTENT = make_input(15) + b"not json\n" + make_line(99)
_CHANGES = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
_WRITING = os.O_WRONLY | os.O_RDWR

SCENARIOS: dict[str, tuple[str, bytes]] = {
    "admitted": ("a b.jsonl", CONTENT),
    "folder": ("alice/high/a b.jsonl", CONTENT),
    "gzip": ("a b.jsonl.gz", compress(CONTENT, mtime=0)),
    "rejected": ("a b.jsonl", b"not json\nat all\n"),
    "rejected_gzip": ("a b.jsonl.gz", compress(b"not json\nat all\n", mtime=0)),
    "duplicate": ("a b.jsonl", CONTENT),
    "held": ("alice/a b.jsonl", make_input(15)),
}
#: Beside the first batch, of 17 requests, there is no capacity for the second file of `held`.
CAPACITY_FOR_ONE = {"max_requests_per_batch": 20, "max_queued_requests": 20}


def bench_of(scenario: str, root: Path) -> Workbench:
    return Workbench(root, **(CAPACITY_FOR_ONE if scenario == "held" else {}))


def admit_all(bench: Workbench) -> None:
    bench.claim_admissible()
    for claim in bench.inbox.claims():
        bench.admit(claim)


def die_before_change(number: int, root: str) -> None:
    """Arrange for this process to be killed before its n-th change below the folder."""
    changes = itertools.count(1)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            relevant = isinstance(flags, int) and bool(flags & _WRITING)
        else:
            path, relevant = (arguments or ("",))[0], event in _CHANGES
        if relevant and str(path).startswith(root) and next(changes) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def in_child(work: Callable[[], object]) -> int:
    """Run in a forked process; return its exit code, negative if a signal ended it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def report(bench: Workbench, number: int, content: bytes) -> None:
    """Print what is on the disk and in the store."""
    root = bench.folder.root
    files = sorted(p for p in root.rglob("*") if p.is_file() and p.suffix != ".lock")
    plans = [bench.folder.read_plan(batch_id) for batch_id in bench.folder.batch_ids()]
    settled = (bench.folder.claims / ".settled").glob("*.json")
    verdicts = [ClaimFolder(bench.folder, path.stem).settled_result() for path in settled]
    found = {
        "number": number,
        "copies": [str(p.relative_to(root)) for p in files if p.read_bytes() == content],
        "sidecars": [str(p.relative_to(root)) for p in files if p.read_bytes() == META],
        "batches": [record.batch_id for record in bench.store.batches()],
        "planned": [plan.batch_id for plan in plans],
        "sources": [plan.source for plan in plans],
        "priorities": [plan.options.priority for plan in plans],
        "failures": [[entry.index for entry in bench.settled(plan)] for plan in plans],
        "verdicts": sorted(type(verdict).__name__ for verdict in verdicts),
        "scans": [p.name for p in bench.folder.scans.glob("*.json")],
        "claims": [p.name for p in bench.folder.claims.iterdir() if p.name[0] != "."],
        "locks": [p.name for p in (bench.folder.claims / ".locks").iterdir()],
        "errors": sorted(p.name for p in bench.folder.rejected.glob("*.errors.json")),
    }
    print(json.dumps(found))


def main(scenario: str, base: Path, stride: int) -> None:
    name, content = SCENARIOS[scenario]
    for number in itertools.count(1, stride):
        root = base / str(number)
        root.mkdir()

        def prepare(root: Path = root) -> None:
            bench = bench_of(scenario, root)
            if scenario in ("duplicate", "held"):
                bench.drop("first.jsonl", CONTENT, meta=META)
                admit_all(bench)
            bench.drop(name, content, meta=META)

        def crash(root: Path = root, number: int = number) -> None:
            bench = bench_of(scenario, root)
            bench.store.migrate()
            die_before_change(number, str(root))
            admit_all(bench)

        def recover(root: Path = root, number: int = number) -> None:
            bench = bench_of(scenario, root)
            admit_all(bench)
            bench.claim_admissible()
            report(bench, number, content)

        assert in_child(prepare) == 0
        died = in_child(crash)
        assert in_child(recover) == 0, f"recovery failed after a death at change {number}"
        if died == 0:
            break
        assert died == -signal.SIGKILL, f"exit code {died} at change {number}"


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
