"""onnx/http_connection.py against RFC 9110 and 9112: streams cut anywhere, h11's opinion, smuggling, and abuse.

Connections run in this process, on a transport that keeps what is written: thousands of streams take seconds.
"""

import json
import re
from dataclasses import dataclass, field
from types import SimpleNamespace

import h11
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers import REPOSITORY_DIR, load_together

http_server, http_connection, http_messages = load_together(
    REPOSITORY_DIR / "onnx", "http_server", "http_connection", "http_messages"
)
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


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


def read_with_h11(stream: bytes) -> tuple[list[tuple[str, str, bytes]], bool]:
    """Return the requests that h11, as a server, finds in `stream`, and whether it objects to what follows them."""
    server, found = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20), []
    server.receive_data(stream)
    method, target, body = "", "", b""
    while True:
        try:
            event = server.next_event()
        except h11.RemoteProtocolError:
            return found, True
        if isinstance(event, h11.Request):
            method, target, body = event.method.decode(), event.target.decode("latin-1"), b""
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            found.append((method, target, body))
            if server.their_state is h11.MUST_CLOSE:
                return found, False
            server.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
            server.send(h11.EndOfMessage())
            if server.our_state is not h11.DONE or server.their_state is not h11.DONE:
                return found, False
            server.start_next_cycle()
        else:
            return found, False


# Streams that are right, cut anywhere

tokens = st.text("abcXYZ019-_", min_size=1, max_size=8)
values = st.text('abc XYZ/;=,\t"é', max_size=12).map(lambda text: text.strip(" \t"))
bodies = st.binary(max_size=40)


@st.composite
def requests(draw) -> tuple[bytes, tuple[str, str, bytes]]:
    """Return one right request as bytes, and what it says."""
    method = draw(st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"]))
    target = "/" + draw(st.text("ab/%2F?=&.", max_size=10))
    lines = [f"{draw(st.sampled_from(['Host', 'host', 'HOST']))}:{draw(st.sampled_from(['', ' ', '  ']))}a.b:80"]
    lines += [f"x-{name}: {value}" for name, value in draw(st.lists(st.tuples(tokens, values), max_size=3))]
    body = b""
    framing = draw(st.sampled_from(["none", "length", "chunked"]))
    if framing == "length":
        body = draw(bodies)
        lines.append(f"Content-Length: {'0' * draw(st.integers(0, 2))}{len(body)}")
    if framing == "chunked":
        lines.append("Transfer-Encoding: " + draw(st.sampled_from(["chunked", "Chunked"])))
    lines = draw(st.permutations(lines))
    sent = f"{method} {target} HTTP/1.1\r\n".encode("latin-1") + b"".join(
        line.encode("latin-1") + b"\r\n" for line in lines
    )
    sent += b"\r\n"
    if framing == "chunked":
        for part in draw(st.lists(st.binary(min_size=1, max_size=20), max_size=3)):
            extension = draw(st.sampled_from([b"", b";a", b";a=b"]))
            sent += f"{len(part):{draw(st.sampled_from(['x', 'X', '03x']))}}".encode() + extension
            sent += b"\r\n" + part + b"\r\n"
            body += part
        sent += b"0\r\n" + draw(st.sampled_from([b"", b"trailer: 1\r\n"])) + b"\r\n"
    else:
        sent += body
    return sent, (method, target, body)


@settings(max_examples=100, deadline=None)
@given(st.lists(requests(), min_size=1, max_size=4), st.lists(st.integers(1, 400), max_size=6))
def test_right_requests_are_understood_wherever_the_stream_is_cut(made, cuts):
    stream = b"".join(sent for sent, _ in made)
    client = Client().send(stream, *cuts)
    assert client.echo.asked == [said for _, said in made]
    assert client.statuses() == [200] * len(made)
    assert not client.transport.ended
    assert read_with_h11(stream) == (client.echo.asked, False)


@settings(max_examples=20, deadline=None)
@given(requests())
def test_a_stream_may_be_cut_at_every_place(made):
    sent, said = made
    for cut in range(1, len(sent)):
        assert Client().send(sent + sent, cut, cut + len(sent)).echo.asked == [said, said]


@settings(max_examples=20, deadline=None)
@given(requests())
def test_a_head_that_is_known_means_what_it_meant(made):
    sent, said = made
    client = Client()
    for _ in range(3):
        client.send(sent)
    assert client.echo.asked == [said] * 3
    assert client.statuses() == [200] * 3


# Streams that are wrong somewhere


@settings(max_examples=150, deadline=None)
@given(
    st.lists(requests(), min_size=1, max_size=3),
    st.lists(
        st.tuples(
            st.floats(0, 1, exclude_max=True),
            st.sampled_from(
                [b"", b"\r", b"\n", b"\r\n", b" ", b"\t", b"\0", b":", b",", b"0", b"f", b";", b"\xff", b"-"]
            ),
            st.booleans(),
        ),
        min_size=1,
        max_size=3,
    ),
    st.integers(1, 200),
)
def test_what_is_understood_of_a_damaged_stream_is_what_h11_understands(made, damages, cut):
    """Strictness may differ, meaning may not: a front end and this server must never see different requests."""
    stream = b"".join(sent for sent, _ in made)
    for share, replacement, inserts in damages:
        place = int(share * len(stream))
        stream = stream[:place] + replacement + stream[place + (not inserts) :]
    whole, pieces = Client().send(stream), Client().send(stream, cut)
    assert whole.echo.asked == pieces.echo.asked
    theirs, objects = read_with_h11(stream)
    for mine, his in zip(whole.echo.asked, theirs, strict=False):
        assert mine == his
    # h11 refuses a lone carriage return before a request, llhttp skips it.
    assert len(whole.echo.asked) <= len(theirs) or objects
    assert all(status == 200 or 400 <= status < 600 for status in whole.statuses())
    assert 500 not in whole.statuses()


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


@pytest.mark.parametrize("name", SMUGGLED)
def test_a_request_of_two_meanings_is_refused_and_the_connection_closed(name):
    stream = (
        b"POST /first HTTP/1.1\r\nHost: a\r\n"
        + SMUGGLED[name]
        + b"\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
    )
    for cuts in ((), range(len(stream))):
        client = Client().send(stream, *cuts)
        assert client.echo.asked == []
        assert [400 <= status <= 501 for status in client.statuses()] == [True]
        assert client.transport.ended in ("closed", "lingering")


@pytest.mark.parametrize(
    ("chunk", "reason"),
    [
        (b"2\r\nabX\r\n0\r\n\r\n", "no line end behind a chunk"),
        (b"2\nab\r\n0\r\n\r\n", "a line feed alone"),
        (b"+2\r\nab\r\n0\r\n\r\n", "a sign"),
        (b"0x2\r\nab\r\n0\r\n\r\n", "hex by name"),
        (b"g\r\nab\r\n0\r\n\r\n", "no number"),
        (b"11111111111111111\r\nab", "65 bits"),
        (b" 2\r\nab\r\n0\r\n\r\n", "a blank first"),
        (b"\r\nab\r\n0\r\n\r\n", "nothing"),
    ],
)
def test_a_malformed_chunk_is_refused(chunk, reason):
    client = Client().send(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk + GET)
    assert client.echo.asked == []
    assert client.statuses() == [400], reason
    assert client.transport.ended


# What RFC 9110 and 9112 demand beside framing


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # no Host: 9112, 3.2
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
        (b"GET /\r\n\r\n", 505),  # HTTP/0.9
        (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
        (b"GET / HTTP/1.2\r\nHost: a\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n", 501),
        (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),  # 9112, 6.1
        (b"POST / HTTP/1.1\r\nHost: a\r\nExpect: miracles\r\nContent-Length: 0\r\n\r\n", 417),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # TLS
        (b"G\xe9T / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 70_000 + b"\r\n\r\n", 431),
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 431),
    ],
)
def test_what_is_not_understood_is_one_json_error_and_the_end(head, status):
    client = Client().send(head, 5, 40, 40_000, 66_000)
    assert client.echo.asked == []
    ((got, body),) = client.replies()
    assert got == status
    assert json.loads(body)["error"]
    assert client.transport.ended


@pytest.mark.parametrize(
    ("head", "word"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", None),
        (b"GET / HTTP/1.1\r\nHost: a\r\nConnection: keep-alive\r\n\r\n", None),
        (b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Close\r\n\r\n", "close"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nConnection: x, close\r\n\r\n", "close"),
        (b"GET / HTTP/1.0\r\n\r\n", "close"),
        (b"GET / HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n", "keep-alive"),
    ],
)
def test_a_connection_is_kept_as_the_client_asks(head, word):
    client = Client().send(head)
    sent = re.search(rb"\r\nconnection: (\S+)\r\n", client.transport.written)
    assert (sent and sent[1].decode()) == word
    assert bool(client.transport.ended) == (word == "close")
    client.send(head)
    assert len(client.echo.asked) == (1 if word == "close" else 2)


def test_a_reply_has_a_date_and_its_length_and_head_has_no_body():
    client = Client().send(b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n" + GET)
    heads = re.findall(
        rb"HTTP/1.1 200 OK\r\ndate: \w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT\r\n", client.transport.written
    )
    assert len(heads) == 2
    lengths = re.findall(rb"content-length: (\d+)", client.transport.written)
    assert int(lengths[0]) == len('["HEAD", "/", ""]')  # what GET would send: 9110, 9.3.2
    assert [len(body) for _, body in client.replies()] == [0, int(lengths[1])]


def test_replies_leave_in_the_order_of_their_requests():
    client = Client()
    for number in range(4):
        path = f"/{'later' if number % 2 == 0 else 'now'}{number}"
        client.send(f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx".encode())
    assert client.transport.written == b""
    for request, reply in reversed(client.echo.kept):
        request.answer(reply)
    assert [json.loads(body)[1] for _, body in client.replies()] == ["/later0", "/now1", "/later2", "/now3"]


@pytest.mark.parametrize("expects", [b"100-continue", b"100-Continue"])
def test_a_client_that_waits_for_it_is_told_to_go_on(expects):
    head = b"POST / HTTP/1.1\r\nHost: a\r\nExpect: " + expects + b"\r\nContent-Length: 2\r\n\r\n"
    client = Client().send(head)
    assert client.transport.written == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.send(b"ab")
    assert client.echo.asked == [("POST", "/", b"ab")]
    assert client.statuses() == [100, 200]


def test_it_is_told_after_the_replies_that_are_due():
    client = Client().send(GET.replace(b"/ ", b"/later "))
    client.send(b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
    assert client.transport.written == b""
    request, reply = client.echo.kept[0]
    request.answer(reply)
    assert client.statuses() == [200, 100]


@pytest.mark.parametrize("path", ["/none", "/"])
def test_a_client_that_waits_is_refused_before_it_sends(path):
    """RFC 9110, 10.1.1; and closed, because it may send the body or not."""
    length = 2 if path == "/none" else 2_000_000
    client = Client().send(
        f"POST {path} HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: {length}\r\n\r\n".encode()
    )
    assert client.statuses() == [404 if path == "/none" else 413]
    assert client.transport.ended == "lingering"


def test_an_expectation_of_http_1_0_is_ignored():
    client = Client().send(b"POST / HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\nab")
    assert client.statuses() == [200]


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket", b"TLS/1.0"])
@pytest.mark.parametrize("framing", ["length", "chunked", "none"])
@pytest.mark.parametrize("cut", [0, 40, 107, 125])
def test_an_upgrade_is_ignored_and_the_body_is_not(protocol, framing, cut):
    """As Java's HttpClient and `curl --http2` ask on every first request (RFC 9110, 7.8)."""
    head = b"POST /up HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: " + protocol
    head += b"\r\nHTTP2-Settings: AAMAAABk\r\n"
    body = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n" if framing != "none" else b""
    if framing == "length":
        head += b"Content-Length: %d\r\n\r\n" % len(body)
    elif framing == "chunked":
        head, body_sent = head + b"Transfer-Encoding: chunked\r\n\r\n", b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    else:
        head += b"\r\n"
    stream = head + (body_sent if framing == "chunked" else body)
    client = Client().send(stream + GET + stream + GET, cut, len(head), len(stream) + 10)
    assert client.echo.asked == [("POST", "/up", body), ("GET", "/", b"")] * 2
    assert client.statuses() == [200] * 4


def test_a_refused_body_is_read_to_its_end_and_the_connection_stays_in_step():
    client = Client(max_body_bytes=10)
    too_long = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 30\r\n\r\n" + b"GET /smuggled HTTP/1.1\r\n\r\n    "
    chunked = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1e\r\n" + b"x" * 30 + b"\r\n0\r\n\r\n"
    client.send(too_long + GET + chunked + GET, 60, 70, 200)
    assert client.statuses() == [413, 200, 413, 200]
    assert [asked[1] for asked in client.echo.asked] == ["/", "/"]


def test_an_error_of_the_servers_own_is_json_without_its_cause(capsys):
    client = Client().send(b"GET /raise HTTP/1.1\r\nHost: a\r\n\r\n" + GET)
    (status, body), (after, _) = client.replies()
    assert (status, after) == (500, 200)
    assert b"secret" not in body
    assert "ValueError: a secret" in capsys.readouterr().err


# Waits, each bounded; the clock is this test's


@pytest.mark.parametrize(
    ("sent", "wait_s", "status"),
    [
        (b"", 10.2, None),  # silence from the start: closed
        (GET, 74, "open"),
        (GET, 75.2, None),
        (b"G", 10.2, 408),
        (GET + b"GET / HTT", 10.2, 408),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\n", 10.2, 408),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\nabc", 10.2, 408),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n", 10.2, 408),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\nabc", 9.8, "open"),
        (b"GET /later HTTP/1.1\r\nHost: a\r\n\r\n", 1000, "open"),  # the server's own time is not the client's fault
    ],
)
def test_every_wait_for_a_client_has_an_end(sent, wait_s, status):
    client = Client().send(sent)
    before = len(client.replies())
    client.wait(wait_s)
    if status == "open":
        assert not client.transport.ended
    else:
        assert client.transport.ended
        assert client.statuses()[before:] == ([status] if status else [])


def test_a_client_that_trickles_gains_no_time():
    client = Client()
    for byte in b"POST / HTTP/1.1\r\nHost: a":
        client.send(bytes([byte]))
        client.wait(0.5)
    assert client.statuses() == [408]


def test_a_client_that_does_not_read_is_not_read_and_is_dropped_in_the_end():
    client = Client().send(GET)
    client.transport.unread_bytes = 100_000
    client.connection.pause_writing()
    assert client.transport.is_paused
    client.wait(29)
    assert not client.transport.ended
    client.wait(2)
    assert client.transport.ended == "aborted"


def test_a_client_that_reads_again_is_read_again():
    client = Client().send(GET)
    client.connection.pause_writing()
    client.connection.resume_writing()
    assert not client.transport.is_paused


def test_more_requests_than_can_wait_are_not_read_until_some_are_answered():
    client = Client().send(GET.replace(b"/ ", b"/later ") * 100)
    assert client.transport.is_paused
    for request, reply in client.echo.kept:
        request.answer(reply)
    assert not client.transport.is_paused
    assert client.statuses() == [200] * 100


def test_a_connection_that_is_closed_within_a_request_lingers_and_then_goes():
    client = Client().send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n")
    assert client.transport.ended == "lingering"
    client.wait(2.2)
    assert client.transport.ended == "aborted"


@pytest.mark.parametrize("kind", ["head", "chunk extension", "trailer"])
def test_what_has_no_end_is_cut_off(kind):
    client = Client()
    if kind != "head":
        client.send(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2")
        client.send(b";a=" if kind == "chunk extension" else b"\r\nab\r\n0\r\nx: ")
    else:
        client.send(b"GET / HTTP/1.1\r\nx: ")
    for _ in range(10):
        client.send(b"x" * 10_000)
    assert client.statuses() == [431]


def test_beyond_the_most_connections_there_is_503_and_the_end():
    client = Client(max_connections=1)
    other = Transport()
    http_connection.Connection(client.server).connection_made(other)
    assert other.written.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 1\r\n" in other.written
    assert other.ended == "lingering"
    assert client.send(GET).statuses() == [200]


def test_heads_that_never_come_again_are_not_kept_without_bound():
    client = Client()
    for number in range(3000):
        client.send(f"GET /{number} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
    assert len(client.server.known_heads) <= http_server.MAX_KNOWN_HEADS
    assert len(client.echo.asked) == 3000


def test_an_application_whose_routes_change_is_asked_again():
    client = Client().send(GET).send(GET)
    client.echo.find = lambda head: SimpleNamespace(handle=lambda request: request.answer(b"new"))
    client.echo.routes = object()
    client.send(GET)
    assert client.replies()[-1] == (200, b"new")


@example(b"")
@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_no_bytes_whatever_break_it(junk):
    client = Client().send(junk, 3, 50).send(GET)
    assert 500 not in client.statuses()
