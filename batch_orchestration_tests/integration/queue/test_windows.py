"""Files with more requests than may be open at a time: one batch, answered window by window."""

import time
from collections import Counter
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import Any

from batch_orchestration_tests.support.builders import make_input, make_line
from batch_orchestration_tests.support.deployment import Deployment
from batch_orchestration_tests.support.scripted_engine import ScriptedEngine, StickingEngine
from batch_orchestration_tests.support.workbench import Workbench


def window_bench(root: Path, **settings: Any) -> Workbench:
    """A bench in which a batch has two open chunks of ten requests."""
    return Workbench(root, clock=time.time, **{"max_requests_per_batch": 25, **settings})


def awkward_input(requests: int) -> bytes:
    """A file with a byte order mark, CRLF, blank lines at every tenth request, faults, repeats."""
    lines = [b"\xef\xbb\xbf"]
    for number in range(requests):
        line = make_line(number).rstrip(b"\n")
        if number % 17 == 3:
            line = b"not json"
        elif number % 17 == 5:
            line = make_line(number // 2).rstrip(b"\n")  # repeats one of long before
        lines.append(line + (b"\r\n" if number % 3 else b"\n"))
        if number % 10 in (9, 4):
            lines.append(b"\r\n \n")
    return b"".join(lines)


def test_awkward_lines_over_many_windows_come_back_in_their_order(tmp_path):
    """Byte order mark, CRLF, blank lines and repeats fall on the borders of windows, too."""
    bench, engine = window_bench(tmp_path), ScriptedEngine()
    plan = bench.plan_of("people.jsonl", awkward_input(230))
    faulty = [n for n in range(230) if n % 17 in (3, 5)]
    asked = [n for n in range(230) if n not in faulty]

    commits = [commit.report for commit in bench.answer_windows(plan, engine)]
    report = bench.deliver(plan)

    windows = [[r.number for r in group] for _, group in groupby(commits, lambda r: r.run_id)]
    assert windows == [[n, n + 1] for n in range(0, 22, 2)] + [[22]]
    assert set(engine.submissions.values()) == {1}
    assert len(engine.submissions) == len(asked)
    assert bench.numbers(plan, "output.jsonl") == asked
    repeats = [n // 2 if n % 17 == 5 else None for n in faulty]
    assert bench.numbers(plan, "errors.jsonl") == repeats
    assert (report.totals.completed, report.totals.failed) == (len(asked), len(faulty))
    assert bench.store.batch(plan.batch_id).status == "completed"
    assert bench.folder.batch_ids() == [plan.batch_id]


def test_a_long_batch_takes_room_for_its_window_and_leaves_the_rest_to_others(tmp_path):
    bench = window_bench(tmp_path, max_queued_requests=30, max_requests_per_batch=20)
    plan = bench.plan_of("long.jsonl", make_input(90))
    bench.drop("small.jsonl", make_input(10))
    bench.drop("smaller.jsonl", make_input(1))

    def claim() -> list[str]:
        """Admit what there is room for; return what waits, and why."""
        waiting = bench.claim_admissible()
        held = [str(bench.admit(claim)) for claim in bench.inbox.claims()]
        return [entry.detail for entry in waiting] + held

    claim()
    assert [record.total for record in bench.store.unfinished()] == [10, 90]
    (why,) = claim()
    assert "its 1 requests and the 30 queued are more than the 30" in why

    for commit in bench.answer_windows(plan):
        if commit.report.number == 7:
            break
    claim()

    assert sorted(record.total for record in bench.store.unfinished()) == [1, 10, 90]


def test_a_batch_cancelled_in_its_second_window_keeps_what_is_answered(tmp_path):
    """The chunks of the later windows were never begun; their requests have their failure, too."""
    bench, engine = Workbench(tmp_path), StickingEngine(answers=5)
    plan = bench.admit_now(60)
    bench.run(plan, ScriptedEngine(), numbers=(0, 1))

    bench.run_until_stuck(plan, engine, lambda: bench.cancel(plan), numbers=(2, 3))
    bench.deliver(plan)

    assert bench.status(plan) == "cancelled"
    codes = Counter(row["error"]["code"] for row in bench.lines(plan, "errors.jsonl"))
    assert (len(bench.lines(plan, "output.jsonl")), codes) == (25, {"batch_cancelled": 35})

    bench.resume(plan)
    bench.finish(plan)

    ids = [row["custom_id"] for row in bench.lines(plan, "output.jsonl")]
    assert ids == [f"request-{number}" for number in range(60)]


def test_dagster_runs_window_after_window_and_who_is_more_urgent_in_between(tmp_path):
    settings = {"max_requests_per_batch": 10, "max_queued_requests": 14}
    with closing(Deployment(tmp_path, **settings)) as deployment:
        long = deployment.admit("long.jsonl", make_input(23))
        done = []

        def answer_next():
            """Run the first thing that the daemon would run now."""
            requests = deployment.requests("dispatch_sensor")
            request = max(requests, key=lambda r: int(r.tags["dagster/priority"]))
            assert deployment.run(request).success
            done.append(request.run_key.rpartition("#")[0])

        answer_next()
        urgent = deployment.admit("high/urgent.jsonl", make_input(4))
        while deployment.store.unfinished():
            answer_next()

        assert done == [
            f"{long}/00000-00001",
            f"{urgent}/00000-00000",
            f"{urgent}/output",
            f"{long}/00002-00003",
            f"{long}/00004-00004",
            f"{long}/output",
        ]
        lines = (deployment.folder.outbox_path(long) / "output.jsonl").read_bytes()
        assert lines.count(b"\n") == 23
