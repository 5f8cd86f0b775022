"""A server that says whatever bytes it is given, whether that is HTTP or not."""

import contextlib
import re
import socket
import socketserver
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping

_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
MODELS = b'{"data": [{"id": "demo-model", "owned_by": "raw", "max_model_len": 4096}]}'

#: Given path and body of a request: what is said, piece by piece, before the connection is closed.
Answer = Callable[[str, bytes], Iterable[bytes]]


def free_port() -> int:
    """Return a port that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def http(body: bytes, *headers: bytes, status: bytes = b"200 OK") -> bytes:
    """Return a well-formed answer."""
    lines = [b"HTTP/1.1 " + status, b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join([*lines, b"Connection: close", b"", body])


#: What the server says of itself, unless a test has it say something else.
PAGES: Mapping[str, bytes] = {
    "/health": http(b"fine"),
    "/v1/models": http(MODELS),
    "/version": http(b'{"version": "1"}'),
    "/metrics": http(b"vllm:num_requests_running 1\n"),
}


@contextlib.contextmanager
def raw_server(answer: Answer, pages: Mapping[str, bytes] = PAGES) -> Iterator[str]:
    """Serve during the body; hand out the address."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):
                self._answer()

        def _answer(self) -> None:
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                if not (line := self.rfile.readline()):
                    return
                head += line
            method, path = head.split(b" ", 2)[:2]
            length = _LENGTH.search(head)
            body = self.rfile.read(int(length[1])) if length else b""
            if method == b"GET":
                pieces: Iterable[bytes] = [pages.get(path.decode(), http(b"", status=b"404 No"))]
            else:
                pieces = answer(path.decode(), body)
            for piece in pieces:
                self.wfile.write(piece)
                self.wfile.flush()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
