"""The data folder: its paths, and the files of each batch's plan and decisions."""

import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from batch_orchestration.core.batches import BatchPlan, can_be_id
from batch_orchestration.core.errors import BatchNotFound, FileDamaged
from batch_orchestration.core.lifecycle import EarlyEnd, Halt, Resumption
from batch_orchestration.files.atomic import (
    atomic_writer,
    disk_errors,
    make_folder,
    read_kept,
    shortages,
    sync_folder,
    write_atomically,
)
from batch_orchestration.files.input_lines import RawLine, new_digest, read_chunk, read_lines
from batch_orchestration.files.sharing import share

__all__ = [
    "DataFolder",
    "RawLine",
    "atomic_writer",
    "disk_errors",
    "make_folder",
    "new_digest",
    "read_chunk",
    "read_lines",
    "shortages",
    "sync_folder",
    "write_atomically",
]


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
        return self.batches / _folder_name(batch_id) / "plan.json"

    def input_path(self, batch_id: str) -> Path:
        """Path of a batch's kept input, uncompressed; an original `.gz` lies beside it."""
        return self.batches / _folder_name(batch_id) / "input.jsonl"

    def early_end_path(self, batch_id: str) -> Path:
        """Path of the decision to end a batch early; the batch ends early if the file exists."""
        return self.batches / _folder_name(batch_id) / "early-end.json"

    def halt_path(self, batch_id: str) -> Path:
        """Path of the decision to pause a batch because too many of its requests fail."""
        return self.batches / _folder_name(batch_id) / "halted.json"

    def resumption_path(self, batch_id: str) -> Path:
        """Path of the decision to resume a batch."""
        return self.batches / _folder_name(batch_id) / "resumed.json"

    def progress_path(self, batch_id: str) -> Path:
        """Path of the progress file, written by the batch's run."""
        return self.batches / _folder_name(batch_id) / "progress.json"

    def pruned_path(self, batch_id: str) -> Path:
        """Path of the marker for a batch whose journals housekeeping has removed."""
        return self.batches / _folder_name(batch_id) / "pruned.json"

    def journal_path(self, batch_id: str, number: int) -> Path:
        """Path of a chunk's journal."""
        return self.journals / _folder_name(batch_id) / f"{number:05d}.journal"

    def outbox_path(self, batch_id: str) -> Path:
        """Folder of a batch's output files."""
        return self.outbox / _folder_name(batch_id)

    def heartbeat_path(self, run_id: str) -> Path:
        """Path of a run worker's heartbeat file."""
        return self.heartbeats / f"{run_id}.json"

    def engine_record_path(self, run_id: str) -> Path:
        """Path of the record of a run's engine processes, beside the engine's log."""
        return self.logs / "engines" / f"{run_id}.process.json"

    def write_plan(self, plan: BatchPlan) -> None:
        """Write a plan durably; the batch's folder is created if missing."""
        write_atomically(self.plan_path(plan.batch_id), msgspec.json.encode(plan) + b"\n")

    def read_plan(self, batch_id: str) -> BatchPlan:
        """Return the plan of a batch.

        Raises:
            BatchNotFound: There is no plan of that id.
            FileDamaged: The plan cannot be read or belongs to another batch.
        """
        found = _plan_at(self.plan_path(batch_id), batch_id)
        if found is None:
            raise BatchNotFound(f"no batch {batch_id!r} in {self.batches}")
        return found

    def write_early_end(self, batch_id: str, early_end: EarlyEnd) -> None:
        """Write the decision to end a batch early, durably."""
        write_atomically(self.early_end_path(batch_id), msgspec.json.encode(early_end) + b"\n")

    def read_early_end(self, batch_id: str) -> EarlyEnd | None:
        """Return the decision to end a batch early; None if there is none.

        Raises:
            FileDamaged: The file cannot be read.
        """
        return read_kept(self.early_end_path(batch_id), EarlyEnd)

    def remove_early_end(self, batch_id: str) -> None:
        """Withdraw the decision to end a batch early, durably."""
        _remove(self.early_end_path(batch_id))

    def write_halt(self, batch_id: str, halt: Halt) -> None:
        """Write the decision to pause a batch, durably."""
        write_atomically(self.halt_path(batch_id), msgspec.json.encode(halt) + b"\n")

    def read_halt(self, batch_id: str) -> Halt | None:
        """Return the decision to pause a batch; None if there is none.

        Raises:
            FileDamaged: The file cannot be read.
        """
        return read_kept(self.halt_path(batch_id), Halt)

    def remove_halt(self, batch_id: str) -> None:
        """Withdraw the decision to pause a batch, durably."""
        _remove(self.halt_path(batch_id))

    def write_resumption(self, batch_id: str, resumption: Resumption) -> None:
        """Write the decision to resume a batch, durably."""
        self.mark_unfinished(batch_id)
        write_atomically(self.resumption_path(batch_id), msgspec.json.encode(resumption) + b"\n")

    def read_resumption(self, batch_id: str) -> Resumption | None:
        """Return the latest decision to resume a batch; None if there is none.

        Raises:
            FileDamaged: The file cannot be read.
        """
        return read_kept(self.resumption_path(batch_id), Resumption)

    def mark_unfinished(self, name: str) -> None:
        """Add a batch to the index of `files/unfinished.py`, durably, or renew its mark."""
        if self.unfinished.is_dir():  # without the index, ticks read every batch
            write_atomically(self.unfinished / name, b"")

    def batch_ids(self) -> list[str]:
        """Return the ids of all planned batches, sorted; other folders are ignored."""
        return sorted(ids_in(self.batches, "plan.json"))


def _plan_at(path: Path, batch_id: str) -> BatchPlan | None:
    plan = read_kept(path, BatchPlan)
    if plan is not None and plan.batch_id != batch_id:
        raise FileDamaged(path, f"is the plan of {plan.batch_id}: its folder is a copy")
    return plan


def ids_in(place: Path, file: str) -> list[str]:
    """Return the names of the subfolders that hold the file, damaged or not, and are valid ids."""
    try:
        with os.scandir(place) as entries:
            names = [entry.name for entry in entries if can_be_id(entry.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    # A broken link counts as present: the file is damaged, but the batch exists.
    return [name for name in names if os.path.lexists(place / name / file)]


def _remove(path: Path) -> None:
    with disk_errors(path):
        path.unlink(missing_ok=True)
        sync_folder(path.parent)


def _folder_name(batch_id: str) -> str:
    if not can_be_id(batch_id):
        raise BatchNotFound(f"not a batch id: {batch_id!r}")
    return batch_id
