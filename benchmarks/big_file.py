"""A file with four times the requests that may be open, dropped into a default installation.

    python -m benchmarks.big_file [--requests 200000] [--minutes 60]

Real `dagster dev`, default limits, the simulated engine (a real child server that makes answers
up): what is measured is this package, not inference. Prints what admission, answering and assembly
took, as a markdown table; ends with an error unless every request is delivered once, in order.
"""

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from batch_orchestration.core.batches import MAX_REQUESTS_PER_BATCH
from batch_orchestration_tests.support.builders import make_line, make_settings
from batch_orchestration_tests.support.dagster_processes import DagsterProcesses, dagster_dev
from batch_orchestration_tests.support.workbench import Workbench

FILE_NAME = "big.jsonl"
#: For comparison: the smallest file of more than one window.
FEWEST = MAX_REQUESTS_PER_BATCH + 1
_TIMES = """{ runsOrError(limit: 500) { ... on Runs { results {
    runId jobName status startTime endTime tags { key value } } } } }"""


class TimedRun(NamedTuple):
    """A run of Dagster, with POSIX seconds."""

    job: str
    batch: str
    started: float
    ended: float

    @property
    def seconds(self) -> float:
        """How long it worked."""
        return self.ended - self.started


def main() -> None:
    """Measure, check what was delivered, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--minutes", type=float, default=60.0, help="to wait at most")
    parser.add_argument("--per-batch", type=int, help="another window, to try this script out")
    options = parser.parse_args()
    limits = {"BATCH_MAX_REQUESTS_PER_BATCH": str(options.per_batch)} if options.per_batch else {}
    with tempfile.TemporaryDirectory(prefix="big-file-") as folder:
        path = Path(folder) / FILE_NAME
        write_file(path, options.requests)
        peaks = [admission_peak(path, Path(folder), count) for count in (FEWEST, options.requests)]
        (root := Path(folder) / "deployment").mkdir()
        with dagster_dev(root, poll_seconds=1, **limits) as dagster:
            dropped = time.time()
            path.rename(dagster.folder.inbox / FILE_NAME)
            batch_id = wait_until_delivered(dagster, options.minutes * 60)
            delivered = time.time()
            check_delivered(dagster, batch_id, options.requests)
            print_table(dagster, batch_id, options.requests, delivered - dropped, peaks)


def write_file(path: Path, requests: int) -> None:
    """Write so many small chat requests."""
    with path.open("wb") as file:
        file.writelines(make_line(number) for number in range(requests))


def admission_peak(path: Path, folder: Path, requests: int) -> float:
    """Return the peak memory in MiB of a process that admits the first so many requests."""
    ask, answer = multiprocessing.get_context("spawn").Pipe(duplex=False)
    child = multiprocessing.get_context("spawn").Process(
        target=_admit, args=(path, folder / f"admitted-{requests}", requests, answer)
    )
    child.start()
    peak: float = ask.recv()
    child.join()
    return peak


def _admit(path: Path, root: Path, requests: int, answer: Any) -> None:
    bench = Workbench(root)
    bench.settings = make_settings(requests_per_chunk=1000)
    with path.open("rb") as source, (bench.folder.inbox / FILE_NAME).open("wb") as target:
        target.writelines(line for line, _ in zip(source, range(requests), strict=False))
    (claim,) = bench.inbox.claim_ready(now=time.time() + 60)
    bench.admit(claim)
    # Not `ru_maxrss`, which a child takes over from the process that started it.
    status = Path("/proc/self/status").read_text()
    answer.send(int(status.partition("VmHWM:")[2].split()[0]) / 1024)


def wait_until_delivered(dagster: DagsterProcesses, seconds: float) -> str:
    """Return the id of the batch, once its files are there and the runs have ended."""
    (batch_id,) = dagster.wait_until(dagster.folder.batch_ids, seconds, "it is admitted")
    report = dagster.folder.outbox_path(batch_id) / "report.md"
    deadline = time.monotonic() + seconds
    while not (report.exists() and all(run.ended for run in dagster.runs())):
        if time.monotonic() > deadline:
            raise SystemExit(f"not delivered in time\n{dagster.log_tail()}")
        time.sleep(2)
        records = dagster.store.batches()
        done = sum(record.completed + record.failed for record in records)
        print(f"{done:,} requests committed", flush=True)
    return batch_id


def check_delivered(dagster: DagsterProcesses, batch_id: str, requests: int) -> None:
    """Compare the one output file with the input, row by row."""
    outbox = dagster.folder.outbox_path(batch_id)
    if (outbox / "errors.jsonl").read_bytes():
        raise SystemExit("some requests failed")
    with (outbox / "output.jsonl").open("rb") as file:
        rows = 0
        for rows, line in enumerate(file, start=1):
            if json.loads(line)["custom_id"] != f"request-{rows - 1}":
                raise SystemExit(f"row {rows} is not that of request {rows - 1}")
    if rows != requests:
        raise SystemExit(f"{rows:,} rows of {requests:,} requests")


def timed_runs(dagster: DagsterProcesses) -> Iterator[TimedRun]:
    """Yield every run."""
    for run in dagster.graphql(_TIMES)["runsOrError"]["results"]:
        tags = {tag["key"]: tag["value"] for tag in run["tags"]}
        batch = tags.get("batch") or tags.get("dagster/partition", "")
        yield TimedRun(run["jobName"], batch, run["startTime"] or 0, run["endTime"] or 0)


def print_table(
    dagster: DagsterProcesses,
    batch_id: str,
    requests: int,
    seconds: float,
    peaks: list[float],
) -> None:
    """Print what it took."""
    runs = list(timed_runs(dagster))
    plan = dagster.folder.read_plan(batch_id)
    (admission,) = (run.seconds for run in runs if run.job == "admit_batch")
    answering = [run for run in runs if run.job == "answer_chunks"]
    (delivery,) = (run.seconds for run in runs if run.job == "deliver_batch")
    busy = max(run.ended for run in answering) - min(run.started for run in answering)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"\n{datetime.now(UTC).date()}, {machine}, **simulated engine**, default limits:\n")
    print("| what | |\n|---|---:|")
    rows = [
        ("requests", f"{requests:,} in {plan.size_bytes / 2**20:,.0f} MiB"),
        ("chunks, and runs that answered them", f"{len(plan.chunks)}, {len(answering)}"),
        ("rows of the one output file, in input order", f"{requests:,}"),
        ("admission (its run, from start to end)", f"{admission:,.1f} s"),
        (f"peak memory of a process that admits {FEWEST:,} requests", f"{peaks[0]:,.0f} MiB"),
        (f"peak memory of a process that admits {requests:,}", f"{peaks[1]:,.0f} MiB"),
        ("answering (first run to last, pauses included)", f"{busy:,.0f} s"),
        ("requests per second meanwhile", f"{requests / busy:,.0f}"),
        ("delivery (its run)", f"{delivery:,.1f} s"),
        ("from the drop to the end", f"{seconds:,.0f} s"),
    ]
    for name, value in rows:
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    main()
