"""What another user of this machine does: a child process of theirs, in one group with us or not.

The interpreter may lie where they cannot read, so everything is imported before we become them.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: Users and groups need no names.
SERVICE, COLLEAGUE, STRANGER = 61_001, 61_002, 61_003
GROUP, OTHER_GROUP = 61_100, 61_200

_PROGRAM = """
import os, sys, tempfile, traceback
from pathlib import Path
user, group, root = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
from batch_orchestration.cli import main
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration_tests.support.command_line import CommandLine
os.environ.update(BATCH_ENGINE="simulated", BATCH_SERVED_MODEL_NAME="demo-model")
with tempfile.TemporaryDirectory() as trial:  # has everything imported
    os.environ["BATCH_DATA_DIR"] = trial + "/data"
    folder = DataFolder(Path(trial) / "data")
    folder.create()
    cli = CommandLine(folder)
    plan = cli.admit_batch(Path(trial))
    cli.settle(plan, failing=[1])
    for words in (["status"], ["status", plan.batch_id], ["replay", "no-batch"], ["pause"]):
        try:
            main(words, standalone_mode=False)
        except Exception:
            traceback.format_exc()
os.chdir("/")
os.setgroups([]); os.setresgid(group, group, group); os.setresuid(user, user, user)
os.umask(0o022)
os.environ.update(HOME=root, BATCH_DATA_DIR=root + "/data")
print("BECAME", flush=True)
"""
_COMMANDS = """
import json
for words in json.loads(sys.argv[4]):
    try:
        main(words, prog_name="batch-orchestration")
    except SystemExit as end:
        if end.code:
            sys.exit(f"{words} ended with {end.code}")
"""


def needs_root() -> None:
    """Skip the test where nobody may become another user."""
    if os.getuid() != 0:
        pytest.skip("only root can become several users")


def as_user(user: int, group: int, root: Path, program: str) -> "subprocess.CompletedProcess[str]":
    """Run a program as another user; `root` has the data folder."""
    return _run([_PROGRAM + program, str(user), str(group), str(root)])


def commands_as(
    user: int, group: int, root: Path, *commands: Sequence[object]
) -> "subprocess.CompletedProcess[str]":
    """Run commands of the command line as another user, up to the first that fails."""
    words = json.dumps([[str(word) for word in command] for command in commands])
    return _run([_PROGRAM + _COMMANDS, str(user), str(group), str(root), words])


def _run(arguments: list[str]) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600
    )
