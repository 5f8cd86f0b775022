"""Recognises from an engine's exit and its log that it ran out of memory."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import msgspec

from batch_orchestration.core.errors import Exhaustion, MemoryShortage
from batch_orchestration.engines.processes import logs

#: After the root cause, vLLM logs tracebacks of all its processes and of each request in flight.
TAIL_BYTES = 16 * 2**20
EVIDENCE_LENGTH = 300


class Sign(NamedTuple):
    """A pattern in the log that indicates exhausted memory.

    Attributes:
        pattern: Searched for in each line; the group `length` is the context in force.
        source: Where the message comes from.
        sample: A line as observed, or as the source formats it.
    """

    shortage: MemoryShortage
    pattern: re.Pattern[str]
    source: str
    sample: str


def _sign(shortage: MemoryShortage, pattern: str, source: str, sample: str) -> Sign:
    return Sign(shortage, re.compile(pattern), source, sample)


#: Most specific first: a cause is often wrapped in another of them.
SIGNS = (
    _sign(
        MemoryShortage.WEIGHTS,
        r"Failed to load model - not enough GPU memory",
        "vllm/v1/worker/gpu_model_runner.py, load_model",
        "(EngineCore pid=7) ERROR 11-23 19:30:00 [gpu_model_runner.py:5146] Failed to load model -"
        " not enough GPU memory. Try lowering --gpu-memory-utilization to free memory for weights",
    ),
    _sign(
        MemoryShortage.CLAIM,
        r"Free memory on device .* on startup is less than ",
        "vllm/v1/worker/utils.py, request_memory",
        "ValueError: Free memory on device cuda:0 (7.34/15.49 GiB) on startup is less than desired"
        " GPU memory utilization (0.8, 12.39 GiB). Decrease GPU memory utilization or reduce GPU"
        " memory used by other processes.",
    ),
    _sign(
        MemoryShortage.CLAIM,
        r"Available memory on node .* is less than (desired CPU memory|requested memory for kv)",
        "vllm/v1/worker/cpu_worker.py, __init__ and determine_available_memory",
        "ValueError: Available memory on node 0 (3.1/23.0 GiB) on kv cache allocation is less than"
        " requested memory for kv (8.0 GiB). Decrease --kv-cache-memory-bytes,"
        " VLLM_CPU_KVCACHE_SPACE, or reduce CPU memory used by other processes.",
    ),
    _sign(
        MemoryShortage.CACHE,
        r"To serve at least one request with the model'?s'?s? max seq len \((?P<length>\d+)\)",
        "vllm/v1/core/kv_cache_utils.py, _check_enough_kv_cache_memory; once `the models's`",
        "ValueError: To serve at least one request with the model's max seq len (131072), (16.0 GiB"
        " KV cache is needed, which is larger than the available KV cache memory (9.6 GiB). Based"
        " on the available memory, the estimated maximum model length is 78640.",
    ),
    _sign(
        MemoryShortage.CACHE,
        r"max seq len \((?P<length>\d+)\) is larger than the maximum number of tokens that can be"
        r" stored in KV cache",
        "vllm/worker/worker.py, raise_if_cache_size_invalid (the engine before V1)",
        "ValueError: The model's max seq len (32768) is larger than the maximum number of tokens"
        " that can be stored in KV cache (16832). Try increasing `gpu_memory_utilization` or"
        " decreasing `max_model_len` when initializing the engine.",
    ),
    _sign(
        MemoryShortage.CACHE,
        r"No available memory for the cache blocks",
        "vllm/v1/core/kv_cache_utils.py, _check_enough_kv_cache_memory",
        "ValueError: No available memory for the cache blocks. Try increasing"
        " `gpu_memory_utilization` when initializing the engine",
    ),
    _sign(
        MemoryShortage.WORK,
        r"(CUDA|HIP|XPU) out of memory",
        "torch, c10/cuda/CUDACachingAllocator.cpp; vllm/v1/worker/gpu_model_runner.py, warm-up",
        "(EngineCore pid=112) ERROR 05-01 14:39:06 [core.py:1131] torch.OutOfMemoryError: CUDA out"
        " of memory. Tried to allocate 50.00 MiB. GPU 0 has a total capacity of 23.56 GiB of which"
        " 21.75 MiB is free.",
    ),
    _sign(
        MemoryShortage.WORK,
        r"CUDA (driver )?error: out of memory|Cuda failure (\d+ )?'out of memory'",
        "torch, c10/cuda/CUDAException.cpp; NCCL, src/include/checks.h",
        "torch.AcceleratorError: CUDA error: out of memory",
    ),
    _sign(
        MemoryShortage.WORK,
        r"CUBLAS_STATUS_ALLOC_FAILED",
        "torch, aten/src/ATen/cuda/CUDABlas.cpp",
        "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ),
    _sign(
        MemoryShortage.WORK,
        r"DefaultCPUAllocator: (can't allocate|not enough) memory",
        "torch, c10/core/impl/alloc_cpu.cpp",
        "RuntimeError: [enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't"
        " allocate memory: you tried to allocate 2359296 bytes. Error code 12 (Cannot allocate"
        " memory)",
    ),
    _sign(
        MemoryShortage.WORK,
        r"(^|\s)MemoryError(:|$)|\[Errno 12\] Cannot allocate memory",
        "Python, MemoryError and OSError of ENOMEM",
        "OSError: [Errno 12] Cannot allocate memory",
    ),
)

#: Informational lines; vLLM logs requests at this level, prompts included.
_HARMLESS = re.compile(r"^(\([^)]*pid=\d+\) )?(INFO|DEBUG)\b")
#: A quote before a sign marks quoted text: a prompt, or the value of a field. An apostrophe
#: follows a letter.
_QUOTE = re.compile(r"(?<![A-Za-z])[\"']")
#: Minimum age of a line, relative to the latest answer, for the engine to have survived it.
SURVIVED_SECONDS = 5.0
#: Matches every line that a pattern matches; cuts the time for megabytes of log to a quarter.
_HINT = re.compile(r"[Mm]emory|max seq len|ALLOC_FAILED|died ")

#: vLLM's messages about a child ended by a signal: vllm/v1/executor/multiproc_executor.py,
#: monitor_workers, and vllm/v1/utils.py, wait_for_completion_or_failure.
_CHILD_KILLED = re.compile(r"died (unexpectedly \(exit code: -9\)|with exit code -9)")


class KernelKills(msgspec.Struct, frozen=True):
    """Processes that the kernel killed for lack of memory; 0 if the kernel does not report it.

    Attributes:
        ours: In our control group.
        all: On the whole machine.
    """

    ours: int = 0
    all: int = 0


NO_KILLS = KernelKills()


class Survived(NamedTuple):
    """A moment that an engine survived: nothing older caused its death.

    Attributes:
        log_size: Size of its log at that moment, in bytes.
        kills: The kernel's counts at that moment.
    """

    log_size: int = 0
    kills: KernelKills = NO_KILLS


class SignsOfLife:
    """Remembers the latest moment that an engine certainly survived.

    An answer may arrive just after the log lines of the death that follows. Therefore the moment
    lies at least `SURVIVED_SECONDS` before the latest answer.
    """

    def __init__(self, begun: Survived) -> None:
        self._survived = self._candidate = begun
        self._since = float("-inf")

    def note_answer(self, now: float, look: Callable[[], Survived]) -> None:
        """Record an answer; calls `look` at most once in `SURVIVED_SECONDS`."""
        if now - self._since >= SURVIVED_SECONDS:
            self._survived, self._candidate, self._since = self._candidate, look(), now

    @property
    def survived(self) -> Survived:
        """The latest moment that the engine certainly survived."""
        return self._survived


def count_kernel_kills(
    *, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")
) -> KernelKills:
    """Read the kernel's counters of processes killed for lack of memory."""
    groups = [line.split(":", 2) for line in _lines(proc / "self/cgroup") if line.count(":") >= 2]
    folders = [cgroups / name.lstrip("/") for _, controllers, name in groups if not controllers]
    folders += [
        cgroups / "memory" / name.lstrip("/")
        for _, controllers, name in groups
        if "memory" in controllers.split(",")
    ]
    # In a container, the group's path may be the host's while its files are at the root.
    folders += [cgroups, cgroups / "memory"]
    files = (
        folder / name for folder in folders for name in ("memory.events", "memory.oom_control")
    )
    return KernelKills(ours=max(map(_oom_kills, files)), all=_oom_kills(proc / "vmstat"))


def recognise(
    lines: Iterable[str],
    *,
    exit_reason: str | None = None,
    before: KernelKills = NO_KILLS,
    now: KernelKills = NO_KILLS,
) -> Exhaustion | None:
    """Return how an engine ran out of memory; None if there is no evidence that it did.

    SIGKILL is no proof, since a person can send it. It counts as the kernel's if the kernel's own
    count of such kills has grown since `before`. Growth in our control group suffices by itself;
    growth on the whole machine counts only together with a SIGKILL of the engine.

    Args:
        lines: The engine's log since the latest moment that it survived.
        exit_reason: See `EngineProcess.exit_reason`; None while it runs.
        before: The kernel's counts at that moment.
        now: The kernel's counts after its end.
    """
    found: tuple[int, Exhaustion] | None = None
    killed = exit_reason is not None and "SIGKILL" in exit_reason
    for line in filter(_HINT.search, lines):
        if _HARMLESS.search(line):
            continue
        killed = killed or _CHILD_KILLED.search(line) is not None
        for rank, sign in enumerate(SIGNS if found is None else SIGNS[: found[0]]):
            match = sign.pattern.search(line)
            if match and not _QUOTE.search(line[: match.start()]):
                found = rank, _exhaustion(sign, line, match)
                break
    if found is not None:
        return found[1]
    if now.ours > before.ours or (killed and now.all > before.all):
        return Exhaustion(
            shortage=MemoryShortage.WORK, evidence="the kernel killed a process for want of memory"
        )
    return None


def _exhaustion(sign: Sign, line: str, match: re.Match[str]) -> Exhaustion:
    length = match.groupdict().get("length")
    return Exhaustion(
        shortage=sign.shortage,
        evidence=logs.message_of(line)[:EVIDENCE_LENGTH],
        max_model_len=None if length is None else int(length),
    )


def _oom_kills(path: Path) -> int:
    """Return the value of `oom_kill` in a file of names and numbers."""
    for line in _lines(path):
        name, _, value = line.partition(" ")
        if name == "oom_kill" and value.strip().isdigit():
            return int(value)
    return 0


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
