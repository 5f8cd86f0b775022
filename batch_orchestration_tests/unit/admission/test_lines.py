"""Reading a batch file: every line is accounted for, and chunks cover every byte."""

import hashlib
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_orchestration.admission.reading.lines import BatchFileReading
from batch_orchestration.core.batches import MemoryDemand
from batch_orchestration.core.outcomes import FailureCode
from batch_orchestration.core.requests import UTF8_BOM, Fault, Request
from batch_orchestration.engines.memory_demand import request_demand
from batch_orchestration.files.input_lines import read_chunk
from batch_orchestration_tests.support.builders import (
    make_body,
    make_chunks,
    make_input,
    make_line,
    make_settings,
)

SHARED = Path(__file__).parents[3].parent / "shared" / "batches"


def read(content: bytes, **settings):
    reading = BatchFileReading(make_settings(**settings))
    return reading, list(reading.read(io.BytesIO(content)))


def faults(parsed) -> list[tuple[int, FailureCode]]:
    return [(p.line, p.code) for p in parsed if isinstance(p, Fault)]


def test_a_flawless_file_has_its_figures():
    content = make_input(25)

    reading, parsed = read(content)

    assert [p.custom_id for p in parsed] == [f"request-{n}" for n in range(25)]
    assert (reading.requests, reading.faulty, reading.usable, reading.lines) == (25, 0, 25, 25)
    assert reading.sha256 == hashlib.sha256(content).hexdigest()
    assert reading.size_bytes == len(content)
    assert [chunk.requests for chunk in reading.chunks] == [10, 10, 5]


def test_blank_lines_are_no_requests_and_shift_nothing():
    content = b"\n \n" + make_line(0) + b"\r\n\t\n" + make_line(1) + b"\n\n"

    reading, parsed = read(content, requests_per_chunk=1)

    assert [(p.index, p.line) for p in parsed] == [(0, 3), (1, 6)]
    assert [(c.first_index, c.first_line) for c in reading.chunks] == [(0, 1), (1, 6)]
    assert reading.chunks[-1].end == len(content)


@pytest.mark.parametrize("content", [b"", b"\n", b" \n\r\n\t", UTF8_BOM])
def test_a_file_without_requests_has_no_chunks(content):
    reading, parsed = read(content)

    assert parsed == []
    assert (reading.requests, reading.chunks) == (0, ())


def test_byte_order_mark_carriage_returns_and_missing_last_newline_are_tolerated():
    content = UTF8_BOM + (make_line(0) + make_line(1)).replace(b"\n", b"\r\n") + make_line(2)[:-1]

    reading, parsed = read(content)

    assert [type(p) for p in parsed] == [Request] * 3
    assert reading.faulty == 0


def test_the_first_of_several_equal_custom_ids_stands():
    content = make_line(1) + make_line(2) + make_line(1, body=make_body("other")) + make_line(1)

    _, parsed = read(content)

    assert faults(parsed) == [
        (3, FailureCode.DUPLICATE_CUSTOM_ID),
        (4, FailureCode.DUPLICATE_CUSTOM_ID),
    ]
    assert parsed[2].message == "`custom_id` is already that of line 1"
    assert parsed[2].custom_id == "request-1"


def test_a_faulty_line_does_not_take_its_custom_id_from_a_good_one():
    _, parsed = read(make_line(1, method="GET") + make_line(1))

    assert [type(p) for p in parsed] == [Fault, Request]


def test_a_torn_last_line_is_a_fault_by_itself():
    _, parsed = read(make_line(0) + make_line(1)[:70])

    assert faults(parsed) == [(2, FailureCode.INVALID_JSON)]


def test_a_line_of_a_megabyte_is_read_and_a_longer_one_is_refused():
    long = make_line(0, body=make_body("x" * 2**20))
    too_long = make_line(1, body=make_body("x" * (2**21 + 100)))

    reading, parsed = read(long + too_long + make_line(2))

    assert [type(p) for p in parsed] == [Request, Fault, Request]
    assert parsed[1].custom_id == "request-1"
    assert "at most 2,097,152 are read" in parsed[1].message
    assert reading.size_bytes == reading.chunks[-1].end


def test_every_fault_of_a_file_is_found():
    content = b"".join(
        [
            make_line(0),
            b"not json\n",
            make_line(2, custom_id=17),
            make_line(3, body=...),
            make_line(4, url="/v1/responses"),
            make_line(5, url="/chat/completions"),
            make_line(6, body={"messages": []}),
            make_line(7, body=make_body(stream=True)),
            make_line(8).replace(b"question", b"\xc3\x28"),
            make_line(0),
        ]
    )

    reading, parsed = read(content)

    assert [line for line, _ in faults(parsed)] == list(range(2, 11))
    assert reading.faults_by_code == {
        FailureCode.INVALID_JSON: 2,
        FailureCode.INVALID_REQUEST: 4,
        FailureCode.UNSUPPORTED_ENDPOINT: 2,
        FailureCode.DUPLICATE_CUSTOM_ID: 1,
    }


LINES = st.one_of(
    st.sampled_from([b"\n", b"  \r\n", b"nope\n", b"\xff\n", b"[1]\n", b"x" * 300 + b"\n"]),
    st.integers(0, 9).map(make_line),
    st.integers(0, 9).map(lambda n: make_line(n).replace(b"\n", b"\r\n")),
)


@given(st.lists(LINES, max_size=30), st.booleans(), st.booleans(), st.integers(1, 7))
def test_every_line_is_accounted_for_and_chunks_tile_the_file(lines, bom, cut, per_chunk):
    content = (UTF8_BOM if bom else b"") + b"".join(lines)
    content = content.removesuffix(b"\n") if cut else content

    reading, parsed = read(content, requests_per_chunk=per_chunk, max_line_bytes=250)

    numbers = [n for n, line in enumerate(lines, start=1) if line.strip()]
    assert [p.line for p in parsed] == numbers
    assert [p.index for p in parsed] == list(range(reading.requests))
    assert sum(isinstance(p, Request) for p in parsed) == reading.usable
    ids = [p.custom_id for p in parsed if isinstance(p, Request)]
    assert len(ids) == len(set(ids))
    chunks = reading.chunks
    if parsed:
        assert [c.start for c in chunks] == [0, *(c.end for c in chunks[:-1])]
        assert chunks[-1].end == len(content)
        assert all(c.requests == per_chunk for c in chunks[:-1])
    assert sum(c.requests for c in chunks) == reading.requests
    expected = make_chunks(content, requests_per_chunk=per_chunk)
    # The builder knows no duplicates, which are not sent.
    assert [(c.start, c.end, c.digest) for c in chunks] == [
        (c.start, c.end, c.digest) for c in expected
    ]


def test_each_chunk_has_the_memory_demand_of_its_requests():
    bodies = [make_body("a" * size, max_tokens=5) for size in (100, 300, 200)]
    lines = [make_line(number, body=body) for number, body in enumerate(bodies)]
    unlimited, unusable = make_line(3, body=make_body()), b"nope\n"

    reading, parsed = read(b"".join([*lines, unusable, unlimited]), requests_per_chunk=2)

    demands = [request_demand(p, None) for p in parsed if isinstance(p, Request)]
    assert [chunk.memory for chunk in reading.chunks] == [demands[1], demands[2], demands[3]]
    assert demands[1].longest_tokens is not None
    assert demands[3] == MemoryDemand(prompts_can_be_cut=True)


def test_the_runner_reads_back_every_chunk_as_it_was_planned(tmp_path):
    content = b"\n" + make_input(7) + b"\n\nnope\n" + make_line(8) + b"\n"
    path = tmp_path / "input.jsonl"
    path.write_bytes(content)

    reading, parsed = read(content, requests_per_chunk=3)

    lines = [line for chunk in reading.chunks for line in read_chunk(path, chunk, 2**20)]
    assert [(line.index, line.line) for line in lines] == [(p.index, p.line) for p in parsed]


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not there")
@pytest.mark.parametrize(
    ("name", "model_required", "requests", "usable", "lines"),
    [
        ("vllm_openai_example_batch.jsonl", True, 2, 2, 2),
        ("litellm_batch_small.jsonl", True, 3, 3, 4),
        ("production_stack_batch.jsonl", True, 2, 2, 2),
        ("aibrix_sample_job_input.jsonl", True, 10, 10, 10),
        ("batchlocallm_candidates_10.jsonl", True, 10, 10, 11),
        ("batchlocallm_demo_10.jsonl", True, 10, 10, 11),
        ("batchlocallm_synthetic_100.jsonl", True, 100, 100, 100),
        ("tandemn_demo_batch.jsonl", True, 30, 30, 30),
        # No model in its bodies, and five ids for a hundred lines.
        ("tandemn_duplicate_ids_input.jsonl", True, 100, 0, 100),
        ("tandemn_duplicate_ids_input.jsonl", False, 100, 5, 100),
    ],
)
def test_files_of_other_projects_have_the_right_counts(
    name, model_required, requests, usable, lines
):
    aliases = {} if model_required else {"*": "any"}
    reading, parsed = read((SHARED / name).read_bytes(), model_aliases=aliases)

    assert (reading.requests, reading.usable, reading.lines) == (requests, usable, lines)
    assert len(parsed) == requests
