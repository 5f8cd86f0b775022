"""Whatever happens to a journal's file, what is intact in it is found, and once."""

import json
import tempfile
from pathlib import Path

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_orchestration.core.outcomes import Outcome
from batch_orchestration.files.journal import Journal, read_journal
from batch_orchestration.files.journal_records import read_records
from batch_orchestration_tests.support.builders import (
    NOW,
    make_completion,
    make_failure,
    make_provenance,
    make_request,
)


def open_journal(path: Path) -> Journal:
    return Journal.open(path, batch_id="b", number=7, provenance=make_provenance(), at=NOW)


outcomes = st.one_of(
    st.text(max_size=30).map(make_completion),
    st.text(max_size=30).map(lambda text: make_failure(message=text)),
    st.dictionaries(st.text(max_size=3), st.text(max_size=9)).map(
        lambda body: make_completion(body=msgspec.Raw(json.dumps(body, indent=1).encode()))
    ),
)
garbage = st.one_of(
    st.binary(min_size=1, max_size=30),
    st.lists(
        st.sampled_from([b"\x1e", b"\n", b"00000000 ", b"\x1e00000000 \n", b"\0" * 9, b'{"a":1}']),
        max_size=6,
    ).map(b"".join),
)
#: Either a record of a request, or harm: cut so many bytes off the end, garbage at a place, resume.
steps = st.lists(
    st.one_of(
        st.tuples(st.just("submitted"), st.integers(0, 9)),
        st.tuples(st.just("outcome"), st.integers(0, 9), outcomes),
        st.tuples(st.just("cut"), st.integers(0, 400)),
        st.tuples(st.just("garbage"), st.floats(0, 1), garbage),
        st.tuples(st.just("resume")),
    ),
    max_size=25,
)


@given(steps)
@settings(deadline=None, max_examples=150)
def test_no_sequence_of_appends_cuts_garbage_and_resumes_loses_an_intact_outcome(
    sequence: list[tuple[str, ...]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "b" / "00007.journal"
        written: dict[int, list[tuple[bytes, Outcome]]] = {}
        journal = open_journal(path)
        for kind, *values in sequence:
            if kind == "submitted" and values[0] not in journal.state.settled:
                journal.record_submitted(values[0], 1, NOW)
            elif kind == "outcome" and values[0] not in journal.state.settled:
                size = path.stat().st_size
                journal.record_outcome(make_request(index=values[0]), values[1], 1, NOW)
                record = path.read_bytes()[size:]
                written.setdefault(values[0], []).append((record, values[1]))
            elif kind in ("cut", "garbage", "resume"):
                journal.close()
                harm(path, kind, values)
                journal = open_journal(path)
        journal.close()
        check(path, written)


def harm(path: Path, kind: str, values: list) -> None:
    content = path.read_bytes()
    if kind == "cut":
        path.write_bytes(content[: max(0, len(content) - values[0])])
    elif kind == "garbage":
        place = int(values[0] * len(content))
        path.write_bytes(content[:place] + values[1] + content[place:])


def check(path: Path, written: dict[int, list[tuple[bytes, Outcome]]]) -> None:
    content = path.read_bytes()
    entries = list(read_journal(path))
    found = {entry.index: entry.outcome for entry in entries}
    assert len(found) == len(entries)
    for index, outcome in found.items():
        assert outcome in [candidate for _, candidate in written[index]]
    for index, records in written.items():
        intact = [outcome for record, outcome in records if record in content]
        if intact:
            assert index in found
    with open_journal(path) as journal:
        assert journal.state.settled == found.keys()


@given(st.lists(outcomes, min_size=1, max_size=5), st.data())
@settings(deadline=None, max_examples=100)
def test_garbage_between_two_records_touches_neither(
    answers: list[Outcome], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "b" / "00007.journal"
        with open_journal(path) as journal:
            ends = []
            for index, outcome in enumerate(answers):
                ends.append(path.stat().st_size)
                journal.record_outcome(make_request(index=index), outcome, 1, NOW)
        end = data.draw(st.sampled_from([0, *ends, path.stat().st_size]))
        content = path.read_bytes()
        path.write_bytes(content[:end] + data.draw(garbage) + content[end:])

        found = [entry.outcome for entry in read_journal(path)]
        assert found == answers


@given(st.lists(outcomes, min_size=2, max_size=4), st.integers(0, 3), st.data())
@settings(deadline=None, max_examples=100)
def test_damage_within_a_record_loses_that_record_alone(
    answers: list[Outcome], victim: int, data: st.DataObject
) -> None:
    victim %= len(answers)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "b" / "00007.journal"
        ends = [0]
        with open_journal(path) as journal:
            for index, outcome in enumerate(answers):
                ends.append(path.stat().st_size)
                journal.record_outcome(make_request(index=index), outcome, 1, NOW)
        ends.append(path.stat().st_size)
        place = data.draw(st.integers(ends[victim + 1], ends[victim + 2] - 2))
        content = bytearray(path.read_bytes())
        content[place] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)

        found = {entry.index: entry.outcome for entry in read_journal(path)}

        expected = {i: outcome for i, outcome in enumerate(answers) if i != victim}
        assert found == expected
        assert None in read_records(path)
