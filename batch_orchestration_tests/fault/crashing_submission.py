"""Delivers the last part of a submission, and dies before the n-th change to the disk, for each n.

Run as a program: `python -m batch_orchestration_tests.fault.crashing_submission FOLDER`. After each
death a new process delivers it again; prints what became of it, one JSON line per n.
"""

import itertools
import json
import shutil
import signal
import sys
from pathlib import Path

from batch_orchestration_tests.builders import make_input
from batch_orchestration_tests.crashing_admission import die_before_change, in_child
from batch_orchestration_tests.letter_bench import refusing
from batch_orchestration_tests.submission_bench import SubmissionBench

REQUESTS, FAILING = 60, (7, 55)


def prepare(root: Path) -> None:
    """Leave a submission whose last part is answered, and the others delivered."""
    bench = SubmissionBench(root)
    bench.split("people.jsonl", make_input(REQUESTS))
    *before, last = bench.admit_parts()
    for plan in before:
        bench.answer(plan, refusing(*FAILING))
        bench.deliver(plan.batch_id)
    bench.answer(last, refusing(*FAILING))


def deliver(root: Path) -> None:
    """Do what the run of `deliver_batch` does."""
    bench = SubmissionBench(root)
    (submission_id,) = bench.folder.submission_ids()
    bench.deliver(bench.folder.read_submission(submission_id).parts[-1])


def report(root: Path, number: int, seen_at_death: list[str]) -> None:
    """Print what is on the disk and in the store."""
    bench = SubmissionBench(root)
    (submission_id,) = bench.folder.submission_ids()
    outbox = bench.folder.outbox_path(submission_id)
    names = ("output.jsonl", "errors.jsonl")
    found = {
        "number": number,
        "seen_at_death": seen_at_death,
        "files": sorted(path.name for path in outbox.iterdir()),
        "statuses": [str(record.status) for record in bench.store.batches()],
        **{n: [row["custom_id"] for row in bench.delivered(submission_id, n)] for n in names},
    }
    print(json.dumps(found))


def main(base: Path) -> None:
    prepared = base / "prepared"
    prepared.mkdir()
    assert in_child(lambda: prepare(prepared)) == 0
    for number in itertools.count(1):
        root = base / str(number)
        shutil.copytree(prepared, root)

        def crash(root: Path = root, number: int = number) -> None:
            die_before_change(number, str(root))
            deliver(root)

        died = in_child(crash)
        seen = sorted(str(path.relative_to(root)) for path in root.glob("outbox/*/[!.]*"))
        assert in_child(lambda root=root: deliver(root)) == 0, f"not healed after change {number}"
        in_child(lambda root=root, n=number, seen=seen: report(root, n, seen))
        if died == 0:
            break
        assert died == -signal.SIGKILL, f"exit code {died} at change {number}"
        shutil.rmtree(root)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
