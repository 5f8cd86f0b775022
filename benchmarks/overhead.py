"""What our path costs over the bare engine: four ways to answer one file, side by side.

    python -m benchmarks.overhead --model DIR [--requests 160] [--chunk 40] [--rounds 3]

Rivals, each in a process of its own with the same engine flags and the same requests:

    chat       raw `LLM.chat` on all requests at once: the bound, nothing is kept
    run_batch  vLLM's own `run-batch` (its function, engine start apart)
    drained    `LLM.chat` chunk by chunk, waiting for each chunk to end
    ours       window over chunk borders, journal, DuckDB commit; from the first request sent to
               the last chunk committed

Rounds alternate the rivals, so that a machine that drifts drifts for all. Engine start-up is not
counted. Prints a markdown table of medians and ratios to `chat`.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FLAGS: dict[str, Any] = {
    "dtype": "float32",
    "max-model-len": 1024,
    "max-num-seqs": 128,
    "enforce-eager": True,
    "kv-cache-memory-bytes": 1 << 30,
    "no-enable-prefix-caching": True,
}
SKILLS = ("Python", "Rust", "SQL", "Kubernetes", "accounting", "nursing", "welding", "design")


def main() -> None:
    """Run all rivals in turn, or, with --rival, one of them once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=160)
    parser.add_argument("--chunk", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rival", choices=sorted(RIVALS), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rival:
        # Not to standard output: vLLM writes there as well.
        options.file.with_suffix(".seconds").write_text(str(RIVALS[options.rival](options)))
        return
    with tempfile.TemporaryDirectory(prefix="overhead-") as folder:
        options.file = Path(folder) / "requests.jsonl"
        options.file.write_text("".join(f"{json.dumps(r)}\n" for r in requests(options.requests)))
        print_table(measure(options), options)


def requests(count: int) -> Iterator[dict[str, Any]]:
    """Yield requests of uneven lengths, the same ones each time.

    Output lengths are lognormal (sigma 0.8), as real batches are uneven; `ignore_eos` makes every
    rival generate the same number of tokens.
    """
    rng = random.Random(0)
    for number in range(count):
        tokens = min(160, max(2, round(rng.lognormvariate(3.0, 0.8))))
        prompt = f"Candidate {number} knows {', '.join(rng.sample(SKILLS, 3))}. Assess them."
        yield {
            "custom_id": f"r-{number:05d}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": "m",
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": tokens,
                "ignore_eos": True,
                "temperature": 0,
            },
        }


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Return seconds by rival, one per round; every round runs every rival once."""
    seconds: dict[str, list[float]] = {name: [] for name in RIVALS}
    for number in range(options.rounds):
        for name in RIVALS:
            command = [sys.executable, "-m", "benchmarks.overhead", "--model", str(options.model)]
            command += ["--chunk", str(options.chunk), "--rival", name, "--file", str(options.file)]
            with options.file.with_suffix(".log").open("a") as log:
                done = subprocess.run(command, stdout=log, stderr=log, check=False)
            if done.returncode:
                sys.exit(f"{name} failed:\n{options.file.with_suffix('.log').read_text()[-4000:]}")
            seconds[name].append(float(options.file.with_suffix(".seconds").read_text()))
            print(f"round {number + 1} {name}: {seconds[name][-1]:.1f} s", file=sys.stderr)
    return seconds


def print_table(seconds: dict[str, list[float]], options: argparse.Namespace) -> None:
    """Print medians, and the ratio to `chat` of the same round."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{datetime.now(UTC).date()}, {machine}:")
    print(f"{options.requests} requests, chunks of {options.chunk}, {options.rounds} rounds,")
    print(f"model {options.model.name}, engine start-up not counted.\n")
    print("| rival | seconds (median) | min to max | ratio to chat (median of rounds) |")
    print("|---|---:|---:|---:|")
    for name, values in seconds.items():
        ratios = [value / base for value, base in zip(values, seconds["chat"], strict=True)]
        print(
            f"| {name} | {statistics.median(values):.1f} | {min(values):.1f} to {max(values):.1f}"
            f" | {statistics.median(ratios):.2f} |"
        )


def chat(options: argparse.Namespace) -> float:
    """Answer all requests in one call."""
    return _llm_chat(options, lambda bodies: [bodies])


def drained(options: argparse.Namespace) -> float:
    """Answer chunk by chunk, each drained before the next."""
    step = options.chunk
    return _llm_chat(
        options, lambda bodies: [bodies[i : i + step] for i in range(0, len(bodies), step)]
    )


def _llm_chat(options: argparse.Namespace, cut: Callable[[list[Any]], list[list[Any]]]) -> float:
    from vllm import LLM, SamplingParams

    llm = LLM(str(options.model), **_keywords())
    bodies = [json.loads(line)["body"] for line in options.file.read_text().splitlines()]
    llm.chat([bodies[0]["messages"]], SamplingParams(max_tokens=2), use_tqdm=False)
    started = time.perf_counter()
    for part in cut(bodies):
        sampling = [
            SamplingParams(max_tokens=body["max_tokens"], ignore_eos=True, temperature=0)
            for body in part
        ]
        llm.chat([body["messages"] for body in part], sampling, use_tqdm=False)
    return time.perf_counter() - started


def _keywords() -> dict[str, Any]:
    keywords = {name.replace("-", "_"): value for name, value in FLAGS.items()}
    del keywords["no_enable_prefix_caching"]
    return keywords | {"enable_prefix_caching": False}


def run_batch(options: argparse.Namespace) -> float:
    """Answer the file with vLLM's own batch runner."""
    from vllm.entrypoints.launchers import run_batch as launcher
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    output = options.file.with_name(f"run-batch-{os.getpid()}.jsonl")
    argv = ["-i", str(options.file), "-o", str(output), "--model", str(options.model)]
    argv += ["--served-model-name", "m"]
    for name, value in FLAGS.items():
        argv += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    parser = FlexibleArgumentParser()  # type: ignore[no-untyped-call]
    args = launcher.make_arg_parser(parser).parse_args(argv)

    async def answer() -> float:
        async with build_async_engine_client(args) as client:
            started = time.perf_counter()
            await launcher.run_batch(client, args)
            return time.perf_counter() - started

    return asyncio.run(answer())


def ours(options: argparse.Namespace) -> float:
    """Answer the file through admission, window, journal and store."""
    from benchmarks.ours import answer_file

    return answer_file(options.file, model=options.model, flags=FLAGS, chunk=options.chunk)


RIVALS: dict[str, Callable[[argparse.Namespace], float]] = {
    "chat": chat,
    "run_batch": run_batch,
    "drained": drained,
    "ours": ours,
}

if __name__ == "__main__":
    main()
