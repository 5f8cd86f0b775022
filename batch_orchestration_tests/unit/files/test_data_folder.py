from pathlib import Path

import pytest

from batch_orchestration.core.errors import BatchNotFound, FileDamaged, StorageError
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration_tests.support.builders import make_input, make_plan, write_plan


def test_the_data_folder_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    folder = DataFolder(Path("data"))
    folder.create()

    assert folder.root == tmp_path / "data"
    assert folder.rejected.is_dir()
    assert folder.duckdb == tmp_path / "data" / "batch.duckdb"


def test_a_plan_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path)
    plan = make_plan(make_input(25))

    write_plan(folder, plan)

    assert folder.read_plan(plan.batch_id) == plan
    assert folder.batch_ids() == [plan.batch_id]


@pytest.mark.parametrize("batch_id", ["none", "", ".", "..", "../batches", "a/b", "/etc", "a\0b"])
def test_a_batch_that_is_not_there_is_not_found_whatever_its_name(
    tmp_path: Path, batch_id: str
) -> None:
    with pytest.raises(BatchNotFound):
        DataFolder(tmp_path).read_plan(batch_id)


def test_a_damaged_plan_is_told_by_its_path(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path)
    plan = make_plan(make_input(1))
    write_plan(folder, plan)
    path = folder.plan_path(plan.batch_id)
    path.write_bytes(path.read_bytes()[:50])

    with pytest.raises(StorageError, match=r"plan\.json is damaged"):
        folder.read_plan(plan.batch_id)


def test_the_plan_in_a_copied_folder_is_no_plan_of_that_batch(tmp_path):
    folder, plan = DataFolder(tmp_path), make_plan(make_input(1))
    write_plan(folder, plan)
    copy = folder.plan_path(f"{plan.batch_id}-copy")
    copy.parent.mkdir()
    copy.write_bytes(folder.plan_path(plan.batch_id).read_bytes())

    with pytest.raises(FileDamaged, match="is a copy"):
        folder.read_plan(f"{plan.batch_id}-copy")


def test_folders_that_cannot_be_batches_are_none(tmp_path):
    folder, plan = DataFolder(tmp_path), make_plan(make_input(1))
    write_plan(folder, plan)
    for name in (f"My Copy of {plan.batch_id} (batch)", "Ünicode", ".hidden"):
        (folder.batches / name).mkdir()
        (folder.batches / name / "plan.json").write_bytes(b"{}")

    assert folder.batch_ids() == [plan.batch_id]
