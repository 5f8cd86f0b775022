"""Loopback servers that take alerts: HTTP as a webhook does, SMTP as a mail server does."""

import json
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email import message_from_bytes
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Webhook(ThreadingHTTPServer):
    """Keeps what is posted to it.

    Attributes:
        status: It answers; None hangs up without a word.
        taken: Bodies that it answered with 2xx, and the paths asked for.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _WebhookHandler)
        self.status: int | None = 200
        self.hold = threading.Event()
        self.hold.set()
        self.taken: list[dict[str, Any]] = []
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/services/T000/s3cret"

    @property
    def texts(self) -> list[str]:
        return [body["text"] for body in self.taken]


class _WebhookHandler(BaseHTTPRequestHandler):
    server: Webhook

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(self.path)
        self.server.hold.wait(20)
        if self.server.status is None:
            self.close_connection = True
            return
        if self.server.status < 300:
            assert self.headers["Content-Type"] == "application/json"
            self.server.taken.append(json.loads(body))
        self.send_response(self.server.status)
        if self.server.status == 302:
            self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        self.server.asked.append(f"GET {self.path}")
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


class MailServer(socketserver.ThreadingTCPServer):
    """Speaks as much SMTP (RFC 5321) as smtplib asks for; no TLS.

    Attributes:
        refuses: Addresses that it does not take.
        mails: Recipients and message of each mail that it took.
        logins: What AUTH PLAIN was tried with.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _MailHandler)
        self.refuses: set[str] = set()
        self.takes_logins = True
        self.parts_well = True
        self.mails: list[tuple[list[str], Message]] = []
        self.logins: list[str] = []

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class _MailHandler(socketserver.StreamRequestHandler):
    server: MailServer

    def handle(self) -> None:
        self.say("220 test")
        recipients: list[str] = []
        while line := self.rfile.readline().decode().strip():
            verb = line.split(" ")[0].upper()
            if verb == "EHLO":
                self.say("250-test", "250 AUTH PLAIN")
            elif verb == "AUTH":
                self.server.logins.append(line)
                self.say("235 ok" if self.server.takes_logins else "535 no, s3cret is wrong")
            elif verb == "RCPT":
                address = line.partition("<")[2].rstrip(">")
                refused = address in self.server.refuses
                recipients += [] if refused else [address]
                self.say("550 nobody here" if refused else "250 ok")
            elif verb == "DATA":
                self.say("354 go on")
                self.server.mails.append((recipients, message_from_bytes(self.data())))
                recipients = []
                self.say("250 ok")
            elif verb == "QUIT":
                self.say("221 bye" if self.server.parts_well else "421 too busy")
                return
            else:
                self.say("250 ok")

    def data(self) -> bytes:
        lines = []
        while (line := self.rfile.readline()) not in (b".\r\n", b""):
            lines.append(line.removeprefix(b"."))
        return b"".join(lines)

    def say(self, *lines: str) -> None:
        self.wfile.write("".join(f"{line}\r\n" for line in lines).encode())


@contextmanager
def serving(server: Any) -> Iterator[Any]:
    """Serve until the end of the block."""
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
