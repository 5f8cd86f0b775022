"""Whatever a server says, each request has one outcome, and the process keeps its memory."""

import asyncio
import contextlib
import gzip
import os
import resource
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from itertools import repeat

import pytest

from batch_orchestration.core.errors import EngineRefusesUs, EngineStartFailed
from batch_orchestration.core.outcomes import Completion, Failure, FailureCode, Outcome
from batch_orchestration.engines.openai_server import OpenAIServerEngine, ServerOptions
from batch_orchestration.engines.reading import PIECE_BYTES
from batch_orchestration_tests.support.builders import ENDPOINT
from batch_orchestration_tests.support.engine_contract import ask, chat, metrics_of
from batch_orchestration_tests.support.raw_server import MODELS, PAGES, Answer, http, raw_server

GOOD = b'{"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}]}'
MIB = 2**20
OPTIONS = ServerOptions(timeout_seconds=30.0, answer_bytes=1 * MIB, all_answers_bytes=4 * MIB)


def outcome_of(*pieces: bytes, options: ServerOptions = OPTIONS) -> Outcome:
    """What becomes of a request that is answered by these bytes."""
    [outcome] = outcomes(lambda path, body: pieces, 1, options=options)
    return outcome


def outcomes(answer: Answer, count: int, *, options: ServerOptions = OPTIONS) -> list[Outcome]:
    with raw_server(answer) as url:
        engine = OpenAIServerEngine(url, options=options)
        asyncio.run(engine.start())
        return ask(engine, *(chat(f"question {number}") for number in range(count)))


@pytest.mark.parametrize("status", [b"301 Moved", b"302 Found", b"307 Same", b"308 Same"])
def test_a_redirect_is_not_followed(status: bytes) -> None:
    asked: list[str] = []

    def elsewhere(path: str, body: bytes) -> list[bytes]:
        asked.append(path)
        return [http(GOOD)]

    with raw_server(elsewhere, {**PAGES, "/steal": http(GOOD)}) as other:
        location = f"Location: {other}/steal".encode()
        outcome = outcome_of(http(b"", location, status=status))

    assert isinstance(outcome, Failure)
    assert outcome.status == int(status[:3])
    assert asked == []


@pytest.mark.parametrize("page", ["/v1/models", "/version", "/metrics"])
def test_a_page_that_redirects_is_not_followed(page: str) -> None:
    away = http(b"", b"Location: http://127.0.0.1:1/", status=b"302 Found")
    with raw_server(lambda path, body: [], {**PAGES, page: away}) as url:
        engine = OpenAIServerEngine(url, options=ServerOptions(start_timeout_seconds=5.0))
        if page == "/v1/models":
            with pytest.raises(EngineRefusesUs, match="302"):
                asyncio.run(engine.start())
        else:
            assert asyncio.run(engine.start()).models == ("demo-model",)


@pytest.mark.parametrize(
    ("encoding", "compress"),
    [
        (b"gzip", gzip.compress),
        (b"x-gzip", gzip.compress),
        (b"deflate", zlib.compress),
        (b"deflate", lambda text: zlib.compress(text)[2:-4]),
        (b"identity", bytes),
    ],
    ids=["gzip", "x-gzip", "zlib", "deflate", "identity"],
)
def test_an_answer_that_is_compressed_is_expanded(encoding: bytes, compress) -> None:
    outcome = outcome_of(http(compress(GOOD), b"Content-Encoding: " + encoding))

    assert isinstance(outcome, Completion)
    assert bytes(outcome.body) == GOOD


@pytest.mark.parametrize("size", [PIECE_BYTES, PIECE_BYTES + 1, PIECE_BYTES + 200, 5 * PIECE_BYTES])
def test_an_answer_that_ends_within_a_full_piece_is_expanded_to_its_end(size: int) -> None:
    """Bare deflate has no trailer: its last byte may be read while text is still to come."""
    text = GOOD.replace(b"yes", b"y" * (size - len(GOOD) + len(b"yes")))

    outcome = outcome_of(http(zlib.compress(text, 9)[2:-4], b"Content-Encoding: deflate"))

    assert isinstance(outcome, Completion)
    assert len(outcome.body) == size


BOMB = gzip.compress(b"[" * 40 * MIB)


@pytest.mark.parametrize(
    ("body", "encoding", "words"),
    [
        (BOMB, b"gzip", "longer than 1,048,576 bytes"),
        (b"x" * 2 * MIB, b"identity", "longer than 1,048,576 bytes"),
        (gzip.compress(GOOD)[:-9], b"gzip", "ends in the middle"),
        (gzip.compress(GOOD) + b"more", b"gzip", "something follows"),
        (b"no gzip at all", b"gzip", "cannot be decompressed"),
        (GOOD, b"br", "Content-Encoding is 'br'"),
        (GOOD, b"zstd", "Content-Encoding is 'zstd'"),
        (gzip.compress(gzip.compress(GOOD)), b"gzip, gzip", "Content-Encoding is 'gzip, gzip'"),
    ],
    # gzip has the time in it: several processes would give the tests different names.
    ids=["bomb", "long", "cut", "followed", "no gzip", "br", "zstd", "twice"],
)
@pytest.mark.parametrize(
    ("status", "code"),
    [
        (b"200 OK", FailureCode.RESPONSE_UNREADABLE),
        (b"429 Slow", FailureCode.ENGINE_OVERLOADED),
    ],
)
def test_an_answer_that_cannot_be_read_is_a_failure_that_says_why(
    status: bytes, code: FailureCode, body: bytes, encoding: bytes, words: str
) -> None:
    outcome = outcome_of(http(body, b"Content-Encoding: " + encoding, status=status))

    assert isinstance(outcome, Failure)
    assert (outcome.status, outcome.code) == (int(status[:3]), code)
    assert words in outcome.message


def test_a_request_waits_while_there_is_no_descriptor_for_its_connection() -> None:
    """It costs no attempt, and says nothing about the server."""
    hoard: list[int] = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def ask_and_make_room(engine: OpenAIServerEngine) -> Outcome:
        asking = asyncio.create_task(engine.answer(ENDPOINT, b"{}", request_id="r"))
        await asyncio.sleep(1.2)
        assert not asking.done()
        while hoard:
            os.close(hoard.pop())
        try:
            return await asking
        finally:
            await engine.disconnect()

    with raw_server(lambda path, body: [http(GOOD)]) as url:
        engine = OpenAIServerEngine(url, options=ServerOptions(timeout_seconds=30.0))
        asyncio.run(engine.start())
        loop = asyncio.new_event_loop()
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
        try:
            with contextlib.suppress(OSError):
                while True:
                    hoard.append(os.open(os.devnull, os.O_RDONLY))
            outcome = loop.run_until_complete(ask_and_make_room(engine))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for descriptor in hoard:
                os.close(descriptor)
            loop.close()

    assert isinstance(outcome, Completion)


def test_an_answer_without_end_is_read_to_the_limit_only() -> None:
    chunk = b"%x\r\n%s\r\n" % (2**16, b"x" * 2**16)

    outcome = outcome_of(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", *repeat(chunk, 99)
    )

    assert isinstance(outcome, Failure)
    assert "longer than" in outcome.message


def test_an_answer_that_trickles_is_given_up_when_its_time_is_over() -> None:
    def trickle(path: str, body: bytes) -> Iterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"
        for _ in range(200):
            yield b" "
            time.sleep(0.05)

    [outcome] = outcomes(trickle, 1, options=ServerOptions(timeout_seconds=1.0))

    assert isinstance(outcome, Failure)
    assert outcome.code == FailureCode.TIMEOUT


def test_answers_that_are_half_read_do_not_wait_for_each_other_without_end() -> None:
    """Each takes half of what there is for all, and more than what is left."""
    big = b'{"choices": [{"text": "%s"}]}' % (b"x" * 3 * MIB)
    options = ServerOptions(timeout_seconds=120.0, answer_bytes=8 * MIB, all_answers_bytes=4 * MIB)

    answered = outcomes(lambda path, body: [http(big)], 12, options=options)

    assert [type(outcome) for outcome in answered] == [Completion] * 12


@pytest.mark.parametrize(
    "page",
    [
        b"",
        b"[" * 100_000,
        b"x" * 5 * MIB,
        b'{"data": [{"id": 5}]}',
        b'{"data": [{"id": ""}]}',
        b'{"data": [{"id": "%s"}]}' % (b"x" * 10_000),
        b'{"data": [{"id": "a", "owned_by": 5}]}',
        b'{"data": [{"id": "\\ud83d"}]}',
        b'{"data": [{"id": "\xff"}]}',
        b'{"data": {}}',
        b'{"data": []}',
        b'{"data": [1e999]}',
    ],
)
def test_models_that_cannot_be_read_fail_the_start(page: bytes) -> None:
    with (
        raw_server(lambda path, body: [], {**PAGES, "/v1/models": http(page)}) as url,
        pytest.raises(EngineStartFailed),
    ):
        asyncio.run(
            OpenAIServerEngine(url, options=ServerOptions(start_timeout_seconds=5.0)).start()
        )


@pytest.mark.parametrize("said", [b"-1", b"0", b"12.5", b'"4096"', b"null", b"[[]]", b"true"])
def test_a_longest_request_of_no_length_is_not_known(said: bytes) -> None:
    models = MODELS.replace(b"4096", said)
    with raw_server(lambda path, body: [], {**PAGES, "/v1/models": http(models)}) as url:
        engine = OpenAIServerEngine(url)
        asyncio.run(engine.start())

    assert engine.info.max_model_len is None


@pytest.mark.parametrize("page", ["/version", "/metrics", "/health"])
@pytest.mark.parametrize(
    "said",
    [http(b"x" * 5 * MIB), http(b"\xff" * 99), http(b"[" * 9_999), http(b"9" * 9_999), http(b"")],
    ids=["long", "not UTF-8", "deep", "digits", "empty"],
)
def test_no_page_about_a_server_keeps_it_from_answering(page: str, said: bytes) -> None:
    with raw_server(lambda path, body: [http(GOOD)], {**PAGES, page: said}) as url:
        engine = OpenAIServerEngine(url)
        asyncio.run(engine.start())
        [outcome] = ask(engine, chat("Hello."))
        metrics_of(engine)

    assert isinstance(outcome, Completion)


SIZE = 300 * MIB
RSS = """
import asyncio, gzip, resource
from batch_orchestration_tests.engine.test_strange_answers import SIZE, giants
asyncio.run(giants())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


async def giants() -> None:
    """Ask for an answer of 300 MB, and for one of 300 KB that expands to as much."""
    bomb = http(gzip.compress(b" " * SIZE, 1), b"Content-Encoding: gzip")

    def answer(path: str, body: bytes) -> Iterator[bytes]:
        if b"bomb" in body:
            yield bomb
            return
        yield b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % SIZE
        yield from repeat(b" " * MIB, SIZE // MIB)

    with raw_server(answer) as url:
        engine = OpenAIServerEngine(url, options=ServerOptions(timeout_seconds=120.0))
        await engine.start()
        for text in ("giant", "bomb"):
            outcome = await engine.answer("/v1/chat/completions", chat(text), request_id="1")
            assert isinstance(outcome, Failure), outcome
            assert "longer than" in outcome.message
        await engine.disconnect()


def test_giant_answers_take_little_more_memory_than_the_limit() -> None:
    done = subprocess.run(
        [sys.executable, "-c", RSS], capture_output=True, text=True, check=False, timeout=300
    )

    assert done.returncode == 0, done.stderr
    # Making the bomb takes the 300 MB, once.
    assert int(done.stdout) < 300 + 64 * 3 + 150
