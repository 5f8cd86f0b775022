"""Batch files of other projects through the whole path on real vLLM; counts must add up.

    python -m benchmarks.real_files --model DIR --files FOLDER [--cap 8]

Every model name is mapped onto the one that is served (alias `*`), and `max_tokens` is capped so
that a CPU can do it. Prints a markdown table.
"""

import argparse
import tempfile
from pathlib import Path

from batch_orchestration.delivery.assembly import Delivery
from batch_orchestration.engines.vllm.engine import VllmEngine
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.store.store import Store
from benchmarks.ours import answer, deployment


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
        settings = deployment(
            Path(root),
            options.model,
            engine_args={"max-model-len": 2048},
            max_tokens_cap=options.cap,
            requests_per_chunk=50,
        )
        folder = DataFolder(settings.data_dir)
        folder.create()
        engine = VllmEngine(
            str(options.model),
            log_path=folder.logs / "engine.log",
            device="cpu",
            args=settings.engine_args,
        )
        try:
            for file in sorted(options.files.glob("*.jsonl")):
                print_row(file, answer(file, engine, settings, Store(folder.duckdb)).delivery)
        finally:
            engine.stop()


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
