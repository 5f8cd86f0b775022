"""A data folder with an inbox and a store: what tests of admission stand at."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from batch_orchestration.admission.admission import AdmissionSettings, admit
from batch_orchestration.admission.claims import Claim
from batch_orchestration.admission.inbox import Inbox
from batch_orchestration.admission.results import Admission, Admitted
from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.journal import JournalEntry, read_journal
from batch_orchestration.store.store import Store
from batch_orchestration_tests.support.builders import NOW

#: Later than any file of a test, however long the test takes.
LATER = 4_000_000_000.0
PRIORITIES = {"high": 10, "low": -10}


def make_admission_settings(**fields: Any) -> AdmissionSettings:
    """Lenient admission in chunks of ten."""
    values: dict[str, Any] = {
        "requests_per_chunk": 10,
        "max_line_bytes": 2 * 2**20,
        "answer_settings": {"engine": "simulated", "model": "demo-model"},
    }
    return AdmissionSettings(**{**values, **fields})


class InboxBench:
    """One data folder; files are dropped, claimed and admitted in it."""

    def __init__(
        self, root: Path, *, clock: Callable[[], float] = lambda: NOW, **settings: Any
    ) -> None:
        self.folder = DataFolder(root)
        self.folder.create()
        self.store = Store(self.folder.duckdb, deadline_seconds=60.0)
        self.clock = clock
        self.inbox = Inbox(self.folder, settle_seconds=5.0, priorities=PRIORITIES)
        self.settings = make_admission_settings(**settings)

    def drop(self, name: str, content: bytes, *, meta: bytes | None = None) -> Path:
        """Put a file, and perhaps its side-car, into the inbox."""
        path = self.folder.inbox / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        if meta is not None:
            path.with_name(f"{path.name}.meta.json").write_bytes(meta)
        return path

    def claim(self, name: str, content: bytes, *, meta: bytes | None = None) -> Claim:
        """Drop a file and claim it."""
        self.drop(name, content, meta=meta)
        [claim] = self.inbox.claim_ready(now=LATER)
        return claim

    def admit(self, claim: Claim) -> Admission:
        """Admit a claim."""
        return admit(
            claim,
            folder=self.folder,
            store=self.store,
            settings=self.settings,
            clock=self.clock,
        )

    def admit_file(self, name: str, content: bytes, *, meta: bytes | None = None) -> Admission:
        """Drop, claim and admit a file."""
        return self.admit(self.claim(name, content, meta=meta))

    def plan_of(self, name: str, content: bytes, *, meta: bytes | None = None) -> BatchPlan:
        """Admit a file that must become a batch, and return its plan."""
        verdict = self.admit_file(name, content, meta=meta)
        assert isinstance(verdict, Admitted), verdict
        return self.folder.read_plan(verdict.batch_id)

    def settled(self, plan: BatchPlan) -> list[JournalEntry]:
        """Return what admission wrote into the journals of a batch."""
        paths = (self.folder.journal_path(plan.batch_id, c.number) for c in plan.chunks)
        return [entry for path in paths for entry in read_journal(path)]

    def files_of(self, place: Path) -> set[str]:
        """Return the files below a folder, hidden ones and lock files left out."""
        files = (p.relative_to(place) for p in place.rglob("*") if p.is_file())
        return {str(f) for f in files if not any(part.startswith(".") for part in f.parts)}
