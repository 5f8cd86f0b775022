"""A dropped file becomes ours alone, or stays where it lies with a reason; nothing vanishes."""

import os
import shutil
import tempfile
import time
from pathlib import Path

import pytest

from batch_orchestration.admission import taking
from batch_orchestration.admission.results import Rejected
from batch_orchestration_tests.support.builders import make_input
from batch_orchestration_tests.support.other_user import (
    COLLEAGUE,
    GROUP,
    SERVICE,
    as_user,
    needs_root,
)
from batch_orchestration_tests.support.workbench import LATER, Workbench

CONTENT = make_input(3)


@pytest.fixture
def bench(tmp_path):
    return Workbench(tmp_path)


@pytest.fixture
def elsewhere(tmp_path):
    """A bench whose inbox is on another disk."""
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system here")
    folder = Path(tempfile.mkdtemp(dir=other))
    (tmp_path / "inbox").symlink_to(folder)
    yield Workbench(tmp_path)
    shutil.rmtree(folder)


def reasons(bench):
    return {each.path.name: each.reason for each in bench.inbox.waiting(now=LATER)}


def test_a_file_on_another_disk_is_claimed_with_its_side_car(elsewhere):
    path = elsewhere.drop("a.jsonl", CONTENT, meta=b'{"priority": 3}')

    [claim] = elsewhere.inbox.claim_ready(now=LATER)

    assert claim.path.read_bytes() == CONTENT
    assert claim.sidecar.read_bytes() == b'{"priority": 3}'
    assert list(path.parent.glob("*.jsonl*")) == []
    assert list(claim.path.parent.glob(".*.tmp")) == []


def test_a_rejected_file_goes_back_to_another_disk_with_its_side_car(elsewhere):
    verdict = elsewhere.admit_file("a.jsonl", b"not a request\n", meta=b"{}")

    assert isinstance(verdict, Rejected)
    rejected = elsewhere.folder.rejected
    assert (rejected / "a.jsonl").read_bytes() == b"not a request\n"
    assert (rejected / "a.jsonl.meta.json").read_bytes() == b"{}"
    assert elsewhere.inbox.claims() == []


def test_the_owner_of_a_dropped_file_cannot_change_what_is_kept(bench):
    needs_root()
    path = bench.drop("a.jsonl", CONTENT)
    os.chown(path, COLLEAGUE, GROUP)
    (bench.folder.root / "second").hardlink_to(path)
    with path.open("r+b") as held_open:
        [claim] = bench.inbox.claim_ready(now=LATER)
        held_open.write(b"changed")
        held_open.flush()
        (bench.folder.root / "second").write_bytes(b"changed, too")

    assert claim.path.read_bytes() == CONTENT
    assert claim.path.stat().st_uid == os.geteuid()
    assert not path.exists()


@pytest.mark.parametrize("mine", [True, False])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_put_in_the_place_of_a_file_is_not_taken_and_does_not_vanish(
    bench, monkeypatch, mine, kind
):
    path = bench.drop("a.jsonl", CONTENT, meta=b"{}")
    if not mine:
        needs_root()
        os.chown(path, COLLEAGUE, GROUP)
    check = taking._check_removable

    def exchange(source, stats):
        check(source, stats)
        if source == path:
            source.unlink()
            if kind == "link":
                source.symlink_to("/etc/hostname")
            elif kind == "pipe":
                os.mkfifo(source)
            else:
                source.mkdir()

    monkeypatch.setattr(taking, "_check_removable", exchange)
    began = time.monotonic()

    assert bench.inbox.claim_ready(now=LATER) == []

    assert time.monotonic() - began < 30
    assert os.path.lexists(path)
    assert not path.is_file() or path.is_symlink()
    assert (bench.folder.inbox / "a.jsonl.meta.json").exists()
    assert list(bench.folder.claims.glob("a-*")) == []
    assert "a.jsonl" in reasons(bench)


def test_another_file_put_in_the_place_of_one_that_is_copied_is_not_removed(bench, monkeypatch):
    needs_root()
    path = bench.drop("a.jsonl", CONTENT)
    os.chown(path, COLLEAGUE, GROUP)
    copy = taking._copy

    def copy_and_exchange(source, target):
        copy(source, target)
        path.unlink()
        path.write_bytes(b"another file")

    monkeypatch.setattr(taking, "_copy", copy_and_exchange)

    assert bench.inbox.claim_ready(now=LATER) == []

    assert path.read_bytes() == b"another file"
    assert [each.name for each in bench.folder.inbox.iterdir() if each.is_file()] == ["a.jsonl"]


def test_a_link_that_a_crash_left_in_a_claim_goes_back(bench):
    claim = bench.claim("a.jsonl", CONTENT)
    claim.path.unlink()
    claim.path.symlink_to("/etc/hostname")

    assert bench.inbox.claim_ready(now=LATER) == []

    assert (bench.folder.inbox / "a.jsonl").is_symlink()
    assert list(bench.folder.claims.glob("a-*")) == []


def test_a_file_that_cannot_be_taken_says_why_holds_up_no_other_and_is_tried_again(
    bench, monkeypatch
):
    stuck = bench.drop("a.jsonl", CONTENT)
    free = bench.drop("b.jsonl", make_input(2))
    seen = []
    take = taking.take

    def refuse(source, target):
        seen.append(source.name)
        if source == stuck:
            raise taking.NotTaken("the folder is not ours")
        take(source, target)

    monkeypatch.setattr("batch_orchestration.admission.inbox.take", refuse)

    def tick(now):
        del seen[:]
        # As with a queue that is full but for one.
        bench.inbox.claim_ready(
            now=now, choose=lambda files: [f for f in files if not f.reason][:1]
        )
        return list(seen)

    assert tick(LATER) == ["a.jsonl"]
    assert reasons(bench) == {"a.jsonl": "the folder is not ours"}
    assert tick(LATER + 5) == ["b.jsonl"]
    assert not free.exists()
    assert tick(LATER + 10) == []
    assert tick(LATER + 61) == ["a.jsonl"]
    stuck.chmod(0o666)
    assert tick(LATER + 65) == ["a.jsonl"]


IN_A_STICKY_FOLDER = """
from batch_orchestration_tests.support.workbench import LATER, Workbench
import batch_orchestration.admission.inbox
bench = Workbench(Path(root) / "data")
bench.folder.inbox.chmod(0o777)
print([c.file_name for c in bench.inbox.claim_ready(now=LATER)])
print([(w.name, w.reason) for w in bench.inbox.waiting(now=LATER)])
"""


def test_a_file_in_a_sticky_folder_stays_and_says_what_helps():
    needs_root()
    with tempfile.TemporaryDirectory(prefix="batch-sticky-", dir="/tmp") as name:
        root = Path(name)
        shared = root / "data/inbox/shared"
        shared.mkdir(parents=True)
        for folder in (root, root / "data", root / "data/inbox"):
            os.chown(folder, SERVICE, GROUP)
            folder.chmod(0o755)
        shared.chmod(0o1777)
        (shared / "a.jsonl").write_bytes(CONTENT)
        os.chown(shared / "a.jsonl", COLLEAGUE, GROUP)

        done = as_user(SERVICE, GROUP, root, IN_A_STICKY_FOLDER)

        assert "[]\n[('shared/a.jsonl', 'it cannot be taken out of" in done.stdout, done.stderr
        assert f"chmod -t {shared}" in done.stdout
        assert (shared / "a.jsonl").read_bytes() == CONTENT
