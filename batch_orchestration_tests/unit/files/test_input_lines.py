import gzip
import io
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from batch_orchestration.core.errors import PlanMismatch
from batch_orchestration.files.input_lines import RawLine, read_chunk, read_lines
from batch_orchestration_tests.support.builders import make_chunks, make_input

BOM = b"\xef\xbb\xbf"
LARGE = 2**20

# Pieces that batch files are made of, the nasty ones over-represented.
files = st.lists(
    st.one_of(
        st.sampled_from([b"\n", b"\r\n", b" \t\r\n", BOM, b"\r", b"\x1e", b"\xff\n", b"{}\n"]),
        st.binary(max_size=40),
        st.just(b"x" * 100),
    ),
    max_size=30,
).map(b"".join)


def lines_of(content: bytes, max_line_bytes: int = LARGE) -> list[RawLine]:
    return list(read_lines(io.BytesIO(content), max_line_bytes))


@given(files, st.integers(1, 60))
@settings(deadline=None)
def test_lines_cover_every_byte_of_any_file_once_and_in_order(content: bytes, limit: int) -> None:
    seen: list[bytes] = []

    lines = list(read_lines(io.BytesIO(content), limit, observe=seen.append))

    assert [line.line for line in lines] == list(range(1, len(lines) + 1))
    assert [line.start for line in lines] == [0, *(line.end for line in lines[:-1])][: len(lines)]
    assert b"".join(content[line.start : line.end] for line in lines) == content
    assert b"".join(seen) == content


@given(files, st.integers(1, 60))
@settings(deadline=None)
def test_the_limit_on_lines_never_shifts_indices(content: bytes, limit: int) -> None:
    def places(lines: list[RawLine]) -> list[tuple[int, int, int, int, bool]]:
        return [(line.line, line.index, line.start, line.end, line.blank) for line in lines]

    assert places(lines_of(content, limit)) == places(lines_of(content))


@given(files, st.integers(1, 60))
@settings(deadline=None)
def test_a_line_within_the_limit_is_whole_and_a_longer_one_is_told(
    content: bytes, limit: int
) -> None:
    for line in lines_of(content, limit):
        whole = content[line.start : line.end]
        length = len(whole.removesuffix(b"\n"))
        length -= whole.endswith(b"\r\n")
        assert line.too_long == (length > limit and not line.blank)
        assert line.data == whole or length > limit
        assert whole.startswith(line.data)


@given(files, st.integers(1, 4), st.integers(1, 60))
@settings(deadline=None)
@example(BOM + b"\r\n\r\n{}\r\n  \n{}", 1, 60)
def test_chunks_yield_exactly_the_requests_of_any_file(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, per_chunk: int, limit: int
) -> None:
    path = tmp_path_factory.mktemp("kept") / "input.jsonl"
    path.write_bytes(content)
    chunks = make_chunks(content, requests_per_chunk=per_chunk)

    lines = [line for chunk in chunks for line in read_chunk(path, chunk, limit)]

    assert lines == [line for line in lines_of(content, limit) if not line.blank]
    assert [line.index for line in lines] == list(range(len(lines)))
    if chunks:
        assert b"".join(content[chunk.start : chunk.end] for chunk in chunks) == content


def test_blank_lines_are_yielded_but_are_no_requests() -> None:
    lines = lines_of(BOM + b"\n{}\r\n\n \t\n{}")

    assert [line.blank for line in lines] == [True, False, True, True, False]
    assert [line.index for line in lines] == [0, 0, 1, 1, 1]


def test_of_a_line_that_is_too_long_only_the_beginning_is_kept() -> None:
    content = b"a" * 3_000_000 + b"\n{}\n"

    long, short = lines_of(content, 100_000)

    assert (long.too_long, len(long.data), long.end) == (True, 2**16, 3_000_001)
    assert (short.too_long, short.index, short.data) == (False, 1, b"{}\n")


@pytest.mark.parametrize("line_break", [b"\n", b"\r\n", b""])
def test_the_line_break_does_not_count_towards_the_limit(line_break: bytes) -> None:
    (fits,) = lines_of(b"a" * 10 + line_break, 10)
    (longer,) = lines_of(b"a" * 11 + line_break, 10)

    assert (fits.too_long, longer.too_long) == (False, True)


def test_compressed_files_are_read_alike() -> None:
    content = make_input(50)

    with gzip.open(io.BytesIO(gzip.compress(content))) as file:
        assert list(read_lines(file, LARGE)) == lines_of(content)  # type: ignore[arg-type]


def test_a_changed_input_is_refused_before_its_first_request(tmp_path: Path) -> None:
    content = make_input(20)
    path = tmp_path / "input.jsonl"
    first, second = make_chunks(content, requests_per_chunk=10)
    path.write_bytes(content[: second.end - 4] + b"?" + content[second.end - 3 :])

    assert len(list(read_chunk(path, first, LARGE))) == 10
    with pytest.raises(PlanMismatch, match=rf"input.jsonl, bytes {second.start} to {second.end}"):
        next(read_chunk(path, second, LARGE))


def test_a_truncated_or_missing_input_is_refused(tmp_path: Path) -> None:
    content = make_input(3)
    path = tmp_path / "input.jsonl"
    (chunk,) = make_chunks(content)
    path.write_bytes(content[:-1])

    with pytest.raises(PlanMismatch, match="changed"):
        next(read_chunk(path, chunk, LARGE))
    path.unlink()
    with pytest.raises(PlanMismatch, match="gone"):
        next(read_chunk(path, chunk, LARGE))
