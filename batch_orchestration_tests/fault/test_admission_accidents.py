"""Accidents around a file that is being admitted: writers, twins, sizes, full disks."""

import multiprocessing
import resource
import threading
import time
from pathlib import Path

import pytest

from batch_orchestration.admission.inbox import Inbox
from batch_orchestration.admission.results import Admitted, AlreadyAdmitted
from batch_orchestration.core.errors import DiskFull, FileStillChanging
from batch_orchestration_tests.support.builders import (
    make_body,
    make_input,
    make_line,
    make_settings,
)
from batch_orchestration_tests.support.workbench import LATER, Workbench

SPAWN = multiprocessing.get_context("spawn")
MEGABYTE = 2**20


@pytest.fixture
def bench(tmp_path):
    return Workbench(tmp_path)


def append_lines(path: Path, first: int, last: int, pause_seconds: float) -> None:
    with path.open("ab", buffering=0) as file:
        for number in range(first, last):
            file.write(make_line(number))
            time.sleep(pause_seconds)


def claim_and_admit(root: Path, barrier, answers) -> None:
    bench = Workbench(root)
    barrier.wait(60)
    for claim in bench.inbox.claim_ready(now=LATER):
        answers.put((claim.file_name, str(bench.admit(claim))))
    answers.put(None)


def admit_claim(root: Path, claim_id: str, barrier, answers) -> None:
    bench = Workbench(root)
    claim = bench.inbox.claim(claim_id)
    barrier.wait(60)
    answers.put(bench.admit(claim))


def test_a_file_that_another_process_goes_on_writing_is_admitted_whole_or_goes_back(bench):
    """The copy stalled longer than a file must rest, was claimed, and then went on."""
    claim = bench.claim("a.jsonl", make_input(3000), meta=b'{"priority": 2}')
    writer = SPAWN.Process(target=append_lines, args=(claim.path, 3000, 3400, 0.005))
    size = claim.path.stat().st_size
    writer.start()
    while claim.path.stat().st_size == size:
        time.sleep(0.01)

    with pytest.raises(FileStillChanging, match="back in the inbox"):
        bench.admit(claim)

    writer.join()
    [again] = bench.inbox.claim_ready(now=LATER)
    verdict = bench.admit(again)
    assert isinstance(verdict, Admitted)
    assert (verdict.requests, verdict.faulty) == (3400, 0)
    assert bench.folder.read_plan(verdict.batch_id).options.priority == 2


def test_a_file_that_is_replaced_in_the_inbox_is_another_file(bench):
    claim = bench.claim("a.jsonl", make_input(2000))
    replaced = threading.Event()

    def replace() -> None:
        for number in range(50):
            new = bench.folder.inbox / ".new"
            new.write_bytes(make_input(number + 1))
            new.replace(bench.folder.inbox / "a.jsonl")
            replaced.set()

    thread = threading.Thread(target=replace)
    thread.start()
    replaced.wait()
    verdict = bench.admit(claim)
    thread.join()

    assert isinstance(verdict, Admitted)
    assert verdict.requests == 2000
    assert (bench.folder.inbox / "a.jsonl").read_bytes() == make_input(50)


def test_a_claimed_file_that_is_truncated_and_written_anew_is_not_half_admitted(bench):
    claim = bench.claim("a.jsonl", make_input(5000))
    content, rewriting, done = make_input(4000), threading.Event(), threading.Event()

    def rewrite() -> None:
        with claim.path.open("r+b", buffering=0) as file:
            while not done.is_set():
                file.seek(0)
                file.truncate()
                file.write(content)
                rewriting.set()

    thread = threading.Thread(target=rewrite, daemon=True)
    thread.start()
    rewriting.wait()
    try:
        with pytest.raises(FileStillChanging):
            bench.admit(claim)
    finally:
        done.set()
        thread.join()

    [again] = bench.inbox.claim_ready(now=LATER)
    verdict = bench.admit(again)
    assert isinstance(verdict, Admitted)
    assert (verdict.requests, verdict.faulty) == (4000, 0)


def test_of_equal_files_dropped_at_once_one_becomes_the_batch(bench):
    for number in range(6):
        bench.drop(f"{number}.jsonl", make_input(20))
    barrier, answers = SPAWN.Barrier(2), SPAWN.Queue()
    processes = [
        SPAWN.Process(target=claim_and_admit, args=(bench.folder.root, barrier, answers))
        for _ in range(2)
    ]

    for process in processes:
        process.start()
    told = dict(filter(None, iter_until_none(answers, ends=2)))
    for process in processes:
        process.join()

    assert sorted(told) == [f"{number}.jsonl" for number in range(6)]
    [record] = bench.store.batches()
    assert sum("admitted as" in text for text in told.values()) == 1
    duplicates = bench.folder.batches / record.batch_id / "duplicates"
    assert len(bench.files_of(duplicates)) == 5
    assert bench.files_of(bench.folder.claims) == set()


def iter_until_none(answers, *, ends: int):
    while ends:
        answer = answers.get(timeout=600)
        if answer is None:
            ends -= 1
        yield answer


def test_equal_files_in_claims_of_their_own_are_admitted_once_by_processes_at_once(bench):
    for number in range(3):
        bench.drop(f"{number}.jsonl", make_input(2000))
    claims = Inbox(bench.folder, make_settings(settle_seconds=0)).claim_ready(now=LATER)
    # The first claim is even admitted by two processes.
    claim_ids = [claims[0].claim_id, *(claim.claim_id for claim in claims)]
    barrier, answers = SPAWN.Barrier(4), SPAWN.Queue()
    processes = [
        SPAWN.Process(target=admit_claim, args=(bench.folder.root, claim_id, barrier, answers))
        for claim_id in claim_ids
    ]

    for process in processes:
        process.start()
    verdicts = [answers.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()

    assert len(bench.store.batches()) == 1
    admitted = {v.file_name for v in verdicts if isinstance(v, Admitted)}
    duplicates = {v.file_name for v in verdicts if isinstance(v, AlreadyAdmitted)}
    assert len(admitted) == 1
    assert admitted | duplicates == {"0.jsonl", "1.jsonl", "2.jsonl"}
    assert bench.files_of(bench.folder.claims) == set()


def write_big_file(path: Path, size_bytes: int) -> int:
    """Requests of 8 KB, and one line of 160 MB without a line break inside."""
    requests = 0
    with path.open("wb") as file:
        while file.tell() < size_bytes:
            file.write(make_line(requests, body=make_body("x" * 8000)))
            requests += 1
        file.write(make_line(requests, body=make_body("x" * (160 * MEGABYTE))))
    return requests + 1


def admit_in_little_memory(root: Path, answers) -> None:
    bench = Workbench(root, requests_per_chunk=1000, max_file_bytes=2**40)
    bench.admit_file("small.jsonl", make_input(1) + b"nope\n")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    # The C library reserves 64 MB for a thread that allocates, which DuckDB's do when they like.
    limit = pages * resource.getpagesize() + 128 * MEGABYTE
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    (root / "big").rename(bench.folder.inbox / "big.jsonl")
    [claim] = bench.inbox.claim_ready(now=LATER)
    answers.put(bench.admit(claim))


def test_a_big_file_is_admitted_in_little_memory(bench):
    """300 MB stand for 1 GB: whoever reads the file, or its longest line, into memory, fails."""
    requests = write_big_file(bench.folder.root / "big", 300 * MEGABYTE)
    answers = SPAWN.Queue()
    process = SPAWN.Process(target=admit_in_little_memory, args=(bench.folder.root, answers))

    process.start()
    verdict = answers.get(timeout=600)
    process.join()

    assert (verdict.requests, verdict.faulty) == (requests, 1)


def test_on_a_full_disk_the_claim_waits_for_room(bench):
    claim = bench.claim("a.jsonl", make_input(20) + b"nope\n" * 5000)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(DiskFull):
            bench.admit(claim)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert bench.inbox.claims() == [claim]
    assert isinstance(bench.admit(claim), Admitted)
