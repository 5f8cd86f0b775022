"""Batch files of other projects through the whole path on real vLLM; counts must add up.

    python benchmarks/real_files.py --model DIR --files FOLDER [--cap 8]

Every model name is mapped onto the one that is served (alias `*`), and `max_tokens` is capped so
that a CPU can do it. Prints a markdown table.
"""

import argparse
import tempfile
import time
from pathlib import Path

from ours import MAX_LINE_BYTES, run_policy

from batch_orchestration.admission.admission import AdmissionSettings, admit
from batch_orchestration.admission.inbox import Inbox
from batch_orchestration.admission.results import Admitted
from batch_orchestration.admission.submit import submit
from batch_orchestration.core.batches import BatchOptions
from batch_orchestration.delivery.assembly import Delivery, assemble
from batch_orchestration.engines.vllm.engine import VllmEngine
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.inference.run import run_chunks
from batch_orchestration.store.store import Store


def main() -> None:
    """Answer every file of the folder and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--files", type=Path, required=True)
    parser.add_argument("--cap", type=int, default=8)
    options = parser.parse_args()
    print("| file | lines | answered | failed | by code | output tokens/s |")
    print("|---|---:|---:|---:|---|---:|")
    with tempfile.TemporaryDirectory(prefix="real-files-") as root:
        folder = DataFolder(Path(root))
        folder.create()
        engine = VllmEngine(
            str(options.model),
            log_path=folder.logs / "engine.log",
            device="cpu",
            args={"max-model-len": 2048},
        )
        try:
            for file in sorted(options.files.glob("*.jsonl")):
                report = answer(file, engine, folder, served=options.model.name, cap=options.cap)
                print_row(file, report)
        finally:
            engine.stop()


def answer(
    file: Path, engine: VllmEngine, folder: DataFolder, *, served: str, cap: int
) -> Delivery:
    """Answer one file from inbox to outbox."""
    store = Store(folder.duckdb)
    submit(file, BatchOptions(), folder)
    (claim,) = Inbox(folder, settle_seconds=0).claim_ready(now=time.time() + 1)
    settings = AdmissionSettings(
        requests_per_chunk=50,
        max_line_bytes=MAX_LINE_BYTES,
        model_required=False,
        answer_settings={},
    )
    batch = admit(claim, folder=folder, store=store, settings=settings)
    assert isinstance(batch, Admitted), batch
    for _ in run_chunks(
        {batch.batch_id: range(batch.chunks)},
        engine=engine,
        folder=folder,
        store=store,
        run_id="real-files",
        policy=run_policy(served=served, max_tokens_cap=cap),
    ):
        pass
    return assemble(batch.batch_id, folder=folder, store=store, clock=time.time)


def print_row(file: Path, report: Delivery) -> None:
    """Print the counts, after making sure that they add up to the lines of the file."""
    totals = report.totals
    lines = sum(1 for line in file.read_bytes().split(b"\n") if line.strip())
    assert totals.completed + totals.failed == lines, (totals, lines)
    seconds = (totals.last_at or 0) - (totals.first_at or 0)
    codes = ", ".join(f"{code} {count}" for code, count in totals.failures_by_code.items())
    speed = totals.completion_tokens / seconds if seconds else 0
    print(
        f"| {file.name} | {lines} | {totals.completed} | {totals.failed} | {codes} | {speed:.0f} |"
    )


if __name__ == "__main__":
    main()
