import random
import time
from pathlib import Path

import pytest

from batch_orchestration.core.errors import JournalInUse
from batch_orchestration.files.journal import Journal, read_journal
from batch_orchestration.files.journal_records import read_records
from batch_orchestration_tests.support.builders import (
    NOW,
    make_completion,
    make_provenance,
    make_request,
)
from batch_orchestration_tests.support.children import child, lines_until_killed, next_line

ANSWER_FOR_EVER = """
    import sys
    from pathlib import Path
    from batch_orchestration.files.journal import Journal
    from batch_orchestration_tests.support.builders import *
    journal = Journal.open(
        Path(sys.argv[1]), batch_id="b", number=0, provenance=make_provenance(), at=NOW
    )
    print("open", flush=True)
    pending = (i for i in range(10**6) if i not in journal.state.settled)
    for index in pending:
        journal.record_submitted(index, journal.state.attempts.get(index, 0) + 1, NOW)
        answer = make_completion(f"answer {index}" * 50)
        journal.record_outcome(make_request(index=index), answer, 1, NOW)
        print(index, flush=True)
"""


def open_journal(path: Path) -> Journal:
    return Journal.open(path, batch_id="b", number=0, provenance=make_provenance(), at=NOW)


def test_every_acknowledged_outcome_survives_its_writer(tmp_path: Path) -> None:
    path = tmp_path / "b" / "00000.journal"
    seed = random.randrange(2**32)
    print("seed", seed)
    chance = random.Random(seed)
    acknowledged: list[int] = []

    for _ in range(6):
        with child(ANSWER_FOR_EVER, path) as process:
            assert next_line(process) == "open"
            time.sleep(chance.uniform(0.01, 0.1))
            acknowledged += map(int, lines_until_killed(process))
        entries = {entry.index: entry.outcome for entry in read_journal(path)}
        assert entries.keys() >= set(acknowledged)

    # At most the one outcome that was being acknowledged is there beyond those.
    assert len(acknowledged) == len(set(acknowledged)) >= len(entries) - 6
    for index, outcome in entries.items():
        assert outcome == make_completion(f"answer {index}" * 50)


def test_a_torn_record_is_dropped_and_the_next_one_is_safe(tmp_path: Path) -> None:
    path = tmp_path / "b" / "00000.journal"
    with open_journal(path) as journal:
        journal.record_outcome(make_request(index=0), make_completion("whole"), 1, NOW)
        size = path.stat().st_size
        journal.record_outcome(make_request(index=1), make_completion("torn"), 1, NOW)
    whole = path.read_bytes()

    # The last byte is a line break, without which the record is as good.
    for end in range(size + 2, len(whole) - 1, 7):
        path.write_bytes(whole[:end])
        with open_journal(path) as journal:
            assert journal.state.settled == {0}
            journal.record_outcome(make_request(index=1), make_completion("again"), 2, NOW)

        assert [entry.outcome for entry in read_journal(path)] == [
            make_completion("whole"),
            make_completion("again"),
        ]


def test_the_lock_of_a_killed_owner_is_free_and_that_of_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "b" / "00000.journal"

    with child(ANSWER_FOR_EVER, path) as process:
        next_line(process)
        with pytest.raises(JournalInUse, match=rf"pid {process.pid} "):
            open_journal(path)
        lines_until_killed(process)

    open_journal(path).close()


#: The limit on the size of files is a full disk for one process: the same short write, then errors.
FULL_DISK = """
    import resource, sys
    from pathlib import Path
    from batch_orchestration.core.errors import DiskFull
    from batch_orchestration.files.journal import Journal
    from batch_orchestration_tests.support.builders import *
    no_limit = resource.RLIM_INFINITY
    journal = Journal.open(
        Path(sys.argv[1]), batch_id="b", number=0, provenance=make_provenance(), at=NOW
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, no_limit))
    index = waits = 0
    while index < 100:
        try:
            journal.record_outcome(make_request(index=index), make_completion("x" * 200), 1, NOW)
        except DiskFull:
            waits += 1
            if waits == 5:
                resource.setrlimit(resource.RLIMIT_FSIZE, (no_limit, no_limit))
        else:
            index += 1
    print(waits, len(journal.state.settled), flush=True)
    input()
"""


def test_a_full_disk_loses_no_outcome_and_leaves_no_torn_record(tmp_path: Path) -> None:
    path = tmp_path / "b" / "00000.journal"

    with child(FULL_DISK, path) as process:
        assert next_line(process) == "5 100"

    assert [entry.index for entry in read_journal(path)] == list(range(100))
    assert None not in read_records(path)
