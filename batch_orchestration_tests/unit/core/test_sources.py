"""Who submits a file, and how urgently, by where it lies."""

import pytest

from batch_orchestration.core.batches import Origin, origin_in

PRIORITIES = {"high": 10, "low": -10}


@pytest.mark.parametrize(
    ("folders", "source", "priority"),
    [
        ((), "inbox", 0),
        (("high",), "inbox", 10),
        (("HIGH",), "inbox", 10),
        (("alice",), "alice", 0),
        (("alice", "low"), "alice", -10),
        (("low", "alice"), "alice", -10),
        (("alice", "reports"), "alice", 0),
        (("low", "high"), "inbox", 10),
        (("x" * 100,), "x" * 64, 0),
    ],
)
def test_folders_name_the_source_and_the_priority(folders, source, priority):
    origin = origin_in(folders, PRIORITIES, arrived_at=7.0)

    assert origin == Origin(
        folder="/".join(folders), source=source, priority=priority, arrived_at=7.0
    )
