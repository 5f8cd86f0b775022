"""The queue's files may be damaged; batches still run, end and are delivered."""

from contextlib import closing

import pytest

from batch_orchestration.queue import pause as queue_pause
from batch_orchestration_tests.support.builders import make_input
from batch_orchestration_tests.support.deployment import Deployment


@pytest.fixture
def deployment(tmp_path):
    with closing(Deployment(tmp_path)) as deployment:
        yield deployment


def test_a_queue_that_cannot_be_written_holds_up_no_batch(deployment):
    batch_id = deployment.admit("a.jsonl", make_input(5))
    deployment.folder.queue.unlink(missing_ok=True)
    deployment.folder.queue.mkdir()

    (needed,) = deployment.requests("dispatch_sensor")

    assert needed.tags["batch"] == batch_id


def test_a_damaged_pause_is_a_pause_that_can_be_ended(deployment):
    """Somebody wanted it; whoever looks must neither be stopped nor let through."""
    deployment.admit("a.jsonl", make_input(5))
    deployment.folder.paused.write_bytes(b'{"at": 17')

    reason = deployment.reason("dispatch_sensor")
    queue_pause.unpause(deployment.folder)

    assert "paused" in reason
    assert "damaged" in reason
    assert not deployment.folder.paused.exists()
    assert len(deployment.requests("dispatch_sensor")) == 1
