"""A server in the test's process that answers every request as a script says."""

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

from batch_orchestration.engines.openai_server import OpenAIServerEngine, ServerOptions

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
MODEL = "demo-model"


class Reply(NamedTuple):
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = {}


class Asked(NamedTuple):
    """A request that reached the server."""

    path: str
    body: bytes
    key: str

    @property
    def number(self) -> int | None:
        """Of the question; None for a one-token probe."""
        found = re.search(rb"question (\d+)", self.body)
        return int(found[1]) if found else None


def error(status: int, message: str, **fields: object) -> Reply:
    return Reply(status, json.dumps({"error": {"message": message, **fields}}).encode())


def answer(path: str = CHAT) -> Reply:
    usage = {"prompt_tokens": 1, "completion_tokens": 1}
    if path == EMBEDDINGS:
        data: dict[str, object] = {"data": [{"index": 0, "embedding": [0.5]}], "usage": usage}
    elif path == CHAT:
        choice = {"message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}
        data = {"choices": [choice], "usage": usage}
    else:
        data = {"choices": [{"text": "yes", "finish_reason": "stop"}], "usage": usage}
    return Reply(200, json.dumps(data).encode())


#: Given what is asked and how many were asked before; None answers.
Script = Callable[[Asked, int], Reply | None]


class GateServer:
    """Keeps what it was asked; `script` may be exchanged at any time."""

    def __init__(self, script: Script = lambda asked, before: None) -> None:
        self.script = script
        #: Of the pages that an engine is asked for when it is started.
        self.pages: Callable[[str], Reply | None] = lambda path: None
        self.asked: list[Asked] = []
        self._lock = threading.Lock()
        self._server = _QuietServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def engine(self, **values: object) -> OpenAIServerEngine:
        limits = {"timeout_seconds": 10.0, "start_timeout_seconds": 10.0, "lost_after_seconds": 1.0}
        options = ServerOptions(**{**limits, **values})  # type: ignore[arg-type]
        return OpenAIServerEngine(self.url, options=options)

    @property
    def probes(self) -> list[Asked]:
        """Those that ask for no request of a batch."""
        return [asked for asked in self.asked if asked.number is None]

    @property
    def times(self) -> Counter[int | None]:
        """How often each question was asked."""
        return Counter(asked.number for asked in self.asked)

    def reply(self, asked: Asked) -> Reply:
        with self._lock:
            before = len(self.asked)
            self.asked.append(asked)
        return self.script(asked, before) or answer(asked.path)

    def page(self, path: str) -> Reply:
        if (given := self.pages(path)) is not None:
            return given
        if path == "/v1/models":
            return Reply(200, json.dumps({"data": [{"id": MODEL}]}).encode())
        return Reply(200 if path == "/health" else 404)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _QuietServer(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """A client that hangs up is none of the test's business."""


def _handler(gate: GateServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        #: Head and body in one packet: else each answer waits for the acknowledgement of its head.
        wbufsize = 2**16

        def do_GET(self) -> None:
            self._send(gate.page(self.path))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            key = self.headers.get("Authorization", "").removeprefix("Bearer ")
            self._send(gate.reply(Asked(self.path, body, key)))

        def _send(self, reply: Reply) -> None:
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(reply.body)))
            self.end_headers()
            self.wfile.write(reply.body)

        def log_message(self, *_: object) -> None:
            pass

    return Handler
