"""Every step that reads a line says the same of it: validate, admission, sizing, the runner."""

import io
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from batch_orchestration.admission.reading.lines import BatchFileReading, choose_chunk_size
from batch_orchestration.admission.reading.screening import Screening
from batch_orchestration.admission.results import Admitted
from batch_orchestration.admission.validation import validate
from batch_orchestration.core.outcomes import FailureCode
from batch_orchestration.core.requests import (
    Fault,
    Overrides,
    Request,
    override_line,
    parse_line,
    prepare_body,
)
from batch_orchestration.engines.memory_demand import memory_demand
from batch_orchestration.estimates.profile import shape_of_request
from batch_orchestration_tests.support.builders import make_body, make_line
from batch_orchestration_tests.support.workbench import Workbench
from batch_orchestration_tests.unit.admission.test_chunk_sizing import SETTINGS, make_screening

SOUND = make_line(0)
NUMBERS = st.sampled_from(
    [
        *("1e999", "-1e400", "1" + "0" * 400, "9" * 5000, "NaN", "-Infinity", "1e308", "-0.0"),
        *(str(2**63), str(2**64), str(-(2**63) - 1), "1" + "0" * 15, "-5", "0", "true", "null"),
    ]
)
NAMES = st.sampled_from(
    [
        *("n", "best_of", "max_tokens", "max_completion_tokens", "seed", "temperature"),
        *("messages", "response_format", "prompt", "input", "model", "stream", "tools"),
    ]
)


@st.composite
def hostile_lines(draw: st.DrawFn) -> bytes:
    """A good line that was tampered with, as JSON or as bytes."""
    endpoint = draw(st.sampled_from(("/v1/chat/completions", "/v1/completions", "/v1/embeddings")))
    line = make_line(1, url=endpoint, body=make_body("hello", HERE="THERE")).strip()
    depth = draw(st.sampled_from((1, 100, 126, 127, 128, 400, 900, 990, 2000)))
    value = draw(
        NUMBERS
        | st.just("[" * depth + "]" * depth)
        | st.just('"\\ud83d"')
        | st.recursive(
            st.integers() | st.floats() | st.text() | st.none(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=5,
        ).map(json.dumps)
    )
    line = line.replace(b"HERE", draw(NAMES).encode()).replace(b'"THERE"', value.encode())
    if draw(st.integers(0, 3)) == 0:
        place, torn = draw(st.integers(0, len(line))), draw(st.binary(max_size=4))
        line = line[:place] + torn + line[place + draw(st.integers(0, 3)) :]
    return line.replace(b"\n", b" ")


@given(hostile_lines())
@example(make_line(1, body=make_body(x=0)).replace(b"0}}", b"1e999}}").strip())
@example(b"\r" + make_line(1).strip())
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_line_stops_a_step_and_all_steps_agree(tmp_path: Path, line: bytes) -> None:
    content = SOUND + line + b"\n"
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)

    report = validate(path, settings=SETTINGS)
    reading = BatchFileReading(SETTINGS, screening=make_screening(request=0.1))
    read = list(reading.read(io.BytesIO(content)))

    assert (report.refusal, report.requests) == (None, len(read))
    assert list(report.faults) == [parsed.lean() for parsed in read if isinstance(parsed, Fault)]
    # What admission lets through, the runner reads, weighs and sends. Lines end with LF alone.
    for parsed in read:
        if isinstance(parsed, Request):
            assert_runnable(parsed, content.split(b"\n")[parsed.line - 1])


def assert_runnable(request: Request, raw: bytes) -> None:
    again = parse_line(raw, index=request.index, line=request.line, model_required=False)
    assert again == request
    memory_demand([request], max_tokens_cap=None)
    lean = request.lean()
    shape = shape_of_request(lean, max_tokens_cap=7)
    assert shape == shape_of_request(request, max_tokens_cap=7)
    for overrides in (Overrides(), Overrides(model="other", max_tokens_cap=7)):
        sent = json.loads(prepare_body(lean, overrides=overrides, served=()))
        assert sent["model"] == (overrides.model or request.fields["model"])
    replayed = parse_line(
        override_line(raw, {"temperature": 0.5}), index=0, line=1, model_required=False
    )
    assert isinstance(replayed, Request)
    assert replayed.fields == {**request.fields, "temperature": 0.5}


@pytest.mark.parametrize("error", [OverflowError("too large"), RecursionError(), KeyError("x")])
def test_what_the_examination_of_a_line_stumbles_over_is_that_lines_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    stumbling_over(monkeypatch, error)
    bench = Workbench(tmp_path)

    verdict = bench.admit_file("a.jsonl", b"".join(map(make_line, range(5))))

    assert isinstance(verdict, Admitted)
    plan = bench.folder.read_plan(verdict.batch_id)
    (entry,) = bench.settled(plan)
    assert (plan.requests, plan.faulty, entry.index) == (5, 1, 3)
    assert entry.outcome.code is FailureCode.INVALID_REQUEST
    assert f"the request cannot be examined: {type(error).__name__}" in entry.outcome.message
    # Nor does it stop the choice of the chunk size.
    file = io.BytesIO(b"".join(map(make_line, range(5))))
    screening = make_screening(request=0.1)
    assert choose_chunk_size(file, settings=SETTINGS, screening=screening) == 600


@pytest.mark.parametrize("trouble", [OSError("disk"), MemoryError()])
def test_a_trouble_of_the_machine_is_no_lines_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: Exception
) -> None:
    stumbling_over(monkeypatch, trouble)
    bench = Workbench(tmp_path)

    with pytest.raises(type(trouble)):
        bench.admit_file("a.jsonl", b"".join(map(make_line, range(5))))


def stumbling_over(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Have the examination of the fourth request raise."""
    examine = Screening.examine

    def stumble(self: Screening, request: Request) -> Request | Fault:
        if request.index == 3:
            raise error
        return examine(self, request)

    monkeypatch.setattr(Screening, "examine", stumble)
