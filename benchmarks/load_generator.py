"""The measuring client: many keep-alive connections in one thread, each asking again as soon as it is answered.

This is a closed loop: a connection has one request under way, so a slow server also slows the asking.
It answers "how fast can it go", not "what would users see at a given rate" (that takes an open loop).

Plain sockets, `select.poll` and the HTTP parser of llhttp (httptools): a loop around `requests` costs
eight times what a small server does, and would measure itself.
"""

import array
import gc
import select
import socket
import time
from collections import Counter
from dataclasses import dataclass, field

import httptools
import numpy as np
from endpoint import Endpoint
from reference import TOLERANCE

REPLY_TIMEOUT_S = 30.0
RECEIVE_BYTES = 1 << 18


@dataclass
class Exchange:
    """A request as bytes, and the answer to expect."""

    request: bytes
    expected: np.ndarray  # (n, 2)


@dataclass
class Window:
    """What one stretch of load observed. Failed and wrong answers are counted apart and not among the latencies."""

    connections: int
    elapsed_s: float = 0.0  # first send to last reply
    latencies_s: np.ndarray = field(default_factory=lambda: np.empty(0))  # right answers, send to whole reply
    errors: Counter = field(default_factory=Counter)  # failed requests by reason: "status 503", "connection closed"
    wrong: int = 0  # replies with status 200 that break the parity contract
    client_cpu_s: float = 0.0
    request_bytes: int = 0  # size of one request on the wire, headers included
    reply_bytes: int = 0  # size of the last reply's body

    @property
    def rate(self) -> float:
        """Right answers per second."""
        return len(self.latencies_s) / self.elapsed_s if self.elapsed_s else 0.0


def make_exchanges(
    endpoint: Endpoint, version: str, rows: list, expected: np.ndarray, batch: int = 1
) -> list[Exchange]:
    """Encode `rows` (n, 5) once, `batch` rows a request, with their `expected` answers (n, 2)."""
    exchanges = []
    for first in range(0, len(rows) - batch + 1, batch):
        request = endpoint.request(rows[first : first + batch], version)
        head = (
            f"{request.method} {request.path} HTTP/1.1\r\nHost: 127.0.0.1:{endpoint.ports['rest']}\r\n"
            f"Content-Type: {request.content_type}\r\nContent-Length: {len(request.body)}\r\n\r\n"
        )
        exchanges.append(Exchange(head.encode() + request.body, expected[first : first + batch]))
    return exchanges


class _Connection:
    """One keep-alive connection; httptools calls the on_ methods."""

    def __init__(self, port: int):
        self.port = port
        self.socket: socket.socket | None = None
        self.open()

    def open(self) -> None:
        self.close()
        self.socket = socket.create_connection(("127.0.0.1", self.port), timeout=REPLY_TIMEOUT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.expect_reply()

    def close(self) -> None:
        if self.socket is not None:
            self.socket.close()
            self.socket = None

    def expect_reply(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.body = b""
        self.complete = False

    def on_body(self, part: bytes) -> None:
        self.body += part

    def on_message_complete(self) -> None:
        self.complete = True
        self.keep_alive = self.parser.should_keep_alive()  # only true to the reply while it is being parsed


class ClosedLoop:
    """Asks `exchanges` in turn over `connections` keep-alive connections."""

    def __init__(self, endpoint: Endpoint, exchanges: list[Exchange], connections: int):
        self.endpoint = endpoint
        self.exchanges = exchanges
        self.port = endpoint.ports["rest"]
        self.connections = [_Connection(self.port) for _ in range(connections)]
        self._right_bodies: dict[int, bytes] = {}  # exchange number -> a body that was decoded and found right

    def __enter__(self) -> "ClosedLoop":
        return self

    def __exit__(self, *_) -> None:
        for connection in self.connections:
            connection.close()

    def run(self, duration_s: float) -> Window:
        """Keep asking for `duration_s`, then wait for the replies under way; return what was observed.

        Every reply is checked: its bytes against a reply to the same rows that was found right
        before, and where they differ its numbers against `expected`, after the clock has stopped.
        """
        window = Window(len(self.connections), request_bytes=len(self.exchanges[0].request))
        latencies_ns = array.array("q")
        unchecked: list[tuple[int, int, bytes]] = []  # place in latencies_ns, exchange number, body
        poller = select.poll()
        by_descriptor: dict[int, _Connection] = {}
        clock_ns, count = time.perf_counter_ns, len(self.exchanges)
        turn = 0

        def ask(connection: _Connection) -> None:
            nonlocal turn
            connection.number = turn % count
            turn += 1
            request = self.exchanges[connection.number].request
            connection.sent_ns = clock_ns()
            try:
                sent = connection.socket.send(request)
                if sent < len(request):
                    connection.socket.setblocking(True)
                    connection.socket.sendall(request[sent:])
                    connection.socket.setblocking(False)
            except OSError as error:
                connection.failure = type(error).__name__

        def fail(connection: _Connection, reason: str) -> None:
            """Count the failure and open the connection anew; a server that refuses has its connection retired."""
            window.errors[reason] += 1
            descriptor = connection.socket.fileno()
            poller.unregister(descriptor)
            del by_descriptor[descriptor]
            try:
                connection.open()
            except OSError as error:
                window.errors[f"reconnect: {type(error).__name__}"] += 1
                return
            watch(connection)

        def watch(connection: _Connection) -> None:
            by_descriptor[connection.socket.fileno()] = connection
            poller.register(connection.socket, select.POLLIN)

        gc_was_enabled = gc.isenabled()
        gc.disable()
        cpu_before_s = time.process_time()
        start_ns = clock_ns()
        stop_ns = start_ns + int(duration_s * 1e9)
        last_ns = start_ns
        waiting: set[_Connection] = set()
        for connection in self.connections:
            if connection.socket is None:
                connection.open()
            connection.failure = None
            watch(connection)
            ask(connection)
            waiting.add(connection)
        try:
            while waiting:
                events = poller.poll(REPLY_TIMEOUT_S * 1000)
                if not events:
                    for connection in list(waiting):
                        waiting.discard(connection)
                        fail(connection, f"no reply in {REPLY_TIMEOUT_S:.0f} s")
                    break
                for descriptor, _ in events:
                    connection = by_descriptor.get(descriptor)
                    if connection is None:
                        continue
                    reason = connection.failure
                    data = b""
                    if reason is None:
                        try:
                            data = connection.socket.recv(RECEIVE_BYTES)
                        except OSError as error:
                            reason = type(error).__name__
                        else:
                            if not data:
                                reason = "connection closed"
                    if data:
                        try:
                            connection.parser.feed_data(data)
                        except httptools.HttpParserError:
                            reason = "not HTTP"
                    if reason is None and not connection.complete:
                        continue
                    now_ns = last_ns = clock_ns()
                    keep_alive = True
                    if reason is None:
                        status = connection.parser.get_status_code()
                        keep_alive = connection.keep_alive
                        if status == 200:
                            if connection.body != self._right_bodies.get(connection.number):
                                unchecked.append((len(latencies_ns), connection.number, connection.body))
                            latencies_ns.append(now_ns - connection.sent_ns)
                            window.reply_bytes = len(connection.body)
                        else:
                            window.errors[f"status {status}"] += 1
                        connection.expect_reply()
                    waiting.discard(connection)
                    if reason is not None:
                        connection.failure = None
                        fail(connection, reason)
                    elif not keep_alive:
                        fail(connection, "server closes after each reply")
                    if now_ns < stop_ns and connection.socket is not None:
                        ask(connection)
                        waiting.add(connection)
        finally:
            if gc_was_enabled:
                gc.enable()
        window.client_cpu_s = time.process_time() - cpu_before_s
        window.elapsed_s = (last_ns - start_ns) / 1e9
        wrong_places = self._check(unchecked)
        window.wrong = len(wrong_places)
        window.latencies_s = np.delete(np.array(latencies_ns, dtype=np.int64), wrong_places) / 1e9
        return window

    def _check(self, unchecked: list[tuple[int, int, bytes]]) -> list[int]:
        """Return the places of the replies that are wrong; remember the bodies that are right."""
        wrong = []
        for place, number, body in unchecked:
            if body == self._right_bodies.get(number):
                continue
            try:
                answer = self.endpoint.decode(body)
                expected = self.exchanges[number].expected
                right = not self.endpoint.has_model or (
                    answer.shape == expected.shape and np.abs(answer - expected).max() <= TOLERANCE
                )
            except (ValueError, KeyError, TypeError):
                right = False
            if right:
                self._right_bodies[number] = body
            else:
                wrong.append(place)
        return wrong
