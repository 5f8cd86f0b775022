"""`kill -9` between two windows of a long batch, and within one: as if undisturbed."""

import os
import signal
import time

import pytest

from batch_orchestration_tests.support.builders import make_input
from batch_orchestration_tests.support.crashing_admission import in_child
from batch_orchestration_tests.support.workbench import Workbench

REQUESTS = 70


@pytest.mark.parametrize("commits", [2, 3, 4], ids=["between", "within", "between later ones"])
def test_a_run_killed_at_the_border_of_a_window_is_gone_on_with_at_the_next(tmp_path, commits):
    """Chunks are of ten requests, windows of two chunks."""

    def open_bench() -> Workbench:
        return Workbench(tmp_path, clock=time.time, max_requests_per_batch=25)

    bench = open_bench()
    plan = bench.plan_of("long.jsonl", make_input(REQUESTS))

    def die_after_commits() -> None:
        for done, _ in enumerate(open_bench().answer_windows(plan), start=1):
            if done == commits:
                os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(die_after_commits) == -signal.SIGKILL

    committed = sorted(bench.store.chunk_reports(plan.batch_id))
    assert committed[:commits] == list(range(commits))
    asked = bench.next_chunks(plan)
    assert asked == range(len(committed), 2 * (len(committed) // 2 + 1))
    later = [commit.report.number for commit in bench.answer_windows(plan)]
    bench.deliver(plan)

    assert later == list(range(len(committed), 7))
    assert bench.numbers(plan, "output.jsonl") == list(range(REQUESTS))
    assert bench.numbers(plan, "errors.jsonl") == []
    settled = list(bench.store.settled(plan.batch_id))
    if commits % 2 == 0:
        assert {request.attempts for request in settled} == {1}, "nothing was in flight"
