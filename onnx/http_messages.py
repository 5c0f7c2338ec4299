"""Requests, their heads and refusals, and the interface of an application of http_server.py, which answers them."""

import http
import re
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

JSON = b"application/json"
HOST = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=%:\[\]-]*")


class Refusal(Exception):
    """An error reply with `status` and {"error": message}; `closes`: the connection ends after it."""

    def __init__(self, status: int, message: str, headers: str = "", closes: bool = False):
        super().__init__(message)
        self.status, self.headers, self.closes = status, headers, closes


@dataclass(frozen=True)
class Limits:
    max_connections: int = 1000  # above it 503
    max_body_bytes: int = 1_000_000  # above it 413
    head_timeout_s: float = 10.0  # from a request's first byte, or from the connection's start, to the head's end
    body_timeout_s: float = 10.0  # from the head's end to the body's
    idle_timeout_s: float = 75.0  # between two requests: longer than most proxies, so that they close first
    write_timeout_s: float = 30.0  # for a client that does not read its replies


class Head:
    """The head of a request."""

    __slots__ = (
        "expects", "headers", "is_plain", "keeps_alive", "keeps_line", "length", "method", "route", "routes", "target",
    )  # fmt: skip

    def __init__(self) -> None:
        self.method = b""
        self.target = ""  # as it was sent
        self.headers: dict[bytes, bytes] = {}  # only KEPT_HEADERS, by their names in lower case
        self.length = 0  # of the body, if announced
        self.keeps_alive, self.keeps_line = True, b""  # the line grants it to an HTTP/1.0 client
        self.expects = False  # the client waits for 100 Continue before it sends the body
        self.is_plain = False  # the next head of the same bytes need not be parsed
        self.route: Route | None = None  # its route, valid for the application's present `routes`
        self.routes: object = None

    def check(self, parser: Any) -> None:
        """Take the results of httptools' `parser`; refuse a head that cannot be understood (RFC 9112, 3.2 and 6.1).

        Also refuse any expectation but 100-continue (RFC 9110, 10.1.1).
        """
        headers, version = self.headers, parser.get_http_version()
        self.method = parser.get_method()
        self.length = int(headers.get(b"content-length", 0))
        self.keeps_alive = parser.should_keep_alive()
        self.keeps_line = b"connection: keep-alive\r\n" if version == "1.0" and self.keeps_alive else b""
        expects = headers.get(b"expect", b"").lower()
        encoding = headers.get(b"transfer-encoding", b"chunked").strip().lower()
        for is_wrong, status, message in (
            (version not in ("1.0", "1.1"), 505, f"HTTP/{version} is not supported, use HTTP/1.1"),
            (version == "1.1" and not HOST.fullmatch(headers.get(b"host", b" ")), 400, "expected one header Host"),
            (version == "1.0" and b"transfer-encoding" in headers, 400, "HTTP/1.0 has no Transfer-Encoding"),
            (encoding != b"chunked", 501, "the only supported Transfer-Encoding is chunked"),
            (self.method == b"CONNECT", 501, "this server is not a proxy"),
            (expects not in (b"", b"100-continue"), 417, "the only supported expectation is 100-continue"),
        ):
            if is_wrong:
                raise Refusal(status, message, closes=True)
        self.expects = bool(expects) and version == "1.1"
        self.is_plain = (
            version == "1.1" and self.keeps_alive and not expects and self.method != b"HEAD"
            and b"transfer-encoding" not in headers and not parser.should_upgrade()
        )  # fmt: skip


class Request:
    """One request with `head` and `body`, given to a Route; it is answered, refused or failed, once."""

    __slots__ = ("body", "connection", "head", "keeps_alive", "parts", "reply", "route", "size", "started_s")

    def __init__(self, connection: Any, head: Head):
        self.connection, self.head = connection, head
        self.keeps_alive = True
        self.reply: bytes | None = None
        self.route: Route | None = None

    def answer(self, body: bytes, content_type: bytes = JSON, lines: bytes = b"", status: int = 200) -> None:
        """Send the reply after those to earlier requests; `lines` are further lines of its head."""
        connection, head = self.connection, self.head
        server = connection.server
        if status == 200 and self.keeps_alive and head.is_plain:  # almost always
            start = server.json_head if content_type is JSON and not lines else b"%b%bcontent-type: %b\r\n" % (
                server.ok_head, lines, content_type,
            )  # fmt: skip
        else:
            status_line = f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\n".encode()
            lines += head.keeps_line if self.keeps_alive else b"connection: close\r\n"
            start = b"%bdate: %b\r\n%bcontent-type: %b\r\n" % (status_line, server.date, lines, content_type)
        sent = b"" if head.method == b"HEAD" else body
        self.reply = b"%bcontent-length: %d\r\n\r\n%b" % (start, len(body), sent)
        connection.flush()
        if self.route is not None:
            server.application.observe(self.route, status, time.perf_counter() - self.started_s)

    def refuse(self, refusal: Refusal) -> None:
        """Answer with an error."""
        self.keeps_alive = self.keeps_alive and not refusal.closes
        body = msgspec.json.encode({"error": str(refusal)})
        self.answer(body, lines=refusal.headers.encode("latin-1"), status=refusal.status)

    def fail(self, error: Exception) -> None:
        """Refuse, or answer with an internal error, whose cause is logged but not sent to the client."""
        if not isinstance(error, Refusal):
            traceback.print_exception(error, file=sys.stderr)
            error = Refusal(500, "internal server error; the server's log has the cause")
        self.refuse(error)

    def later(self, method: Callable, *arguments: object) -> None:
        """Call a method of this request from another thread."""
        self.connection.server.loop.call_soon_threadsafe(method, *arguments)


class Route(Protocol):
    def handle(self, request: Request) -> None:
        """Answer `request`, whose body has arrived, now or later, or raise Refusal."""


class Application(Protocol):
    routes: object  # replaced whenever `find` may return something else

    def find(self, head: Head) -> Route:
        """Return the route of a request with this head; Refusal if there is none."""

    def observe(self, route: Route, status: int, seconds: float) -> None:
        """Note an answered request, and the time since its head."""
