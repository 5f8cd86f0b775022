"""A data folder with its store, watched as the sensors watch it, on a clock that the test moves."""

import msgspec

from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.core.errors import DiskFull
from batch_orchestration.files.state_file import StateFile
from batch_orchestration.operations.alerts.channels import alert_channels
from batch_orchestration.operations.alerts.cycle import run_alert_cycle
from batch_orchestration.operations.alerts.state import AlertState
from batch_orchestration.operations.health.report import Finding, HealthReport, Level
from batch_orchestration.settings import Settings
from batch_orchestration_tests.support.builders import NOW, make_settled_chunk
from batch_orchestration_tests.support.workbench import Workbench

TICK = 30.0


class FullDisk(StateFile):
    """A state file, of `alert_sensor` or of others, whose disk is full."""

    def write(self, value):
        if self.path.name == "alerts.json":
            raise DiskFull("no room")
        super().write(value)


class AlertBench(Workbench):
    """A workbench whose alerts go to a webhook, or to other channels; the test moves its clock."""

    def __init__(self, root, webhook=None, *, channels=None):
        self.webhook = webhook
        super().__init__(root / "data", lock_seconds=5)
        self.in_force = Settings(
            data_dir=self.folder.root, engine="simulated", alert_dead_letters=3,
            alert_webhook_url=webhook.url if webhook else "", _env_file=None,
        )  # fmt: skip
        self.channels = channels or alert_channels(self.in_force)
        self.now = NOW
        self.findings: tuple[Finding, ...] = ()

    def tick(self, *, seconds=TICK):
        """Look as `health_sensor` and `alert_sensor` do."""
        self.now += seconds
        findings = [
            msgspec.structs.replace(found, since=found.since or self.now) for found in self.findings
        ]
        fine = Finding(check="disk", level=Level.HEALTHY, reason="there is room")
        StateFile(self.folder.health, HealthReport).write(
            HealthReport(at=self.now, findings=(fine, *findings))
        )
        return self.cycle()

    def cycle(self, observed=None):
        return run_alert_cycle(
            settings=self.in_force,
            folder=self.folder,
            channels=self.channels,
            now=self.now,
            observed=observed,
        )

    def begin(self):
        """The first tick: from now on there is news."""
        self.tick()
        self.now += 1

    def add(self, name="b", *, requests=10, failing=()):
        plan = self.admitted(requests, name, at=self.now)
        for chunk in plan.chunks:
            settled = [
                msgspec.structs.replace(request, settled_at=self.now)
                for request in make_settled_chunk(chunk, failing=failing)
            ]
            self.store.commit_chunk(
                plan.batch_id, chunk.number, settled, run_id="run-1", at=self.now, seconds=1.0
            )
        return plan.batch_id

    def end(self, batch_id, status=BatchStatus.COMPLETED):
        for step in (BatchStatus.FINALIZING, status):
            self.store.set_status(batch_id, step, at=self.now, actor="run-1", reason="all is done")

    @property
    def kinds(self):
        """Of the open alerts."""
        return [transition.finding.kind for transition in self.state.open.values()]

    @property
    def state(self):
        return StateFile(self.folder.alerts, AlertState).read()

    def only(self):
        (text,) = self.webhook.texts
        return text
