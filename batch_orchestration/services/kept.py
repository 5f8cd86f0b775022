"""The fraction of the raw engine that a batch kept, over all its runs."""

from batch_orchestration.domain.kept import Kept
from batch_orchestration.domain.run_account import kept
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.storage.accounts import read_accounts


def kept_of(folder: DataFolder, batch_id: str) -> Kept | None:
    """Return where the wall time of a batch went; None if no run has kept an account of it.

    Runs are added up; the time between them, such as a wait for a device, is no run's. A run that
    was killed has lost at most its last second. Replays are not counted.

    Raises:
        BatchNotFound: That is no batch id.
    """
    return kept(read_accounts(folder, batch_id))
