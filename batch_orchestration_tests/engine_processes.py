"""The processes of a real vLLM server, found by what was recorded when it was started."""

import contextlib
import re
import time
import urllib.request
from pathlib import Path

import aiohttp

from batch_orchestration.engines.process_records import PROC, read_record
from batch_orchestration.engines.vllm import VllmEngine


def engine_core_pid(engine: VllmEngine) -> int:
    """Return the child of the server that has a child itself, of those that were recorded."""
    record = read_record(Path(engine.figures()["log"]).with_suffix(".process.json"))
    assert record is not None
    parents = {member.pid: parent_pid(member.pid) for member in record.members}
    [core] = [
        pid
        for pid, parent in parents.items()
        if parent == record.leader.pid and pid in parents.values()
    ]
    return core


def parent_pid(pid: int) -> int:
    return int((PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])


async def count_running(engine: VllmEngine) -> int:
    """Return how many requests the engine core worked on at its last step."""
    url = f"http://127.0.0.1:{engine.figures()['port']}/metrics"
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        text = await response.text()
    return sum(
        int(float(n)) for n in re.findall(r"^vllm:num_requests_running\S* (\S+)", text, re.M)
    )


def wait_until_unwell(engine: VllmEngine, *, seconds: float = 20.0) -> None:
    """Return as soon as the server itself knows that its core is gone."""
    deadline = time.monotonic() + seconds
    with contextlib.suppress(OSError):  # an HTTP status of 503, or nobody there any more
        while urllib.request.urlopen(f"http://127.0.0.1:{engine.figures()['port']}/health"):
            assert time.monotonic() < deadline, "the server still says that all is well"
            time.sleep(0.02)
