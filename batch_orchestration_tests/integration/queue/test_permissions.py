"""Who may do what: the service works, its group decides, and others do not even look."""

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.queue.pause import read_pause
from batch_orchestration.store.operations import open_replays
from batch_orchestration_tests.support.builders import make_line
from batch_orchestration_tests.support.other_user import (
    COLLEAGUE,
    GROUP,
    OTHER_GROUP,
    SERVICE,
    STRANGER,
    as_user,
    commands_as,
    needs_root,
)

#: What the service does: it admits a file with a line that fails, and answers the other one.
SERVE = """
from pathlib import Path
from batch_orchestration.files.sharing import keep_from_others
from batch_orchestration.files.data_folder import DataFolder
keep_from_others()
folder = DataFolder(Path(root) / "data")
folder.create()
cli = CommandLine(folder)
(folder.inbox / "a.jsonl").write_bytes(Path(root, "input").read_bytes())
(verdict,) = cli.admit_inbox()
plan = folder.read_plan(verdict.batch_id)
cli.settle(plan, failing=[1])
(folder.inbox / "b.jsonl").write_bytes(b"\\n" + Path(root, "input").read_bytes())
cli.admit_inbox()
"""


@pytest.fixture(scope="module", autouse=True)
def umask_of_people() -> Iterator[None]:
    """Write files that others can read: an earlier test may have left us the product's umask."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture(scope="module")
def site(umask_of_people: None) -> Iterator[tuple[Path, str, str]]:
    """A data folder of the service, and two batches: one is answered, the other waits."""
    needs_root()
    # pytest closes its own folder against other users, again and again.
    with tempfile.TemporaryDirectory(prefix="batch-permissions-", dir="/tmp") as folder:
        root = Path(folder)
        root.chmod(0o755)
        os.chown(root, SERVICE, GROUP)
        (root / "input").write_bytes(make_line(0) + make_line(1) + b"not a request\n")
        served = as_user(SERVICE, GROUP, root, SERVE)
        assert served.returncode == 0, served.stderr
        answered, waiting = DataFolder(root / "data").batch_ids()
        yield root, answered, waiting


def test_nothing_of_the_data_folder_can_be_read_by_others(site: tuple[Path, str, str]) -> None:
    root, *_ = site

    open_to_others = [
        f"{path.relative_to(root)} {stat.filemode(path.lstat().st_mode)}"
        for path in [root / "data", *(root / "data").rglob("*")]
        if path.lstat().st_mode & 0o007
    ]

    assert open_to_others == []


def test_what_was_kept_is_read_by_the_group_and_written_by_the_service(
    site: tuple[Path, str, str],
) -> None:
    root, batch_id, _ = site
    folder = DataFolder(root / "data")
    kept = [
        folder.plan_path(batch_id),
        folder.input_path(batch_id),
        folder.journal_path(batch_id, 0),
    ]

    assert {oct(path.stat().st_mode & 0o777) for path in kept} == {"0o640"}
    assert {path.stat().st_uid for path in kept} == {SERVICE}


def test_a_stranger_reads_and_decides_nothing(site: tuple[Path, str, str]) -> None:
    root, batch_id, _ = site

    for command in (["status"], ["cancel", batch_id], ["pause"], ["submit", root / "input"]):
        done = commands_as(STRANGER, OTHER_GROUP, root, command)
        assert done.returncode != 0, command
        assert "Traceback" not in done.stderr, done.stderr
        assert "Permission denied" in done.stderr


def test_a_colleague_in_the_group_submits_pauses_replays_and_cancels(
    site: tuple[Path, str, str],
) -> None:
    root, batch_id, waiting = site
    folder = DataFolder(root / "data")
    (root / "theirs.jsonl").write_bytes(make_line(7))

    done = commands_as(
        *(COLLEAGUE, GROUP, root),
        ["submit", root / "theirs.jsonl"],
        ["pause", "--reason", "theirs"],
        ["resume"],
        ["pause", "--reason", "again"],
        ["replay", batch_id, "--max-tokens", 5],
        ["cancel", waiting],
    )
    assert done.returncode == 0, (done.stderr, done.stdout)

    dropped = folder.inbox / "theirs.jsonl"
    assert (dropped.stat().st_uid, dropped.stat().st_gid) == (COLLEAGUE, GROUP)
    pause, early_end = read_pause(folder), folder.early_end(waiting).read()
    assert (pause and pause.reason, early_end and early_end.actor) == ("again", f"uid {COLLEAGUE}")
    assert len(list(open_replays(folder))) == 1
    # And the service goes on with all of it.
    done = commands_as(*(SERVICE, GROUP, root), ["resume"], ["status", waiting])
    assert done.returncode == 0, (done.stderr, done.stdout)
    assert "cancelling" in done.stdout
    assert read_pause(folder) is None
