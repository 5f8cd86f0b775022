"""Profiles: what is counted of every request, what is sampled, and that both are the file's own."""

from collections.abc import Mapping
from typing import Any

import pytest

from batch_orchestration.core.requests import Request
from batch_orchestration.estimates.estimate import TokenHistory, estimate
from batch_orchestration.estimates.profile import (
    MOST_ANSWERS,
    SAMPLE_PER_SHAPE,
    Profiler,
    TokenProfile,
    shape_of_request,
)
from batch_orchestration_tests.support import builders

CHAT, EMBEDDINGS = "/v1/chat/completions", "/v1/embeddings"


def make_request(
    index: int = 0, *, endpoint: str = CHAT, text: str = "hello", **fields: Any
) -> Request:
    asked = (
        {"input": text}
        if endpoint == EMBEDDINGS
        else {"messages": [{"role": "user", "content": text}]}
    )
    return builders.make_request({"model": "m", **asked, **fields}, endpoint=endpoint, index=index)


def profile_of(requests: list[Request], **arguments: Any) -> TokenProfile:
    profiler = Profiler(**arguments)
    for request in requests:
        profiler.add(request)
    return profiler.profile()


@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        ({}, "chat, text, uncapped"),
        ({"max_tokens": 1}, "chat, text, one token"),
        ({"max_completion_tokens": 64}, "chat, text, short"),
        ({"max_tokens": 65}, "chat, text, long"),
        ({"max_tokens": "many"}, "chat, text, uncapped"),
        ({"response_format": {"type": "json_schema"}, "max_tokens": 9}, "chat, JSON, short"),
        ({"response_format": {"type": "text"}}, "chat, text, uncapped"),
        ({"structured_outputs": {"choice": ["a"]}}, "chat, JSON, uncapped"),
        ({"max_tokens": 2**15}, "chat, text, long"),
        ({"max_tokens": 2**15 + 1}, "chat, text, very long"),
        ({"max_tokens": 600, "n": 100}, "chat, text, very long"),
        ({"max_tokens": 1, "n": 10**6}, "chat, text, one token"),
    ],
)
def test_a_shape_says_what_kind_of_answer_is_asked_for(fields: dict[str, Any], shape: str) -> None:
    assert shape_of_request(make_request(**fields), max_tokens_cap=None) == shape


def test_the_cap_of_the_deployment_is_part_of_the_shape() -> None:
    assert shape_of_request(make_request(), max_tokens_cap=8) == "chat, text, short"
    assert shape_of_request(make_request(endpoint=EMBEDDINGS), max_tokens_cap=8) == "embedding"


def test_every_request_is_counted_and_so_many_of_each_shape_are_sampled() -> None:
    requests = [make_request(i, max_tokens=1 if i % 10 == 0 else 100) for i in range(5000)]

    profile = profile_of(requests)

    sampled = [request.shape for request in profile.sample]
    assert profile.requests == 5000
    assert profile.shapes["chat, text, one token"].requests == 500
    assert profile.shapes["chat, text, long"].size_bytes == sum(
        len(request.body) for request in requests if request.index % 10
    )
    assert {shape: sampled.count(shape) for shape in profile.shapes} == dict.fromkeys(
        profile.shapes, SAMPLE_PER_SHAPE
    )


def test_the_sample_depends_on_the_file_alone_and_favours_no_place() -> None:
    requests = [make_request(i) for i in range(4000)]

    first, second = profile_of(requests), profile_of(requests)

    indices = [request.index for request in first.sample]
    assert first == second
    assert 1700 < sum(indices) / len(indices) < 2300


def test_prompts_are_only_counted_for_the_sample() -> None:
    asked: list[str] = []

    def count_tokens(endpoint: str, body: Any) -> int:
        asked.append(endpoint)
        return 7

    profile = profile_of([make_request(i) for i in range(20_000)], count_tokens=count_tokens)

    assert {request.prompt_tokens for request in profile.sample} == {7}
    assert len(asked) < 2500


def test_texts_of_parts_and_of_lists_are_all_counted() -> None:
    content = [{"type": "text", "text": "abc"}, {"type": "image_url", "image_url": {}}]
    turns = [{"role": "user", "content": content}, {"role": "user"}, 3]
    parts = make_request(0, messages=turns)
    many = make_request(1, endpoint=EMBEDDINGS, input=["ab", "cd", [1, 2]])

    profile = profile_of([parts, many])

    assert [request.characters for request in profile.sample] == [3, 4]


@pytest.mark.parametrize(
    ("fields", "absurd"),
    [
        ({"max_tokens": 200}, {"n": 10**9}),
        ({"max_tokens": 8}, {"max_tokens": 1e300}),
        ({}, {"max_tokens": 10**9}),
    ],
)
def test_what_an_absurd_request_asks_for_is_expected_only_as_far_as_an_engine_goes(
    fields: dict[str, Any], absurd: dict[str, Any]
) -> None:
    sound = [make_request(index, **fields) for index in range(2000)]
    # Wherever it stands: whether it is sampled depends on its place.
    worst = max(
        expected([*sound, make_request(2000 + place, **{**fields, **absurd})])
        for place in range(20)
    )

    assert worst < 2 * expected(sound) + MOST_ANSWERS * 4096


@pytest.mark.parametrize("kind", [float, str])
def test_numbers_are_expected_as_engines_take_them(kind: type) -> None:
    given = {"n": 7, "max_tokens": 3000}

    (sampled,) = profile_of(
        [make_request(0, **{name: kind(number) for name, number in given.items()})]
    ).sample

    assert (sampled.answers, sampled.cap) == (7, 3000)


def test_a_request_whose_tokens_cannot_be_counted_leaves_the_profile_as_it_was() -> None:
    def count_tokens(endpoint: str, body: Mapping[str, Any]) -> int:
        if body["messages"][0]["content"] == "damned":
            raise OverflowError
        return 7

    profiler = Profiler(count_tokens=count_tokens)
    profiler.add(make_request(0))
    with pytest.raises(OverflowError):
        profiler.add(make_request(1, text="damned"))

    assert profiler.profile() == profile_of([make_request(0)], count_tokens=count_tokens)


def expected(requests: list[Request]) -> float:
    profile = profile_of(requests, longest=4096)
    made = estimate(profile, history=TokenHistory(), throughput=None, at_a_time=8)
    return made.completion_tokens.mid
