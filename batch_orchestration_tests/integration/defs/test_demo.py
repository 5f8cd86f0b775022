"""`make demo`: it comes to its end, can be repeated, and leaves nothing running."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
#: Starting Dagster and three runs take most of a minute on two cores, more on busy ones.
DEMO_SECONDS = 900


class Checkout:
    """A copy of what the demo needs, so that its data is not the developer's."""

    def __init__(self, root):
        self.root = root
        for name in ("dagster.yaml", "pyproject.toml", "scripts", "examples"):
            source = REPOSITORY / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, root / name)
        self._mark = f"DEMO_TEST={secrets.token_hex(8)}"

    def start(self, *arguments, **environ):
        """Start the demo; everything that descends from it carries a mark."""
        kept = {n: v for n, v in os.environ.items() if not n.startswith(("BATCH_", "DAGSTER_"))}
        name, _, value = self._mark.partition("=")
        return subprocess.Popen(
            [sys.executable, self.root / "scripts" / "demo.py", *arguments],
            cwd=self.root,
            env={**kept, "BATCH_ENGINE": "simulated", **environ, name: value},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments, **environ):
        """Run the demo to its end; return its exit code and what it printed."""
        process = self.start(*arguments, **environ)
        text, _ = process.communicate(timeout=DEMO_SECONDS)
        return process.returncode, text

    def left_running(self):
        """Command lines of marked processes, found without the demo's own bookkeeping."""
        return list(self.processes().values())

    def processes(self):
        """Command lines of marked processes by pid."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self._mark.encode() in (folder / "environ").read_bytes():
                    found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
        return {pid: command for pid, command in found.items() if command}


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(2 * DEMO_SECONDS)
def test_the_demo_answers_its_file_and_stops_everything(checkout):
    code, text = checkout.run()

    assert code == 0, text
    assert "The engine was simulated: these answers are made up." in text
    (outbox,) = (checkout.root / "data" / "outbox").iterdir()
    assert str(outbox / "output.jsonl") in text
    assert str(outbox / "errors.jsonl") in text
    assert "cand-0001-backend-engineer" in text
    assert checkout.left_running() == []

    started = time.monotonic()
    code, text = checkout.run()

    assert code == 0
    assert f"done earlier, as {outbox.name}" in text
    assert "--again" in text
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_that_is_interrupted_stops_everything(checkout, number):
    process = checkout.start()
    assert process.stdout.readline().startswith("Starting Dagster")
    time.sleep(3)

    process.send_signal(number)
    process.communicate(timeout=600)

    assert process.returncode not in (0, None)
    assert checkout.left_running() == []


def test_without_a_model_the_demo_says_what_to_say(checkout):
    code, text = checkout.run(BATCH_ENGINE="vllm", BATCH_DEVICE="cuda")

    assert code == 1
    assert "make demo BATCH_MODEL=" in text


def test_a_demo_beside_a_running_dagster_does_not_start_another(checkout):
    (checkout.root / "data").mkdir()
    script = (
        "import sys; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire();"
        "print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, checkout.root / "data" / ".dagster-dev.lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    holder.stdout.readline()

    code, text = checkout.run("--serve")

    holder.communicate()
    assert code == 1
    assert "runs in this folder already" in text


@pytest.mark.slow
def test_a_killed_code_server_is_replaced_and_files_are_admitted_again(checkout):
    """`dagster dev` by itself leaves it dead, and with it every sensor, until somebody reloads."""
    process = checkout.start("--serve")
    try:
        assert any("Ctrl-C stops it" in line for line in iter(process.stdout.readline, ""))
        (killed,) = code_servers(checkout)

        os.kill(killed, signal.SIGKILL)
        shutil.copy(checkout.root / "examples/candidates.jsonl", checkout.root / "data" / "inbox")

        # By the run that a sensor has asked for.
        deadline = time.monotonic() + DEMO_SECONDS / 2
        while not list((checkout.root / "data" / "batches").glob("*/plan.json")):
            assert time.monotonic() < deadline, "the file was not admitted"
            time.sleep(0.5)
        assert killed not in code_servers(checkout)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=600)
    assert checkout.left_running() == []


def code_servers(checkout):
    """Pids of the processes that have loaded the code for sensors and launches."""
    return [pid for pid, command in checkout.processes().items() if " api grpc " in command]
