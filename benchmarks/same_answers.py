"""Whether our answers are those of vLLM's own batch runner, request by request.

    python -m benchmarks.same_answers --model DIR [--requests 60]

Answers one file at temperature 0 with `vllm run-batch` and with ours, on the same model and flags,
and compares the text per custom_id. Batching changes the order of floating-point sums, so that a
token of nearly equal rank may win the other way round; the script counts how often, and shows the
first differences.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.ours import answer_lines
from benchmarks.overhead import FLAGS, requests


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=60)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="same-answers-") as folder:
        file = Path(folder) / "requests.jsonl"
        lines = [json.dumps(request) for request in requests(options.requests)]
        file.write_text("".join(f"{line}\n" for line in lines))
        theirs = texts(run_batch(file, options.model).read_text().splitlines())
        ours = texts(answer_lines(file, model=options.model, flags=FLAGS, chunk=20))
    report(theirs, ours)


def run_batch(file: Path, model: Path) -> Path:
    """Answer the file with vLLM's batch runner; return its output file."""
    output = file.with_name("theirs.jsonl")
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.run_batch"]
    command += ["-i", str(file), "-o", str(output), "--model", str(model)]
    command += ["--served-model-name", "m"]
    for name, value in FLAGS.items():
        command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    subprocess.run(command, check=True, capture_output=True)
    return output


def texts(lines: list[str]) -> dict[str, str]:
    """Return the answered text by custom_id."""
    parsed = [json.loads(line) for line in lines]
    return {
        line["custom_id"]: line["response"]["body"]["choices"][0]["message"]["content"]
        for line in parsed
    }


def report(theirs: dict[str, str], ours: dict[str, str]) -> None:
    """Print the rate of equal answers and where the others part."""
    assert theirs.keys() == ours.keys(), theirs.keys() ^ ours.keys()
    different = [key for key in theirs if theirs[key] != ours[key]]
    equal = len(theirs) - len(different)
    print(f"{equal} of {len(theirs)} answers are equal ({100 * equal / len(theirs):.1f} %)")
    for key in different[:5]:
        pair = zip(theirs[key], ours[key], strict=False)
        same = next((n for n, (a, b) in enumerate(pair) if a != b), 0)
        print(f"{key}: equal for {same} characters, then")
        print(
            f"  theirs {theirs[key][same : same + 60]!r}\n  ours   {ours[key][same : same + 60]!r}"
        )


if __name__ == "__main__":
    main()
