"""Admissions that keep failing by their file: it is rejected, and is in nobody's way meanwhile."""

import json
from pathlib import Path

import msgspec
import pytest

from batch_orchestration.admission import admission
from batch_orchestration.admission.admission import MAX_ADMISSION_FAILURES
from batch_orchestration.admission.claims import ClaimFolder
from batch_orchestration.admission.results import Admitted, Rejected
from batch_orchestration.core.errors import StorageError, StoreLocked
from batch_orchestration.status.overview import rejections
from batch_orchestration_tests.support.builders import make_input, make_settings
from batch_orchestration_tests.support.workbench import Workbench


@pytest.fixture
def bench(tmp_path):
    return Workbench(tmp_path)


@pytest.fixture
def fail(monkeypatch):
    """Have the reading of files with certain content raise."""
    raised: dict[bytes, Exception | type[BaseException]] = {}
    read = admission.BatchFileReading.read

    def broken(self, file):
        content = file.read()
        file.seek(0)
        for word, error in raised.items():
            if word in content:
                raise error
        return read(self, file)

    monkeypatch.setattr(admission.BatchFileReading, "read", broken)
    return raised


def attempt(bench, claim, error):
    kind = type(error) if isinstance(error, BaseException) else error
    with pytest.raises((kind, StorageError)):
        bench.admit(claim)
    return bench.inbox.claim(claim.claim_id)


def claim_next(bench, *, most_batches):
    bench.settings = make_settings(max_unfinished_batches=most_batches)
    bench.claim_admissible()
    return [claim.file_name for claim in bench.inbox.claims()]


@pytest.mark.parametrize(
    "error",
    [OverflowError("int too large to convert to float"), RecursionError("too deep"), KeyError("x")],
    ids=lambda error: type(error).__name__,
)
def test_a_file_whose_admission_keeps_failing_is_rejected_with_the_reason(bench, fail, error):
    fail[b"request-3"] = error
    claim = bench.claim("odd.jsonl", make_input(5), meta=b'{"priority": 3}')
    for _ in range(MAX_ADMISSION_FAILURES - 1):
        claim = attempt(bench, claim, error)

    verdict = bench.admit(claim)

    assert isinstance(verdict, Rejected)
    assert f"failed {MAX_ADMISSION_FAILURES} times" in verdict.reason
    assert type(error).__name__ in verdict.reason
    assert Path(verdict.rejected_path).read_bytes() == make_input(5)
    assert json.loads(Path(verdict.errors_path).read_text())["reason"] == verdict.reason
    assert bench.files_of(bench.folder.claims) == set()
    assert [known.reason for known in rejections(bench.folder)] == [verdict.reason]


def test_a_reason_that_no_file_can_hold_is_written_all_the_same(bench, fail):
    fail[b"request-3"] = ValueError("half of an emoji: \ud83d")
    claim = bench.claim("odd.jsonl", make_input(5))
    for _ in range(MAX_ADMISSION_FAILURES - 1):
        claim = attempt(bench, claim, ValueError)

    verdict = bench.admit(claim)

    assert isinstance(verdict, Rejected)
    assert "half of an emoji" in json.loads(Path(verdict.errors_path).read_text())["reason"]


def test_a_file_that_is_admitted_in_the_end_is_a_batch_like_any_other(bench, fail):
    fail[b"request-3"] = KeyError("x")
    claim = bench.claim("odd.jsonl", make_input(5))
    claim = attempt(bench, claim, KeyError)
    assert claim.attempts.failed == 1
    assert "KeyError" in str(claim.attempts)
    fail.clear()

    verdict = bench.admit(claim)

    assert isinstance(verdict, Admitted)
    assert bench.files_of(bench.folder.claims) == set()


@pytest.mark.parametrize(
    "error",
    [StoreLocked("held by pid 7"), OSError(28, "No space left on device"), MemoryError()],
    ids=lambda error: type(error).__name__,
)
def test_what_is_no_fault_of_the_file_is_tried_again_without_end(bench, fail, error):
    fail[b"request-3"] = error
    claim = bench.claim("odd.jsonl", make_input(5))
    for _ in range(MAX_ADMISSION_FAILURES + 2):
        claim = attempt(bench, claim, error)
    assert not claim.attempts.failing
    fail.clear()

    assert isinstance(bench.admit(claim), Admitted)


def test_failing_claims_hold_no_place(bench, fail):
    """Five of them once kept everybody's files out, whatever their priority."""
    fail[b"request"] = OverflowError("too large")
    for number in range(5):
        bench.drop(f"odd-{number}.jsonl", make_input(2 + number))
    assert len(claim_next(bench, most_batches=5)) == 5
    bench.drop("good.jsonl", make_input(9))
    assert "good.jsonl" not in claim_next(bench, most_batches=5)
    for claim in bench.inbox.claims():
        attempt(bench, claim, OverflowError)

    assert "good.jsonl" in claim_next(bench, most_batches=5)


def test_claims_whose_admission_is_killed_hold_no_place_once_it_is_tried_again(bench, fail):
    """A file that costs the worker its life each time says nothing that could be kept."""
    fail[b"request"] = KeyboardInterrupt
    bench.drop("deadly.jsonl", make_input(2))
    bench.drop("good.jsonl", make_input(3))
    assert claim_next(bench, most_batches=1) == ["deadly.jsonl"]
    (claim,) = bench.inbox.claims()
    for _ in range(MAX_ADMISSION_FAILURES + 2):
        claim = attempt(bench, claim, KeyboardInterrupt)

    assert sorted(claim_next(bench, most_batches=1)) == ["deadly.jsonl", "good.jsonl"]
    assert claim.attempts.failed == 0


def test_a_claim_that_cannot_be_written_holds_no_place_and_is_not_rejected(bench):
    claim = bench.claim("odd.jsonl", make_input(2))
    ClaimFolder(bench.folder, claim.claim_id).result_path.mkdir()
    for _ in range(MAX_ADMISSION_FAILURES + 2):
        claim = attempt(bench, claim, StorageError)
    bench.drop("good.jsonl", make_input(3))

    assert sorted(claim_next(bench, most_batches=1)) == ["good.jsonl", "odd.jsonl"]
    ClaimFolder(bench.folder, claim.claim_id).result_path.rmdir()
    assert isinstance(bench.admit(claim), Admitted)


@pytest.mark.parametrize("name", ["claim.json", "result.json"])
@pytest.mark.parametrize("how", ["emptied", "truncated", "a folder"])
def test_a_damaged_claim_stops_no_other_file(bench, name, how):
    claim = bench.claim("odd.jsonl", make_input(2))
    path = ClaimFolder(bench.folder, claim.claim_id).root / name
    path.unlink(missing_ok=True)
    match how:
        case "emptied":
            path.write_bytes(b"")
        case "truncated":
            path.write_bytes(b'{"folder": "al')
        case _:
            path.mkdir()
    bench.drop("good.jsonl", make_input(3))

    assert "good.jsonl" in claim_next(bench, most_batches=5)
    good = next(claim for claim in bench.inbox.claims() if claim.file_name == "good.jsonl")
    assert isinstance(bench.admit(good), Admitted)


def test_a_claim_goes_on_by_itself_once_its_file_is_mended(bench):
    claim = bench.claim("odd.jsonl", make_input(2))
    path = ClaimFolder(bench.folder, claim.claim_id).origin_path
    whole = path.read_bytes()
    path.write_bytes(whole[:5])
    assert bench.inbox.claims() == []

    path.write_bytes(whole)

    (found,) = bench.inbox.claims()
    assert found.origin == msgspec.json.decode(whole, type=type(found.origin))
    assert isinstance(bench.admit(found), Admitted)
