from pathlib import Path

import pytest

from batch_orchestration.core.errors import BatchNotFound, DiskFull, StorageError
from batch_orchestration.files.atomic import atomic_writer, write_atomically
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


def test_nothing_is_visible_until_the_body_ends(tmp_path: Path) -> None:
    path = tmp_path / "outbox" / "output.jsonl"

    with atomic_writer(path) as file:
        file.write(b"half")
        assert not path.exists()

    assert path.read_bytes() == b"half"


def test_a_body_that_raises_leaves_the_old_content_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "output.jsonl"
    write_atomically(path, b"old")

    def write_half() -> None:
        with atomic_writer(path) as file:
            file.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        write_half()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_longest_file_names_can_be_written_atomically(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 127)

    write_atomically(path, b"text")

    assert path.read_bytes() == b"text"


def test_files_are_readable_by_those_whom_the_umask_allows(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()

    write_atomically(tmp_path / "atomic", b"text")

    assert (tmp_path / "atomic").stat().st_mode == plain.stat().st_mode


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "outbox").write_text("a file in the way")

    with pytest.raises(StorageError, match="cannot write"):
        write_atomically(tmp_path / "outbox" / "output.jsonl", b"text")


def test_a_full_disk_met_by_the_body_is_told_as_such(tmp_path: Path) -> None:
    def fill() -> None:
        with atomic_writer(tmp_path / "output.jsonl"), open("/dev/full", "wb", 0) as full:  # noqa: PTH123
            full.write(b"text")

    with pytest.raises(DiskFull):
        fill()
    assert list(tmp_path.iterdir()) == []
