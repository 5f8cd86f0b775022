"""The processes of a real vLLM server, found by what was recorded when it was started."""

import asyncio
import contextlib
import time

import aiohttp

from batch_orchestration.engines.processes.records import PROC, read_record
from batch_orchestration.engines.vllm.engine import VllmEngine

#: State of a socket in the tables of proc(5), `/proc/net/tcp`.
TCP_LISTEN = "0A"
LOOPBACK = "0100007F:"


def engine_core_pid(engine: VllmEngine) -> int:
    """Return the child of the server that has a child itself, of those that were recorded."""
    record = read_record(engine.process.log_path.with_suffix(".process.json"))
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
    figures = await engine.measure()
    assert figures is not None
    assert figures.running is not None
    return figures.running


def wait_until_unwell(engine: VllmEngine, *, seconds: float = 20.0) -> None:
    """Return as soon as the server itself knows that its core is gone."""

    async def ask() -> None:
        deadline = time.monotonic() + seconds
        connector = aiohttp.UnixConnector(engine.process.socket)
        async with aiohttp.ClientSession(connector=connector) as session:
            while True:
                async with session.get("http://localhost/health") as response:
                    if not response.ok:
                        return
                assert time.monotonic() < deadline, "the server still says that all is well"
                await asyncio.sleep(0.02)

    with contextlib.suppress(aiohttp.ClientError):  # nobody there any more
        asyncio.run(ask())


def tcp_listeners(pid: int) -> list[str]:
    """Return the addresses, as proc(5) writes them, at which a process waits for connections."""
    listening = {
        fields[9]: fields[1]
        for table in ("tcp", "tcp6")
        for line in (PROC / "net" / table).read_text().splitlines()[1:]
        if (fields := line.split())[3] == TCP_LISTEN
    }
    found = []
    for link in (PROC / str(pid) / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            inode = str(link.readlink()).removeprefix("socket:[").rstrip("]")
            found += [listening[inode]] if inode in listening else []
    return found
