"""Requests, their heads and refusals, and what an application of http_server.py is: something that answers them."""

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
    """A request that gets `status` and {"error": message} instead of an answer; `closes`: and then no other."""

    def __init__(self, status: int, message: str, headers: str = "", closes: bool = False):
        super().__init__(message)
        self.status, self.headers, self.closes = status, headers, closes


@dataclass(frozen=True)
class Limits:
    max_connections: int = 1000  # beyond them 503
    max_body_bytes: int = 1_000_000  # beyond it 413
    head_timeout_s: float = 10.0  # from a request's first byte, or from the connection's start, to the head's end
    body_timeout_s: float = 10.0  # from the head's end to the body's
    idle_timeout_s: float = 75.0  # between two requests: longer than most proxies, so that they close first
    write_timeout_s: float = 30.0  # for a client that does not read its replies


class Head:
    """What the head of a request says."""

    __slots__ = (
        "expects", "headers", "is_plain", "keeps_alive", "keeps_line", "length", "method", "route", "routes", "target",
    )  # fmt: skip

    def __init__(self) -> None:
        self.method = b""
        self.target = ""  # as it was sent
        self.headers: dict[bytes, bytes] = {}  # KEPT_HEADERS alone, by their names in lower case
        self.length = 0  # of the body, where it is announced
        self.keeps_alive, self.keeps_line = True, b""  # the line tells an HTTP/1.0 client that it is granted
        self.expects = False  # its client waits for 100 Continue before it sends the body
        self.is_plain = False  # the next head of the same bytes need not be parsed
        self.route: Route | None = None  # what answers it, as long as the application's `routes` are these
        self.routes: object = None

    def check(self, parser: Any) -> None:
        """Take over what httptools' `parser` found; refuse what cannot be understood (RFC 9112, 3.2 and 6.1).

        And what else than 100-continue is expected (RFC 9110, 10.1.1).
        """
        headers, version = self.headers, parser.get_http_version()
        self.method = parser.get_method()
        self.length = int(headers.get(b"content-length", 0))
        self.keeps_alive = parser.should_keep_alive()
        self.keeps_line = b"connection: keep-alive\r\n" if version == "1.0" and self.keeps_alive else b""
        expects = headers.get(b"expect", b"").lower()
        encoding = headers.get(b"transfer-encoding", b"chunked").strip().lower()
        for is_wrong, status, message in (
            (version not in ("1.0", "1.1"), 505, f"HTTP/{version} is not spoken here, HTTP/1.1 is"),
            (version == "1.1" and not HOST.fullmatch(headers.get(b"host", b" ")), 400, "expected one header Host"),
            (version == "1.0" and b"transfer-encoding" in headers, 400, "HTTP/1.0 has no Transfer-Encoding"),
            (encoding != b"chunked", 501, "the only Transfer-Encoding here is chunked"),
            (self.method == b"CONNECT", 501, "this server is no proxy"),
            (expects not in (b"", b"100-continue"), 417, "the only expectation here is 100-continue"),
        ):
            if is_wrong:
                raise Refusal(status, message, closes=True)
        self.expects = bool(expects) and version == "1.1"
        self.is_plain = (
            version == "1.1" and self.keeps_alive and not expects and self.method != b"HEAD"
            and b"transfer-encoding" not in headers and not parser.should_upgrade()
        )  # fmt: skip


class Request:
    """One request, of which a Route gets `head` and `body`; it is answered, refused or failed, once."""

    __slots__ = ("body", "connection", "head", "keeps_alive", "parts", "reply", "route", "size", "started_s")

    def __init__(self, connection: Any, head: Head):
        self.connection, self.head = connection, head
        self.keeps_alive = True
        self.reply: bytes | None = None
        self.route: Route | None = None

    def answer(self, body: bytes, content_type: bytes = JSON, lines: bytes = b"", status: int = 200) -> None:
        """Send the reply, once those to earlier requests are sent; `lines` are further ones of its head."""
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
        """Refuse, or answer with an error of the server's own, whose cause the log gets and the client does not."""
        if not isinstance(error, Refusal):
            traceback.print_exception(error, file=sys.stderr)
            error = Refusal(500, "the server has an error of its own; its log says which")
        self.refuse(error)

    def later(self, method: Callable, *arguments: object) -> None:
        """Call a method of this request from another thread."""
        self.connection.server.loop.call_soon_threadsafe(method, *arguments)


class Route(Protocol):
    def handle(self, request: Request) -> None:
        """Answer `request`, whose body is there, now or later, or raise Refusal."""


class Application(Protocol):
    routes: object  # another one whenever `find` may find something else

    def find(self, head: Head) -> Route:
        """Return what answers a request with this head; Refusal where nothing does."""

    def observe(self, route: Route, status: int, seconds: float) -> None:
        """Be told of an answered request, and how long after its head."""
