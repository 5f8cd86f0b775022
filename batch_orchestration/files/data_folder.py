"""The data folder: its paths, and the state files of a batch's plan and decisions."""

import os
from dataclasses import dataclass
from pathlib import Path

from batch_orchestration.core.batches import BatchPlan, can_be_id
from batch_orchestration.core.errors import BatchNotFound, FileDamaged
from batch_orchestration.core.lifecycle import EarlyEnd, Halt, Resumption
from batch_orchestration.files.atomic import make_folder
from batch_orchestration.files.sharing import share
from batch_orchestration.files.state_file import StateFile


@dataclass(frozen=True)
class DataFolder:
    """The folder named by the setting `data_dir`, with all our files; `root` becomes absolute."""

    root: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root).resolve())

    @property
    def inbox(self) -> Path:
        """Folder into which users drop files."""
        return self.root / "inbox"

    @property
    def rejected(self) -> Path:
        """Dropped files that were rejected, with the reasons."""
        return self.inbox / "rejected"

    @property
    def claims(self) -> Path:
        """Dropped files that are claimed but not yet admitted."""
        return self.root / "claims"

    @property
    def batches(self) -> Path:
        """One folder per batch: kept input, plan, progress."""
        return self.root / "batches"

    @property
    def journals(self) -> Path:
        """One folder per batch: a journal per chunk."""
        return self.root / "journals"

    @property
    def outbox(self) -> Path:
        """One folder per batch: output, errors, report."""
        return self.root / "outbox"

    @property
    def engines(self) -> Path:
        """Records of the engine hosts that run."""
        return self.root / "engines"

    @property
    def logs(self) -> Path:
        """Logs of engines and runs."""
        return self.root / "logs"

    @property
    def heartbeats(self) -> Path:
        """Heartbeat files of the run workers, by run id."""
        return self.root / "heartbeats"

    @property
    def duckdb(self) -> Path:
        """The DuckDB file of the store."""
        return self.root / "batch.duckdb"

    @property
    def queue(self) -> Path:
        """The queue, as last written by `dispatch_sensor`."""
        return self.root / "queue.json"

    @property
    def paused(self) -> Path:
        """Exists while the queue is paused."""
        return self.root / "paused.json"

    @property
    def needs(self) -> Path:
        """The batches that need attention from a person."""
        return self.root / "needs-attention.json"

    @property
    def refusal(self) -> Path:
        """The engine's latest refusal of access, and when access was restored."""
        return self.root / "engine-refuses-us.json"

    @property
    def health(self) -> Path:
        """The latest findings of `health_sensor`."""
        return self.root / "health.json"

    @property
    def alerts(self) -> Path:
        """The alert state; only `alert_sensor` writes it."""
        return self.root / "alerts.json"

    @property
    def scans(self) -> Path:
        """File scans of the files that wait in the inbox for capacity."""
        return self.root / "scans"

    @property
    def unfinished(self) -> Path:
        """An empty file for each batch whose folder sensor ticks have to read."""
        return self.root / "unfinished"

    @property
    def fences(self) -> Path:
        """One file per GPU that must not be used."""
        return self.root / "fences"

    @property
    def memory_levels(self) -> Path:
        """The memory levels that worked, by engine."""
        return self.root / "memory-levels.json"

    def create(self) -> None:
        """Create every missing folder."""
        ours = (self.inbox, self.rejected, self.claims, self.batches, self.journals)
        for folder in (*ours, self.outbox, self.logs):
            make_folder(folder)
        if not os.path.lexists(self.unfinished):
            make_folder(self.unfinished)
        # The top folders suffice: they contain only our own files.
        for folder in filter(Path.exists, (self.root, *ours, self.unfinished)):
            share(folder)

    def plan_path(self, batch_id: str) -> Path:
        """Path of a batch's plan."""
        return self._of_batch(batch_id) / "plan.json"

    def input_path(self, batch_id: str) -> Path:
        """Path of a batch's kept input, uncompressed; an original `.gz` lies beside it."""
        return self._of_batch(batch_id) / "input.jsonl"

    def early_end(self, batch_id: str) -> StateFile[EarlyEnd]:
        """The decision to end a batch early; the batch ends early if the file exists."""
        return StateFile(self._of_batch(batch_id) / "early-end.json", EarlyEnd)

    def halt(self, batch_id: str) -> StateFile[Halt]:
        """The decision to pause a batch because too many of its requests fail."""
        return StateFile(self._of_batch(batch_id) / "halted.json", Halt)

    def resumption(self, batch_id: str) -> StateFile[Resumption]:
        """The latest decision to resume a batch; its writer marks the batch as unfinished first."""
        return StateFile(self._of_batch(batch_id) / "resumed.json", Resumption)

    def progress_path(self, batch_id: str) -> Path:
        """Path of the progress file, written by the batch's run."""
        return self._of_batch(batch_id) / "progress.json"

    def pruned_path(self, batch_id: str) -> Path:
        """Path of the marker for a batch whose journals housekeeping has removed."""
        return self._of_batch(batch_id) / "pruned.json"

    def journal_path(self, batch_id: str, number: int) -> Path:
        """Path of a chunk's journal."""
        return self.journals / _folder_name(batch_id) / journal_name(number)

    def outbox_path(self, batch_id: str) -> Path:
        """Folder of a batch's output files."""
        return self.outbox / _folder_name(batch_id)

    def heartbeat_path(self, run_id: str) -> Path:
        """Path of a run worker's heartbeat file."""
        return self.heartbeats / f"{run_id}.json"

    def engine_record_path(self, run_id: str) -> Path:
        """Path of the record of a run's engine processes, beside the engine's log."""
        return self.logs / "engines" / f"{run_id}.process.json"

    def read_plan(self, batch_id: str) -> BatchPlan:
        """Return the plan of a batch.

        Raises:
            BatchNotFound: There is no plan of that id.
            FileDamaged: The plan cannot be read or belongs to another batch.
        """
        path = self.plan_path(batch_id)
        if (plan := StateFile(path, BatchPlan).read()) is None:
            raise BatchNotFound(f"no batch {batch_id!r} in {self.batches}")
        if plan.batch_id != batch_id:
            raise FileDamaged(path, f"is the plan of {plan.batch_id}: its folder is a copy")
        return plan

    def batch_ids(self) -> list[str]:
        """Return the ids of all planned batches, sorted, those with a damaged plan included."""
        try:
            with os.scandir(self.batches) as entries:
                names = sorted(entry.name for entry in entries if can_be_id(entry.name))
        except (FileNotFoundError, NotADirectoryError):
            return []
        # A broken link counts as present: the file is damaged, but the batch exists.
        return [name for name in names if os.path.lexists(self.plan_path(name))]

    def _of_batch(self, batch_id: str) -> Path:
        return self.batches / _folder_name(batch_id)


def journal_name(number: int, attempt: int = 1) -> str:
    """Return the name of a chunk's journal, such as `00000.1.journal`.

    Args:
        number: Number of the chunk.
        attempt: All passes of one machine append to one journal. A chunk that another machine takes
            over will have a further journal.
    """
    return f"{number:05d}.{attempt}.journal"


def _folder_name(batch_id: str) -> str:
    if not can_be_id(batch_id):
        raise BatchNotFound(f"not a batch id: {batch_id!r}")
    return batch_id
