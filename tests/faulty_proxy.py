"""Stands between a client and an HTTP server, and lets requests go wrong."""

import http.client
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ERROR = "<Error><Code>{}</Code><Message>as the test wishes</Message></Error>"
CODES = {400: "ExpiredToken", 403: "AccessDenied", 500: "InternalError", 503: "SlowDown"}


@dataclass(frozen=True)
class Request:
    """What a fault is chosen by.

    Attributes:
        method: As ``PUT``.
        path: With the query, as ``/bucket/run/COMMITTED?uploads``.
        number: How many requests came before it.
        key: The access key that it was signed with; empty if it was not.
    """

    method: str
    path: str
    number: int
    key: str = ""

    @property
    def is_list(self) -> bool:
        return self.method == "GET" and "list-type" in self.path

    @property
    def is_delete(self) -> bool:
        return self.method == "DELETE" or (self.method == "POST" and "?delete" in self.path)


class FaultyProxy:
    """A proxy in a thread. ``fault`` says what happens to a request:

    - None: nothing,
    - 400, 403, 500, 503: it is answered with this status and not passed on,
    - ``cut``: the connection breaks after the request went through, before the answer,
    - ``cut_body``: it breaks in the middle of the answer,
    - ``stall``: no answer for ten seconds,
    - ``flip``: one byte of what the client gets is another,
    - ``flip_up``: one byte of what the server gets is another,
    - ``truncate_up``: the server gets the first half.
    """

    def __init__(self, port: int):
        self.fault: Callable[[Request], int | str | None] = lambda request: None
        self.requests: list[Request] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # an answer in one piece, else the client waits 40 ms for its second half

            def handle_expect_100(self) -> bool:
                super().handle_expect_100()
                self.wfile.flush()
                return True

            def handle_one(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                signed = self.headers.get("Authorization", "").partition("Credential=")[2]
                key = signed.partition("/")[0]
                request = Request(self.command, self.path, len(proxy.requests), key)
                proxy.requests.append(request)
                fault = proxy.fault(request)
                if isinstance(fault, int):
                    return self.answer(fault, [], ERROR.format(CODES[fault]).encode())
                if fault == "stall":
                    time.sleep(10)
                    return self.cut()
                if fault == "flip_up":
                    body = _flip(body)
                if fault == "truncate_up":
                    body = body[: len(body) // 2]
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
                try:
                    connection.putrequest(
                        self.command, self.path, skip_host=True, skip_accept_encoding=True
                    )
                    for name, value in self.headers.items():
                        if name.lower() == "content-length":
                            value = str(len(body))
                        if name.lower() != "expect":
                            connection.putheader(name, value)
                    connection.endheaders(body)
                    response = connection.getresponse()
                    content = response.read()
                finally:
                    connection.close()
                if fault == "cut":
                    return self.cut()
                if fault == "flip":
                    content = _flip(content)
                half = len(content) // 2 if fault == "cut_body" else None
                self.answer(response.status, response.getheaders(), content, half)

            def answer(self, status, headers, content, half=None) -> None:
                self.send_response_only(status)
                skipped = ("content-length", "transfer-encoding", "connection")
                for name, value in headers:
                    if name.lower() not in skipped:
                        self.send_header(name, value)
                length = {k.lower(): v for k, v in headers}.get("content-length")
                head = self.command == "HEAD" and length is not None
                self.send_header("Content-Length", length if head else str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content[:half])
                self.wfile.flush()
                if half is not None:
                    self.cut()

            def cut(self) -> None:
                self.close_connection = True
                with suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_one

            def log_message(self, *args) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *args: None  # a client that went away
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def _flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return (
        content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :] if content else b""
    )
