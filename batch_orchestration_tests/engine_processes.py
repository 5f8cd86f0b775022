"""The processes of a real vLLM server, found by what was recorded when it was started."""

from pathlib import Path

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
