"""Whether the store has an answer itself or only says where it is, makes no difference to it."""

import json
import tempfile
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_orchestration.core.outcomes import Completion, Outcome
from batch_orchestration.core.results import SettledRequest
from batch_orchestration.files.journal import Journal, read_journal
from batch_orchestration.store import rows
from batch_orchestration_tests.support.builders import (
    NOW,
    make_completion,
    make_failure,
    make_provenance,
    make_request,
    make_settled,
)

texts = st.text(max_size=40).map(lambda text: json.dumps({"said": text}, ensure_ascii=False))
bodies = st.one_of(
    texts.map(str.encode),
    st.text(max_size=20).map(lambda text: json.dumps({"a": [text]}, indent=1).encode()),
    # Is no Unicode within the string; a decoder that leaves it raw does not mind.
    st.just(b'{"a":"\xff\xfe"}'),
).map(msgspec.Raw)
outcomes: st.SearchStrategy[Outcome] = st.one_of(
    bodies.map(lambda body: make_completion(body=body)),
    bodies.map(lambda body: make_failure(body=body)),
    st.just(make_failure(body=None, status=None)),
)


def row_of(request: SettledRequest) -> rows.Row:
    if isinstance(request.outcome, Completion):
        return rows.result_row("b", 7, request, request.outcome)
    return rows.failed_row("b", 7, request, request.outcome)


@given(st.lists(outcomes, min_size=1, max_size=8), st.integers(0, 400), st.integers(0, 120))
@settings(deadline=None, max_examples=100)
def test_every_outcome_comes_back_as_it_was_however_little_room_the_store_has(
    answers: list[Outcome], size_bytes: int, each: int
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "BUDGET_BYTES", size_bytes)
        patch.setattr(rows, "LARGEST_BYTES", each)
        root = Path(folder)
        path = root / "journals" / "b: 1+1" / "00007.journal"
        with Journal.open(
            path, batch_id="b", number=7, provenance=make_provenance(), at=NOW
        ) as journal:
            for index, outcome in enumerate(answers):
                journal.record_outcome(make_request(index=index), outcome, 1, NOW)
        budget = rows.RowBudget(root)
        taken = 0

        for entry in read_journal(path):
            request = make_settled(entry.index, entry.outcome, place=entry.place)
            stored = budget.fit(row_of(request), request)
            taken += sum(len(stored.get(name) or "") for name in ("response", "body"))
            found = rows.settled_request(rows.with_response(stored, root))
            assert found.outcome == rows.as_stored("b", 7, request).outcome
        budget.sync()

        assert taken <= size_bytes
