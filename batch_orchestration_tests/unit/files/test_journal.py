import sys
from pathlib import Path

import msgspec
import pytest

from batch_orchestration.core.errors import FileDamaged, JournalError, JournalInUse, StorageError
from batch_orchestration.core.outcomes import Completion, FailureCode, Outcome
from batch_orchestration.core.requests import LARGEST_KEPT_BODY, Fault
from batch_orchestration.core.results import Provenance
from batch_orchestration.files import journal_reading
from batch_orchestration.files.journal import (
    Journal,
    JournalEntry,
    JournalState,
    read_journal,
    replay_journal,
)
from batch_orchestration.files.journal_records import OutcomeRecord, PassRecord, encode_record
from batch_orchestration_tests.support.builders import (
    NOW,
    make_completion,
    make_failure,
    make_provenance,
    make_request,
)

UNREADABLE = make_failure(FailureCode.INVALID_JSON)


def make_record(index: int, outcome: Outcome, *, attempt: int = 1) -> OutcomeRecord:
    return OutcomeRecord(
        ordinal=1, index=index, line=index + 1, attempt=attempt, at=NOW, outcome=outcome
    )


def open_journal(path: Path, provenance: Provenance | None = None) -> Journal:
    return Journal.open(
        path, batch_id="b", number=7, provenance=provenance or make_provenance(), at=NOW
    )


def list_entries(path: Path) -> list[JournalEntry]:
    return list(read_journal(path))


def replay(path: Path) -> JournalState:
    return replay_journal(path, "b", 7)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "b" / "00007.journal"


def test_a_settled_request_is_read_back_with_its_history(path: Path) -> None:
    with open_journal(path) as journal:
        journal.record_submitted(3, 1, NOW)
        journal.record_failed_attempt(3, make_failure(FailureCode.TIMEOUT), 1, NOW + 1)
        journal.record_submitted(3, 2, NOW + 2)
        journal.record_outcome(make_request(index=3), make_completion(), 2, NOW + 3)

    (entry,) = read_journal(path)

    assert (entry.index, entry.outcome, entry.attempts) == (3, make_completion(), 2)
    assert [(attempt.at, attempt.code) for attempt in entry.failed_attempts] == [
        (NOW + 1, "timeout")
    ]
    assert (entry.first_submitted_at, entry.settled_at) == (NOW, NOW + 3)
    assert entry.provenance == make_provenance()


def test_a_settled_request_says_all_that_a_commit_needs(path: Path) -> None:
    answered, failed = make_request(index=3), make_request(index=4, endpoint="/v1/embeddings")
    with open_journal(path) as journal:
        journal.record_outcome(answered, make_completion(), 1, NOW)
        journal.record_outcome(failed, make_failure(), 1, NOW)

    first, second = (entry.settled() for entry in read_journal(path))

    assert (first.line, first.custom_id, first.endpoint) == (4, "request-3", answered.endpoint)
    assert (first.body, first.outcome) == (b"", make_completion())
    assert (second.line, second.custom_id, second.endpoint) == (5, "request-4", "/v1/embeddings")
    assert (second.body, second.outcome) == (bytes(failed.body), make_failure())
    assert first.place is not None
    assert first.place.journal == path


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        (b"not JSON", b"not JSON"),
        (b'{"torn": "\x00\x1e\r\n', b'{"torn": "\x00\x1e\r\n'),
        (b"\xef\xbb\xbf\xff\xfe", b"\xef\xbb\xbf" + "\ufffd\ufffd".encode()),
        (b"x" * LARGEST_KEPT_BODY, b"x" * LARGEST_KEPT_BODY),
        (b"x" * (LARGEST_KEPT_BODY + 1), b""),
    ],
)
def test_a_line_that_is_no_request_is_kept_as_text_unless_it_is_long(
    path: Path, body: bytes, kept: bytes
) -> None:
    code = FailureCode.INVALID_JSON
    fault = Fault(index=0, line=1, custom_id=None, body=body, code=code, message="torn")
    with open_journal(path) as journal:
        journal.record_outcome(fault, fault.as_failure(), 0, NOW)

    (entry,) = read_journal(path)

    settled = entry.settled()
    assert (settled.custom_id, settled.endpoint, settled.body) == (None, "", kept)


@pytest.mark.parametrize("read", [list_entries, replay, open_journal])
def test_the_journal_of_another_version_is_refused_with_what_to_do(path: Path, read) -> None:
    with open_journal(path) as journal:
        journal.record_outcome(make_request(index=1), make_completion(), 1, NOW)
    provenance = make_provenance()
    begun = PassRecord(ordinal=1, batch_id="b", number=7, pid=1, at=NOW, provenance=provenance)
    old = encode_record(msgspec.structs.replace(begun, format=1))
    path.write_bytes(old + path.read_bytes())

    with pytest.raises(FileDamaged, match=r"00007\.journal is a journal of format 1, .*: finish"):
        read(path)


def test_entries_come_in_index_order_and_only_settled_ones(path: Path) -> None:
    with open_journal(path) as journal:
        journal.record_submitted(9, 1, NOW)
        for index in (5, 0, 3):
            journal.record_outcome(make_request(index=index), make_completion(), 1, NOW)

    assert [entry.index for entry in read_journal(path)] == [0, 3, 5]


def test_a_missing_journal_has_no_entries(path: Path) -> None:
    assert list(read_journal(path)) == []


def test_every_outcome_belongs_to_the_pass_that_recorded_it(path: Path) -> None:
    with open_journal(path, Provenance(run_id="admission")) as journal:
        journal.record_outcome(
            make_request(index=0), make_failure(FailureCode.INVALID_JSON), 0, NOW
        )
    with open_journal(path, make_provenance("run-2")) as journal:
        journal.record_outcome(make_request(index=1), make_completion(), 1, NOW)

    assert [entry.provenance.run_id for entry in read_journal(path)] == ["admission", "run-2"]


def test_a_lost_pass_record_does_not_put_its_outcomes_on_another_pass(path: Path) -> None:
    for run_id, index in (("run-1", 0), ("run-2", 1)):
        with open_journal(path, make_provenance(run_id)) as journal:
            journal.record_outcome(make_request(index=index), make_completion(), 1, NOW)
    path.write_bytes(path.read_bytes().replace(b'"run_id":"run-2"', b'"run_id":"run-?"'))

    with open_journal(path, make_provenance("run-3")) as journal:
        journal.record_outcome(make_request(index=2), make_completion(), 1, NOW)

    runs = [entry.provenance.run_id for entry in read_journal(path)]
    assert runs == ["run-1", "unknown", "run-3"]


def test_opening_tells_what_is_settled_in_flight_and_how_often_it_was_tried(path: Path) -> None:
    with open_journal(path) as journal:
        journal.record_outcome(
            make_request(index=0), make_failure(FailureCode.INVALID_JSON), 0, NOW
        )
        for index in (1, 2, 3):
            journal.record_submitted(index, 1, NOW)
        journal.record_outcome(make_request(index=1), make_completion(), 1, NOW)
        journal.record_failed_attempt(2, make_failure(FailureCode.TIMEOUT), 1, NOW)

    with open_journal(path) as journal:
        state = journal.state

    assert state.settled == {0, 1}
    assert state.in_flight == {3}
    assert state.attempts == {0: 0, 1: 1, 2: 1, 3: 1}


def test_what_a_dead_pass_left_in_flight_stays_suspect_until_its_fate_is_known(path: Path) -> None:
    with open_journal(path) as journal:
        journal.record_submitted(1, 1, NOW)
    open_journal(path).close()

    with open_journal(path) as journal:
        assert journal.state.in_flight == {1}
        journal.record_outcome(make_request(index=1), make_completion(), 1, NOW)
    with open_journal(path) as journal:
        assert journal.state.in_flight == set()


def test_a_second_outcome_is_refused_in_this_pass_and_in_the_next(path: Path) -> None:
    with open_journal(path) as journal:
        journal.record_outcome(make_request(index=1), make_completion("first"), 1, NOW)
        with pytest.raises(JournalError, match="request 1 has an outcome already"):
            journal.record_outcome(make_request(index=1), make_completion("second"), 1, NOW)
    with open_journal(path) as journal, pytest.raises(JournalError):
        journal.record_outcome(make_request(index=1), make_completion("third"), 1, NOW)

    assert [entry.outcome for entry in read_journal(path)] == [make_completion("first")]


def test_should_there_be_two_outcomes_after_all_the_first_counts(path: Path) -> None:
    with open_journal(path) as journal:
        journal.record_outcome(make_request(index=1), make_completion("first"), 1, NOW)
    with path.open("ab") as file:
        file.write(encode_record(make_record(1, make_completion("second"), attempt=2)))

    (entry,) = read_journal(path)

    assert (entry.outcome, entry.attempts) == (make_completion("first"), 1)


@pytest.mark.parametrize("body", [b'{"a": \x1e}', b"not JSON", b"{", b""])
def test_an_answer_that_could_not_be_read_back_is_refused_at_once(path: Path, body: bytes) -> None:
    with open_journal(path) as journal:
        with pytest.raises(JournalError):
            journal.record_outcome(
                make_request(index=0), make_completion(body=msgspec.Raw(body)), 1, NOW
            )

        assert journal.state.settled == set()
    assert list(read_journal(path)) == []


def test_answers_are_kept_byte_for_byte(path: Path) -> None:
    body = msgspec.Raw('{\n  "text": "ü\\u001e\\n",\r\n\t"n": 1.50\n}'.encode())
    with open_journal(path) as journal:
        journal.record_outcome(make_request(index=0), make_completion(body=body), 1, NOW)

    (entry,) = read_journal(path)

    assert isinstance(entry.outcome, Completion)
    assert bytes(entry.outcome.body) == bytes(body)


def test_a_journal_has_one_writer_and_names_it(path: Path) -> None:
    with open_journal(path), pytest.raises(JournalInUse, match=r"pid \d+ \(run run-1\)"):
        open_journal(path, make_provenance("run-2"))

    open_journal(path, make_provenance("run-2")).close()


def test_the_journal_of_another_chunk_is_refused(path: Path) -> None:
    open_journal(path).close()

    with pytest.raises(StorageError, match="journal of b/00007, not of b/00008"):
        Journal.open(path, batch_id="b", number=8, provenance=make_provenance(), at=NOW)
    open_journal(path).close()


def test_closing_twice_is_closing_and_a_closed_journal_takes_nothing(path: Path) -> None:
    journal = open_journal(path)
    journal.sync()

    journal.close()
    journal.close()

    with pytest.raises(JournalError, match="closed"):
        journal.record_submitted(0, 1, NOW)


def test_a_journal_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("a file in the way")

    with pytest.raises(StorageError, match="cannot write"):
        open_journal(tmp_path / "b" / "00007.journal")


def test_the_size_at_one_moment_is_a_picture_of_that_moment(path: Path) -> None:
    with open_journal(path) as journal:
        journal.record_outcome(make_request(index=0), make_completion(), 1, NOW)
        end = path.stat().st_size
        journal.record_outcome(make_request(index=1), make_completion(), 1, NOW)

    assert [entry.index for entry in read_journal(path, end=end)] == [0]
    assert [entry.index for entry in read_journal(path, end=end + 40)] == [0]
    assert list(read_journal(path, end=0)) == []
    assert len(replay_journal(path, "b", 7, end=end).settled) == 1


def test_outcomes_in_memory_are_bounded_by_what_they_take_there(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A body that is not ASCII takes four bytes a character, and one or two in the file."""
    body = "é" * 4_000 + "🙂"
    monkeypatch.setattr(journal_reading, "HELD_BYTES", 100_000)
    with open_journal(path) as journal:
        for index in range(50):
            fault = Fault(
                index=index,
                line=index + 1,
                custom_id=None,
                code=FailureCode.INVALID_JSON,
                message="no JSON",
                body=body.encode(),
            )
            journal.record_outcome(fault, UNREADABLE, 0, NOW)

    held = [entry.held for entry in read_journal(path)]

    assert sum(sys.getsizeof(record.body) for record in held if record) <= 100_000
    assert [entry.settled().body for entry in list_entries(path)] == [body.encode()] * 50
