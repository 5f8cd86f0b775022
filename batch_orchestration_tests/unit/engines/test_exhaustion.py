"""Exhausted memory is recognised by the words of those who ran out of it, and by the kernel."""

import time
from pathlib import Path

import pytest

from batch_orchestration.core.errors import MemoryShortage
from batch_orchestration.engines.exhaustion import (
    SIGNS,
    SURVIVED_SECONDS,
    KernelKills,
    Sign,
    SignsOfLife,
    Survived,
    count_kernel_kills,
    recognise,
)

FURTHER_SAMPLES = [
    (
        "ValueError: To serve at least one request with the models's max seq len (8192), (0.35 GiB"
        " KV cache is needed, which is larger than the available KV cache memory (0.29 GiB).",
        MemoryShortage.CACHE,
    ),
    (
        "ValueError: Free memory on device (3.27/15.98 GiB) on startup is less than desired GPU"
        " memory utilization (0.9, 14.39 GiB)",
        MemoryShortage.CLAIM,
    ),
    (
        "ValueError: Available memory on node 0 (3.1/23.0 GiB) on startup is less than desired CPU"
        " memory utilization (0.92, 21.2 GiB).",
        MemoryShortage.CLAIM,
    ),
    (
        "RuntimeError: CUDA out of memory occurred when warming up sampler with 256 dummy requests."
        " Please try lowering `max_num_seqs` or `gpu_memory_utilization`",
        MemoryShortage.WORK,
    ),
    ("Cuda failure 'out of memory'", MemoryShortage.WORK),
    ("Cuda failure 2 'out of memory'", MemoryShortage.WORK),
    ("RuntimeError: CUDA driver error: out of memory", MemoryShortage.WORK),
    ("MemoryError", MemoryShortage.WORK),
    ("torch.OutOfMemoryError: HIP out of memory. Tried to allocate 2.00 GiB.", MemoryShortage.WORK),
]

INNOCENT = [
    "INFO 11-23 19:30:00 [gpu_worker.py:760] Available KV cache memory: 3.20 GiB",
    "DEBUG 11-23 19:30:00 [gpu_worker.py:1012] Free memory on device (7.3/15.5 GiB) on startup."
    " Desired GPU memory utilization is (0.9, 13.9 GiB).",
    "INFO 11-23 19:30:00 [loggers.py:257] Engine 000: Running: 8 reqs, GPU KV cache usage: 99.9%",
    "ValueError: The decoder prompt (length 9000) is longer than the maximum model length of 8192",
    "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.",
    "RuntimeError: Engine core initialization failed. See root cause above.",
]


@pytest.mark.parametrize("sign", SIGNS, ids=lambda sign: sign.sample[:40])
def test_every_sign_is_recognised_by_its_sample(sign: Sign) -> None:
    found = recognise(["INFO before", sign.sample, *INNOCENT])

    assert found is not None
    assert found.shortage == sign.shortage


@pytest.mark.parametrize(("line", "shortage"), FURTHER_SAMPLES)
def test_further_wordings(line: str, shortage: MemoryShortage) -> None:
    found = recognise([line])

    assert found is not None
    assert found.shortage == shortage


def test_an_ordinary_log_tells_of_no_exhaustion() -> None:
    assert recognise(INNOCENT, exit_reason="exited with status 1") is None


def test_the_evidence_is_the_line_without_the_loggers_words() -> None:
    found = recognise(
        ["(EngineCore pid=7) ERROR 11-23 19:30:00 [core.py:11] torch.OutOfMemoryError: CUDA out of"
         " memory. Tried to allocate 50.00 MiB."]
    )  # fmt: skip

    assert found is not None
    assert found.evidence.startswith("torch.OutOfMemoryError: CUDA out of memory. Tried")


def test_the_log_tells_the_context_that_did_not_fit() -> None:
    line = "ValueError: To serve at least one request with the model's max seq len (131072), (16.0"

    found = recognise([line])

    assert found is not None
    assert found.max_model_len == 131_072


def test_the_most_telling_sign_wins_wherever_it_stands() -> None:
    load, torch = SIGNS[0].sample, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate"

    for lines in ([load, torch], [torch, load]):
        found = recognise(lines)
        assert found is not None
        assert found.shortage == MemoryShortage.WEIGHTS


@pytest.mark.parametrize(
    "line",
    [
        "INFO 11-23 19:30:00 [logger.py:39] Received request chatcmpl-1: prompt: 'why CUDA out of"
        " memory?', params: SamplingParams(n=1)",
        "(APIServer pid=7) INFO 11-23 19:30:00 [logger.py:39] CUDA out of memory, says a prompt",
        "ERROR 11-23 19:30:00 [serving.py:10] bad field: input_value='torch.OutOfMemoryError: CUDA"
        " out of memory. Tried to allocate 1 GiB'",
        'ValueError: prompt "MemoryError: CUBLAS_STATUS_ALLOC_FAILED" is too long',
        "DEBUG 11-23 19:30:00 [x.py:1] Worker proc 0 died unexpectedly (exit code: -9), asks one",
    ],
)
def test_what_a_prompt_says_about_memory_is_no_sign(line: str) -> None:
    assert recognise([line], exit_reason="was killed by SIGKILL") is None


def test_what_an_engine_has_survived_by_some_answers_is_not_what_it_died_of() -> None:
    life = SignsOfLife(Survived(100))

    life.note_answer(1000.0, lambda: Survived(200))
    assert life.survived.log_size == 100, "the answer may be older than the words"
    life.note_answer(1000.0 + SURVIVED_SECONDS / 2, lambda: Survived(300))
    assert life.survived.log_size == 100
    life.note_answer(1000.0 + SURVIVED_SECONDS, lambda: Survived(400))
    assert life.survived.log_size == 200
    life.note_answer(1000.0 + 2 * SURVIVED_SECONDS, lambda: Survived(500))
    assert life.survived.log_size == 400


KILLED, EXITED = "was killed by SIGKILL", "exited with status 1"
CHILD = (
    "ERROR [multiproc_executor.py:314] Worker proc VllmWorker-0 died unexpectedly (exit code: -9)"
)


@pytest.mark.parametrize(
    ("exit_reason", "lines", "ours", "all_", "exhausted"),
    [
        pytest.param(KILLED, [], 0, 0, False, id="a person can kill -9"),
        pytest.param(KILLED, [], 0, 1, True, id="killed, and the kernel has killed somebody"),
        pytest.param(EXITED, [], 0, 1, False, id="somebody else was killed"),
        pytest.param(EXITED, [CHILD], 0, 1, True, id="a child of the engine was killed"),
        pytest.param(EXITED, [CHILD], 0, 0, False, id="a person killed a child"),
        pytest.param(EXITED, [], 1, 0, True, id="the kernel has killed one of our group"),
        pytest.param(None, [], 0, 0, False, id="still running"),
    ],
)
def test_a_kill_is_the_kernels_if_the_kernel_says_so(
    exit_reason: str | None, lines: list[str], ours: int, all_: int, exhausted: bool
) -> None:
    found = recognise(
        lines,
        exit_reason=exit_reason,
        before=KernelKills(ours=3, all=10),
        now=KernelKills(ours=3 + ours, all=10 + all_),
    )

    assert (found is not None) == exhausted


@pytest.mark.parametrize(
    ("groups", "file", "text"),
    [
        ("0::/a/b\n", "a/b/memory.events", "low 0\noom 5\noom_kill 4\n"),
        ("0::/not/mounted\n", "memory.events", "oom_kill 4\noom_group_kill 0\n"),
        ("4:memory:/a\n0::/\n", "memory/a/memory.oom_control", "under_oom 0\noom_kill 4\n"),
        ("5:cpu,memory:/a\n", "memory/a/memory.oom_control", "oom_kill 4\n"),
    ],
)
def test_the_kernel_counts_its_kills(tmp_path: Path, groups: str, file: str, text: str) -> None:
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "self/cgroup").write_text(groups)
    (proc / "vmstat").write_text("nr_free_pages 1\noom_kill 9\n")
    (cgroups / file).parent.mkdir(parents=True)
    (cgroups / file).write_text(text)

    assert count_kernel_kills(proc=proc, cgroups=cgroups) == KernelKills(ours=4, all=9)


def test_a_kernel_that_does_not_tell_counts_as_zero(tmp_path: Path) -> None:
    assert count_kernel_kills(proc=tmp_path, cgroups=tmp_path) == KernelKills()


def test_this_machines_kernel_can_be_asked() -> None:
    assert count_kernel_kills().all >= 0


def test_a_long_log_is_read_in_a_moment() -> None:
    lines = [f'  File "/usr/lib/vllm/v1/engine/core.py", line {n}, in run' for n in range(150_000)]
    began = time.thread_time()

    found = recognise([SIGNS[6].sample, *lines])

    assert found is not None
    assert time.thread_time() - began < 2
