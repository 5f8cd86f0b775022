"""Lines of output and error files: OpenAI's shape, byte by byte."""

import json

import msgspec
import pytest

from batch_orchestration.core.outcomes import FailureCode
from batch_orchestration.delivery.lines import output_line, output_line_id
from batch_orchestration_tests.support.builders import make_completion, make_failure, make_settled


def line_of(outcome, **fields):
    return output_line("b-1", make_settled(7, outcome, **fields))


def test_an_answered_request_has_a_response_and_a_null_error():
    body = b'{"id":"chatcmpl-1","choices":[{"message":{"content":"\xc3\xa4 \\u00e4"}}],"n":1.50}'
    outcome = make_completion(body=msgspec.Raw(body), request_id="req-9")

    line = line_of(outcome)

    expected = (
        b'{"id":"batch_req_9fef1ad8f20ce7e549f843ca","custom_id":"request-7","response":'
        b'{"status_code":200,"request_id":"req-9","body":' + body + b'},"error":null}\n'
    )
    assert line == expected


def test_a_refusal_is_a_response_too_with_the_engines_own_words():
    body = b'{"error":{"message":"too long","type":"BadRequestError","param":null,"code":400}}'

    line = line_of(make_failure(status=400, body=msgspec.Raw(body), request_id=None))

    expected = (
        b'{"id":"batch_req_9fef1ad8f20ce7e549f843ca","custom_id":"request-7","response":'
        b'{"status_code":400,"request_id":null,"body":' + body + b'},"error":null}\n'
    )
    assert line == expected


@pytest.mark.parametrize(
    "body",
    [
        b'{"detail":"Not Found"}',
        b'{"object":"error","message":"flat","code":404}',
        b'{"error":"a string"}',
        b'{"error":null}',
        b'["not", "an object"]',
        b'"text"',
        None,
    ],
)
def test_a_refusal_in_another_shape_is_put_into_openais(body):
    failure = make_failure(
        FailureCode.MODEL_NOT_FOUND,
        message="no such model",
        status=404,
        body=None if body is None else msgspec.Raw(body),
    )

    answer = json.loads(line_of(failure))

    assert answer["error"] is None
    assert answer["response"]["status_code"] == 404
    assert answer["response"]["body"] == {
        "error": {
            "message": "no such model",
            "type": "invalid_request_error",
            "param": None,
            "code": "model_not_found",
        }
    }


def test_an_engines_own_trouble_is_a_response_of_a_server_error():
    failure = make_failure(FailureCode.ENGINE_ERROR, status=502, body=None, message="Bad Gateway")

    answer = json.loads(line_of(failure))

    assert answer["response"]["status_code"] == 502
    assert answer["response"]["body"]["error"]["type"] == "server_error"


def test_without_any_response_the_error_says_why():
    failure = make_failure(FailureCode.TIMEOUT, status=None, body=None, message="no answer in 5 s")

    line = line_of(failure)

    assert line == (
        b'{"id":"batch_req_9fef1ad8f20ce7e549f843ca","custom_id":"request-7","response":null,'
        b'"error":{"code":"timeout","message":"no answer in 5 s"}}\n'
    )


def test_an_unreadable_answer_is_no_response():
    """Its status is 200: a reader that goes by status would take it for an answer."""
    failure = make_failure(
        FailureCode.RESPONSE_UNREADABLE, status=200, body=msgspec.Raw(b"[]"), message="no object"
    )

    answer = json.loads(line_of(failure))

    assert answer["response"] is None
    assert answer["error"]["code"] == "response_unreadable"


def test_a_line_without_an_id_of_its_own_says_so():
    failure = make_failure(FailureCode.INVALID_JSON, status=None, body=None, message="line 8: …")

    assert json.loads(line_of(failure, custom_id=None))["custom_id"] is None


def test_an_answer_over_several_lines_becomes_one():
    """Servers may pretty-print; numbers and strings keep their bytes."""
    outcome = make_completion(body=msgspec.Raw(b'{\r\n  "x": 1.50,\n  "y": "a\\nb c"\n}'))

    line = line_of(outcome)

    assert line.count(b"\n") == 1
    assert b'"body":{"x":1.50,"y":"a\\nb c"}' in line


def test_ids_are_unique_and_always_the_same():
    ids = [output_line_id(batch, index) for batch in ("a", "b") for index in range(500)]

    assert len(set(ids)) == 1000
    assert ids == [output_line_id(batch, index) for batch in ("a", "b") for index in range(500)]
