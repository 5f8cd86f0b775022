"""A deployment of which every metric has a value, and readers of the page that it exports."""

import time
from pathlib import Path
from typing import Any

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from batch_orchestration.engines.metrics import EngineMetrics
from batch_orchestration.gpu.facts import GpuFacts
from batch_orchestration.gpu.faults import Fence
from batch_orchestration.gpu.fences import put_up_fence
from batch_orchestration.operations.metrics.collector import metrics_text
from batch_orchestration.queue.entries import EntryKind, EntryState, WaitReason
from batch_orchestration.workers.utilization import TimeBreakdown
from batch_orchestration.workers.utilization_files import write_account
from batch_orchestration_tests.support.builders import NOW, make_settled_chunk
from batch_orchestration_tests.support.health_bench import HealthBench, entry

PREFIX = "batch_orchestration_"
GPU = GpuFacts(
    index=0,
    uuid="GPU-0",
    name="Test GPU",
    memory_total_bytes=80,
    memory_used_bytes=60,
    temperature_celsius=70,
    slowdown_celsius=90,
    utilization_percent=98,
    power_watts=300.0,
    sm_clock_mhz=1_500,
    throttle_reasons=("sw_power_cap",),
    ecc_uncorrectable_errors=0,
)
ENGINE = EngineMetrics(
    running=200,
    waiting=8,
    kv_usage=0.75,
    kv_cache_tokens=100_000,
    preemptions=2,
    prompt_tokens=5_000,
    generation_tokens=9_000,
    prefix_queries=5_000,
    prefix_hits=1_000,
)


class MetricsBench(HealthBench):
    """A data folder in which everything has happened once: one chunk of two is committed."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.now = time.time()
        self.plan = self.admitted(20)
        self.commit(0, failing=(3,))
        self.tick(
            entry(self.plan.batch_id, state=EntryState.RUNNING),
            entry("alice/b.jsonl", **waiting_file(WaitReason.QUEUE_FULL)),
        )
        self.folder.inbox.joinpath("alice").mkdir()
        self.folder.inbox.joinpath("alice/b.jsonl").write_bytes(b"{}\n")
        self.beat(in_flight=208, window=256, engine=ENGINE, gpus=(GPU,), batch_id="a")
        self.account()
        fence = Fence(uuid="GPU-1", at=self.now, reason="Xid 79", by="run-1")
        put_up_fence(self.folder, fence)
        self.watch()

    def commit(self, number: int, *, failing: tuple[int, ...] = ()) -> None:
        """Commit a chunk of the batch."""
        self.store.commit_chunk(
            self.plan.batch_id,
            number,
            make_settled_chunk(self.plan.chunks[number], failing=failing),
            run_id="run-1",
            at=NOW,
            seconds=2.0,
        )

    def account(self, run_id: str = "run-1", **fields: Any) -> None:
        """Write the account of a run: of 100 s it was busy for 80."""
        values = {"wall_seconds": 100.0, "busy_seconds": 80.0, "start_up_seconds": 20.0}
        account = TimeBreakdown(
            batch_id=self.plan.batch_id, run_id=run_id, engine_restarts=1, **{**values, **fields}
        )
        write_account(self.folder, account)

    def page(self) -> str:
        """Scrape once."""
        return metrics_text(self.folder).decode()


def waiting_file(reason: WaitReason) -> dict[str, Any]:
    """The fields of a file that waits in the inbox."""
    state = EntryState.WAITING
    return {"kind": EntryKind.FILE, "batch_id": None, "state": state, "reason": reason}


def families(page: str) -> dict[str, Metric]:
    """The metrics of a page, by their names there."""
    return {
        family.name + ("_total" if family.type == "counter" else ""): family
        for family in text_string_to_metric_families(page)
    }


def value(page: str, name: str, **labels: str) -> float | None:
    """The value of one series; None if there is none."""
    wanted = PREFIX + name
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name == wanted and sample.labels == labels:
                return sample.value
    return None
