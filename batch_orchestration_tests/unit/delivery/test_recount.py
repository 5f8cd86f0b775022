"""Recount: the files in the outbox, held against the plan."""

import pytest

from batch_orchestration.delivery.assembly import OutboxFiles
from batch_orchestration.delivery.lines import output_line
from batch_orchestration.delivery.recount import recount
from batch_orchestration_tests.support.builders import (
    make_failure,
    make_input,
    make_plan,
    make_settled,
)

REQUESTS = 6
FAILED = {1, 4}


@pytest.fixture
def plan():
    return make_plan(make_input(REQUESTS), requests_per_chunk=2)


@pytest.fixture
def files(tmp_path, plan):
    files = OutboxFiles(tmp_path)
    write(files, plan, range(REQUESTS))
    return files


def write(files, plan, indices, *, failed=FAILED):
    with files.output.open("wb") as output, files.errors.open("wb") as errors:
        for index in indices:
            settled = make_settled(index, make_failure() if index in failed else None)
            (errors if index in failed else output).write(output_line(plan.batch_id, settled))


def test_complete_files_add_up(plan, files):
    counts = recount(plan, files)

    assert (counts.total, counts.completed, counts.failed, counts.problem) == (6, 4, 2, None)


@pytest.mark.parametrize("missing", [0, 1, 5])
def test_a_missing_request_is_named(plan, files, missing):
    write(files, plan, [index for index in range(REQUESTS) if index != missing])

    counts = recount(plan, files)

    assert f"request {missing} of {plan.batch_id} has no line" in counts.problem
    assert counts.completed + counts.failed == REQUESTS - 1


def test_a_request_in_both_files_is_found(plan, files):
    with files.errors.open("ab") as errors:
        errors.write(output_line(plan.batch_id, make_settled(5)))

    assert "lines of no request" in recount(plan, files).problem


def test_a_request_twice_in_one_file_is_found(plan, files):
    write(files, plan, [0, 1, 2, 2, 3, 4, 5])

    assert recount(plan, files).problem is not None


def test_lines_out_of_order_are_found(plan, files):
    write(files, plan, [2, 0, 1, 3, 4, 5])

    assert recount(plan, files).problem is not None


def test_a_torn_last_line_is_found(plan, files):
    files.output.write_bytes(files.output.read_bytes()[:-200])

    assert "unreadable" in recount(plan, files).problem


# --- partial files --------------------------------------------------------------------------------


def write_partial(files, plan, answered, failed):
    for path, indices in ((files.partial_output, answered), (files.partial_errors, failed)):
        lines = [output_line(plan.batch_id, make_settled(index)) for index in indices]
        path.write_bytes(b"".join(lines))


def test_partial_files_are_meant_where_there_are_any(plan, files):
    write_partial(files, plan, [0, 3], [4])

    counts = recount(plan, files)

    assert (counts.total, counts.completed, counts.failed, counts.done) == (6, 2, 1, 3)
    assert (counts.partial, counts.problem) == (True, None)


@pytest.mark.parametrize(
    ("answered", "failed"),
    [
        ([0, 3, 3], [4]),
        ([3, 0], [4]),
        ([0, 3], [3, 4]),
        ([0, 7], [4]),
    ],
    ids=["twice", "out of order", "in both", "of no request"],
)
def test_partial_files_with_a_line_too_much_are_found(plan, files, answered, failed):
    write_partial(files, plan, answered, failed)

    counts = recount(plan, files)

    assert counts.problem
    assert (counts.completed, counts.failed) == (len(answered), len(failed))


def test_a_missing_half_of_partial_files_is_a_problem(plan, files):
    write_partial(files, plan, [0, 3], [4])
    files.partial_errors.unlink()

    with pytest.raises(FileNotFoundError):
        recount(plan, files)
