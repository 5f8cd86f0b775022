"""Lines of a batch file: what is a request, and what is said of one that is not."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_orchestration.core.outcomes import FailureCode
from batch_orchestration.core.requests import (
    CUSTOM_ID_MAX_LENGTH,
    SUPPORTED_ENDPOINTS,
    UTF8_BOM,
    Fault,
    Request,
    parse_line,
    too_long_fault,
)
from batch_orchestration_tests.support.builders import make_body, make_line

TEMPERATURE = "the number in `body.temperature` is out of range"


def parse(raw: bytes, *, model_required: bool = True) -> Request | Fault:
    return parse_line(raw, index=6, line=7, model_required=model_required)


def fault_of(raw: bytes) -> Fault:
    parsed = parse(raw)
    assert isinstance(parsed, Fault), parsed
    assert (parsed.index, parsed.line) == (6, 7)
    return parsed


@pytest.mark.parametrize("endpoint", SUPPORTED_ENDPOINTS)
def test_a_usable_line_is_a_request(endpoint):
    request = parse(make_line(3, url=endpoint))

    assert isinstance(request, Request)
    assert (request.index, request.line) == (6, 7)
    assert (request.custom_id, request.endpoint) == ("request-3", endpoint)


def test_the_body_is_kept_byte_for_byte():
    body = b'{ "model":"m",  "seed": 1.50, "x":"\\u00e9\\n" }'

    request = parse(
        b'{"body":' + body + b',"custom_id":"a","method":"POST","url":"/v1/completions"}'
    )

    assert isinstance(request, Request)
    assert bytes(request.body) == body


@pytest.mark.parametrize("ending", [b"", b"\n", b"\r\n", b"  \r\n"])
@pytest.mark.parametrize("beginning", [b"", UTF8_BOM])
def test_byte_order_mark_and_line_breaks_are_tolerated(beginning, ending):
    assert isinstance(parse(beginning + make_line().strip() + ending), Request)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"hello", "not JSON"),
        (b'{"custom_id": "a"', "not JSON"),
        (b'{"custom_id": "a"} {"custom_id": "b"}', "not JSON"),
        (make_line().replace(b"question", b"question \xff"), "not UTF-8: byte"),
        (b'{"custom_id": "\\ud800"}', "not JSON"),
        (b"\x00\x00", "not JSON"),
        (b'{"body": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested more than 128 deep"),
        (b'{"body": [' + b"[]," * 1_000_000 + b"[]]}", "more than 1,000,000 values"),
        (make_line(body={"model": "m", "x": float("nan")}), "not JSON"),
    ],
)
def test_what_cannot_be_read_is_invalid_json(raw, message):
    fault = fault_of(raw)

    assert fault.code is FailureCode.INVALID_JSON
    assert message in fault.message


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"[1, 2]", "not a JSON object"),
        (b'"text"', "not a JSON object"),
        (b"null", "not a JSON object"),
        (make_line(custom_id=...), "`custom_id` is missing"),
        (make_line(custom_id=None), "`custom_id` is missing"),
        (make_line(custom_id=17), "`custom_id` must be a string, not 17"),
        (make_line(custom_id=""), "`custom_id` is empty"),
        (make_line(custom_id="x" * 513), "`custom_id` has 513 characters; at most 512"),
        (make_line(method=...), "`method` is missing"),
        (make_line(method="GET"), '`method` must be POST, not "GET"'),
        (make_line(method="post"), "`method` must be POST"),
        (make_line(url=...), "`url` is missing"),
        (make_line(body=...), "`body` is missing"),
        (make_line(body=None), "`body` is missing"),
        (make_line(body="text"), "`body` must be a JSON object"),
        (make_line(body=[]), "`body` must be a JSON object"),
        (make_line(body={"messages": []}), "`body.model` is missing"),
        (make_line(body=make_body(model="")), "`body.model` is missing"),
        (make_line(body=make_body(model=5)), "`body.model` is missing or not a string"),
        (make_line(body=make_body(stream=True)), "`stream` must not be set"),
        (make_line(body=make_body(stream="yes")), "`stream` must not be set"),
        (make_line(body=make_body(temperature=1e300)).replace(b"e+300", b"e999"), TEMPERATURE),
        (make_line(body=make_body(seed=2**64)), "`body.seed` is out of range"),
        (make_line(body=make_body(n=16_385)), "`body.n` is 16,385; more than 16,384 no engine"),
        (make_line(body=make_body(best_of=10**15)), "`body.best_of` is 1,000,000,000,000,000"),
        (make_line(body=make_body(max_tokens=2**31)), "`body.max_tokens` is 2,147,483,648;"),
        (make_line(body=make_body(max_completion_tokens=10**18)), "`body.max_completion_tokens`"),
        (make_line(body=make_body(top_logprobs=10**12)), "`body.top_logprobs` is 1,000,000,"),
    ],
)
def test_an_envelope_with_a_fault_is_an_invalid_request(raw, message):
    fault = fault_of(raw)

    assert fault.code is FailureCode.INVALID_REQUEST
    assert message in fault.message


@pytest.mark.parametrize("url", ["/v1/responses", "/chat/completions", "", 5, {"a": 1}, []])
def test_another_endpoint_is_unsupported(url):
    fault = fault_of(make_line(url=url))

    assert fault.code is FailureCode.UNSUPPORTED_ENDPOINT
    assert "/v1/chat/completions" in fault.message


@pytest.mark.parametrize("stream", [False, None])
def test_stream_may_be_said_to_be_off(stream):
    assert isinstance(parse(make_line(body=make_body(stream=stream))), Request)


def test_a_missing_model_is_no_fault_where_something_else_names_it():
    line = make_line(body={"messages": []})

    assert isinstance(parse(line, model_required=False), Request)
    assert isinstance(parse(make_line(body={"model": 5}), model_required=False), Fault)


def test_all_problems_of_a_line_are_told_at_once():
    fault = fault_of(make_line(custom_id=17, url="/v1/responses", body=...))

    assert fault.code is FailureCode.INVALID_REQUEST
    assert [part.split("`")[1] for part in fault.message.split("; ")] == [
        "custom_id",
        "url",
        "body",
    ]


def test_a_fault_names_the_custom_id_even_of_a_torn_line():
    torn = make_line(8)[:60]

    assert fault_of(torn).custom_id == "request-8"
    assert fault_of(b'{"custom_id": "\\u00e9\\"x", "met').custom_id == 'é"x'
    assert fault_of(b'{"method": "POST", "custom').custom_id is None
    assert fault_of(b'{"custom_id": "\xff", "met').custom_id is None


def test_messages_and_ids_of_faults_stay_short():
    fault = fault_of(make_line(custom_id="x" * 100_000, method="y" * 100_000))

    assert fault.custom_id == "x" * CUSTOM_ID_MAX_LENGTH
    assert len(fault.message) < 300


def test_a_line_that_was_too_long_to_be_read_says_how_long():
    head = make_line(9)[:50]

    fault = too_long_fault(head, index=1, line=2, size_bytes=3_000_000, max_line_bytes=2_000_000)

    assert fault.code is FailureCode.INVALID_REQUEST
    assert fault.custom_id == "request-9"
    assert "3,000,000 bytes; at most 2,000,000" in fault.message


def test_a_fault_becomes_a_failure_that_names_its_line():
    failure = fault_of(b"hello").as_failure()

    assert failure.message.startswith("line 7: not JSON")
    assert not failure.retryable


@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_a_fault(raw):
    parsed = parse(raw)

    assert isinstance(parsed, Request | Fault)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    ),
    st.sampled_from(["custom_id", "method", "url", "body"]),
)
def test_a_field_of_any_type_is_a_request_or_a_fault(value, field):
    parsed = parse(json.dumps({**json.loads(make_line()), field: value}).encode())

    assert isinstance(parsed, Request | Fault)
    if isinstance(parsed, Request) and field == "custom_id":
        assert parsed.custom_id == value


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line.replace(b'"question', b'"\\ud83d question'),
        lambda line: line.replace(b'"question 5"', b"NaN"),
        lambda line: line.replace(b'"question 5"', b"1e999"),
        lambda line: line.replace(b'"question 5"', b"9" * 5000),
        lambda line: line.replace(b'"question 5"', b"[" * 200 + b"]" * 200),
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_a_line_that_cannot_be_used_names_its_custom_id_wherever_that_stands(damage, order):
    fields = list(json.loads(make_line(5)).items())
    line = json.dumps(dict(fields[::order])).encode()

    assert fault_of(damage(line)).custom_id == "request-5"


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 16_384},
        {"n": -(10**15)},
        {"n": 16_384.0},
        {"n": 0.5},
        {"n": "3"},
        {"n": "1e9"},
        {"max_tokens": 2**31 - 1},
        {"max_tokens": 0},
        {"max_tokens": True},
        {"max_completion_tokens": None},
        {"seed": 2**63},
    ],
)
def test_what_an_engine_can_be_asked_is_for_the_engine_to_refuse(fields):
    request = parse(make_line(body=make_body(**fields)))

    assert isinstance(request, Request)
    assert request.fields == make_body(**fields) == json.loads(bytes(request.body))


def test_of_a_body_that_is_there_twice_both_forms_are_the_last_one():
    first, last = json.dumps(make_body("a")).encode(), json.dumps(make_body("b")).encode()
    envelope = b'{"custom_id":"a","method":"POST","url":"/v1/completions","body":'

    request = parse(envelope + first + b',"body":' + last + b"}")

    assert isinstance(request, Request)
    assert bytes(request.body) == last
    assert request.fields == make_body("b")


def test_a_lean_request_holds_no_second_prompt():
    request = parse(make_line(body=make_body("long", max_tokens=5)))

    assert isinstance(request, Request)
    assert request.lean().fields == {"model": make_body()["model"], "max_tokens": 5}
    assert request.lean().body == request.body


@pytest.mark.parametrize("absurd", [1e9, 1e300, "1000000000", " +1_000_000_000.0 ", "9" * 40])
def test_a_number_that_engines_take_for_a_whole_one_has_the_same_limit(absurd):
    fault = fault_of(make_line(body=make_body(n=absurd)))

    assert fault.code is FailureCode.INVALID_REQUEST
    assert re.search(r"`body.n` is .*; more than 16,384 no engine accepts", fault.message)
