"""onnx/http_connection.py against RFC 9110 and 9112: streams cut anywhere, h11's opinion, smuggling, and abuse.

Connections run in this process, on a transport that keeps what is written: thousands of streams take seconds.
"""

import gc
import json
import re
import weakref
from types import SimpleNamespace
from unittest import mock

import h11
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from http_toys import GET, LATER, SMUGGLED, Client, Transport, http_connection, http_server


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


# Faults that were found one by one


@pytest.mark.parametrize("head", [b"POST / HTTP/1.0", b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close"])
@pytest.mark.parametrize("sent", [b"Content-Length: 5\r\n\r\n", b"Content-Length: 5\r\n\r\nab"])
def test_the_body_of_a_last_request_is_not_waited_for_without_end(head, sent):
    client = Client().send(head + b"\r\n" + sent)
    client.wait(10.2)
    assert client.statuses() == [408]
    assert client.transport.ended


def test_a_last_request_whose_body_is_malformed_is_refused():
    client = Client().send(
        b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"
    )
    assert client.statuses() == [400]
    assert client.transport.ended


@pytest.mark.parametrize(
    "last",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET /later HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nUpgrade: h2c\r\nConnection: upgrade\r\nTransfer-Encoding: x\r\n\r\n0\r\n\r\n",
    ],
)
@pytest.mark.parametrize("is_cut", [False, True])
def test_what_follows_the_last_request_is_not_served_while_a_reply_is_due(last, is_cut):
    follows = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
    client = Client()
    client.server.remember(follows, Client().send(follows).server.known_heads[follows])
    client.send(LATER + last + follows, *([len(LATER), len(LATER + last)] if is_cut else []))
    assert "/smuggled" not in [asked[1] for asked in client.echo.asked]
    for request, reply in client.echo.kept:
        request.answer(reply)
    assert len(client.statuses()) == 2
    assert client.statuses()[0] == 200
    assert client.transport.ended


@pytest.mark.parametrize(
    "rest", [b"", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nab", b"GET /half", b"\0"]
)
def test_a_client_that_ends_its_half_gets_what_it_asked_for(rest):
    client = Client().send(LATER + rest)
    assert client.connection.eof_received()
    request, reply = client.echo.kept[0]
    request.answer(reply)
    assert client.statuses() == ([200, 400] if rest == b"\0" else [200])
    assert client.transport.ended == "closed"


def test_a_body_that_is_not_read_because_of_other_requests_is_read_after_them():
    client = Client().send(LATER * 64 + b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nab")
    assert client.transport.is_paused
    client.wait(1000)
    assert not client.transport.ended
    for request, reply in client.echo.kept:
        request.answer(reply)
    assert client.statuses() == [200] * 65
    assert not client.transport.is_paused


@pytest.mark.parametrize("is_late", [False, True])
def test_a_refused_request_whose_body_is_malformed_gets_one_reply(is_late):
    client = Client().send(LATER if is_late else b"")
    client.send(b"POST /none HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
    client.send(b"zz\r\n")
    for request, reply in client.echo.kept:
        request.answer(reply)
    assert client.statuses() == [200, 404][not is_late :]
    assert client.transport.ended == "lingering"


def test_a_refused_body_that_does_not_end_costs_no_other_reply():
    client = Client().send(LATER + b"POST /none HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n")
    client.wait(10.2)
    request, reply = client.echo.kept[0]
    request.answer(reply)
    assert client.statuses() == [200, 404]
    assert client.transport.ended == "lingering"


def test_requests_that_come_one_by_one_are_not_read_without_bound_either():
    client = Client().send(GET.replace(b"/ ", b"/later "))
    for request, reply in client.echo.kept:
        request.answer(reply)
    sent = 0
    while not client.transport.is_paused and sent < 1000:
        client.send(LATER)
        sent += 1
    assert sent <= http_connection.MAX_UNANSWERED + 1


def test_the_time_that_this_server_takes_is_not_its_clients_fault():
    client = Client().send(LATER * 100 + b"GET /half")
    client.wait(1000)
    assert not client.transport.ended
    assert client.statuses() == []


def test_a_client_that_has_to_wait_for_100_continue_is_not_late():
    client = Client().send(LATER + b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
    client.wait(1000)
    assert client.statuses() == []
    request, reply = client.echo.kept[0]
    request.answer(reply)
    assert client.statuses() == [200, 100]
    client.wait(9.8)
    assert not client.transport.ended
    client.wait(0.4)
    assert client.statuses() == [200, 100, 408]


def test_a_client_that_was_not_read_is_read_again_once_it_is_answered():
    """Though some replies are still on their way: they are too few for the event loop to tell."""
    client = Client().send(LATER * 65)
    assert client.transport.is_paused
    client.transport.unread_bytes = 100
    for request, reply in client.echo.kept:
        request.answer(reply)
    assert not client.transport.is_paused


def test_what_does_not_read_its_replies_is_answered_little_more():
    client = Client()

    def write(data, write=client.transport.write):
        write(data)
        client.connection.pause_writing()

    client.transport.write = write
    client.send(GET * 9000)
    assert len(client.echo.asked) == 1
    del client.transport.write
    client.connection.resume_writing()
    assert len(client.echo.asked) == 9000
    assert not client.transport.is_paused


def test_a_client_that_reads_at_once_is_not_answered_twice():
    """The event loop may pause and resume writing within one write."""
    client = Client()

    def write(data, write=client.transport.write):
        client.connection.pause_writing()
        write(data)
        client.connection.resume_writing()

    client.transport.write = write
    client.send(GET * 10)
    assert len(client.echo.asked) == 10
    assert client.statuses() == [200] * 10
    assert not client.transport.is_paused


def test_a_full_connection_that_lingers_is_read_so_that_its_replies_are_not_lost():
    client = Client().send(LATER * 64 + b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n")
    assert client.transport.is_paused
    for request, reply in client.echo.kept:
        request.answer(reply)
    assert client.statuses() == [200] * 64 + [400]
    assert client.transport.ended == "lingering"
    assert not client.transport.is_paused


def test_many_upgrades_at_once_are_ignored_one_by_one():
    client = Client().send(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n" * 3000)
    assert len(client.echo.asked) == 3000


def test_a_head_is_not_remembered_as_that_of_a_request_that_was_read_late():
    client = Client().send(LATER * 65 + GET)
    for request, reply in client.echo.kept:
        request.answer(reply)
    head = b"POST /other HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n"
    client.send(head).send(b"abcde").send(head).send(b"abcde")
    assert client.echo.asked[65:] == [("GET", "/", b""), *[("POST", "/other", b"abcde")] * 2]


def test_a_known_head_is_not_a_way_around_the_limit():
    client = Client(max_body_bytes=10)
    for _ in range(3):
        client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 11\r\n\r\n" + b"x" * 11)
    assert client.statuses() == [413] * 3


def test_an_error_in_the_search_for_a_route_is_500(capsys):
    client = Client()
    client.echo.find = lambda head: 1 / 0
    client.send(GET + GET)
    assert client.statuses() == [500, 500]
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_lost_connection_keeps_nothing():
    client = Client().send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 900000\r\n\r\n" + b"x" * 500_000)
    connection = weakref.ref(client.connection)
    gc.collect()
    gc.disable()  # which may come late: a body may be a megabyte
    try:
        client.connection.connection_lost(None)
        client.connection = None
        assert connection() is None
    finally:
        gc.enable()


def test_a_late_answer_to_a_lost_connection_is_dropped():
    client = Client().send(LATER * 100)
    client.transport.abort()
    client.connection.connection_lost(None)
    for request, reply in client.echo.kept:
        request.answer(reply)
    assert client.transport.written == b""


def test_an_idle_connection_keeps_neither_request_nor_route():
    class Route:
        def handle(self, request):
            request.answer(b"")

    client, routes = Client(), weakref.WeakSet()

    def find(head):
        route = Route()
        routes.add(route)
        return route

    client.echo.find = find
    client.send(GET + GET).send(GET)
    assert client.statuses() == [200] * 3
    assert routes
    client.echo.routes = object()  # as after a reload
    client.server.tick()
    gc.collect()
    assert not routes


steps = st.one_of(
    st.sampled_from(["read", "answer first", "answer last", "answer all", "tick"]),
    st.lists(st.sampled_from(["now", "later", "none", "chunked", "upgrade"]), min_size=1, max_size=20),
)


@mock.patch.object(http_connection, "MAX_UNANSWERED", 4)
@settings(max_examples=40, deadline=None)
@given(st.lists(steps, max_size=12), st.lists(st.integers(1, 3000), max_size=5), st.booleans())
def test_whatever_order_things_come_in_each_request_gets_its_reply_in_its_place(script, cuts, ends):
    """Answers out of order, at once and late; a client that reads now and then; its last bytes; its end."""
    client, wanted = Client(), []
    high_water, waiting = 1000, bytearray()  # what arrived while it was not read
    write = client.transport.write

    def write_and_pause(data):
        write(data)
        client.transport.unread_bytes += len(data)
        if client.transport.unread_bytes > high_water and not client.connection.is_stuck:
            client.connection.pause_writing()

    client.transport.write = write_and_pause

    def read():
        client.transport.unread_bytes = 0
        if client.connection.is_stuck:
            client.connection.resume_writing()

    def deliver():
        while waiting and not client.transport.is_paused and not client.transport.ended:
            count = cuts[len(waiting) % len(cuts)] if cuts else len(waiting)
            client.connection.data_received(bytes(waiting[:count]))
            del waiting[:count]

    def answer(place):
        if client.echo.kept:
            request, reply = client.echo.kept.pop(place)
            request.answer(reply)

    for step in script:
        if isinstance(step, list):
            for kind in step:
                target = f"/{kind}{len(wanted)}"
                wanted.append(target)
                head = f"{'POST' if kind == 'chunked' else 'GET'} {target} HTTP/1.1\r\nHost: a\r\n".encode()
                head += {
                    "chunked": b"Transfer-Encoding: chunked\r\n",
                    "upgrade": b"Connection: upgrade\r\nUpgrade: x\r\n",
                }.get(kind, b"")
                waiting += head + b"\r\n" + (b"3;a\r\nabc\r\n0\r\n\r\n" if kind == "chunked" else b"")
        elif step == "read":
            read()
        elif step == "tick":
            client.wait(1)
        elif step == "answer all":
            while client.echo.kept:
                answer(0)
        else:
            answer(0 if step == "answer first" else -1)
        deliver()
    for _ in range(10 * len(wanted)):
        read()
        deliver()
        answer(-1)
    assert not waiting
    assert not client.transport.is_paused
    said = [
        target if status == 404 else json.loads(body)[1]
        for target, (status, body) in zip(wanted, client.replies(), strict=True)
    ]
    assert said == wanted
    assert [asked[1] for asked in client.echo.asked] == [target for target in wanted if not target.startswith("/none")]
    assert not client.transport.ended
    if ends:
        assert not client.connection.eof_received()
