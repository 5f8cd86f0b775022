"""Splits a dropped file, admits its parts, and dies before the n-th change to the disk.

Run as a program: `python -m batch_orchestration_tests.fault.crashing_split [.gz] FOLDER STRIDE`.
After each death a new process does it again; prints what became of it, one JSON line per n.
"""

import itertools
import json
import signal
import sys
from gzip import compress
from pathlib import Path

from batch_orchestration.services.parts import waiting_parts
from batch_orchestration_tests.crashing_admission import (
    META,
    admit_all,
    die_before_change,
    in_child,
)
from batch_orchestration_tests.submission_bench import SubmissionBench, awkward_input

REQUESTS = 40
CONTENT = awkward_input(REQUESTS)


def work(bench: SubmissionBench) -> None:
    admit_all(bench)
    bench.admit_parts()


def report(bench: SubmissionBench, number: int, content: bytes) -> None:
    """Print what is on the disk and in the store."""
    root = bench.folder.root
    files = sorted(p for p in root.rglob("*") if p.is_file() and p.suffix != ".lock")
    plans = [bench.folder.read_plan(batch_id) for batch_id in bench.folder.batch_ids()]
    settled = (bench.folder.claims / ".settled").glob("*.json")
    found = {
        "number": number,
        "copies": [str(p.relative_to(root)) for p in files if p.read_bytes() == content],
        "sidecars": [str(p.relative_to(root)) for p in files if p.read_bytes() == META],
        "submissions": bench.folder.submission_ids(),
        "waiting": [plan.batch_id for plan in waiting_parts(bench.folder)],
        "batches": sorted(record.batch_id for record in bench.store.batches()),
        "planned": [plan.batch_id for plan in plans],
        "requests": [plan.requests for plan in plans],
        "priorities": [plan.options.priority for plan in plans],
        "failures": [[entry.index for entry in bench.settled(plan)] for plan in plans],
        "verdicts": [json.loads(path.read_bytes())["type"] for path in settled],
        "claims": [p.name for p in bench.folder.claims.iterdir() if p.name[0] != "."],
    }
    print(json.dumps(found))


def main(ending: str, folder: str, strides: str) -> None:
    base, stride = Path(folder), int(strides)
    content = compress(CONTENT, mtime=0) if ending == ".gz" else CONTENT
    for number in itertools.count(1, stride):
        root = base / str(number)
        root.mkdir()

        def prepare(root: Path = root) -> None:
            SubmissionBench(root).drop(
                f"a b.jsonl{ending.removeprefix('plain')}", content, meta=META
            )

        def crash(root: Path = root, number: int = number) -> None:
            bench = SubmissionBench(root)
            bench.store.migrate()
            die_before_change(number, str(root))
            work(bench)

        def recover(root: Path = root, number: int = number) -> None:
            bench = SubmissionBench(root)
            work(bench)
            work(bench)
            report(bench, number, content)

        assert in_child(prepare) == 0
        died = in_child(crash)
        assert in_child(recover) == 0, f"recovery failed after a death at change {number}"
        if died == 0:
            break
        assert died == -signal.SIGKILL, f"exit code {died} at change {number}"


if __name__ == "__main__":
    main(*([] if sys.argv[1:2] == [".gz"] else [""]), *sys.argv[1:])
