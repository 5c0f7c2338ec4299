"""onnx/http_connection.py on a transport that keeps what is written, and an application that echoes."""

import json
from dataclasses import dataclass, field
from types import SimpleNamespace

import h11

from helpers import REPOSITORY_DIR, load_together

http_server, http_connection, http_messages = load_together(
    REPOSITORY_DIR / "onnx", "http_server", "http_connection", "http_messages"
)
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
LATER = GET.replace(b"/ ", b"/later ")
SMUGGLED = {  # each holds a second request, /smuggled, that a careless server would find in the first one's body
    "both lengths": b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
    "both lengths, the other way round": b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n",
    "two lengths": b"Content-Length: 0\r\nContent-Length: 50\r\n",
    "a list of lengths": b"Content-Length: 0, 50\r\n",
    "a length with a sign": b"Content-Length: +0\r\n",
    "a negative length": b"Content-Length: -1\r\n",
    "a length in hex": b"Content-Length: 0x0\r\n",
    "an empty length": b"Content-Length: \r\n",
    "a length that is too large for 64 bits": b"Content-Length: 18446744073709551616\r\n",
    "an obscured encoding": b"Transfer-Encoding: xchunked\r\n",
    "chunked, and something after it": b"Transfer-Encoding: chunked, identity\r\n",
    "chunked twice": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
    "chunked twice in a list": b"Transfer-Encoding: chunked, chunked\r\n",
    "an encoding before chunked": b"Transfer-Encoding: gzip, chunked\r\n",
    "identity": b"Transfer-Encoding: identity\r\n",
    "a blank before the colon": b"Transfer-Encoding : chunked\r\n",
    "a tab before the colon": b"Content-Length\t: 0\r\n",
    "a folded line": b"Transfer-Encoding:\r\n chunked\r\n",
    "a form feed in the value": b"Transfer-Encoding: \x0bchunked\r\n",
    "a NUL in a value": b"X: a\0b\r\n",
    "a carriage return in a value": b"X: a\rTransfer-Encoding: chunked\r\n",
    "a line feed alone": b"X: a\nTransfer-Encoding: chunked\r\n",
    "quoted chunked": b'Transfer-Encoding: "chunked"\r\n',
    "a name with a blank": b"Content Length: 0\r\n",
    "no name": b": 0\r\n",
}


class Echo:
    """An application that answers with what it was asked; and, where the target is /later, when it is told to."""

    routes = object()

    def __init__(self):
        self.asked: list[tuple[str, str, bytes]] = []
        self.kept: list = []

    def find(self, head):
        if head.target.startswith("/none"):
            raise http_messages.Refusal(404, "nothing here")
        return SimpleNamespace(handle=self.handle)

    def handle(self, request):
        head = request.head
        self.asked.append((head.method.decode(), head.target, request.body))
        if head.target.startswith("/raise"):
            raise ValueError("a secret")
        reply = json.dumps([head.method.decode(), head.target, request.body.hex()]).encode()
        if head.target.startswith("/later"):
            self.kept.append((request, reply))
        else:
            request.answer(reply)

    def observe(self, route, status, seconds):
        pass


@dataclass
class Transport:
    """What uvloop's would do."""

    written: bytearray = field(default_factory=bytearray)
    ended: str = ""  # how, once it is
    is_paused: bool = False
    unread_bytes: int = 0  # of what is written, where the client does not read

    def write(self, data: bytes) -> None:
        assert not self.ended, "written after the end"
        self.written += data

    def close(self) -> None:
        self.ended = self.ended or "closed"

    def abort(self) -> None:
        self.ended = "aborted"

    def write_eof(self) -> None:
        self.ended = self.ended or "lingering"

    def can_write_eof(self) -> bool:
        return True

    def pause_reading(self) -> None:
        self.is_paused = True

    def resume_reading(self) -> None:
        self.is_paused = False

    def get_write_buffer_size(self) -> int:
        return self.unread_bytes


class Client:
    """One connection to a server of its own."""

    def __init__(self, **limits):
        self.echo = Echo()
        self.server = http_server.Server(self.echo, http_messages.Limits(**limits))
        self.transport = Transport()
        self.connection = http_connection.Connection(self.server)
        self.connection.connection_made(self.transport)

    def send(self, data: bytes, *cuts: int) -> "Client":
        """Have the server receive `data`, in pieces that begin at `cuts`."""
        places = [0, *sorted(cut for cut in set(cuts) if 0 < cut < len(data)), len(data)]
        for start, end in zip(places, places[1:], strict=False):
            if self.transport.ended in ("closed", "aborted"):
                break
            if start < end:
                self.connection.data_received(data[start:end])
        return self

    def wait(self, seconds: float) -> None:
        """Let so much time pass for the server."""
        self.server.now_s += seconds
        self.connection.check_time()

    def replies(self) -> list[tuple[int, bytes]]:
        """Return status and body of every reply, as h11 reads them; an interim one has no body."""
        found: list[tuple[int, bytes]] = []
        text, heads = bytes(self.transport.written), [asked[0] == "HEAD" for asked in self.echo.asked]
        for is_head in [*heads, *[False] * 1000]:
            if not text:
                break
            reader = h11.Connection(h11.CLIENT)
            reader.send(h11.Request(method="HEAD" if is_head else "GET", target="/", headers=[("host", "a")]))
            reader.send(h11.EndOfMessage())
            reader.receive_data(text)
            if self.transport.ended:
                reader.receive_data(b"")
            status, body = 0, b""
            while True:
                event = reader.next_event()
                if isinstance(event, h11.InformationalResponse):
                    found.append((event.status_code, b""))
                elif isinstance(event, h11.Response):
                    status = event.status_code
                elif isinstance(event, h11.Data):
                    body += bytes(event.data)
                elif isinstance(event, h11.EndOfMessage):
                    found.append((status, body))
                    text = reader.trailing_data[0]
                    break
                else:
                    assert not text or event in (h11.NEED_DATA, h11.PAUSED), event
                    return found
        return found

    def statuses(self) -> list[int]:
        return [status for status, _ in self.replies()]
