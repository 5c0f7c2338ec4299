"""gRPC in the benchmark: the client speaks HTTP/2 as the RFC says, and the rows over gRPC are right and cheap."""

import ast
import json
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time

import grpc
import grpc_connection
import hpack
import numpy as np
import pytest
from bad_requests import GOOD_ROW
from conftest import REPOSITORY_DIR, start
from endpoint import Endpoint, Request, load_endpoints
from free_ports import find_free_ports
from grpc_connection import (
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
    LAST_STREAM,
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
from load_generator import LoadGenerator, constant_arrivals, make_exchanges
from reference import TOLERANCE, load_expected, load_test_rows
from server_process import ServerError, ServerProcess, ask
from verify import max_abs_difference

TESTS_DIR = REPOSITORY_DIR / "tests"
ROWS = load_test_rows()[0]
DEADLINE_S = 10.0
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


class Toy(Endpoint):
    """What a fifth server needs where it speaks gRPC."""

    name = "toy-grpc"
    kind = "local"
    protocol = "gRPC"
    folder = TESTS_DIR
    default_ports = {"grpc": 9101}
    start_timeout_s = 20.0
    manner = "right"

    def command(self):
        return [sys.executable, "toy_grpc_server.py", str(self.ports["grpc"]), self.manner]

    def request(self, rows, version):
        return Request("/toy/Predict", json.dumps({"rows": rows, "version": version}).encode())

    def decode(self, reply):
        return np.array(json.loads(reply)["answers"])


def start_toy(manner: str = "right") -> ServerProcess:
    toy = Toy(find_free_ports(["grpc"]))
    toy.manner = manner
    return ServerProcess(toy)


@pytest.fixture(scope="module")
def toy():
    with start_toy() as server:
        yield server.endpoint


@pytest.fixture(scope="module")
def null_grpc():
    with start("null-grpc") as server:
        yield server.endpoint


@pytest.fixture(params=["tfserving", "torchserve"])
def real(request):
    """The gRPC endpoint of a real server that runs already; its REST endpoint uses the same process."""
    server = request.getfixturevalue(f"{request.param}_server")
    return load_endpoints()[f"{request.param}-grpc"](server.endpoint.ports)


def load(endpoint: Endpoint, connections: int = 1, batch: int = 1, rows: list = ROWS, expected=None) -> LoadGenerator:
    expected = load_expected("1") if expected is None else expected
    return LoadGenerator(endpoint, make_exchanges(endpoint, "1", rows, expected, batch), connections)


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


def test_a_message_far_beyond_every_window_goes_and_comes_whole(toy):
    message = os.urandom(5_000_000)
    assert grpc_connection.send(toy.port, Request("/toy/Echo", message)) == (200, message)


def test_the_server_is_allowed_more_before_its_window_ends(toy, monkeypatch):
    monkeypatch.setattr(grpc_connection, "CONNECTION_WINDOW_BYTES", 70_000)
    connection = GrpcConnection(toy.port)
    connection.open()
    request = GrpcConnection.encode(toy.port, Request("/toy/Echo", bytes(60_000)))
    for number in range(20):  # 1.2 MB through a window of 70 kB
        connection.send(number, request)
        while not connection.complete:
            assert select.select([connection.socket], [], [], DEADLINE_S)[0], "the server waits for its window"
            assert connection.receive() is None
        assert len(connection.body) == 60_000
    connection.close()


# Load


def test_right_answers_over_grpc_are_timed_closed_and_open(toy):
    with load(toy, connections=4) as generator:
        closed, opened = generator.run_closed(0.3), generator.run_open(constant_arrivals(200, 0.5))
    for window in (closed, opened):
        assert (window.errors, window.wrong) == ({}, 0)
    assert len(closed.latencies_s) > 50
    assert len(opened.latencies_s) == 100
    assert closed.request_bytes == len(generator.exchanges[0].request)


def test_grpc_errors_are_counted_by_their_number_at_their_rate_and_not_timed():
    with start_toy("erring") as server, load(server.endpoint, connections=4) as generator:
        sockets = [connection.socket for connection in generator.connections]
        generator.run_closed(0.3)
        while (window := generator.run_closed(0.5)) and not window.errors:
            pass
        window = generator.run_closed(0.5)
        assert [connection.socket for connection in generator.connections] == sockets  # an error costs no connection
    assert set(window.errors) == {"grpc-status 3"}
    share = window.errors.total() / (window.errors.total() + len(window.latencies_s))
    assert abs(share - 0.25) < 0.03


def test_an_error_is_told_with_the_servers_own_words():
    with start_toy("erring") as server, pytest.raises(ServerError, match="grpc-status 3 .*one of four, 100 % sure"):
        for _ in range(310):
            ask(server.endpoint, ROWS[:1], "1")


def test_wrong_answers_over_grpc_are_counted():
    with start_toy("wrong") as server, load(server.endpoint, connections=4) as generator:
        windows = [generator.run_closed(0.5) for _ in range(4)]
    assert sum(window.wrong for window in windows) > 50
    assert windows[-1].wrong and len(windows[-1].latencies_s) == 0


def test_stream_numbers_that_run_out_cost_a_connection_and_no_error(toy):
    with load(toy) as generator:
        connection = generator.connections[0]
        connection._next_stream = LAST_STREAM - 4
        first = connection.socket
        window = generator.run_closed(0.3)
    assert (window.errors, window.wrong) == ({}, 0)
    assert len(window.latencies_s) > 10
    assert connection.socket is not first
    assert connection._next_stream < 1_000_000


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


@pytest.mark.parametrize("covers_last", [True, False])
def test_a_goaway_amid_a_run_is_counted_and_the_load_goes_on(covers_last):
    server = GoawayServer(covers_last)
    server.start()
    endpoint = Toy({"grpc": server.listener.getsockname()[1]})
    endpoint.has_model = False
    endpoint.decode = json.loads
    try:
        with load(endpoint) as generator:
            window = generator.run_closed(0.5)
    finally:
        server.listener.close()
    assert server.goaways > 3
    assert window.errors == {"GOAWAY 0": server.goaways}
    per_connection = 10 if covers_last else 9
    assert 0 <= len(window.latencies_s) - per_connection * server.goaways <= 9  # on the last, unfinished connection


def test_a_server_that_is_not_there_is_an_oserror_and_one_of_http1_a_reason(null_server):
    with pytest.raises(OSError, match="refused"):
        load(Toy(find_free_ports(["grpc"])))
    with pytest.raises(ConnectionError, match="not HTTP/2|connection closed"):
        grpc_connection.send(null_server.endpoint.port, Request("/a/B", b""))


# The rows


def test_every_server_that_has_grpc_has_a_row_over_each_protocol():
    classes = load_endpoints()
    over_grpc = {name for name, value in classes.items() if value.protocol == "gRPC"}
    assert over_grpc == {
        "null-grpc",
        "tfserving-grpc",
        "tfserving-grpc-tuned",
        "torchserve-grpc",
        "torchserve-grpc-tuned",
    }
    for name in over_grpc - {"null-grpc"}:
        rest = classes[name.replace("-grpc", "")]
        assert (rest.protocol, rest().timed_port, classes[name]().timed_port) == ("REST", "rest", "grpc")
        assert rest.variant == classes[name].variant
        assert rest().command() == classes[name]().command()
        assert rest().port != classes[name]().port


@pytest.mark.parametrize("version", ["1", "2"])
def test_grpc_rows_give_the_references_answers(real, version):
    assert max_abs_difference(real, version) <= TOLERANCE


def test_a_thousand_rows_go_in_one_call(real):
    many = (ROWS * 9)[:1024]
    expected = np.tile(load_expected("1"), (9, 1))[:1024]
    assert np.abs(ask(real, many, "1") - expected).max() <= TOLERANCE
    with load(real, batch=1024, rows=many, expected=expected) as generator:
        window = generator.run_closed(0.3)
    assert (window.errors, window.wrong) == ({}, 0)
    assert len(window.latencies_s) > 0


def test_real_servers_answer_under_load_without_an_error(real):
    with load(real, connections=4) as generator:
        window = generator.run_closed(0.5)
    assert (window.errors, window.wrong) == ({}, 0)
    assert len(window.latencies_s) > 10


def test_the_answer_is_the_one_that_grpcio_gets(real):
    for version in ("1", "2"):
        request = real.request(ROWS[:3], version)
        with grpc.insecure_channel(f"127.0.0.1:{real.port}") as channel:
            theirs = channel.unary_unary(request.path)(request.body, timeout=DEADLINE_S)
        status, ours = grpc_connection.send(real.port, request)
        assert status == 200
        assert np.array_equal(real.decode(ours), real.decode(theirs))


def test_a_version_that_is_not_there_is_a_grpc_error_with_the_number_that_grpcio_gets(real):
    request = real.request(ROWS[:1], "99")
    with grpc.insecure_channel(f"127.0.0.1:{real.port}") as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(request.path)(request.body, timeout=DEADLINE_S)
    status, message = grpc_connection.send(real.port, request)
    assert status == f"grpc-status {caught.value.code().value[0]}"
    assert message.decode() == caught.value.details()
    with load(real) as generator:
        generator.exchanges[0].request = GrpcConnection.encode(real.port, request)
        window = generator.run_closed(0.5)
    assert set(window.errors) == {status}


def test_what_is_no_answer_is_a_value_error(real):
    for reply_bytes in (b"", b"\xff\xff", b"[[0.5, 0.5]]"):
        with pytest.raises(ValueError):
            real.decode(reply_bytes)


def test_torchserves_refusal_with_status_ok_is_no_answer(torchserve_server):
    endpoint = load_endpoints()["torchserve-grpc"](torchserve_server.endpoint.ports)
    status, body = grpc_connection.send(endpoint.port, endpoint.request([GOOD_ROW[:4]], "1"))
    assert status == 200
    with pytest.raises(ValueError, match="not a list of probability pairs: .*4 features"):
        endpoint.decode(body)


# The floor


def test_the_grpc_floor_has_the_stack_and_the_answer_of_the_local_server(null_grpc, tfserving_server):
    tree = ast.parse((REPOSITORY_DIR / "tfserving" / "grpc_api.py").read_text())
    [options] = [
        ast.literal_eval(statement.value)
        for statement in tree.body
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "OPTIONS"
    ]
    import null_grpc_server

    assert options == null_grpc_server.GRPC_OPTIONS
    assert "uvloop.run(" in (REPOSITORY_DIR / "tfserving" / "local_server.py").read_text()
    real = load_endpoints()["tfserving-grpc"](tfserving_server.endpoint.ports)
    status, answer = grpc_connection.send(real.port, real.request(ROWS[:1], "1"))
    status, constant = grpc_connection.send(null_grpc.port, null_grpc.request(ROWS[:1], "1"))
    assert len(constant) == len(answer)
    assert null_grpc.request(ROWS[:1], "1") == real.request(ROWS[:1], "1")
    assert np.array_equal(ask(null_grpc, ROWS[:1], "1"), ask(null_grpc, ROWS, "2"))


def test_the_grpc_floor_takes_a_large_message(null_grpc):
    status, _ = grpc_connection.send(null_grpc.port, Request("/any/Method", bytes(8_000_000)))
    assert status == 200


def test_a_taken_port_of_the_grpc_floor_is_one_line(null_grpc):
    result = subprocess.run(
        [sys.executable, "null_grpc_server.py", "--port", str(null_grpc.port)],
        cwd=REPOSITORY_DIR / "benchmarks", capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert "is in use" in result.stderr


def time_grpcio(endpoint: Endpoint, count: int) -> tuple[float, float]:
    """Return p50 in seconds and CPU seconds per call of grpcio's own client on one channel."""
    request = endpoint.request(ROWS[:1], "1")
    with grpc.insecure_channel(f"127.0.0.1:{endpoint.port}") as channel:
        call = channel.unary_unary(request.path)
        call(request.body, timeout=DEADLINE_S)
        cpu_before_s = time.process_time()
        times_s = []
        for _ in range(count):
            before_s = time.perf_counter()
            call(request.body)
            times_s.append(time.perf_counter() - before_s)
        return float(np.median(times_s)), (time.process_time() - cpu_before_s) / count


def test_the_client_is_clearly_cheaper_than_grpcios(null_grpc):
    ours, theirs = [], []
    for _ in range(5):
        with load(null_grpc) as generator:
            generator.run_closed(0.05)
            window = generator.run_closed(0.3)
        ours.append((np.median(window.latencies_s), window.client_cpu_s / len(window.latencies_s)))
        theirs.append(time_grpcio(null_grpc, 500))
    (our_p50_s, our_cpu_s), (their_p50_s, their_cpu_s) = np.min(ours, axis=0), np.min(theirs, axis=0)
    assert our_cpu_s < 0.6 * their_cpu_s
    assert our_p50_s < their_p50_s


def test_benchmark_code_does_not_import_tensorflow_or_grpcio():
    code = (
        "import sys; sys.path.insert(0, 'benchmarks'); import load_generator, server_process\n"
        "from endpoint import load_endpoints\n"
        "for name, value in load_endpoints().items():\n"
        "    if value.protocol == 'gRPC': value().request([[1.0] * 5], '1')\n"
        "print(sorted({'tensorflow', 'grpc'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY_DIR, capture_output=True, text=True)
    assert run.stdout == "[]\n", run.stderr
