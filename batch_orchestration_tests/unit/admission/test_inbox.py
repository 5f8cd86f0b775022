"""The inbox claims what is complete, leaves the rest alone, and says why."""

import os
import threading
import time
from pathlib import Path

import pytest

from batch_orchestration.admission.inbox import Inbox
from batch_orchestration.core.errors import ClaimNotFound
from batch_orchestration_tests.support.builders import make_input, make_settings
from batch_orchestration_tests.support.workbench import LATER, Workbench


@pytest.fixture
def bench(tmp_path):
    return Workbench(tmp_path)


def reasons(bench: Workbench, *, now: float = LATER) -> dict[str, str]:
    return {waiting.path.name: waiting.reason for waiting in bench.inbox.waiting(now=now)}


@pytest.mark.parametrize(
    "name",
    [
        "candidates.jsonl",
        "candidates.jsonl.gz",
        "CANDIDATES.JSONL.GZ",
        "two words.jsonl",
        "näïve 名前 🎓.jsonl",
        "x" * 194 + ".jsonl",
        "x" * 249 + ".jsonl",
        "a;rm -rf $HOME`\n'\".jsonl",
    ],
)
def test_a_complete_file_is_claimed_under_its_own_name(bench, name):
    path = bench.drop(name, b"content")

    [claim] = bench.inbox.claim_ready(now=LATER)

    assert not path.exists()
    assert claim.file_name == claim.path.name == name
    assert claim.path.read_bytes() == b"content"
    assert claim.path.parent == bench.folder.claims / claim.claim_id
    assert bench.inbox.claims() == [claim]
    assert bench.inbox.claim(claim.claim_id) == claim


def test_a_name_that_is_not_utf8_is_claimed_and_told_in_readable_form(bench):
    Path(os.fsdecode(os.fsencode(bench.folder.inbox) + b"/caf\xe9.jsonl")).write_bytes(b"content")

    [claim] = bench.inbox.claim_ready(now=LATER)

    assert claim.file_name == "caf?.jsonl"
    assert claim.path.read_bytes() == b"content"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a.txt", "rename to .jsonl"),
        ("a.json", "rename to .jsonl"),
        ("a.csv", "rename to .jsonl"),
        ("jsonl", "rename to .jsonl"),
        ("a.gz", "rename to .jsonl"),
        ("a.jsonl.zst", "unpack it, or pack it with gzip"),
        ("a.JSONL.BZ2", "unpack it, or pack it with gzip"),
        ("a.zip", "unpack it, or pack it with gzip"),
        ("a.tar.gz", "unpack it, or pack it with gzip"),
        ("a.jsonl.part", "unfinished copy"),
        ("a.jsonl.TMP", "unfinished copy"),
        ("a.jsonl~", "unfinished copy"),
        ("~$a.jsonl", "unfinished copy"),
        ("a.jsonl.crdownload", "unfinished copy"),
        ("b.jsonl.meta.json", "a side-car without its file"),
    ],
)
def test_other_files_stay_and_are_told_why(bench, name, reason):
    path = bench.drop(name, b"content")

    assert bench.inbox.claim_ready(now=LATER) == []
    assert path.exists()
    assert reason in reasons(bench)[name]


def test_hidden_files_and_our_own_folder_are_not_mentioned(bench):
    bench.drop(".a.jsonl", b"content")
    bench.drop(".b.jsonl.Xy12", b"half of what rsync copies")
    (bench.folder.rejected / "c.jsonl").write_bytes(b"content")

    assert bench.inbox.claim_ready(now=LATER) == []
    assert reasons(bench) == {}


def test_folders_links_and_pipes_stay(bench, tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(b"secret")
    (bench.folder.inbox / "link.jsonl").symlink_to(outside)
    (bench.folder.inbox / "dangling.jsonl").symlink_to(tmp_path / "nowhere")
    (bench.folder.inbox / "folder.jsonl").mkdir()
    os.mkfifo(bench.folder.inbox / "pipe.jsonl")

    assert bench.inbox.claim_ready(now=LATER) == []
    assert "symbolic link" in reasons(bench)["link.jsonl"]
    assert "symbolic link" in reasons(bench)["dangling.jsonl"]
    assert "folder" in reasons(bench)["folder.jsonl"]
    assert "not a regular file" in reasons(bench)["pipe.jsonl"]


def test_a_file_must_rest_before_it_is_claimed(bench):
    path = bench.drop("a.jsonl", b"content")
    changed = path.stat().st_ctime

    assert bench.inbox.claim_ready(now=changed + 4.9) == []
    assert "must rest 5 s" in reasons(bench, now=changed + 4.9)["a.jsonl"]
    assert bench.inbox.ready_files(now=changed + 5.1) == [path]
    assert reasons(bench, now=changed + 5.1) == {}


def test_an_old_mtime_does_not_make_a_fresh_copy_complete(bench):
    path = bench.drop("a.jsonl", b"content")
    os.utime(path, (0, 0))

    assert bench.inbox.claim_ready(now=time.time()) == []
    assert "still being written" in reasons(bench, now=time.time())["a.jsonl"]


def test_an_mtime_in_the_future_does_not_hold_a_file_for_ever(bench):
    path = bench.drop("a.jsonl", b"content")
    os.utime(path, (LATER, LATER))

    assert bench.inbox.ready_files(now=time.time() + 60) == [path]


def test_clocks_that_disagree_are_told(bench):
    bench.drop("a.jsonl", b"content")

    assert "do the clocks agree?" in reasons(bench, now=time.time() - 3600)["a.jsonl"]


def test_files_are_claimed_in_the_order_of_arrival(bench):
    for name in ("c.jsonl", "a.jsonl", "b.jsonl"):
        bench.drop(name, b"content")
        time.sleep(0.01)

    claims = bench.inbox.claim_ready(now=LATER)

    assert [claim.file_name for claim in claims] == ["c.jsonl", "a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    ("name", "sidecar"),
    [
        ("a.jsonl", "a.jsonl.meta.json"),
        ("a.jsonl", "a.meta.json"),
        ("a.jsonl.gz", "a.jsonl.gz.meta.json"),
        ("a.jsonl.gz", "a.jsonl.meta.json"),
        ("a.JSONL.GZ", "a.meta.json"),
    ],
)
def test_the_side_car_travels_along(bench, name, sidecar):
    bench.drop(name, b"content")
    bench.drop(sidecar, b"{}")
    bench.drop("another.meta.json", b"{}")

    [claim] = bench.inbox.claim_ready(now=LATER)

    assert claim.sidecar == claim.path.with_name(sidecar)
    assert bench.inbox.claims() == [claim]
    assert bench.files_of(bench.folder.inbox) == {"another.meta.json"}


def test_a_side_car_that_is_still_written_holds_its_file(bench):
    path = bench.drop("a.jsonl", b"content")
    resting = path.stat().st_ctime + 5.1
    time.sleep(0.2)
    bench.drop("a.meta.json", b'{"prio')

    assert bench.inbox.claim_ready(now=resting) == []
    assert reasons(bench, now=resting)["a.jsonl"].startswith("its side-car a.meta.json")


def test_a_side_car_that_a_crash_parted_from_its_file_goes_back(bench):
    claim = bench.claim("a.jsonl", b"content", meta=b"{}")
    claim.path.rename(bench.folder.inbox / "a.jsonl")

    [again] = bench.inbox.claim_ready(now=LATER)

    assert again.claim_id != claim.claim_id
    assert again.sidecar is not None
    assert not claim.path.parent.exists()
    assert bench.files_of(bench.folder.inbox) == set()


def test_an_empty_claim_is_removed(bench):
    (bench.folder.claims / "empty-1").mkdir()

    bench.inbox.claim_ready(now=LATER)

    assert bench.inbox.claims() == []
    assert not (bench.folder.claims / "empty-1").exists()


def test_a_file_that_cannot_be_claimed_does_not_hold_up_the_others(bench, monkeypatch):
    bench.drop("a.jsonl", b"content", meta=b"{}")
    bench.drop("b.jsonl", b"content")
    rename = Path.rename

    def refuse(self, target):
        if self.name == "a.jsonl":
            raise PermissionError(1, "not yours")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    claims = bench.inbox.claim_ready(now=LATER)

    assert [claim.file_name for claim in claims] == ["b.jsonl"]
    assert bench.files_of(bench.folder.inbox) == {"a.jsonl", "a.jsonl.meta.json"}


def test_of_many_ticks_at_once_each_file_is_claimed_by_one(bench):
    for number in range(20):
        bench.drop(f"{number}.jsonl", make_input(1), meta=b"{}")
    found = []

    def tick():
        found.extend(Inbox(bench.folder, make_settings(settle_seconds=0)).claim_ready(now=LATER))

    threads = [threading.Thread(target=tick) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(claim.file_name for claim in found) == sorted(f"{n}.jsonl" for n in range(20))
    assert all(claim.sidecar for claim in found)
    assert len(bench.inbox.claims()) == 20


@pytest.mark.parametrize("claim_id", ["nothing", "", "..", "../inbox", ".settled", "a/b"])
def test_a_claim_that_never_was_is_not_found(bench, claim_id):
    bench.drop("a.jsonl", b"content")

    with pytest.raises(ClaimNotFound):
        bench.inbox.claim(claim_id)
