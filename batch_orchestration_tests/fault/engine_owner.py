"""A process that owns an engine, for tests that kill it: start, say so on stdout, wait.

`python -m batch_orchestration_tests.fault.engine_owner <simulated|vllm> <log path> <how to end>`
"""

import asyncio
import sys
import time
from pathlib import Path

from batch_orchestration.engines.simulated.engine import SimulatedEngine
from batch_orchestration.engines.vllm.engine import VllmEngine
from batch_orchestration_tests.support.tiny_model import make_tiny_model


def make_engine(kind: str, log_path: Path) -> SimulatedEngine | VllmEngine:
    if kind == "simulated":
        return SimulatedEngine(log_path=log_path)
    model = make_tiny_model(log_path.parent / "tiny")
    args = {"max-model-len": 512, "kv-cache-memory-bytes": 64 * 2**20}
    return VllmEngine(str(model), device="cpu", args=args, log_path=log_path)


def main() -> None:
    kind, log_path, ending = sys.argv[1:]
    engine = make_engine(kind, Path(log_path))
    asyncio.run(engine.start())
    print("ready", flush=True)
    if ending == "exit":
        return
    if ending == "raise":
        raise RuntimeError("an accident")
    time.sleep(600)


if __name__ == "__main__":
    main()
