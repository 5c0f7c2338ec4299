"""The measuring client's HTTP/1.1: plain sockets and the parser of llhttp (httptools)."""

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from client.connection import RECEIVE_BYTES, Connection
from endpoints.base import LOOPBACK, Request


class HttpConnection(Connection):
    """A Connection over HTTP/1.1; httptools calls the on_ methods."""

    closing_reason = "server closes after each reply"

    @staticmethod
    def encode(port: int, request: Request, host: str = LOOPBACK) -> bytes:
        """Encode `request` once for many sends."""
        headers = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        head = (
            f"{request.method} {request.path} HTTP/1.1\r\nHost: {host}:{port}\r\n{headers}"
            f"Content-Type: {request.content_type}\r\nContent-Length: {len(request.body)}\r\n\r\n"
        )
        return head.encode() + request.body

    @property
    def failure(self) -> str:
        """Why the status is not 200, in a few words to count it under."""
        return f"status {self.status}"

    def greet(self) -> None:
        """Expect a reply, which an impatient server sends before it is asked."""
        self.keep_alive = True
        self._is_parsing = self._has_head = self._has_length = False

    def send(self, number: int, request: bytes) -> None:
        """Send exchange `number`'s request; a broken connection shows when the reply is read."""
        self.number = number
        self.complete = self.is_right = self._is_parsing = False
        self.sent_ns = self.clock()
        self.write(request)

    def receive(self) -> str | None:
        """Take in what has arrived; return what went wrong, or None.

        Only a reply's first bytes are compared with `right_replies`. The parser found the same bytes to be one whole
        reply with status 200 that keeps the connection, so it would find that again.
        """
        try:
            data = self.socket.recv(RECEIVE_BYTES)
        except OSError as error:
            return type(error).__name__
        if self._is_parsing:
            self.raw = b""
        elif data == self.right_replies.get(self.number):
            self.complete = self.is_right = True
            return None
        else:
            self._parser = HttpResponseParser(self)
            self._is_parsing = True
            self._has_head = self._has_length = False
            self.raw, self.body = data, b""
        if not data:
            if not self._has_head or self._has_length:
                return "connection closed"
            self._finish(keep_alive=False)  # the end of the connection is that of the reply (RFC 9112, 6.3, item 8)
            return None
        try:
            self._parser.feed_data(data)
        except HttpParserError as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # Ctrl-C in an on_ method, which httptools wraps
                raise error.__context__ from None
            return "not HTTP"
        except HttpParserUpgrade:
            return "switches to another protocol"  # status 101, to a request that did not ask for it
        return None

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"content-length" or (name == b"transfer-encoding" and value.lower().rstrip().endswith(b"chunked")):
            self._has_length = True

    def on_headers_complete(self) -> None:
        self._has_head = True

    def on_body(self, part: bytes) -> None:
        self.body += part

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() < 200:  # an interim reply; the final one follows (RFC 9110, 15.2)
            self._has_head = self._has_length = False
            return
        self._finish(self._parser.should_keep_alive())  # right only while the reply is being parsed

    def _finish(self, keep_alive: bool) -> None:
        self.complete = True
        self.status = self._parser.get_status_code()
        self.keep_alive = keep_alive
