"""The gRPC client speaks HTTP/2 as RFC 9113 says, to peers whose every frame a test writes and reads."""

import json
import os
import select
import socket
import struct
import threading
from collections import Counter

import hpack
import numpy as np
import pytest

from client.grpc_connection import (
    ACK,
    CANCEL,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    FRAME_HEAD,
    GOAWAY,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    MAX_FRAME_SIZE,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTING,
    SETTINGS,
    WINDOW_UPDATE,
    GrpcConnection,
    encode_frame,
)
from client.load_generator import LoadGenerator, make_exchanges
from endpoints.base import Endpoint, Request
from helpers import DEADLINE_S

REPLY_HEADERS = [(":status", "200"), ("content-type", "application/grpc")]


def encode(headers: list, huffman: bool = False) -> bytes:
    """A block of reply headers by the hpack package, remembering nothing."""
    encoder = hpack.Encoder()
    encoder.header_table_size = 0
    return encoder.encode(headers, huffman=huffman)


def reply(stream: int, message: bytes, trailers=(("grpc-status", "0"),)) -> bytes:
    """The usual reply: headers, one DATA frame, trailers."""
    return (
        encode_frame(HEADERS, END_HEADERS, stream, encode(REPLY_HEADERS))
        + encode_frame(DATA, 0, stream, struct.pack(">BI", 0, len(message)) + message)
        + encode_frame(HEADERS, END_HEADERS | END_STREAM, stream, encode(list(trailers)))
    )


class Peer:
    """The server's end of one connection: the test says what it sends, and sees what it received as frames."""

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.connection = GrpcConnection(self.listener.getsockname()[1])
        self.connection.open()
        self.socket, _ = self.listener.accept()
        self.socket.settimeout(DEADLINE_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        assert self.read(len(PREFACE)) == PREFACE
        self.greeting = [self.frame(), self.frame()]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for end in (self.connection, self.socket, self.listener):
            end.close()

    def read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self.socket.recv(count - len(data))
            assert part, "the client closed the connection"
            data += part
        return data

    def frame(self) -> tuple[int, int, int, bytes]:
        """The next frame from the client: kind, flags, stream, payload."""
        first, flags, stream = FRAME_HEAD.unpack(self.read(FRAME_HEAD.size))
        return first & 0xFF, flags, stream, self.read(first >> 8)

    def send_nothing_more_came(self) -> None:
        """Assert that the client has sent nothing that was not read, by a PING that it must answer next."""
        self.tell(encode_frame(PING, 0, 0, b"anything"))
        assert self.frame() == (PING, ACK, 0, b"anything")

    def ask(self, message: bytes = b"question") -> int:
        """Let the client call; return the stream that it called on."""
        self.connection.send(0, GrpcConnection.encode(self.connection.port, Request("/a/B", message)))
        return self.connection._stream

    def tell(self, data: bytes) -> str | None:
        """Send `data` to the client and let it take it in; return what it finds wrong."""
        self.socket.sendall(data)
        return self.receive()

    def receive(self) -> str | None:
        assert select.select([self.connection.socket], [], [], DEADLINE_S)[0], "nothing reached the client"
        return self.connection.receive()


@pytest.fixture
def peer():
    with Peer() as value:
        yield value


# The protocol, frame by frame


def test_the_client_turns_remembered_headers_off_and_allows_large_replies(peer):
    (kind, flags, stream, payload), (update, _, update_stream, _) = peer.greeting
    settings = dict(SETTING.iter_unpack(payload))
    assert (kind, flags, stream) == (SETTINGS, 0, 0)
    assert settings == {1: 0, 2: 0, 4: 2**31 - 1}  # HEADER_TABLE_SIZE, ENABLE_PUSH, INITIAL_WINDOW_SIZE
    assert (update, update_stream) == (WINDOW_UPDATE, 0)


def test_a_request_is_headers_and_a_message_that_any_hpack_decoder_reads_again_and_again(peer):
    decoder = hpack.Decoder()
    for stream in (1, 3, 5):
        assert peer.ask(b"question") == stream
        kind, flags, number, block = peer.frame()
        assert (kind, flags, number) == (HEADERS, END_HEADERS, stream)
        assert decoder.decode(block) == [
            (":method", "POST"), (":scheme", "http"), (":path", "/a/B"),
            (":authority", f"127.0.0.1:{peer.connection.port}"),
            ("content-type", "application/grpc"), ("te", "trailers"),
        ]  # fmt: skip
        assert not decoder.header_table.dynamic_entries, "the server has to remember nothing"
        assert peer.frame() == (DATA, END_STREAM, stream, b"\0\0\0\0\x08question")
        assert peer.tell(reply(stream, b"answer")) is None
        assert (peer.connection.complete, peer.connection.status, peer.connection.body) == (True, 200, b"answer")


def test_the_length_of_a_request_is_its_bytes_on_the_wire(peer):
    for size in (0, 10, 40_000):
        request = GrpcConnection.encode(peer.connection.port, Request("/a/B", b"x" * size))
        peer.connection.send(0, request)
        seen = -1
        on_the_wire = 0
        while seen != END_STREAM:
            kind, flags, _, payload = peer.frame()
            on_the_wire += FRAME_HEAD.size + len(payload)
            seen = flags if kind == DATA else -1
        assert on_the_wire == len(request)
        peer.tell(reply(peer.connection._stream, b""))


def long_reply(stream: int) -> bytes:
    """A reply with everything that may lie in between: padding, a priority, a cut block, pings, unknown frames."""
    block = encode([*REPLY_HEADERS, ("date", "Mon, 01 Jan 2026 00:00:00 GMT"), ("x-proxy", "é")], huffman=True)
    message = b"\0\0\0\0\x06answer"
    return b"".join(
        [
            encode_frame(SETTINGS, 0, 0, SETTING.pack(MAX_FRAME_SIZE, 32_768)),
            encode_frame(SETTINGS, ACK, 0),
            encode_frame(HEADERS, PADDED | PRIORITY, stream, b"\x03" + b"\x80\0\0\x01\xff" + block[:7] + b"\0\0\0"),
            encode_frame(CONTINUATION, 0, stream, block[7:9]),
            encode_frame(CONTINUATION, END_HEADERS, stream, block[9:]),
            encode_frame(PING, 0, 0, b"12345678"),
            encode_frame(PING, ACK, 0, b"87654321"),
            encode_frame(DATA, PADDED, stream, b"\x02" + message[:8] + b"\0\0"),
            encode_frame(DATA, 0, stream),
            encode_frame(0xEE, 0xFF, stream, b"what is not known is ignored"),
            encode_frame(DATA, PADDED, stream, b"\0" + message[8:]),
            encode_frame(WINDOW_UPDATE, 0, stream, b"\0\0\0\x01"),
            encode_frame(HEADERS, END_HEADERS | END_STREAM, stream, encode([("grpc-status", "0")])),
        ]
    )


def test_a_reply_is_read_wherever_it_is_split(peer):
    for split in range(1, len(long_reply(1))):
        stream = peer.ask()
        data = long_reply(stream)
        assert peer.tell(data[:split]) is None
        assert not peer.connection.complete
        assert peer.tell(data[split:]) is None
        assert (peer.connection.complete, peer.connection.body) == (True, b"answer"), f"split at {split}"


def test_a_reply_is_read_byte_by_byte(peer):
    for byte in long_reply(peer.ask()):
        assert not peer.connection.complete
        assert peer.tell(bytes([byte])) is None
    assert (peer.connection.status, peer.connection.body) == (200, b"answer")


def test_settings_and_pings_are_acknowledged_once_each(peer):
    peer.tell(long_reply(peer.ask()))
    peer.frame(), peer.frame()
    assert peer.frame() == (SETTINGS, ACK, 0, b"")
    assert peer.frame() == (PING, ACK, 0, b"12345678")
    peer.send_nothing_more_came()


@pytest.mark.parametrize(
    ("trailers", "failure", "message"),
    [
        ([("grpc-status", "3"), ("grpc-message", "caf%C3%A9 %25")], "grpc-status 3", "café %".encode()),
        ([("grpc-status", "14")], "grpc-status 14", b""),
        ([("x-other", "0")], "no grpc-status", b""),
    ],
)
def test_an_error_in_the_trailers_is_a_failure_by_its_number_and_the_connection_stays(peer, trailers, failure, message):
    only_trailers = encode([*REPLY_HEADERS, *trailers])
    for after_data in (True, False):
        stream = peer.ask()
        data = encode_frame(HEADERS, END_HEADERS | END_STREAM, stream, only_trailers)
        assert peer.tell(reply(stream, b"half an answer", trailers) if after_data else data) is None
        connection = peer.connection
        assert (connection.complete, connection.status, connection.keep_alive) == (True, 0, True)
        assert (connection.failure, connection.failure_message) == (failure, message)
    peer.tell(reply(peer.ask(), b"answer"))
    assert (peer.connection.status, peer.connection.failure) == (200, "")


def test_a_reset_stream_is_a_failure_and_its_late_frames_are_ignored(peer):
    stream = peer.ask()
    assert peer.tell(encode_frame(RST_STREAM, 0, stream, (7).to_bytes(4, "big"))) is None
    assert (peer.connection.complete, peer.connection.failure, peer.connection.keep_alive) == (
        True,
        "RST_STREAM 7",
        True,
    )
    second = peer.ask()
    assert peer.tell(reply(stream, b"late") + reply(second, b"answer")) is None
    assert (peer.connection.status, peer.connection.body) == (200, b"answer")


def test_frames_after_the_reply_do_not_disturb_the_next_call(peer):
    stream = peer.ask()
    peer.tell(reply(stream, b"answer") + encode_frame(RST_STREAM, 0, stream, bytes(4)))
    assert (peer.connection.status, peer.connection.failure) == (200, "")
    peer.tell(reply(peer.ask(), b"another"))
    assert (peer.connection.status, peer.connection.body) == (200, b"another")


@pytest.mark.parametrize(
    ("frames", "failure"),
    [
        ([(DATA, END_STREAM, b"\0\0\0\0\x06answer")], "no grpc-status"),
        ([(DATA, 0, b"\x01\0\0\0\x06answer"), "trailers"], "not one plain message"),
        ([(DATA, 0, b"\0\0\0\0\x07answer"), "trailers"], "not one plain message"),
        ([(DATA, 0, b"\0\0\0\0\x01a\0\0\0\0\x01b"), "trailers"], "not one plain message"),
        (["trailers"], "not one plain message"),
    ],
)
def test_a_reply_that_is_not_one_message_and_a_status_is_a_failure(peer, frames, failure):
    stream = peer.ask()
    data = encode_frame(HEADERS, END_HEADERS, stream, encode(REPLY_HEADERS))
    for frame in frames:
        if frame == "trailers":
            data += encode_frame(HEADERS, END_HEADERS | END_STREAM, stream, encode([("grpc-status", "0")]))
        else:
            data += encode_frame(frame[0], frame[1], stream, frame[2])
    assert peer.tell(data) is None
    assert (peer.connection.complete, peer.connection.status, peer.connection.failure) == (True, 0, failure)


def test_a_proxys_http_error_is_a_failure_by_its_status(peer):
    block = encode([(":status", "503"), ("content-type", "text/html")])
    peer.tell(encode_frame(HEADERS, END_HEADERS, peer.ask(), block))
    assert (peer.connection.complete, peer.connection.failure) == (True, "HTTP status 503")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "not HTTP/2"),
        (encode_frame(DATA, PADDED, 1, b"\x05abc"), "not HTTP/2"),
        (encode_frame(DATA, PADDED, 1), "not HTTP/2"),
        (encode_frame(CONTINUATION, END_HEADERS, 1), "not HTTP/2"),
        (encode_frame(HEADERS, 0, 1) + encode_frame(DATA, 0, 1), "not HTTP/2"),
        (encode_frame(SETTINGS, 0, 0, b"12345"), "not HTTP/2"),
        (encode_frame(GOAWAY, 0, 0, b"1234"), "not HTTP/2"),
        (encode_frame(PUSH_PROMISE, END_HEADERS, 1, bytes(4)), "PUSH_PROMISE"),
        (encode_frame(HEADERS, END_HEADERS, 1, b"\xff\xff\xff\xff\xff"), "not HPACK"),
        (encode_frame(HEADERS, END_HEADERS, 1, b"\xbe"), "not HPACK"),  # the first remembered header: none may be
        (encode_frame(HEADERS, END_HEADERS, 1, b"\x3f\xe1\x1f\x88"), "not HPACK"),  # a table of 4,096 bytes
    ],
)
def test_what_breaks_the_protocol_gives_the_connection_up_with_a_reason(peer, data, reason):
    assert peer.ask() == 1
    assert peer.tell(data) == reason


def test_a_closed_connection_is_one_whether_or_not_part_of_a_reply_has_come(peer):
    assert peer.tell(reply(peer.ask(), b"answer")[:-1]) is None
    peer.socket.close()
    assert peer.receive() in ("connection closed", "ConnectionResetError")


def test_a_goaway_that_covers_the_call_lets_it_end_and_then_asks_for_a_new_connection(peer):
    stream = peer.ask()
    goaway = struct.pack(">II", stream, 0)
    assert peer.tell(encode_frame(GOAWAY, 0, 0, goaway) + reply(stream, b"answer")) is None
    connection = peer.connection
    assert (connection.status, connection.body) == (200, b"answer")
    assert (connection.keep_alive, connection.closing_reason) == (False, "GOAWAY 0")
    connection.open()
    assert connection.keep_alive


def test_a_goaway_before_the_call_is_a_failure_of_it(peer):
    stream = peer.ask()
    assert peer.tell(reply(stream, b"answer")) is None
    peer.ask()
    assert peer.tell(encode_frame(GOAWAY, 0, 0, struct.pack(">II", stream, 11))) == "GOAWAY 11"


# Flow control


def read_message(peer: Peer, stream: int, window: int, grants: list[bytes], max_frame: int = 16_384) -> bytes:
    """Read a request's DATA frames, each time the `window` is used up sending the next of `grants`."""
    grants = iter(grants)
    message, allowed = b"", window
    while True:
        while allowed <= 0:
            frame = next(grants)
            peer.tell(frame)
            allowed += int.from_bytes(frame[-4:], "big")
        kind, flags, number, payload = peer.frame()
        assert (kind, number) == (DATA, stream)
        assert 0 < len(payload) <= min(allowed, max_frame)
        message += payload
        allowed -= len(payload)
        if flags & END_STREAM:
            return message
        assert flags == 0


def window_update(stream: int, size: int) -> bytes:
    return encode_frame(WINDOW_UPDATE, 0, stream, size.to_bytes(4, "big"))


def test_a_tiny_window_of_the_stream_is_respected_to_the_byte(peer):
    peer.tell(encode_frame(SETTINGS, 0, 0, SETTING.pack(INITIAL_WINDOW_SIZE, 10)))
    assert peer.frame() == (SETTINGS, ACK, 0, b"")
    message = os.urandom(200)
    stream = peer.ask(message)
    assert peer.frame()[0] == HEADERS
    received = read_message(peer, stream, 10, [window_update(stream, size) for size in (1, 7, 2, 100, 50, 50)])
    assert received == struct.pack(">BI", 0, 200) + message
    peer.tell(reply(stream, b"answer"))
    assert peer.connection.body == b"answer"


def test_a_window_that_shrinks_below_what_was_sent_must_be_paid_back_first(peer):
    stream = peer.ask(bytes(100_000))  # sends the default window of 65,535 bytes
    assert peer.frame()[0] == HEADERS
    sent = 0
    while sent < 65_535:
        sent += len(peer.frame()[3])
    peer.tell(encode_frame(SETTINGS, 0, 0, SETTING.pack(INITIAL_WINDOW_SIZE, 35)) + window_update(0, 1_000_000))
    assert peer.frame() == (SETTINGS, ACK, 0, b"")  # the stream's window is now -65,500
    peer.tell(window_update(stream, 65_500))
    peer.send_nothing_more_came()
    peer.tell(window_update(stream, 3))
    assert peer.frame() == (DATA, 0, stream, bytes(3))


def test_the_window_of_the_connection_counts_over_all_calls(peer):
    message = bytes(30_000)
    for stream in (1, 3):
        assert peer.ask(message) == stream
        assert peer.frame()[0] == HEADERS
        read_message(peer, stream, 65_535, [])
        peer.tell(reply(stream, b""))
    assert peer.ask(message) == 5
    assert peer.frame()[0] == HEADERS
    left = 65_535 - 2 * (30_000 + 5)
    read_message(peer, 5, left, [window_update(0, 10_000)] * 3)


def test_data_frames_are_as_large_as_the_server_takes(peer):
    peer.tell(
        encode_frame(SETTINGS, 0, 0, SETTING.pack(MAX_FRAME_SIZE, 20_000) + SETTING.pack(INITIAL_WINDOW_SIZE, 2**20))
        + window_update(0, 2**20)
    )
    peer.frame()
    peer.ask(bytes(50_000 - 5))
    assert [len(peer.frame()[3]) for _ in range(4)][1:] == [20_000, 20_000, 10_000]


def test_a_reply_before_the_end_of_the_request_cancels_the_rest(peer):
    stream = peer.ask(bytes(100_000))
    peer.tell(encode_frame(HEADERS, END_HEADERS | END_STREAM, stream, encode([*REPLY_HEADERS, ("grpc-status", "8")])))
    assert (peer.connection.complete, peer.connection.failure) == (True, "grpc-status 8")
    kinds = [peer.frame() for _ in range(6)]
    assert [kind for kind, *_ in kinds] == [HEADERS, DATA, DATA, DATA, DATA, RST_STREAM]
    assert kinds[-1] == (RST_STREAM, 0, stream, CANCEL.to_bytes(4, "big"))


# A load on a server that sends GOAWAY


class GoawayServer(threading.Thread):
    """Answers each call with b"{}"; each connection ends with a GOAWAY that covers, or does not cover, its tenth."""

    def __init__(self, covers_last: bool):
        super().__init__(daemon=True)
        self.covers_last = covers_last
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.goaways = 0

    def run(self):
        while True:
            try:
                peer, _ = self.listener.accept()
            except OSError:
                return
            with peer, peer.makefile("rb") as stream:
                self.serve(peer, stream)

    def serve(self, peer, stream):
        stream.read(len(PREFACE))
        calls = 0
        while head := stream.read(FRAME_HEAD.size):
            first, flags, number = FRAME_HEAD.unpack(head)
            stream.read(first >> 8)
            if first & 0xFF != DATA or not flags & END_STREAM:
                continue
            calls += 1
            if calls < 10:
                peer.sendall(reply(number, b"{}"))
                continue
            self.goaways += 1
            goaway = encode_frame(GOAWAY, 0, 0, struct.pack(">II", number if self.covers_last else number - 2, 0))
            peer.sendall(goaway + (reply(number, b"{}") if self.covers_last else b""))
            return


class Braces(Endpoint):
    """Answers everything with {}."""

    name = "braces"
    kind = "local"
    protocol = "gRPC"
    default_ports = {"grpc": 0}
    has_model = False

    def request(self, rows, version):
        return Request("/a/B", b"{}")

    def decode(self, reply):
        return json.loads(reply)


@pytest.mark.parametrize("covers_last", [True, False])
def test_a_goaway_amid_a_run_is_counted_and_the_load_goes_on(covers_last):
    server = GoawayServer(covers_last)
    server.start()
    endpoint = Braces({"grpc": server.listener.getsockname()[1]})
    exchanges = make_exchanges(endpoint, "1", [[1.0] * 5], np.array([[0.5, 0.5]]))
    errors, answered = Counter(), 0
    try:
        with LoadGenerator(endpoint, exchanges, connections=1) as load:
            while server.goaways < 4:
                window = load.run_closed(0.1)
                errors += window.errors
                answered += len(window.latencies_s)
    finally:
        server.listener.close()
    assert errors == {"GOAWAY 0": server.goaways}
    per_connection = 10 if covers_last else 9
    assert 0 <= answered - per_connection * server.goaways <= 9  # on the last, unfinished connection
