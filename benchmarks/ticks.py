"""What a tick of each sensor costs after a long history, held against its cost with none.

    python -m benchmarks.ticks [BATCHES]

Writes `benchmarks/ticks.md`. Both deployments have one batch in progress and a file that waits for
room. CPU time of this process, all threads; the ticks of the two alternate, so that what else the
machine does meets both alike.
"""

import os
import platform
import statistics
import sys
import tempfile
import time
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import dagster as dg

from batch_orchestration.defs.alerts import AlertsResource
from batch_orchestration.defs.partitions import batches, chunks
from batch_orchestration_tests.support.builders import make_input
from batch_orchestration_tests.support.deployment import Deployment
from batch_orchestration_tests.support.history import finished_id, make_history

SENSORS = (
    *("inbox_sensor", "dispatch_sensor", "replay_sensor"),
    *("recovery_sensor", "health_sensor", "alert_sensor"),
)
ROUNDS = 25
BATCHES = 10_000
MOST = 1.1
PAGE = Path(__file__).with_name("ticks.md")


def main() -> None:
    """Measure, and write the page."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else BATCHES
    with (
        tempfile.TemporaryDirectory() as root,
        closing(_deployment(Path(root, "none"), 0)) as none,
        closing(_deployment(Path(root, "long"), count)) as long,
    ):
        seconds = {sensor: _measure(sensor, none, long) for sensor in SENSORS}
        (long.folder.unfinished / ".searched").unlink()
        began = time.process_time()
        _tick(long, "dispatch_sensor")
        search = time.process_time() - began
    page = _page(count, seconds, search)
    PAGE.write_text(page)
    print(page)


def _deployment(root: Path, count: int) -> Deployment:
    root.mkdir()
    deployment = Deployment(root, max_unfinished_batches=1)
    cancelled = count // 5
    if count:
        make_history(
            deployment.folder, deployment.store, completed=count - cancelled, cancelled=cancelled
        )
        names = [finished_id(number) for number in range(count)]
        deployment.instance.add_dynamic_partitions(str(batches.name), names)
        keys = [f"{name}/00000" for name in names]
        deployment.instance.add_dynamic_partitions(str(chunks.name), keys)
    deployment.admit("at_work.jsonl", make_input(12))
    deployment.drop("waits.jsonl", make_input(5))
    for sensor in SENSORS:  # the first tick of a deployment searches
        _tick(deployment, sensor)
    return deployment


def _tick(deployment: Deployment, sensor: str) -> None:
    settings = deployment.settings
    context = dg.build_sensor_context(
        instance=deployment.instance,
        repository_def=deployment.repository,
        resources={"settings": settings, "alerts": AlertsResource.of(settings)},
    )
    deployment.repository.get_sensor_def(sensor)(context)


def _measure(sensor: str, *deployments: Deployment) -> list[float]:
    """Return the median of the CPU seconds of a tick, for each deployment."""
    spent: list[list[float]] = [[] for _ in deployments]
    for _ in range(ROUNDS):
        for deployment, seconds in zip(deployments, spent, strict=True):
            began = time.process_time()
            _tick(deployment, sensor)
            seconds.append(time.process_time() - began)
    return [statistics.median(seconds) for seconds in spent]


def _page(count: int, seconds: dict[str, list[float]], search: float) -> str:
    rows = [
        f"| `{sensor}` | {none * 1000:.1f} | {long * 1000:.1f} | {long / none:.2f} |"
        for sensor, (none, long) in seconds.items()
    ]
    worst = max(long / none for none, long in seconds.values())
    return "\n".join(
        [
            "# What a tick costs after a long history",
            "",
            f"Measured {datetime.now(UTC):%Y-%m-%d} by `python -m benchmarks.ticks {count}` on",
            f"{os.cpu_count()} cores ({platform.system()}, Python {platform.python_version()};",
            f"load {os.getloadavg()[0]:.1f}). {count:,} finished batches, a fifth of them",
            "cancelled, against none; one batch in progress, one file that waits. CPU milliseconds",
            f"of a tick, median of {ROUNDS}. Dagster has the partitions of the history, not its",
            "runs.",
            "",
            "| sensor | none | long | ratio |",
            "|---|---:|---:|---:|",
            *rows,
            "",
            f"The worst ratio is {worst:.2f}; the aim is {MOST}. Every 15 minutes one tick of",
            f"`dispatch_sensor` searches the disk for what the index lacks: {search:.1f} s of CPU.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
