"""What befalls a soak beside the deaths of processes: one table, drawn from by its seed."""

import json
import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from signal import SIGKILL
from subprocess import CalledProcessError, run
from typing import Any

from batch_orchestration.core.lifecycle import FINAL
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.store.store import Store
from batch_orchestration_tests.fault.disks import fill, mount
from batch_orchestration_tests.fault.mixed_batches import engine_leaders

DISK_MEBIBYTES = 512
#: Of the simulated engine; long enough for full windows, and with a tail.
CONDITIONS = {"latency_seconds": 0.1, "latency_sigma": 0.5}
#: How a gate refuses everything alike.
GATES: list[dict[str, Any]] = [
    *({"statuses": {status: 1.0}} for status in (401, 401, 402, 403, 407)),
    {"strange": {"redirect": 1.0}},
]
DAMAGES = (b"", b"{", b"\xff\x00", b"[]")

#: Ends what lasts.
End = Callable[[], object]


def kill_an_engine(folder: DataFolder, _dice: random.Random) -> bool:
    """Kill the engines of the folder; say whether there were any, as the others here."""
    leaders = engine_leaders(folder)
    for leader in leaders:
        with suppress(ProcessLookupError):
            os.kill(leader, SIGKILL)
    return bool(leaders)


def damage_a_file(folder: DataFolder, dice: random.Random) -> bool:
    """Damage a file that is written anew by itself, or the end of a journal; add foreign things."""
    replaced = [folder.queue, folder.needs, folder.health, folder.alerts, folder.refusal]
    replaced += [folder.progress_path(batch_id) for batch_id in folder.batch_ids()]
    journals = [*folder.journals.glob("*/*.journal")]
    found = sorted(path for path in (*replaced, *journals) if path.exists())
    if not found:
        return False
    path, damage = dice.choice(found), dice.choice(DAMAGES)
    if path in journals:
        with path.open("ab") as file:
            file.write(b"\x1e" + damage)
    else:
        path.write_bytes(damage)
    (folder.batches / f"My Copy of {dice.randrange(3)}").mkdir(exist_ok=True)
    return True


def damage_a_needed_file(folder: DataFolder, dice: random.Random) -> End | None:
    """Damage a file without which its batch waits, until a person mends it."""
    batches = Store(folder.duckdb, deadline_seconds=60.0).batches()
    unfinished = [batch.batch_id for batch in batches if batch.status not in FINAL]
    needed = [
        path
        for each in unfinished
        for path in (
            folder.plan_path(each),
            folder.resumption(each).path,
            folder.halt(each).path,
        )
    ]
    found = [path for path in needed if path.exists()]
    if not found:
        return None
    path, damage = dice.choice(found), dice.choice(DAMAGES)
    good = path.read_bytes()
    path.write_bytes(damage)

    def mend() -> None:
        # Somebody may have decided anew meanwhile.
        if path.exists() and path.read_bytes() == damage:
            _replace(path, good)

    return mend


def close_the_gate(folder: DataFolder, dice: random.Random) -> End:
    """Refuse whatever is asked, as with a revoked key."""
    simulate(folder, **dice.choice(GATES))
    return lambda: simulate(folder)


def fill_the_disk(folder: DataFolder, _dice: random.Random) -> End:
    """Leave no room on the disk of the folder."""
    return fill(folder.root, but=0).unlink


#: Happen at once.
STRIKES: Mapping[str, Callable[[DataFolder, random.Random], bool]] = {
    "engine": kill_an_engine,
    "file": damage_a_file,
}
#: Last for a while, one at a time; whatever dies, dies also meanwhile.
LASTING: Mapping[str, Callable[[DataFolder, random.Random], End | None]] = {
    "needed file": damage_a_needed_file,
    "gate": close_the_gate,
    "disk": fill_the_disk,
}


def simulate(folder: DataFolder, **conditions: Any) -> None:
    """Set what holds for all requests to the simulated engine, beside what always does."""
    _replace(folder.root / "simulated.json", json.dumps({**CONDITIONS, **conditions}).encode())


@contextmanager
def small_disk_if_allowed(root: Path) -> Iterator[tuple[Path, bool]]:
    """Hand out a folder, and whether it is a disk of its own that may be filled."""
    place = root / "disk"
    place.mkdir()
    try:
        mount("-t", "tmpfs", "-o", f"size={DISK_MEBIBYTES}m", "tmpfs", place)
    except (CalledProcessError, FileNotFoundError):
        print("no right to mount a file system: no disk gets full", flush=True)
        yield place, False
        return
    try:
        yield place, True
    finally:
        run(["umount", "-l", str(place)], check=True)


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_bytes(content)
    temporary.replace(path)
