"""Files of accounts of runs: `accounts/<run id>.json` in the folder of each batch."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from batch_orchestration.core.errors import StorageError
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.state_file import StateFile
from batch_orchestration.workers.utilization import TimeBreakdown, Utilization


def accounts_path(folder: DataFolder, batch_id: str) -> Path:
    """Return the folder with the accounts of all runs of a batch."""
    return folder.plan_path(batch_id).with_name("accounts")


def account_path(folder: DataFolder, batch_id: str, run_id: str) -> Path:
    """Return the path of a run's account of a batch."""
    return accounts_path(folder, batch_id) / f"{quote(run_id, safe='')}.json"


def write_account(folder: DataFolder, account: TimeBreakdown) -> None:
    """Replace an account atomically.

    Not fsynced, like the progress file: a power loss costs some seconds of a statistic.

    Raises:
        OSError: It cannot be written.
    """
    path = account_path(folder, account.batch_id, account.run_id)
    path.parent.mkdir(exist_ok=True)
    StateFile(path, TimeBreakdown).write_unsynced(account)


def read_account(path: Path) -> TimeBreakdown | None:
    """Return an account; None if there is none that can be read."""
    try:
        return StateFile(path, TimeBreakdown).read()
    except StorageError:
        return None


def read_accounts(folder: DataFolder, batch_id: str) -> Iterator[TimeBreakdown]:
    """Yield the accounts of a batch that can be read, one for each run that worked for it."""
    for path in sorted(accounts_path(folder, batch_id).glob("*.json")):
        if (account := read_account(path)) is not None:
            yield account


def utilization_of(folder: DataFolder, batch_id: str) -> Utilization | None:
    """Return where the wall time of a batch went; None if there is no account of it.

    Runs are added up. Time between runs, such as a wait for a device, is not included. A run that
    was killed has lost at most its last second. Replays are not counted.

    Raises:
        BatchNotFound: `batch_id` is not valid.
    """
    return Utilization.of(read_accounts(folder, batch_id))
