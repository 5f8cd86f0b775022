"""Validating says what admission would say, and touches nothing."""

import gzip

import pytest

from batch_orchestration.admission.validation import validate
from batch_orchestration.core.batches import BatchOptions, LinePolicy
from batch_orchestration_tests.support.builders import make_input, make_line, make_settings


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.jsonl"


def check(path, *, options=None, max_listed_faults=1000, **settings):
    return validate(
        path,
        settings=make_settings(**settings),
        options=options,
        max_listed_faults=max_listed_faults,
    )


def test_a_flawless_file_is_told_so_and_left_alone(path):
    path.write_bytes(make_input(25) + b"\n")

    report = check(path)

    assert report.refusal is None
    assert (report.requests, report.faulty, report.chunks, report.lines) == (25, 0, 3, 26)
    assert [p.name for p in path.parent.iterdir()] == ["a.jsonl"]


def test_all_faults_are_counted_and_the_first_are_listed(path):
    path.write_bytes(make_line(0) + b"nope\n" * 30 + make_line(0))

    report = check(path, max_listed_faults=10)

    assert report.refusal is None
    assert [fault.line for fault in report.faults] == list(range(2, 12))
    assert report.faults_not_listed == 21
    assert report.faults_by_code == {"invalid_json": 30, "duplicate_custom_id": 1}


@pytest.mark.parametrize(
    ("content", "refusal"),
    [(b"", "empty"), (b"\n\n", "blank"), (b"[{}]", "JSON array"), (b"x", "none of its 1")],
)
def test_a_file_that_would_be_rejected_is_told_why(path, content, refusal):
    path.write_bytes(content)

    assert refusal in check(path).refusal


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (
            [make_line(n).strip() + b"," for n in range(12)],
            "none of its 12 requests can be used: line 1: not JSON: after the value, at byte 166,"
            " there is more: ',' (12 lines are like it)",
        ),
        (
            [b"torn", *(make_line(n, body={"messages": [n]}) for n in range(3)), b"{"],
            "line 2: `body.model` is missing or not a string (3 lines are like it)",
        ),
        (
            [make_line(n, url=f"/v1/{n}" if n else "/v1/responses") for n in range(3)],
            'line 1: `url` "/v1/responses" is not one of',
        ),
        (
            [make_line(0).replace(b"\n", b"") + make_line(1).strip()],
            "line 1: not JSON: after the value",
        ),
    ],
)
def test_a_file_without_a_usable_request_is_told_the_commonest_reason(path, lines, words):
    path.write_bytes(b"\n".join(line.strip() for line in lines))

    assert words in check(path).refusal


def test_the_strict_policy_counts_here_too(path):
    path.write_bytes(make_line(0) + b"nope\n")

    assert "strict" in check(path, line_policy=LinePolicy.STRICT).refusal


def test_compressed_files_are_read_and_broken_ones_told(path):
    path = path.with_name("a.jsonl.gz")
    path.write_bytes(gzip.compress(make_input(7)))
    assert check(path).requests == 7

    path.write_bytes(gzip.compress(make_input(7))[:-9])
    assert "not a whole gzip file" in check(path).refusal


def test_the_side_car_is_validated_unless_options_are_given(path):
    path.write_bytes(make_line(0, body={"messages": []}))
    path.with_name("a.meta.json").write_bytes(b'{"priority": "high"}')

    assert "`priority`" in check(path).refusal
    assert "none of its 1" in check(path, options=BatchOptions()).refusal
    assert check(path, options=BatchOptions(model="m")).refusal is None


def test_a_name_that_the_inbox_would_ignore_is_told(path):
    path = path.with_name("a.json")
    path.write_bytes(make_input(1))

    assert "rename to .jsonl" in check(path).refusal
