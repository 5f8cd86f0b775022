"""Recount: the files in the outbox, complete or partial, compared with the plan."""

import re

import pytest

from batch_orchestration.delivery.lines import output_line
from batch_orchestration.delivery.outbox import OutboxFiles
from batch_orchestration.delivery.recount import recount
from batch_orchestration_tests.support.builders import make_input, make_plan, make_settled

PLAN = make_plan(make_input(6), requests_per_chunk=2)
#: Indices in the output file and in the error file that add up to the plan.
ANSWERED, FAILED = [0, 2, 3, 5], [1, 4]


def counted(tmp_path, answered, failed, *, partial):
    files = OutboxFiles(tmp_path, partial=partial)
    for path, indices in ((files.output, answered), (files.errors, failed)):
        lines = [output_line(PLAN.batch_id, make_settled(index)) for index in indices]
        path.write_bytes(b"".join(lines))
    return recount(PLAN, OutboxFiles.present(tmp_path))


@pytest.mark.parametrize(
    ("answered", "failed", "partial"), [(ANSWERED, FAILED, False), ([0, 3], [4], True)]
)
def test_files_that_match_the_plan_have_no_problem(tmp_path, answered, failed, partial):
    counts = counted(tmp_path, answered, failed, partial=partial)

    assert (counts.problem, counts.partial, counts.total) == (None, partial, 6)
    assert (counts.completed, counts.failed) == (len(answered), len(failed))


@pytest.mark.parametrize(
    ("answered", "failed", "problem"),
    [
        ([2, 3, 5], FAILED, "request 0 of .* has no line"),
        (ANSWERED, [4], "request 1 of .* has no line"),
        ([0, 2, 3], FAILED, "request 5 of .* has no line"),
        ([2, 0, 3, 5], FAILED, "request 0 of .* has no line"),
    ],
)
def test_a_missing_request_is_named_unless_the_files_are_partial(
    tmp_path, answered, failed, problem
):
    counts = counted(tmp_path, answered, failed, partial=False)

    assert re.search(problem, counts.problem)
    assert (counts.completed, counts.failed) == (len(answered), len(failed))


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize(
    ("answered", "failed"),
    [
        ([0, 2, 2, 3, 5], FAILED),
        ([3, 0, 2, 5], FAILED),
        (ANSWERED, [1, 3, 4]),
        ([*ANSWERED, 7], FAILED),
    ],
    ids=["twice", "out of order", "in both", "of no request"],
)
def test_a_line_too_much_is_found(tmp_path, answered, failed, partial):
    counts = counted(tmp_path, answered, failed, partial=partial)

    assert counts.problem
    assert (counts.completed, counts.failed) == (len(answered), len(failed))


def test_a_torn_last_line_is_found(tmp_path):
    counted(tmp_path, ANSWERED, FAILED, partial=False)
    files = OutboxFiles(tmp_path)
    files.output.write_bytes(files.output.read_bytes()[:-200])

    assert "unreadable" in recount(PLAN, files).problem


def test_partial_files_of_which_one_is_missing_cannot_be_counted(tmp_path):
    counted(tmp_path, [0, 3], [4], partial=True)
    OutboxFiles(tmp_path, partial=True).errors.unlink()

    with pytest.raises(FileNotFoundError):
        recount(PLAN, OutboxFiles.present(tmp_path))
