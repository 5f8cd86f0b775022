"""The original lines of dead letters: written to a batch file, or mended by overrides."""

from pathlib import Path

import pytest

from batch_orchestration.admission.registration import write_fault_journals
from batch_orchestration.core.dead_letters import Selection
from batch_orchestration.core.errors import DeadLetterError
from batch_orchestration.core.outcomes import FailureCode
from batch_orchestration.core.requests import Fault
from batch_orchestration.dead_letters.actions import as_input
from batch_orchestration_tests.support.builders import (
    NOW,
    make_input,
    make_line,
    make_plan,
    write_plan,
)
from batch_orchestration_tests.support.letter_bench import LetterBench, refusing
from batch_orchestration_tests.support.workbench import Workbench


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> LetterBench:
    return LetterBench(tmp_path_factory.mktemp("answered"))


@pytest.fixture
def bench(answered: LetterBench, tmp_path: Path) -> LetterBench:
    return answered.copied(tmp_path)


def test_the_original_lines_come_out_byte_for_byte(bench: LetterBench, tmp_path: Path) -> None:
    path = tmp_path / "again.jsonl"

    written = as_input(bench.batch_id, Selection(), path, folder=bench.folder, store=bench.store)

    kept = make_input(25).splitlines(keepends=True)
    assert written.written == 3
    assert path.read_bytes() == kept[3] + kept[4] + kept[17]


def test_an_existing_file_is_left_as_it_is(bench: LetterBench, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("mine")

    with pytest.raises(DeadLetterError, match="exists"):
        as_input(bench.batch_id, Selection(), path, folder=bench.folder, store=bench.store)

    assert path.read_text() == "mine"


class FaultyBench(LetterBench):
    """A batch with lines that admission refused."""

    LINES = (
        make_line(0),
        b'{"custom_id": "torn", \n',
        make_line(2, custom_id="request-0"),
        make_line(3, body={"messages": [{"role": "user", "content": "question 3"}]}),
        make_line(4).removesuffix(b"\n"),
    )

    def __init__(self, root: Path) -> None:
        Workbench.__init__(self, root)
        content = b"".join(self.LINES)
        self.plan = make_plan(content, faulty=3)
        self.batch_id = self.plan.batch_id
        write_plan(self.folder, self.plan)
        self.folder.input_path(self.batch_id).write_bytes(content)
        self.store.add_batch(self.plan, at=NOW)
        work = self.folder.plan_path(self.batch_id).parent
        write_fault_journals(work, self.plan, self.faults(), at=NOW)
        (work / "journals").rename(self.folder.journal_path(self.batch_id, 0).parent)
        self.run(self.plan, refusing(4))

    @staticmethod
    def faults():
        codes = {
            1: ("torn", FailureCode.INVALID_JSON),
            2: ("request-0", FailureCode.DUPLICATE_CUSTOM_ID),
            3: ("request-3", FailureCode.INVALID_REQUEST),
        }
        return [
            Fault(index=index, line=index + 1, custom_id=name, code=code, message="faulty")
            for index, (name, code) in codes.items()
        ]


def test_lines_that_never_were_requests_are_left_out_unless_asked_for(tmp_path: Path) -> None:
    bench = FaultyBench(tmp_path / "data")
    places = {"folder": bench.folder, "store": bench.store}

    some = as_input(bench.batch_id, Selection(), tmp_path / "some.jsonl", **places)
    everything = as_input(
        bench.batch_id, Selection(), tmp_path / "all.jsonl", include_faulty=True, **places
    )

    assert (some.written, [line.index for line in some.left_out]) == (3, [1])
    assert everything.written == 4
    assert (tmp_path / "all.jsonl").read_bytes() == b"".join(bench.LINES[1:]) + b"\n"


def test_faults_of_admission_are_replayed_only_if_overrides_mend_them(tmp_path: Path) -> None:
    bench = FaultyBench(tmp_path / "data")

    asked = bench.ask(overrides={"model": "tiny"})

    assert asked.replays[0].indices == (3, 4)
    reasons = {line.index: str(line) for line in asked.left_out}
    assert "line 2 (torn): is not a valid request: not JSON" in reasons[1]
    assert "another request of the batch has the same custom_id" in reasons[2]
    bench.replay(1)
    assert bench.states() == {1: "dead", 2: "dead", 3: "resolved", 4: "resolved"}
    bench.assert_accounts_add_up()


def test_a_selection_that_cannot_be_replayed_at_all_is_refused_with_reasons(
    tmp_path: Path,
) -> None:
    bench = FaultyBench(tmp_path / "data")

    with pytest.raises(DeadLetterError, match=r"can be replayed: line 4 .*model"):
        bench.ask(Selection(codes=(FailureCode.INVALID_REQUEST,)))

    assert set(bench.states().values()) == {"dead"}
