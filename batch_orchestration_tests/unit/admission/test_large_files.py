"""Large files: into how many chunks they are cut, and by which limits they are refused."""

import gzip
import hashlib
import io
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_orchestration.admission.reading.batch_files import open_batch_file
from batch_orchestration.admission.reading.lines import (
    BatchFileReading,
    choose_chunk_size,
)
from batch_orchestration.admission.results import Admitted, Rejected
from batch_orchestration.admission.validation import validate
from batch_orchestration.core.batches import OnOversize
from batch_orchestration.core.errors import FileRefused
from batch_orchestration_tests.support.builders import make_input, make_line, make_settings
from batch_orchestration_tests.support.workbench import Workbench
from batch_orchestration_tests.unit.admission.test_chunk_sizing import make_screening


def window_bench(root: Path, **settings: Any) -> Workbench:
    """A bench in which a batch may have 25 open requests, in chunks of ten."""
    return Workbench(root, clock=time.time, **{"max_requests_per_batch": 25, **settings})


@given(
    lines=st.lists(
        st.sampled_from([b"{}\n", b"x\r\n", b"\n", b" \r\n", b"{}\r\n", b"x" * 200 + b"\n"])
    ),
    at_least=st.integers(1, 7),
    most_requests=st.integers(1, 9),
    most_chunks=st.integers(1, 9),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf"]),
    last=st.sampled_from([b"", b"{}", b"   "]),
)
def test_however_long_a_file_is_its_chunks_are_few_and_cover_it_once_in_order(
    lines, at_least, most_requests, most_chunks, mark, last
):
    content = mark + b"".join(lines) + last
    settings = make_settings(
        requests_per_chunk=at_least, max_requests_per_batch=most_requests, max_line_bytes=100
    )
    file = io.BytesIO(content)
    size = choose_chunk_size(
        file, settings=settings, screening=make_screening(), most_chunks=most_chunks
    )
    reading = BatchFileReading(make_settings(requests_per_chunk=size, max_line_bytes=100))

    list(reading.read(file))

    chunks = reading.chunks
    sizes = [chunk.requests for chunk in chunks]
    assert len(chunks) <= most_chunks
    assert sum(sizes) == reading.requests
    # Every chunk but the last has the size of the first: places are found by it.
    assert set(sizes[:-1]) <= {*sizes[:1]}
    assert all(size <= sizes[0] for size in sizes[-1:])
    # They are no larger than asked for and than may be open, but where there were too many of them.
    wanted = min(at_least, most_requests)
    assert all(size in (wanted, -(-reading.requests // most_chunks)) for size in sizes[:-1])
    assert [chunk.number for chunk in chunks] == list(range(len(chunks)))
    assert [chunk.first_index for chunk in chunks] == [sum(sizes[:n]) for n in range(len(sizes))]
    ends = [0, *(chunk.end for chunk in chunks)]
    assert [chunk.start for chunk in chunks] == ends[:-1]
    assert ends[-1] == (len(content) if chunks else 0)
    for chunk in chunks:
        digest = hashlib.blake2b(content[chunk.start : chunk.end], digest_size=16).hexdigest()
        assert chunk.digest == digest


@pytest.mark.parametrize("requests", [25, 26, 260])
def test_a_file_of_any_length_is_one_batch_unless_settings_refuse_it(tmp_path, requests):
    lenient = window_bench(tmp_path / "window")
    strict = window_bench(tmp_path / "reject", on_oversize=OnOversize.REJECT)

    plan = lenient.plan_of("people.jsonl", make_input(requests))
    verdict = strict.admit_file("people.jsonl", make_input(requests))

    assert (plan.requests, len(plan.chunks)) == (requests, -(-requests // 10))
    if requests == 25:
        assert isinstance(verdict, Admitted)
        return
    assert isinstance(verdict, Rejected)
    for word in (f"{requests} requests", "the 25", "BATCH_MAX_REQUESTS_PER_BATCH", "=window"):
        assert word in verdict.reason
    assert strict.folder.batch_ids() == []


def test_a_file_with_too_many_bytes_is_refused(tmp_path):
    content = make_input(60)
    bench = window_bench(tmp_path, max_file_bytes=len(content) - 1)

    verdict = bench.admit_file("people.jsonl", content)

    assert isinstance(verdict, Rejected)
    for word in (f"{len(content):,}", f"{len(content) - 1:,}", "BATCH_MAX_FILE_BYTES"):
        assert word in verdict.reason
    assert Path(verdict.rejected_path).read_bytes() == content


def test_a_compressed_file_is_expanded_no_further_than_the_limit(tmp_path):
    """A thousand times its size would be on the disk before anybody looked."""
    bench = window_bench(tmp_path, max_file_bytes=500_000)
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


def test_a_compressed_file_of_just_the_limit_is_read_whole_however_often(tmp_path):
    content = make_input(10)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(content))

    with open_batch_file(path, max_bytes=len(content)) as file:
        for _ in range(2):
            assert list(file) == content.splitlines(keepends=True)
            file.seek(0)
        file.seek(len(content) - 5)
        assert file.read() == content[-5:]


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
    bench = window_bench(tmp_path / "data", **settings)

    report = validate(path, settings=bench.settings)
    verdict = bench.admit_file(path.name, path.read_bytes())

    if words is None:
        assert report.refusal is None
        assert isinstance(verdict, Admitted)
        assert report.chunks == verdict.chunks == 6
    else:
        assert report.refusal == verdict.reason
        assert all(word in verdict.reason for word in words)
