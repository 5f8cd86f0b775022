"""Early ends as Dagster sees them: sensor, jobs, runs and partitions."""

import time

import dagster as dg
from dagster._core.remote_origin import (
    GrpcServerCodeLocationOrigin,
    RemoteJobOrigin,
    RemoteRepositoryOrigin,
)

from batch_orchestration.core.lifecycle import Resumption
from batch_orchestration.lifecycle.close_out import fail_unanswered
from batch_orchestration_tests.support.builders import make_input
from batch_orchestration_tests.support.deployment import CANCELED, STARTED

QUEUED = dg.DagsterRunStatus.QUEUED
#: Dagster queues no run without one.
ORIGIN = RemoteJobOrigin(
    RemoteRepositoryOrigin(GrpcServerCodeLocationOrigin(host="nowhere", port=1), "repository"),
    "answer_chunks",
)


def history(deployment, batch_id):
    return [(str(e.to_status), e.actor) for e in deployment.store.batch_events(batch_id)[2:]]


def test_a_terminated_run_cancels_its_batch_which_then_is_delivered(deployment):
    batch_id = deployment.admit("a.jsonl", make_input(12))
    deployment.pretend(deployment.requests("dispatch_sensor")[0], CANCELED)
    (terminated,) = deployment.instance.get_runs(dg.RunsFilter(statuses=[CANCELED]))

    (request,) = deployment.requests("dispatch_sensor")
    result = deployment.run(request)

    assert request.job_name == "deliver_batch"
    assert result.success
    assert history(deployment, batch_id) == [
        ("cancelling", terminated.run_id),
        ("cancelled", result.run_id),
    ]
    assert deployment.statuses("chunk_results") == {f"{batch_id}/0000{n}" for n in range(3)}
    assert deployment.statuses("batch_output") == {batch_id}
    assert deployment.instance.get_run_by_id(result.run_id).tags["early_end"] == "cancelled"
    checks = result.get_asset_check_evaluations()
    assert [check.passed for check in checks] == [True, True]
    assert any("12 are not counted" in (check.description or "") for check in checks)
    assert deployment.reason("dispatch_sensor") == "no unfinished batch"


def test_a_batch_that_ends_early_is_delivered_once_no_run_is_at_work_on_it(deployment):
    batch_id = deployment.admit("a.jsonl", make_input(12))
    (request,) = deployment.requests("dispatch_sensor")
    run = deployment.pretend(request, STARTED)
    deployment.cancel(batch_id)

    reason = deployment.reason("dispatch_sensor")
    deployment.instance.report_run_canceled(run)

    assert "is about to end" in reason
    assert "cancelled by tester" in reason
    assert deployment.requests("dispatch_sensor")[0].job_name == "deliver_batch"


def test_runs_that_wait_for_the_engine_leave_the_queue_with_their_batch(deployment):
    batch_id = deployment.admit("a.jsonl", make_input(12))
    (request,) = deployment.requests("dispatch_sensor")
    run = deployment.instance.create_run_for_job(
        deployment.repository.get_job(request.job_name),
        status=QUEUED,
        tags=request.tags,
        remote_job_origin=ORIGIN,
    )
    deployment.cancel(batch_id)

    (delivering,) = deployment.requests("dispatch_sensor")

    assert deployment.instance.get_run_by_id(run.run_id).status is CANCELED
    assert delivering.job_name == "deliver_batch"
    assert delivering.run_key == f"{batch_id}/output#1"
    assert history(deployment, batch_id) == [("cancelling", "tester")]


def test_an_overdue_batch_is_expired_by_the_sensor_and_delivered(deployment):
    deployment.drop("a.jsonl", make_input(7))
    deployment.drop("a.jsonl.meta.json", b'{"completion_window": "1s"}')
    assert deployment.run(deployment.requests("inbox_sensor")[0]).success
    (batch_id,) = deployment.folder.batch_ids()
    time.sleep(1.1)

    (request,) = deployment.requests("dispatch_sensor")
    result = deployment.run(request)

    assert result.success
    assert history(deployment, batch_id) == [
        ("finalizing", "dispatch_sensor"),
        ("expired", result.run_id),
    ]


def test_a_run_over_a_batch_that_ended_does_nothing_and_says_how_to_go_on(deployment):
    batch_id = deployment.admit("a.jsonl", make_input(12))
    (answering,) = deployment.requests("dispatch_sensor")
    deployment.cancel(batch_id)

    result = deployment.run(answering)

    assert result.success
    assert deployment.instance.get_run_by_id(result.run_id).tags["early_end"] == "cancelled"
    assert deployment.store.chunk_reports(batch_id) == {}


def test_the_job_cancels_a_batch_in_the_name_of_its_run(deployment):
    batch_id = deployment.admit("a.jsonl", make_input(12))

    result = deployment.launch("cancel_batch", batch=batch_id, reason="oh")
    again = deployment.launch("cancel_batch", batch=batch_id)
    unknown = deployment.launch("cancel_batch", batch="nothing-00000000")

    assert (result.success, again.success, unknown.success) == (True, True, False)
    assert history(deployment, batch_id) == [("cancelling", result.run_id)]
    assert deployment.instance.get_run_by_id(result.run_id).tags["batch"] == batch_id


def test_chunks_that_a_killed_delivery_committed_silently_are_reported_by_the_next(deployment):
    batch_id = deployment.admit("a.jsonl", make_input(12))
    deployment.cancel(batch_id)
    list(
        fail_unanswered(
            batch_id,
            folder=deployment.folder,
            store=deployment.store,
            run_id="killed",
            clock=time.time,
        )
    )

    (request,) = deployment.requests("dispatch_sensor")
    assert deployment.run(request).success

    assert len(deployment.statuses("chunk_results")) == 3


def test_a_resumed_batch_is_dispatched_again_although_a_person_terminated_its_run(deployment):
    batch_id = deployment.admit("a.jsonl", make_input(12))
    too_early = deployment.launch("resume_batch", batch=batch_id)
    deployment.pretend(deployment.requests("dispatch_sensor")[0], CANCELED)
    assert deployment.run(deployment.requests("dispatch_sensor")[0]).success

    result = deployment.launch("resume_batch", batch=batch_id)
    deployment.work_off()

    assert (too_early.success, result.success) == (False, True)
    assert history(deployment, batch_id)[2:][0] == ("in_progress", result.run_id)
    assert deployment.store.batch(batch_id).status == "completed"
    assert deployment.store.batch(batch_id).completed == 12


def test_a_resumption_whose_maker_was_killed_is_carried_out_by_the_sensor(deployment):
    batch_id = deployment.admit("a.jsonl", make_input(12))
    deployment.cancel(batch_id)
    assert deployment.run(deployment.requests("dispatch_sensor")[0]).success
    decided = Resumption(at=time.time(), actor="tester")
    deployment.folder.resumption(batch_id).write(decided)

    (answering,) = deployment.requests("dispatch_sensor")

    assert answering.job_name == "answer_chunks"
    assert history(deployment, batch_id)[-1] == ("in_progress", "tester")
