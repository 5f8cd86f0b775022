"""What is drawn of a batch: its throughput, its engine and its GPUs over time."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from batch_orchestration.domain.batch_figures import Throughput
from batch_orchestration.gpu.facts import GpuFacts
from batch_orchestration.gpu.samples import RunSample
from batch_orchestration.services.plots import COLOURS, VERMILLION, Line, Panel, Plot

#: More cannot be told apart in a picture as wide as a page.
MOST_INTERVALS = 120
MOST_SAMPLES = 120
#: Fewer are no curve: the figures in the text say as much.
LEAST_POINTS = 3
#: More lines than colours would only look like a comparison.
MOST_GPUS = len(COLOURS)
SINCE = "first submission"
_GIBIBYTE = 2**30

#: Samples of one run that follow each other, drawn as one point; None: the line is interrupted.
Group = Sequence[RunSample] | None


def throughput_plot(throughput: Throughput | None) -> Plot | None:
    """Return requests and output tokens per second, with the failures marked."""
    if throughput is None or len(throughput.intervals) < LEAST_POINTS:
        return None
    width = throughput.width_seconds
    found = {interval.number: interval for interval in throughput.intervals}
    # One more, down to zero: each value holds to the end of its interval.
    numbers = range(max(found) + 2)
    answered = [found[n].answered / width if n in found else 0.0 for n in numbers]
    failed = [found[n].failed / width if n in found and found[n].failed else None for n in numbers]
    tokens = [found[n].output_tokens / width if n in found else 0.0 for n in numbers]
    requests = [Line("answered", answered)]
    if any(failed):
        requests.append(Line("failed", failed, VERMILLION, marks=True))
    return Plot(
        name="throughput",
        title="Throughput",
        seconds=[n * width for n in numbers],
        panels=[Panel("requests/s", requests), Panel("output tokens/s", [Line("tokens", tokens)])],
        since=SINCE,
        stepped=True,
    )


def engine_plot(samples: Sequence[RunSample], *, since: float) -> Plot | None:
    """Return what the engine had to do, and how full its KV cache was."""
    groups = [*_grouped(samples)]
    if len(groups) < LEAST_POINTS:
        return None
    in_flight = _means(groups, lambda sample: sample.in_flight)
    if not any(in_flight):
        return None
    requests = [
        Line("window", _means(groups, lambda sample: sample.window), COLOURS[1]),
        Line("in flight", in_flight),
    ]
    waiting = _means(groups, lambda sample: sample.engine.waiting if sample.engine else None)
    if any(value is not None for value in waiting):
        requests.append(Line("waiting in the engine", waiting, COLOURS[2]))
    panels = [Panel("requests", requests)]
    usage = _means(groups, _kv_percent)
    if any(value is not None for value in usage):
        panels.append(Panel("KV cache, %", [Line("KV cache", usage)], top=100))
    return Plot("engine", "Engine", _times(groups, since), panels, SINCE)


def gpu_plot(samples: Sequence[RunSample], *, since: float) -> Plot | None:
    """Return utilisation, memory and temperature of each GPU, or instance of one."""
    groups = [*_grouped(samples)]
    if len(groups) < LEAST_POINTS:
        return None
    labels = _gpu_labels(samples)
    figures: tuple[tuple[str, Callable[[GpuFacts], float | None], float | None], ...] = (
        ("utilisation, %", lambda gpu: gpu.utilization_percent, 100),
        ("memory, GiB", lambda gpu: _gibibytes(gpu.memory_used_bytes), None),
        ("temperature, °C", lambda gpu: gpu.temperature_celsius, None),
    )
    panels = []
    for unit, figure, top in figures:
        lines = [
            Line(label, _means(groups, _of_gpu(uuid, figure)), colour)
            for (uuid, label), colour in zip(labels.items(), COLOURS, strict=False)
        ]
        lines = [line for line in lines if any(value is not None for value in line.values)]
        panels += [Panel(unit, lines, top)] if lines else []
    return Plot("gpu", "GPU", _times(groups, since), panels, SINCE) if panels else None


def _gpu_labels(samples: Sequence[RunSample]) -> dict[str, str]:
    """Return what each device is called, by its uuid; instances of one device share its index."""
    found = sorted({(gpu.index, gpu.uuid) for sample in samples for gpu in sample.gpus})[:MOST_GPUS]
    so_many = Counter(index for index, _ in found)
    return {
        uuid: f"GPU {index}" if so_many[index] == 1 else f"GPU {index}, {_short(uuid)}"
        for index, uuid in found
    }


def _short(uuid: str) -> str:
    return uuid.removeprefix("MIG-").removeprefix("GPU-")[:8]


def _of_gpu(
    uuid: str, figure: Callable[[GpuFacts], float | None]
) -> Callable[[RunSample], float | None]:
    def of_sample(sample: RunSample) -> float | None:
        return next((figure(gpu) for gpu in sample.gpus if gpu.uuid == uuid), None)

    return of_sample


def _grouped(samples: Sequence[RunSample]) -> Iterator[Group]:
    """Yield samples in groups of as many as make few enough points, with a gap between runs.

    Runs of a batch may overlap; each is a line of its own then, one after the other.
    """
    size = max(1, -(-len(samples) // MOST_SAMPLES))
    by_run: dict[str, list[RunSample]] = {}
    for sample in samples:
        by_run.setdefault(sample.run_id, []).append(sample)
    for number, of_run in enumerate(by_run.values()):
        if number:
            yield None
        yield from (of_run[at : at + size] for at in range(0, len(of_run), size))


def _times(groups: Iterable[Group], since: float) -> list[float]:
    """Return the seconds of each group; a gap is where the group before it was."""
    times: list[float] = []
    for group in groups:
        if group is not None:
            times.append(sum(sample.at for sample in group) / len(group) - since)
        elif times:
            times.append(times[-1])
    return times


def _means(
    groups: Iterable[Group], figure: Callable[[RunSample], float | None]
) -> list[float | None]:
    means: list[float | None] = []
    for group in groups:
        values = [value for sample in group or () if (value := figure(sample)) is not None]
        means.append(sum(values) / len(values) if values else None)
    return means


def _kv_percent(sample: RunSample) -> float | None:
    usage = sample.engine.kv_usage if sample.engine else None
    return None if usage is None else 100 * usage


def _gibibytes(size_bytes: int | None) -> float | None:
    return None if size_bytes is None else size_bytes / _GIBIBYTE
