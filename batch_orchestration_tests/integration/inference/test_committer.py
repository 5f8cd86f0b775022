"""Commits beside the feed: what is wrong with one chunk costs that chunk."""

from pathlib import Path

from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.core.errors import StorageError
from batch_orchestration.files.kept_input import ChunkRef
from batch_orchestration.inference.committer import Committed, Committer
from batch_orchestration.workers.run_status import RunStatus
from batch_orchestration_tests.support.builders import make_completion, make_failure, make_request
from batch_orchestration_tests.support.large_answers import answered
from batch_orchestration_tests.support.workbench import Workbench


def make_committer(bench: Workbench, plan: BatchPlan) -> Committer:
    return Committer(
        bench.store,
        batch_id=plan.batch_id,
        run_id="run-1",
        known=lambda reports: None,
        status=RunStatus(),
    )


def test_a_commit_needs_no_kept_input(tmp_path: Path) -> None:
    bench = Workbench(tmp_path)
    plan = answered(bench, [make_completion(), make_failure(), make_completion()])
    bench.folder.input_path(plan.batch_id).unlink()
    committer = make_committer(bench, plan)

    committer.add(ChunkRef.of(plan, 0, bench.folder))
    committer.finish()
    committer.start()
    (result,) = iter(committer.results.get, None)

    assert isinstance(result, Committed)
    settled = list(bench.store.settled(plan.batch_id))
    assert [request.custom_id for request in settled] == ["request-0", "request-1", "request-2"]
    assert [request.line for request in settled] == [1, 2, 3]
    assert settled[1].body == bytes(make_request(index=1).body)


def test_a_chunk_that_cannot_be_committed_keeps_no_other_from_it(tmp_path: Path) -> None:
    bench = Workbench(tmp_path)
    plan = answered(bench, [make_completion()] * 30)
    lost = bench.folder.journal_path(plan.batch_id, 1)
    lost.write_bytes(b"")
    committer = make_committer(bench, plan)

    for number in range(3):
        committer.add(ChunkRef.of(plan, number, bench.folder))
    committer.finish()
    committer.start()
    results = list(iter(committer.results.get, None))

    committed = [result.report.number for result in results if isinstance(result, Committed)]
    assert committed == [0, 2]
    assert sorted(bench.store.chunk_reports(plan.batch_id)) == [0, 2]
    assert isinstance(results[-1], StorageError)
    assert str(lost) in str(results[-1])
