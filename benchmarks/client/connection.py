"""One keep-alive connection with at most one unanswered request, as the load generator uses it.

Two protocols are built on it: http_connection.py (HTTP/1.1) and grpc_connection.py (gRPC over HTTP/2).
"""

import errno
import os
import select
import socket
import time
from collections.abc import Callable
from typing import Any

from endpoints.base import LOOPBACK, Request

CONNECT_TIMEOUT_S = 30.0
RECEIVE_BYTES = 1 << 16  # from 128 KiB on, glibc maps and unmaps pages for each buffer: 20 µs and more per reply


def begin_connecting(port: int, address: str = LOOPBACK) -> socket.socket:
    """Return a non-blocking socket that is connecting to the port; OSError if that fails at once."""
    connecting = socket.socket()
    connecting.setblocking(False)
    connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    code = connecting.connect_ex((address, port))
    if code not in (0, errno.EINPROGRESS):
        connecting.close()
        raise OSError(code, os.strerror(code))
    return connecting


class Connection:
    """The state of one connection. A protocol adds `encode`, `send` and `receive`, and `greet` if it speaks first.

    `clock` gives nanoseconds and `connect` begins to connect to a port: arguments, so that a test can own both.
    """

    closing_reason = ""  # the failure to count if not keep_alive; "" if there is none

    def __init__(
        self,
        port: int,
        clock: Callable[[], int] = time.perf_counter_ns,
        connect: Callable[[int], Any] = begin_connecting,
    ) -> None:
        self.port = port
        self.clock = clock
        self.connect = connect
        self.socket: Any = None  # a socket.socket, or what `connect` gives in its place; None while it is closed
        self.descriptor = -1  # of the socket
        self.number = 0  # of the current exchange
        self.sent_ns = 0
        self.complete = False  # the whole reply has come
        self.status = 0  # 200 for a success
        self.body = b""
        self.keep_alive = True
        # Right replies by the number of their exchange, every byte of each. The load generator fills it, and a protocol
        # whose replies to one request are the same bytes compares them with it instead of parsing them.
        self.right_replies: dict[int, bytes] = {}
        self.is_right = False  # the reply is such a one: its status, body and keep_alive are not read again
        self.raw = b""  # a parsed reply's bytes, if they all came in one piece

    @staticmethod
    def encode(port: int, request: Request, host: str = LOOPBACK) -> Any:
        """Encode `request` once for many sends; the result's length is its bytes on the wire."""
        raise NotImplementedError

    @property
    def failure(self) -> str:
        """Why the status is not 200, in a few words to count it under."""
        raise NotImplementedError

    def send(self, number: int, request: Any) -> None:
        """Send exchange `number`'s encoded request; a broken connection shows when the reply is read."""
        raise NotImplementedError

    def receive(self) -> str | None:
        """Read the bytes that have arrived; return the failure, or None."""
        raise NotImplementedError

    def greet(self) -> None:
        """Send the protocol's greeting on a new connection."""

    def begin_opening(self) -> None:
        """Begin to connect again, without waiting; OSError if no server listens. `end_opening` must follow."""
        self.close()
        self.socket = self.connect(self.port)
        self.descriptor = self.socket.fileno()

    def end_opening(self) -> None:
        """Take the connection, whose socket has become writable, into use; OSError if it was refused."""
        code = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self.close()
            raise OSError(code, os.strerror(code))
        self.greet()

    def open(self, poller: Callable[[], Any] = select.poll) -> None:
        """Connect again and wait for it; OSError if no server listens. `poller` is that of LoadGenerator."""
        self.begin_opening()
        polling = poller()
        polling.register(self.socket, select.POLLOUT)
        if not polling.poll(CONNECT_TIMEOUT_S * 1000):
            self.close()
            raise TimeoutError(f"no connection to port {self.port} within {CONNECT_TIMEOUT_S:.0f} s")
        self.end_opening()

    def write(self, data: bytes) -> None:
        """Send all of `data`; `receive` finds a broken connection, or one that the server does not read."""
        try:
            sent = self.socket.send(data)
            if sent < len(data):
                self.socket.settimeout(CONNECT_TIMEOUT_S)
                try:
                    self.socket.sendall(memoryview(data)[sent:])
                finally:
                    self.socket.setblocking(False)
        except OSError:
            return

    def close(self) -> None:
        """Close the socket, if there is one."""
        if self.socket is not None:
            self.socket.close()
            self.socket = None
