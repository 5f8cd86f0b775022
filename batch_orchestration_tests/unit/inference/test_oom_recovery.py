"""What worked is where the next run begins, until it is time to try one higher."""

from pathlib import Path

import pytest

from batch_orchestration.core.errors import Exhaustion, MemoryShortage
from batch_orchestration.engines.memory_fallback import MemoryFallback, MemoryLevel
from batch_orchestration.engines.memory_level_file import MemoryLevelFile
from batch_orchestration.inference.faults.oom_recovery import remembered_fallback

TOP = MemoryLevel(max_num_seqs=64)
OUT_OF_MEMORY = Exhaustion(shortage=MemoryShortage.WORK, evidence="CUDA out of memory")
DAY = 86_400


class Runs:
    """Runs of engines that share a memory; `now` is their clock."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "memory-levels.json"
        self.now = 1000.0

    def fallback(self, *, top: MemoryLevel = TOP, **fields) -> MemoryFallback:
        values = {"model": "m", "device": "cuda", "args": {"dtype": "float16"}, **fields}
        return remembered_fallback(
            top,
            memory=MemoryLevelFile(self.path),
            retry_seconds=DAY,
            clock=lambda: self.now,
            **values,
        )

    def run(self, *, deaths: int = 0, **fields) -> int | None:
        """Die so often, then answer; return how many sequences the run began with."""
        fallback = self.fallback(**fields)
        began = fallback.level.max_num_seqs
        for _ in range(deaths):
            fallback.step_down(OUT_OF_MEMORY)
        fallback.note_answer()
        return began


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def test_an_engine_that_works_as_configured_leaves_no_file(runs: Runs) -> None:
    runs.run()

    assert not runs.path.exists()


def test_the_next_run_begins_on_the_level_that_worked(runs: Runs) -> None:
    runs.run(deaths=2)

    assert runs.run() == 16


def test_a_level_that_answered_nothing_is_not_remembered(runs: Runs) -> None:
    runs.fallback().step_down(OUT_OF_MEMORY)

    assert runs.run() == 64


@pytest.mark.parametrize(
    "other",
    [{"model": "n"}, {"device": "cpu"}, {"args": {}}, {"top": MemoryLevel(max_num_seqs=65)}],
)
def test_another_engine_begins_as_configured(runs: Runs, other) -> None:
    runs.run(deaths=2)

    assert runs.run(**other) == (65 if "top" in other else 64)


def test_a_level_is_remembered_whatever_the_derived_flags_are_today(runs: Runs) -> None:
    derived = ("max-num-seqs",)
    runs.run(deaths=2, derived=derived)

    assert runs.run(top=MemoryLevel(max_num_seqs=96), derived=derived) == 16
    assert runs.run(top=MemoryLevel(max_num_seqs=96)) == 96  # As set: another engine.


def test_a_remembered_level_never_raises_what_was_derived(runs: Runs) -> None:
    """A neighbour may have taken memory meanwhile: more than what is free does not start."""
    derived = ("gpu-memory-utilization",)
    free = MemoryLevel(max_num_seqs=64, gpu_memory_utilization=0.9)
    runs.run(top=free, deaths=1, derived=derived)

    fallback = runs.fallback(
        top=MemoryLevel(max_num_seqs=64, gpu_memory_utilization=0.4), derived=derived
    )

    assert fallback.level == MemoryLevel(max_num_seqs=32, gpu_memory_utilization=0.4)


def test_after_a_time_one_higher_is_tried_then_the_next_one(runs: Runs) -> None:
    runs.run(deaths=3)
    began = []
    for _ in range(4):
        runs.now += DAY
        began.append(runs.run())

    assert began == [16, 32, 64, 64]
    assert runs.path.read_text().strip() == "{}"


def test_runs_in_between_do_not_put_off_the_trial(runs: Runs) -> None:
    runs.run(deaths=2)
    runs.now += DAY / 2
    assert runs.run() == 16

    runs.now += DAY / 2

    assert runs.run() == 32


def test_a_trial_that_fails_waits_for_its_time_again(runs: Runs) -> None:
    runs.run(deaths=2)
    runs.now += DAY
    assert runs.run(deaths=1) == 32

    runs.now += DAY / 2
    assert runs.run() == 16
    runs.now += DAY / 2
    assert runs.run() == 32


@pytest.mark.parametrize("text", ["", "[]", '{"m": 1}', "\udcff"])
def test_a_file_of_no_use_is_replaced(runs: Runs, text: str) -> None:
    runs.path.write_bytes(text.encode(errors="surrogateescape"))

    assert runs.run(deaths=1) == 64
    assert runs.run() == 32


def test_a_memory_that_cannot_be_written_stops_no_run(tmp_path: Path) -> None:
    (tmp_path / "memory-levels.json").mkdir()

    assert Runs(tmp_path).run(deaths=1) == 64
