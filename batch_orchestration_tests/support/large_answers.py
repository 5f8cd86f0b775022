"""A batch with large answers among small ones; as a program, its worker.

`python -m batch_orchestration_tests.support.large_answers FOLDER [scarce]` runs the batch of a data
folder, all of whose answers are in the journals, to the end of its commits, and prints its peak
memory in MiB; with `scarce`, the store has room for two or three large answers of a chunk.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.core.outcomes import Outcome
from batch_orchestration.files import journal_reading as replay
from batch_orchestration.files.journal import Journal
from batch_orchestration.store import rows
from batch_orchestration_tests.support.builders import (
    NOW,
    make_completion,
    make_failure,
    make_provenance,
    make_request,
)
from batch_orchestration_tests.support.scripted_engine import ScriptedEngine
from batch_orchestration_tests.support.workbench import Workbench

MIB = 2**20
LARGE = 20_000
SCARCE = 50_000


def large_completion(size: int, mark: str = "") -> Outcome:
    """An answer of so many bytes, not all of them ASCII."""
    return make_completion(mark + "é" * (size // 2))


def large_failure(size: int, **fields: object) -> Outcome:
    """A refusal in OpenAI's shape, spread over lines."""
    error = {"error": {"message": "no", "detail": "x" * size}}
    return make_failure(body=msgspec.Raw(json.dumps(error, indent=2).encode()), **fields)


def mixed_outcomes() -> list[Outcome]:
    """Of a chunk of ten, seven of which are large, and of one of two that are small."""
    large = [large_completion(LARGE, str(number)) for number in range(5)]
    small, failed = make_completion("yes"), make_failure()
    refused = large_failure(LARGE)
    return [small, *large, refused, failed, refused, small, failed, small]


def make_room_scarce() -> None:
    """Have this process hold and store less at once, so that tests need no megabytes."""
    rows.BUDGET_BYTES = SCARCE
    replay.HELD_BYTES = SCARCE // 2


def answered(bench: Workbench, outcomes: Sequence[Outcome], *, per_chunk: int = 10) -> BatchPlan:
    """A batch all of whose answers are in the journals, and nothing of it in the store."""
    plan = bench.admitted(len(outcomes), requests_per_chunk=per_chunk)
    for chunk in plan.chunks:
        path = bench.folder.journal_path(plan.batch_id, chunk.number)
        with Journal.open(
            path,
            batch_id=plan.batch_id,
            number=chunk.number,
            provenance=make_provenance(),
            at=NOW,
        ) as journal:
            for index in range(chunk.first_index, chunk.first_index + chunk.requests):
                journal.record_submitted(index, 1, NOW)
                journal.record_outcome(make_request(index=index), outcomes[index], 1, NOW + index)
    return plan


def run_worker(root: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the batch of a data folder in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "batch_orchestration_tests.support.large_answers", root, *words],
        env=environment,
        text=True,
        capture_output=True,
        check=False,
    )


def main(root: Path) -> None:
    """Run it, without a request to an engine, and print what it took."""
    bench = Workbench(root)
    (batch_id,) = bench.folder.batch_ids()
    engine = ScriptedEngine()
    bench.run(bench.folder.read_plan(batch_id), engine)
    assert not engine.submissions
    status = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in status if line.startswith("VmHWM"))
    print(int(peak) >> 10)


if __name__ == "__main__":
    if "scarce" in sys.argv:
        make_room_scarce()
    main(Path(sys.argv[1]))
