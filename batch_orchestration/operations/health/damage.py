"""Damage: our own unreadable files, each with its path, the reason and the next step.

Code that meets such a file goes on with the others (`core.fault_isolation`). This module searches
for them, so that `status` and `health` report them even if nothing else reads them.
"""

import os
import stat
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from batch_orchestration.admission.claims import Attempts, ClaimFolder
from batch_orchestration.admission.results import AdmissionResult
from batch_orchestration.admission.scans import FileScan
from batch_orchestration.core.batches import BatchPlan, Origin, can_be_id
from batch_orchestration.core.dead_letters import Replay
from batch_orchestration.core.errors import BatchNotFound, BatchOrchestrationError, FileDamaged
from batch_orchestration.engines.access import Refusal
from batch_orchestration.engines.memory_level_file import Descent
from batch_orchestration.engines.processes.records import ProcessRecord
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.kept_input import check_input_size
from batch_orchestration.files.state_file import StateFile
from batch_orchestration.gpu.faults import Fence
from batch_orchestration.lifecycle.clock import ClockRecord, clock_path
from batch_orchestration.operations.health.links import CLI
from batch_orchestration.operations.health.report import HealthReport
from batch_orchestration.operations.housekeeping.clean import PartResult, results_file
from batch_orchestration.queue.entries import NeedsAttention, Pause, QueueView
from batch_orchestration.store.operations import open_files
from batch_orchestration.workers.heartbeat import Heartbeat
from batch_orchestration.workers.progress import Progress
from batch_orchestration.workers.utilization import TimeBreakdown
from batch_orchestration.workers.utilization_files import accounts_path


@dataclass(frozen=True, kw_only=True)
class Damage:
    """An unreadable file.

    Attributes:
        reason: The problem, beginning with the path.
        next_command: The next step for a person.
        member: Batch or claim that waits because of it; None if none does.
    """

    path: Path
    reason: str
    next_command: str
    member: str | None = None


def find_damage(
    folder: DataFolder, unfinished: Collection[str], *, thorough: bool = False
) -> list[Damage]:
    """Return the unreadable files of the deployment and of unfinished work.

    Args:
        folder: The data folder; nothing in it is changed.
        unfinished: Ids of the batches to examine.
        thorough: Whether to look for foreign folders beside all batches, too; the time for that
            grows with their number.
    """
    found = [*_of_deployment(folder), *_of_index(folder), *_of_claims(folder)]
    found += _of_replays(folder)
    for batch_id in sorted(unfinished):
        found += _of_batch(folder, batch_id)
    if thorough:
        found += _foreign(folder)
    return found


def _of_deployment(folder: DataFolder) -> Iterator[Damage]:
    kinds: list[tuple[Iterable[Path], Any]] = [
        ([folder.queue], QueueView),
        ([folder.paused], Pause),
        ([folder.needs], tuple[NeedsAttention, ...]),
        ([folder.refusal], Refusal),
        ([folder.health], HealthReport),
        ([folder.alerts], dict[str, Any]),
        ([folder.memory_levels], dict[str, Descent]),
        ([results_file(folder).path], dict[str, PartResult]),
        ([clock_path(folder)], ClockRecord),
        (folder.fences.glob("*.json"), Fence),
        (folder.scans.glob("*.json"), FileScan),
        (folder.heartbeats.glob("*.json"), Heartbeat),
        ((folder.logs / "engines").glob("*.process.json"), ProcessRecord),
    ]
    for paths, kind in kinds:
        for path in sorted(paths):
            next_command = f"{CLI} resume" if path == folder.paused else _replaced(path)
            yield from _unreadable(StateFile(path, kind), next_command)


def _of_index(folder: DataFolder) -> Iterator[Damage]:
    path = folder.unfinished
    if os.path.lexists(path) and not path.is_dir():
        reason = f"{path} is not a folder: each tick reads all batches"
        yield Damage(path=path, reason=reason, next_command=_replaced(path))


def _of_claims(folder: DataFolder) -> Iterator[Damage]:
    for path in _folders(folder.claims):
        place = ClaimFolder(folder, path.name)
        way_out = (
            f"repair or remove it, or take the file back: mv {quote(str(path))}/*.jsonl* inbox/"
        )
        kinds: tuple[tuple[Path, Any], ...] = (
            (place.origin_path, Origin),
            (place.result_path, AdmissionResult),
            (place.attempts_path, Attempts),
        )
        for file, kind in kinds:
            yield from _unreadable(StateFile(file, kind), way_out, path.name)


def _of_replays(folder: DataFolder) -> Iterator[Damage]:
    for path in open_files(folder):
        batch_id = path.parent.parent.name
        yield from _unreadable(StateFile(path, Replay), _replaced(path), batch_id)


def _of_batch(folder: DataFolder, batch_id: str) -> Iterator[Damage]:
    decide = f"restore it from a backup, or decide again: {CLI} cancel {batch_id}"
    home = folder.plan_path(batch_id).parent
    plan: list[BatchPlan] = []
    yield from _check(
        folder.plan_path(batch_id),
        lambda: plan.append(folder.read_plan(batch_id)),
        _lost(batch_id),
        batch_id,
    )
    progress = folder.progress_path(batch_id)
    for file, next_command in (
        (folder.early_end(batch_id), decide),
        (folder.resumption(batch_id), decide),
        (folder.halt(batch_id), f"{CLI} resume {batch_id}"),
        (StateFile(progress, Progress), _replaced(progress)),
    ):
        yield from _unreadable(file, next_command, batch_id)
    for path in accounts_path(folder, batch_id).glob("*.json"):
        yield from _unreadable(StateFile(path, TimeBreakdown), _replaced(path), batch_id)
    if plan:
        end = f"{CLI} cancel {batch_id}"
        path = folder.input_path(batch_id)
        yield from _check(path, lambda: _check_input(plan[0], folder), end, batch_id)
    for path in (home, folder.journal_path(batch_id, 0).parent, folder.outbox_path(batch_id)):
        if os.path.lexists(path) and not path.is_dir():
            reason = f"{path} is not a folder"
            yield Damage(path=path, reason=reason, next_command=_replaced(path), member=batch_id)
    for path in folder.journal_path(batch_id, 0).parent.glob("*.journal"):
        if not stat.S_ISREG(path.lstat().st_mode):
            reason = f"{path} is not a regular file"
            yield Damage(path=path, reason=reason, next_command=_replaced(path), member=batch_id)


def _check_input(plan: BatchPlan, folder: DataFolder) -> None:
    check_input_size(plan, folder)
    path = folder.input_path(plan.batch_id)
    if not path.is_file():
        raise FileDamaged(path, "is not a regular file")


def _foreign(folder: DataFolder) -> Iterator[Damage]:
    """Yield folders beside the batches that are none: copies, and folders added by people."""
    for path in _folders(folder.batches):
        reason = None
        if not can_be_id(path.name):
            reason = f"{path} is not a batch: no batch has such a name"
        elif not os.path.lexists(path / "plan.json"):
            reason = f"{path} has no plan.json"
        if reason is not None:
            yield Damage(path=path, reason=reason, next_command="move it elsewhere")


def _folders(place: Path) -> list[Path]:
    try:
        with os.scandir(place) as entries:
            return sorted(
                Path(e.path) for e in entries if e.is_dir() and not e.name.startswith(".")
            )
    except OSError:
        return []


def _unreadable(
    file: StateFile[Any], next_command: str, member: str | None = None
) -> Iterator[Damage]:
    yield from _check(file.path, file.read, next_command, member)


def _check(path: Path, read: Any, next_command: str, member: str | None = None) -> Iterator[Damage]:
    try:
        read()
    except BatchNotFound:
        if member is not None:
            yield Damage(
                path=path, reason=f"{path} is missing", next_command=next_command, member=member
            )
    except (BatchOrchestrationError, OSError) as error:
        reason = str(error).partition("\n")[0]
        yield Damage(path=path, reason=reason, next_command=next_command, member=member)


def _replaced(path: Path) -> str:
    """Return the command for a damaged file that is rewritten by itself."""
    return f"mv {quote(str(path))} {quote(str(path))}.damaged"


def _lost(name: str) -> str:
    return f"restore it from a backup, or give it up: {CLI} cancel {name}"
