"""Estimates against what batches take: calibrates real vLLM, then runs batch files and scores them.

    python benchmarks/estimates.py --model DIR --files FOLDER [--only NAME …] [--cap 16]

Each file runs twice: first with the calibration alone, then with the history of all files of the
first round. Every model name is mapped onto the one that is served (alias `*`), and `max_tokens` is
capped so that a CPU can do it. Prints markdown; progress goes to stderr.
"""

import argparse
import asyncio
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from batch_orchestration.core.batches import BatchOptions
from batch_orchestration.engines.openai_server import ServerOptions
from batch_orchestration.engines.vllm.engine import VllmEngine
from batch_orchestration.estimates.batch_estimates import read_estimate
from batch_orchestration.estimates.benchmark import CalibrationReport, calibrate
from batch_orchestration.estimates.derivation import DEFAULT_IN_FLIGHT
from batch_orchestration.estimates.engine import engine_in_force
from batch_orchestration.estimates.estimate import Estimate, seconds_band, tokens_band
from batch_orchestration.estimates.scores import Score, accuracy
from batch_orchestration.estimates.tables import EstimateTables, cache_engine_info
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.store.store import Store
from benchmarks.ours import answer, deployment

ROUNDS = ("calibration only", "with history")
CONTEXT = 2048


def main() -> None:
    """Calibrate, run every file in both rounds, and print what came of it."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="estimates-") as root:
        bench = Bench(Path(root), options)
        try:
            report = bench.calibrate(requests=options.requests, seconds=options.seconds)
            scored = list(bench.run_all())
        finally:
            bench.engine.stop()
    print(render(options, report, scored))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--files", type=Path, required=True, help="folder of batch files")
    parser.add_argument("--only", nargs="*", help="names of files; default: all of the folder")
    parser.add_argument("--cap", type=int, default=16, help="upper bound of max_tokens")
    parser.add_argument("--requests", type=int, default=24, help="of a calibration's full round")
    parser.add_argument("--seconds", type=float, default=240, help="of the calibration")
    return parser.parse_args()


class Bench:
    """A deployment in a temporary folder, with one engine for everything."""

    def __init__(self, root: Path, options: argparse.Namespace) -> None:
        names = options.only or [path.name for path in options.files.glob("*.jsonl")]
        self.files = [options.files / name for name in sorted(names)]
        self.settings = deployment(
            root,
            options.model,
            engine_args={"max-model-len": CONTEXT},
            max_tokens_cap=options.cap,
            requests_per_chunk=50,
        )
        self.folder = DataFolder(root)
        self.folder.create()
        self.store = Store(self.folder.duckdb)
        self.engine = VllmEngine(
            str(options.model),
            log_path=self.folder.logs / "engine.log",
            device="cpu",
            args=self.settings.engine_args,
            options=ServerOptions(connections=DEFAULT_IN_FLIGHT),
        )

    def calibrate(self, *, requests: int, seconds: float) -> CalibrationReport:
        """Do what the job `benchmark_engine` does."""
        in_force = engine_in_force(self.settings)
        report = asyncio.run(
            calibrate(self.engine, in_force, requests=requests, seconds=seconds, run_id="benchmark")
        )
        EstimateTables(self.store).add_measurements(report.rounds)
        cache_engine_info(self.engine, in_force, self.store, at=time.time())
        took = sum(measured.seconds for measured in report.rounds)
        _say(f"calibrated in {took:.0f} s: {report.throughput}")
        return report

    def run_all(self) -> Iterator[tuple[str, str, Estimate, Score]]:
        """Yield round, file, estimate and score of every batch."""
        for number, name in enumerate(ROUNDS):
            for file in self.files:
                estimate, score = self.run(file, BatchOptions(metadata={"round": str(number)}))
                seconds = estimate.seconds
                expected = "not measured" if seconds is None else seconds_band(seconds)
                _say(f"{name}, {file.name}: {expected}, {score}")
                yield name, file.name, estimate, score

    def run(self, file: Path, options: BatchOptions) -> tuple[Estimate, Score]:
        """Answer one file from inbox to outbox; return what was expected and what it took."""
        answered = answer(file, self.engine, self.settings, self.store, options=options)
        batch_id = answered.delivery.files.folder.name
        estimate = read_estimate(self.folder, batch_id)
        score = EstimateTables(self.store).score_of(batch_id)
        assert estimate is not None
        assert score is not None
        return estimate, score


def render(
    options: argparse.Namespace,
    report: CalibrationReport,
    scored: list[tuple[str, str, Estimate, Score]],
) -> str:
    """Return the tables."""
    load = os.getloadavg()
    lines = [
        f"{time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}, {options.model.name} in float32,"
        f" `max_tokens` capped at {options.cap}; {os.cpu_count()} cores ({platform.machine()}),"
        f" load of the last 15 minutes {load[2]:.1f}.",
        "",
        f"Calibration: {len(report.rounds)} rounds,"
        f" {sum(measured.seconds for measured in report.rounds):.0f} s; costs in seconds:"
        f" `{msgspec.json.encode(report.throughput).decode()}`",
        "",
        "| round | file | requests | prompt tokens, expected | actual | answer tokens, expected |"
        " actual | time, expected | actual | error | in band |",
        "|---|---|---:|---|---:|---|---:|---|---:|---:|---|",
    ]
    for name, file, estimate, score in scored:
        seconds = "" if estimate.seconds is None else seconds_band(estimate.seconds)
        lines.append(
            f"| {name} | {file} | {estimate.requests} | {tokens_band(estimate.prompt_tokens)} |"
            f" {score.actual_prompt_tokens:,} | {tokens_band(estimate.completion_tokens)} |"
            f" {score.actual_completion_tokens:,} | {seconds} | {score.actual_seconds:.1f} s |"
            f" {score.error:.0%} | {'yes' if score.inside else 'no'} |"
        )
    for name in ROUNDS:
        of_round = accuracy([score for which, _, _, score in scored if which == name])
        lines.append(
            f"\n{name.capitalize()}: median error of the time {of_round.median_error:.0%},"
            f" of the tokens {of_round.median_token_error:.0%};"
            f" {of_round.inside:.0%} of {of_round.with_seconds} inside the band."
        )
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
