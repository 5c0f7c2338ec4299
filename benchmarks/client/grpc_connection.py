"""A gRPC client for one call at a time, cheap enough to measure with: HTTP/2 over a plain socket.

`GrpcConnection` is a connection.Connection. grpcio's Python client is the proven one, and the tests compare with it,
but a call through it costs more than a small server does.

HTTP/2 is RFC 9113, header compression (HPACK) RFC 7541; how gRPC uses them is doc/PROTOCOL-HTTP2.md of gRPC.
The table of remembered headers is off in both directions, so a block of headers means the same in every
request and reply: ours is encoded once, and each different one of the server's decoded once.
"""

import functools
import select
import socket
import struct
import time
import urllib.parse
from dataclasses import dataclass

import hpack

from client.connection import RECEIVE_BYTES, Connection, begin_connecting
from endpoints.base import LOOPBACK, Request

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAME_HEAD = struct.Struct(">IBI")  # length (24 bits) and kind (8 bits), flags, stream
SETTING = struct.Struct(">HI")
MESSAGE_HEAD = struct.Struct(">BI")  # gRPC: compressed or not, length

DATA, HEADERS, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 5, 6, 7, 8, 9
END_STREAM = ACK = 0x1
END_HEADERS, PADDED, PRIORITY = 0x4, 0x8, 0x20
HEADER_TABLE_SIZE, ENABLE_PUSH, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE = 1, 2, 4, 5
CANCEL = 8  # error code

DEFAULT_WINDOW_BYTES = 65_535
DEFAULT_FRAME_BYTES = 16_384
STREAM_WINDOW_BYTES = 2**31 - 1  # bytes that the server may send of one reply
CONNECTION_WINDOW_BYTES = 2**30  # bytes that it may send of all replies until we allow more
LAST_STREAM = 2**31 - 1


class ProtocolError(Exception):
    """The server did what HTTP/2 or gRPC does not allow; the message is a reason to count it under."""


@dataclass(frozen=True)
class GrpcRequest:
    """One call, all of it encoded but the number of its stream. Its length is its bytes on the wire."""

    headers: bytes  # HPACK block
    message: bytes  # gRPC's five bytes and the protobuf message

    def __len__(self) -> int:
        data_frames = -(-len(self.message) // DEFAULT_FRAME_BYTES)
        return len(self.headers) + len(self.message) + FRAME_HEAD.size * (1 + data_frames)


@dataclass(frozen=True)
class ReplyHeaders:
    """The relevant fields of a block of headers or trailers; None if absent."""

    http_status: bytes | None
    grpc_status: bytes | None
    grpc_message: bytes


def encode_frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Return one HTTP/2 frame (RFC 9113, section 4.1)."""
    return FRAME_HEAD.pack(len(payload) << 8 | kind, flags, stream) + payload


@functools.lru_cache(maxsize=1024)
def decode_headers(block: bytes) -> ReplyHeaders:
    """Decode a block of reply headers; ProtocolError if it is not HPACK or needs remembered headers."""
    decoder = hpack.Decoder()
    decoder.max_allowed_table_size = decoder.header_table_size = 0
    try:
        headers = dict(decoder.decode(block, raw=True))
    except hpack.HPACKError as error:
        raise ProtocolError("not HPACK") from error
    message = urllib.parse.unquote_to_bytes(headers.get(b"grpc-message", b""))
    return ReplyHeaders(headers.get(b":status"), headers.get(b"grpc-status"), message)


class GrpcConnection(Connection):
    """A Connection over gRPC. A large message waits for the server's flow control."""

    failure = ""  # why the status is not 200: "grpc-status 3"
    failure_message = b""  # the server's explanation

    @staticmethod
    def encode(port: int, request: Request, host: str = LOOPBACK) -> GrpcRequest:
        """Encode `request`, whose path is the method and whose body the protobuf message, once for many sends."""
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", request.path),
            (":authority", f"{host}:{port}"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
            *((name.lower(), value) for name, value in request.headers.items()),
        ]
        # "Never indexed": the server remembers nothing, so the block can be sent again as it is.
        block = hpack.Encoder().encode([hpack.NeverIndexedHeaderTuple(*header) for header in headers])
        if len(block) > DEFAULT_FRAME_BYTES:
            raise ValueError(f"{len(block)} bytes of headers do not fit into one frame")
        return GrpcRequest(block, MESSAGE_HEAD.pack(0, len(request.body)) + request.body)

    def greet(self) -> None:
        """Send the preface and our settings, and forget the last connection."""
        self.keep_alive, self.closing_reason = True, ""
        self._next_stream, self._stream = 1, 0
        self._unparsed = b""  # the beginning of a frame
        self._block: bytes | None = None  # of headers, until its last frame has come
        self._outgoing = b""  # frames to be sent
        self._unsent = memoryview(b"")  # rest of the message that flow control holds back
        self._initial_window = self._connection_window = self._stream_window = DEFAULT_WINDOW_BYTES
        self._max_frame = DEFAULT_FRAME_BYTES
        self._received = 0  # bytes of data since the server was last allowed more
        self._connection_allowance = CONNECTION_WINDOW_BYTES
        settings = {HEADER_TABLE_SIZE: 0, ENABLE_PUSH: 0, INITIAL_WINDOW_SIZE: STREAM_WINDOW_BYTES}
        self.write(
            PREFACE
            + encode_frame(SETTINGS, 0, 0, b"".join(SETTING.pack(*item) for item in settings.items()))
            + self._allow_more(self._connection_allowance - DEFAULT_WINDOW_BYTES)
        )

    def send(self, number: int, request: GrpcRequest) -> None:
        """Send exchange `number`'s request; a broken connection shows when the reply is read."""
        self.number = number
        self.complete = False
        self.body = self._data = b""
        self._block = None
        self._headers: ReplyHeaders | None = None
        self._stream = stream = self._next_stream
        self._next_stream += 2
        self._stream_window = self._initial_window
        self._unsent = memoryview(request.message)
        head = FRAME_HEAD.pack(len(request.headers) << 8 | HEADERS, END_HEADERS, stream)
        frames = b"".join((self._outgoing, head, request.headers, *self._take_data()))
        self._outgoing = b""
        self.sent_ns = self.clock()
        self.write(frames)

    def receive(self) -> str | None:
        """Read the bytes that have arrived; return the failure, or None."""
        try:
            data = self.socket.recv(RECEIVE_BYTES)
        except OSError as error:
            return type(error).__name__
        if not data:
            return "connection closed"
        try:
            self._parse(self._unparsed + data if self._unparsed else data)
        except (ProtocolError, struct.error, IndexError) as error:
            return str(error) if isinstance(error, ProtocolError) else "not HTTP/2"
        if self._unsent:
            self._outgoing += b"".join(self._take_data())
        if self._outgoing:
            outgoing, self._outgoing = self._outgoing, b""
            self.write(outgoing)
        return None

    def _take_data(self) -> list[bytes | memoryview]:
        """Take from `_unsent` the bytes that the server's windows allow now, as the parts of DATA frames."""
        parts: list[bytes | memoryview] = []
        while self._unsent:
            count = min(len(self._unsent), self._max_frame, self._stream_window, self._connection_window)
            if count <= 0:
                break
            part, self._unsent = self._unsent[:count], self._unsent[count:]
            self._stream_window -= count
            self._connection_window -= count
            parts += (FRAME_HEAD.pack(count << 8 | DATA, 0 if self._unsent else END_STREAM, self._stream), part)
        return parts

    def _allow_more(self, size_bytes: int) -> bytes:
        return encode_frame(WINDOW_UPDATE, 0, 0, size_bytes.to_bytes(4, "big"))

    def _parse(self, buffer: bytes) -> None:
        """Take in all whole frames and keep the rest."""
        position, end = 0, len(buffer)
        while end - position >= FRAME_HEAD.size:
            first, flags, stream = FRAME_HEAD.unpack_from(buffer, position)
            if first >> 8 > DEFAULT_FRAME_BYTES:
                raise ProtocolError("not HTTP/2")
            start = position + FRAME_HEAD.size
            stop = start + (first >> 8)
            if stop > end:
                break
            position = stop
            self._take_frame(first & 0xFF, flags, stream & LAST_STREAM, buffer[start:stop])
        self._unparsed = buffer[position:]

    def _take_frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if self._block is not None and (kind != CONTINUATION or stream != self._stream):
            raise ProtocolError("not HTTP/2")  # a block of headers is not to be interrupted
        if kind == DATA:
            self._received += len(payload)  # padding counts
            if self._received > self._connection_allowance // 2:
                self._outgoing += self._allow_more(self._received)
                self._received = 0
        if kind in STREAM_FRAMES:
            if stream == self._stream and not self.complete:  # else it is the rest of a call that is over
                STREAM_FRAMES[kind](self, flags, payload)
        elif kind in CONNECTION_FRAMES:
            CONNECTION_FRAMES[kind](self, flags, stream, payload)

    def _take_data_frame(self, flags: int, payload: bytes) -> None:
        self._data += _strip_padding(payload) if flags & PADDED else payload
        if flags & END_STREAM:
            self._finish()

    def _take_headers_frame(self, flags: int, payload: bytes) -> None:
        if flags & PADDED:
            payload = _strip_padding(payload)
        if flags & PRIORITY:
            payload = payload[5:]
        self._ends_stream = flags & END_STREAM
        self._take_block(flags, payload)

    def _take_continuation_frame(self, flags: int, payload: bytes) -> None:
        if self._block is None:
            raise ProtocolError("not HTTP/2")
        self._take_block(flags, self._block + payload)

    def _take_block(self, flags: int, block: bytes) -> None:
        if not flags & END_HEADERS:
            self._block = block
            return
        self._block = None
        self._headers = headers = decode_headers(block)
        if headers.http_status not in (None, b"200"):
            self._finish(f"HTTP status {headers.http_status.decode('ascii', 'replace')}")
        elif self._ends_stream:
            self._finish()

    def _take_reset_frame(self, flags: int, payload: bytes) -> None:
        self._finish(f"RST_STREAM {int.from_bytes(payload, 'big')}")

    def _take_window_frame(self, flags: int, stream: int, payload: bytes) -> None:
        increment = int.from_bytes(payload, "big") & LAST_STREAM
        if stream == 0:
            self._connection_window += increment
        elif stream == self._stream:
            self._stream_window += increment

    def _take_settings_frame(self, flags: int, stream: int, payload: bytes) -> None:
        if flags & ACK:
            return
        for key, value in SETTING.iter_unpack(payload):
            if key == INITIAL_WINDOW_SIZE:
                self._stream_window += value - self._initial_window  # section 6.9.2: of open streams too
                self._initial_window = value
            elif key == MAX_FRAME_SIZE:
                self._max_frame = value
        self._outgoing += encode_frame(SETTINGS, ACK, 0)

    def _take_ping_frame(self, flags: int, stream: int, payload: bytes) -> None:
        if not flags & ACK:
            self._outgoing += encode_frame(PING, ACK, 0, payload)

    def _take_goaway_frame(self, flags: int, stream: int, payload: bytes) -> None:
        last_stream, code = struct.unpack_from(">II", payload)
        self.keep_alive, self.closing_reason = False, f"GOAWAY {code}"
        if not self.complete and self._stream > last_stream & LAST_STREAM:
            raise ProtocolError(self.closing_reason)  # this call was not looked at

    def _refuse_push_frame(self, flags: int, stream: int, payload: bytes) -> None:
        raise ProtocolError("PUSH_PROMISE")  # our settings forbid it

    def _finish(self, failure: str | None = None) -> None:
        """The call is over: read its outcome."""
        headers = self._headers
        if failure is None:
            if headers is None or headers.grpc_status is None:
                failure = "no grpc-status"
            elif headers.grpc_status != b"0":
                failure = f"grpc-status {headers.grpc_status.decode('ascii', 'replace')}"
            elif len(self._data) < MESSAGE_HEAD.size or MESSAGE_HEAD.unpack_from(self._data) != (
                0,
                len(self._data) - MESSAGE_HEAD.size,
            ):
                failure = "not one plain message"
        self.complete = True
        self.failure = failure or ""
        self.failure_message = headers.grpc_message if headers else b""
        self.status = 0 if failure else 200
        self.body = b"" if failure else self._data[MESSAGE_HEAD.size :]
        if self._unsent:  # it answered before it had all; it must not wait for the rest
            self._outgoing += encode_frame(RST_STREAM, 0, self._stream, CANCEL.to_bytes(4, "big"))
            self._unsent = memoryview(b"")
        if self._next_stream > LAST_STREAM:
            self.keep_alive = False


STREAM_FRAMES = {
    DATA: GrpcConnection._take_data_frame,
    HEADERS: GrpcConnection._take_headers_frame,
    CONTINUATION: GrpcConnection._take_continuation_frame,
    RST_STREAM: GrpcConnection._take_reset_frame,
}
CONNECTION_FRAMES = {
    SETTINGS: GrpcConnection._take_settings_frame,
    PING: GrpcConnection._take_ping_frame,
    WINDOW_UPDATE: GrpcConnection._take_window_frame,
    GOAWAY: GrpcConnection._take_goaway_frame,
    PUSH_PROMISE: GrpcConnection._refuse_push_frame,
}


def _strip_padding(payload: bytes) -> bytes:
    """Return the payload without its padding, whose length is the first byte (RFC 9113, section 6.1)."""
    if payload[0] >= len(payload):
        raise ProtocolError("not HTTP/2")
    return payload[1 : len(payload) - payload[0]]


def send(port: int, request: Request, timeout_s: float = 30.0, host: str = LOOPBACK) -> tuple[int | str, bytes]:
    """Make one call on a new connection; return 200 and the reply, or why it failed and the server's message.

    OSError if no server answers or the connection breaks.
    """
    address = socket.gethostbyname(host)
    connection = GrpcConnection(port, connect=functools.partial(begin_connecting, address=address))
    connection.open()
    try:
        connection.send(0, connection.encode(port, request, host))
        deadline_s = time.monotonic() + timeout_s
        poller = select.poll()
        poller.register(connection.socket, select.POLLIN)
        while not connection.complete:
            if not poller.poll(max(0.0, deadline_s - time.monotonic()) * 1000):
                raise TimeoutError(f"no reply within {timeout_s:.0f} s")
            reason = connection.receive()
            if reason is not None and not connection.complete:
                raise ConnectionError(reason)
        if connection.failure:
            return connection.failure, connection.failure_message
        return 200, connection.body
    finally:
        connection.close()
