"""Splitting: parts cover every request exactly once, wherever the borders fall."""

import gzip
import hashlib
import io
import stat
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_orchestration.domain.batches import BatchStatus, OnOversize
from batch_orchestration.domain.errors import FileRefused
from batch_orchestration.domain.outcomes import FailureCode
from batch_orchestration.services import registration
from batch_orchestration.services.batch_files import open_batch_file
from batch_orchestration.services.chunk_pass import ChunkRef
from batch_orchestration.services.line_reading import BatchFileReading, ReadingRules
from batch_orchestration.services.parts import admit_part, plan_of, waiting_parts
from batch_orchestration.services.plan_checks import check_input_size
from batch_orchestration.services.splitting import part_plans
from batch_orchestration.services.validation import validate
from batch_orchestration.services.verdicts import Admitted, AlreadyAdmitted, Rejected, Split
from batch_orchestration.storage.lines import read_lines
from batch_orchestration_tests.builders import NOW, make_input, make_line, make_plan
from batch_orchestration_tests.inbox_bench import LATER
from batch_orchestration_tests.submission_bench import SubmissionBench, awkward_input


@pytest.fixture
def bench(tmp_path):
    return SubmissionBench(tmp_path)


def test_a_file_over_the_limit_becomes_parts_of_one_kept_input(bench):
    content = awkward_input(90)

    submission = bench.split("people.jsonl", content, meta=b'{"priority": 7}')

    sid = submission.submission_id
    assert submission.parts == tuple(f"{sid}-p{number}of4" for number in (1, 2, 3, 4))
    assert bench.folder.submission_input_path(sid).read_bytes() == content
    assert (submission.requests, submission.options.priority) == (90, 7)
    assert bench.store.batches() == []
    plans = waiting_parts(bench.folder)
    assert [plan.batch_id for plan in plans] == list(submission.parts)
    assert [plan.requests for plan in plans] == [25, 25, 25, 15]
    assert [[c.requests for c in plan.chunks] for plan in plans[:1]] == [[10, 10, 5]]
    assert sum(plan.faulty for plan in plans) == submission.faulty > 0
    assert {plan.identity for plan in plans} == {
        f"{submission.identity}-p{number}" for number in (1, 2, 3, 4)
    }
    assert bench.files_of(bench.folder.claims) == set()
    kept = bench.files_of(bench.folder.submissions / sid)
    assert {"input.jsonl", "input.jsonl.meta.json", "submission.json"} <= kept


def test_whoever_is_in_the_group_may_make_waiting_parts_batches_to_cancel_them(bench):
    submission = bench.split("people.jsonl", make_input(60))

    parts = [bench.folder.waiting_part_path(part) for part in submission.parts]

    for folder in {*parts, *(part.parent for part in parts)}:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o2770


def test_a_file_at_the_limit_is_one_batch_as_before(bench):
    verdict = bench.admit_file("a.jsonl", make_input(25))

    assert isinstance(verdict, Admitted)
    assert bench.folder.submission_ids() == []


def test_faults_are_journalled_in_their_part_with_the_lines_of_the_file(bench):
    content = awkward_input(90)
    submission = bench.split("people.jsonl", content)
    plans = bench.admit_parts()

    faults = [
        (plan.part.number, entry.index, entry.outcome.code)
        for plan in plans
        for entry in bench.settled(plan)
    ]

    expected = [
        (n // 25 + 1, n % 25, FailureCode.INVALID_JSON if n % 17 == 3 else "duplicate_custom_id")
        for n in range(90)
        if n % 17 in (3, 5)
    ]
    assert faults == expected
    # Also of a line whose first is in another part.
    assert any(n // 25 != n // 2 // 25 for n in range(90) if n % 17 == 5)
    lines = [line for plan in plans for line in lines_of(bench, plan)]
    whole = [ln for ln in read_lines(io.BytesIO(content), 2**20) if not ln.blank]
    assert [(ln.line, ln.data) for ln in lines] == [(ln.line, ln.data) for ln in whole]
    assert submission.faulty == len(expected)


def lines_of(bench, plan):
    check_input_size(plan, bench.folder)
    refs = [ChunkRef.of(plan, chunk.number, bench.folder) for chunk in plan.chunks]
    return [line for ref in refs for line in ref.lines()]


@given(
    lines=st.lists(st.sampled_from([b"{}\n", b"x\r\n", b"\n", b" \r\n", b"{}\r\n"]), min_size=1),
    per_chunk=st.integers(1, 7),
    per_part=st.integers(1, 9),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf"]),
    last=st.sampled_from([b"", b"{}", b"   "]),
)
def test_parts_cover_every_byte_and_every_request_once(lines, per_chunk, per_part, mark, last):
    content = mark + b"".join(lines) + last
    rules = ReadingRules(
        requests_per_chunk=per_chunk, requests_per_batch=per_part, max_line_bytes=100
    )
    reading = BatchFileReading(rules)
    list(reading.read(io.BytesIO(content)))
    if not reading.requests:
        return
    whole = msgspec.structs.replace(make_plan(b""), requests=reading.requests)
    whole = msgspec.structs.replace(whole, chunks=reading.chunks)

    parts = part_plans(whole, per_part)

    chunks = [chunk for part in parts for chunk in part.chunks]
    ends = [0, *(chunk.end for chunk in chunks)]
    assert [chunk.start for chunk in chunks] == ends[:-1]
    assert ends[-1] == len(content)
    assert [part.requests for part in parts[:-1]] == [per_part] * (len(parts) - 1)
    assert sum(part.requests for part in parts) == reading.requests
    for part in parts:
        assert [chunk.number for chunk in part.chunks] == list(range(len(part.chunks)))
        sizes = [chunk.requests for chunk in part.chunks]
        assert [c.first_index for c in part.chunks] == [sum(sizes[:n]) for n in range(len(sizes))]
        # Every chunk but the last has the size of the first: places are found by it.
        assert set(sizes[:-1]) <= {sizes[0]}
    for chunk in chunks:
        digest = hashlib.blake2b(content[chunk.start : chunk.end], digest_size=16).hexdigest()
        assert chunk.digest == digest


def test_parts_are_admitted_in_order_as_there_is_room(bench):
    submission = bench.split("people.jsonl", make_input(90))

    first = bench.admit_parts(max_unfinished=2)
    assert bench.admit_parts(max_unfinished=2) == []
    for status in (BatchStatus.FINALIZING, BatchStatus.COMPLETED):
        bench.store.set_status(first[0].batch_id, status, at=NOW, actor="test", reason="ended")
    second = bench.admit_parts(max_unfinished=2)

    assert [plan.batch_id for plan in (*first, *second)] == list(submission.parts[:3])
    assert {record.batch_id for record in bench.store.batches()} == set(submission.parts[:3])
    assert plan_of(submission.parts[3], folder=bench.folder).requests == 15


def test_of_two_submissions_the_more_urgent_goes_first(bench):
    later = bench.split("low.jsonl", make_input(30))
    urgent = bench.split("high.jsonl", make_input(31), meta=b'{"priority": 5}')

    waiting = [plan.batch_id for plan in waiting_parts(bench.folder)]

    assert waiting == [*urgent.parts, *later.parts]


def test_a_part_is_admitted_once_however_often_it_is_asked_for(bench):
    submission = bench.split("people.jsonl", make_input(30))
    part = submission.parts[0]

    first = admit_part(part, folder=bench.folder, store=bench.store, at=NOW)
    again = admit_part(part, folder=bench.folder, store=bench.store, at=NOW)

    assert first == again
    assert [record.batch_id for record in bench.store.batches()] == [part]


def test_a_part_that_a_crash_kept_from_the_store_is_told_by_the_next_tick(bench, monkeypatch):
    submission = bench.split("people.jsonl", make_input(30))
    with monkeypatch.context() as patch:
        patch.setattr(registration.Store, "add_batch", lambda *args, **kwargs: 1 / 0)
        assert bench.admit_parts() == []

    bench.admit_parts(max_unfinished=1)

    assert [record.batch_id for record in bench.store.batches()] == [submission.parts[0]]
    assert bench.admit_parts(max_unfinished=1) == []


def test_the_same_file_again_is_a_pointer_to_the_submission_whatever_the_limit_is_now(bench):
    submission = bench.split("people.jsonl", make_input(60))
    bench.admit_parts(max_unfinished=1)
    bench.settings = SubmissionBench(bench.folder.root, max_requests_per_batch=100).settings

    verdict = bench.admit_file("again.jsonl", make_input(60))

    assert isinstance(verdict, AlreadyAdmitted)
    assert verdict.batch_id == submission.submission_id
    kept = bench.folder.submissions / submission.submission_id / "duplicates" / "again.jsonl"
    assert verdict.kept_as == str(kept)
    assert kept.read_bytes() == make_input(60)


def test_asking_again_for_a_split_claim_repeats_the_verdict(bench):
    claim = bench.claim("people.jsonl", make_input(60))

    first = bench.admit(claim)

    assert isinstance(first, Split)
    assert bench.admit(claim) == first
    assert bench.inbox.claim_ready(now=LATER) == []


def test_a_compressed_file_is_split_too_and_kept_beside(bench):
    content = make_input(60)

    submission = bench.split("people.jsonl.gz", gzip.compress(content))

    place = bench.folder.submissions / submission.submission_id
    assert (place / "input.jsonl").read_bytes() == content
    assert gzip.decompress((place / "input.jsonl.gz").read_bytes()) == content
    assert sum(len(lines_of(bench, plan)) for plan in waiting_parts(bench.folder)) == 60


def test_a_file_over_the_limit_is_refused_where_settings_say_so(tmp_path):
    bench = SubmissionBench(tmp_path, on_oversize=OnOversize.REJECT)

    verdict = bench.admit_file("people.jsonl", make_input(26))

    assert isinstance(verdict, Rejected)
    for word in ("26 requests", "the 25", "BATCH_MAX_REQUESTS_PER_BATCH", "BATCH_ON_OVERSIZE"):
        assert word in verdict.reason
    assert bench.folder.submission_ids() == []


def test_a_file_with_too_many_bytes_is_refused_even_where_it_could_be_split(tmp_path):
    content = make_input(60)
    bench = SubmissionBench(tmp_path, max_file_bytes=len(content) - 1)

    verdict = bench.admit_file("people.jsonl", content)

    assert isinstance(verdict, Rejected)
    for word in (f"{len(content):,}", f"{len(content) - 1:,}", "BATCH_MAX_FILE_BYTES"):
        assert word in verdict.reason
    assert Path(verdict.rejected_path).read_bytes() == content


def test_a_compressed_file_is_expanded_no_further_than_the_limit(tmp_path):
    """A thousand times its size would be on the disk before anybody looked."""
    bench = SubmissionBench(tmp_path, max_file_bytes=500_000)
    bomb = gzip.compress(make_line(0) + b" " * 50_000_000)
    expanded: list[int] = []

    verdict = bench.admit_file("bomb.jsonl.gz", bomb)

    assert isinstance(verdict, Rejected)
    assert "expands to more than the 500,000 bytes that BATCH_MAX_FILE_BYTES" in verdict.reason
    with pytest.raises(FileRefused):
        expand(Path(verdict.rejected_path), expanded, max_bytes=500_000)
    assert 0 < sum(expanded) <= 500_000


def expand(path: Path, expanded: list[int], *, max_bytes: int) -> None:
    with open_batch_file(path, max_bytes=max_bytes) as file:
        while block := file.read(10_000):
            expanded.append(len(block))


def test_a_compressed_file_of_just_the_limit_is_read_whole(tmp_path):
    content = make_input(10)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(content))

    with open_batch_file(path, max_bytes=len(content)) as file:
        assert list(file) == content.splitlines(keepends=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_file_bytes": 5000}, ["BATCH_MAX_FILE_BYTES", "5,000"]),
        ({"on_oversize": OnOversize.REJECT}, ["BATCH_ON_OVERSIZE", "60 requests"]),
        ({}, None),
    ],
)
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_validating_says_what_admission_would(tmp_path, settings, words, ending):
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(gzip.compress(make_input(60)) if ending else make_input(60))
    bench = SubmissionBench(tmp_path / "data", **settings)

    report = validate(path, settings=bench.settings)
    verdict = bench.admit_file(path.name, path.read_bytes())

    if words is None:
        assert report.refusal is None
        assert isinstance(verdict, Split)
        assert report.parts == len(verdict.parts) == 3
    else:
        assert report.refusal == verdict.reason
        assert all(word in verdict.reason for word in words)
