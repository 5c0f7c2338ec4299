"""The measuring client: many keep-alive connections in one thread, under closed-loop or open-loop load.

In a closed loop each connection asks again as soon as it is answered: "how fast can it go". A slow
server then also slows the asking, so a stall is seen by few requests.

In an open loop requests are due at times drawn beforehand, whether or not earlier ones are answered,
and latency counts from the time a request was due: "what would users see". This is what wrk2 and
MLPerf LoadGen's server scenario do (Schroeder, Wierman, Harchol-Balter, "Open versus closed", NSDI 2006).

Plain sockets, `select.poll` and the HTTP parser of llhttp (httptools): a loop around `requests` costs
eight times what a small server does, and would measure itself.
"""

import array
import collections
import contextlib
import gc
import itertools
import select
import socket
import time
from collections import Counter
from dataclasses import dataclass, field

import httptools
import numpy as np
from endpoint import Endpoint, Request
from grpc_connection import GrpcConnection, GrpcRequest
from reference import TOLERANCE

REPLY_TIMEOUT_S = 30.0
RECEIVE_BYTES = 1 << 18


@dataclass
class Exchange:
    """A request as its connection sends it, and the answer to expect."""

    request: bytes | GrpcRequest
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
    offered_rate: float = 0.0  # open loop: requests due per second
    lateness_s: np.ndarray = field(default_factory=lambda: np.empty(0))  # open loop: sent after it was due
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
    encode = CONNECTION_CLASSES[endpoint.protocol].encode
    exchanges = []
    for first in range(0, len(rows) - batch + 1, batch):
        request = encode(endpoint.port, endpoint.request(rows[first : first + batch], version))
        exchanges.append(Exchange(request, expected[first : first + batch]))
    return exchanges


def constant_arrivals(rate: float, duration_s: float) -> np.ndarray:
    """Return when requests are due, in seconds (n,): `rate` per second, evenly spaced."""
    return np.arange(1, int(rate * duration_s) + 1) / rate


def poisson_arrivals(rate: float, duration_s: float, seed: int) -> np.ndarray:
    """Return when requests are due, in seconds (n,): a Poisson process of `rate` per second, n = rate * duration_s."""
    gaps_s = np.random.default_rng(seed).exponential(1 / rate, int(rate * duration_s))
    return np.cumsum(gaps_s)


class _Connection:
    """One keep-alive connection with at most one request under way; httptools calls the on_ methods."""

    closing_reason = "server closes after each reply"  # what is counted where not keep_alive

    def __init__(self, port: int):
        self.port = port
        self.socket: socket.socket | None = None
        self.number = 0  # of the exchange under way
        self.sent_ns = 0

    @staticmethod
    def encode(port: int, request: Request) -> bytes:
        """Encode `request` once for many sends."""
        headers = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        head = (
            f"{request.method} {request.path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{headers}"
            f"Content-Type: {request.content_type}\r\nContent-Length: {len(request.body)}\r\n\r\n"
        )
        return head.encode() + request.body

    @property
    def failure(self) -> str:
        """Why the status is not 200, in a few words to count it under."""
        return f"status {self.status}"

    def open(self) -> None:
        """Connect anew; OSError where nobody listens."""
        self.close()
        self.socket = socket.create_connection(("127.0.0.1", self.port), timeout=REPLY_TIMEOUT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)

    def close(self) -> None:
        if self.socket is not None:
            self.socket.close()
            self.socket = None

    def send(self, number: int, request: bytes) -> None:
        """Send exchange `number`'s request; a broken connection shows when the reply is read."""
        self.number = number
        self.parser = httptools.HttpResponseParser(self)
        self.body = b""
        self.complete = False
        self.sent_ns = time.perf_counter_ns()
        try:
            sent = self.socket.send(request)
            if sent < len(request):
                self.socket.setblocking(True)
                self.socket.sendall(request[sent:])
                self.socket.setblocking(False)
        except OSError:
            return

    def receive(self) -> str | None:
        """Take in what has arrived; return what went wrong, or None."""
        try:
            data = self.socket.recv(RECEIVE_BYTES)
            if not data:
                return "connection closed"
            self.parser.feed_data(data)
        except OSError as error:
            return type(error).__name__
        except httptools.HttpParserError:
            return "not HTTP"
        return None

    def on_body(self, part: bytes) -> None:
        self.body += part

    def on_message_complete(self) -> None:
        self.complete = True
        self.status = self.parser.get_status_code()
        self.keep_alive = self.parser.should_keep_alive()  # right only while the reply is being parsed


CONNECTION_CLASSES = {"REST": _Connection, "gRPC": GrpcConnection}  # by endpoint.protocol


class LoadGenerator:
    """Asks `exchanges` in turn over `connections` keep-alive connections; OSError where nobody listens.

    Every reply is checked: its bytes against a reply to the same rows that was found right before,
    and where they differ its numbers against the expected ones, after the clock has stopped. A
    connection that fails is opened anew; where nobody listens any more it is given up.
    """

    def __init__(self, endpoint: Endpoint, exchanges: list[Exchange], connections: int):
        self.endpoint = endpoint
        self.exchanges = exchanges
        connection_class = CONNECTION_CLASSES[endpoint.protocol]
        self.connections = [connection_class(endpoint.port) for _ in range(connections)]
        self._numbers = itertools.cycle(range(len(exchanges)))
        self._right_bodies: dict[int, bytes] = {}  # exchange number -> a body that was decoded and found right
        for connection in self.connections:
            connection.open()

    def __enter__(self) -> "LoadGenerator":
        return self

    def __exit__(self, *_) -> None:
        for connection in self.connections:
            connection.close()

    def run_closed(self, duration_s: float) -> Window:
        """Keep every connection asking for `duration_s`, then wait for the replies under way."""
        with self._observation() as window:
            stop_ns = self._start_ns + int(duration_s * 1e9)
            for connection in self.connections:
                self._send(connection)
            while self._waiting:
                events = self._poller.poll(REPLY_TIMEOUT_S * 1000)
                if not events:
                    self._give_up_waiting()
                for descriptor, _ in events:
                    connection = self._receive(descriptor)
                    if connection is not None and self._last_ns < stop_ns:
                        self._send(connection)
        return window

    def run_open(self, due_s: np.ndarray) -> Window:
        """Send a request at each of the times `due_s` (n,), seconds from the start, ascending.

        A request that is due while every connection is busy waits for one, and its latency counts that
        wait. Waiting ends REPLY_TIMEOUT_S after the last was due; what is then unsent counts as failed.
        The thread never sleeps between two sends: it would wake too late. Give it a core of its own.
        """
        lateness_ns = array.array("q")
        with self._observation() as window:
            due_ns = (self._start_ns + np.round(np.asarray(due_s) * 1e9).astype(np.int64)).tolist()
            idle = collections.deque(self.connections)
            position, count = 0, len(due_ns)
            end_ns = (due_ns[-1] if due_ns else self._start_ns) + int(REPLY_TIMEOUT_S * 1e9)
            while position < count or self._waiting:
                now_ns = time.perf_counter_ns()
                while position < count and due_ns[position] <= now_ns and idle:
                    connection = idle.popleft()
                    if connection.socket is None:  # closed while idle, and nobody listens any more
                        continue
                    self._send(connection)
                    lateness_ns.append(connection.sent_ns - due_ns[position])
                    connection.sent_ns = due_ns[position]  # the latency counts from here
                    position += 1
                for descriptor, _ in self._poller.poll(0):
                    connection = self._receive(descriptor)
                    if connection is not None:
                        idle.append(connection)
                if now_ns > end_ns or not (idle or self._waiting):
                    self._give_up_waiting()
                    window.errors["not sent: no connection was free"] += count - position
                    break
        window.offered_rate = count / float(due_s[-1]) if count else 0.0
        window.lateness_s = np.array(lateness_ns, dtype=np.int64) / 1e9
        return window

    @contextlib.contextmanager
    def _observation(self):
        """Set up what one run observes, and after it fill the Window that is given."""
        window = self._window = Window(len(self.connections), request_bytes=len(self.exchanges[0].request))
        self._latencies_ns = array.array("q")
        self._unchecked: list[tuple[int, int, bytes]] = []  # place in _latencies_ns, exchange number, body
        self._poller = select.poll()
        self._waiting: dict[int, _Connection | GrpcConnection] = {}  # by descriptor: those with a request under way
        for connection in self.connections:
            if connection.socket is None:
                connection.open()
            self._poller.register(connection.socket, select.POLLIN)
        gc_was_enabled = gc.isenabled()
        gc.disable()
        cpu_before_s = time.process_time()
        self._start_ns = self._last_ns = time.perf_counter_ns()
        try:
            yield window
        finally:
            window.client_cpu_s = time.process_time() - cpu_before_s
            window.elapsed_s = (self._last_ns - self._start_ns) / 1e9
            if gc_was_enabled:
                gc.enable()
        wrong_places = self._check(self._unchecked)
        window.wrong = len(wrong_places)
        window.latencies_s = np.delete(np.array(self._latencies_ns, dtype=np.int64), wrong_places) / 1e9

    def _send(self, connection: _Connection) -> None:
        number = next(self._numbers)
        self._waiting[connection.socket.fileno()] = connection
        connection.send(number, self.exchanges[number].request)

    def _receive(self, descriptor: int) -> _Connection | None:
        """Take in what has arrived; return the connection when it is free to ask again, else None."""
        connection = self._waiting.get(descriptor)
        if connection is None:  # nothing was asked on it: the server keeps it alive, or closes it, which is no failure
            for idle in self.connections:
                if idle.socket is not None and idle.socket.fileno() == descriptor and idle.receive() is not None:
                    self._reopen(idle, "")
            return None
        reason = connection.receive()
        if reason is None and not connection.complete:
            return None
        self._last_ns = time.perf_counter_ns()
        del self._waiting[descriptor]
        if reason is None:
            if connection.status == 200:
                body = connection.body
                if body != self._right_bodies.get(connection.number):
                    self._unchecked.append((len(self._latencies_ns), connection.number, body))
                self._latencies_ns.append(self._last_ns - connection.sent_ns)
                self._window.reply_bytes = len(body)
            else:
                self._window.errors[connection.failure] += 1
            if connection.keep_alive:
                return connection
            reason = connection.closing_reason
        return connection if self._reopen(connection, reason) else None

    def _reopen(self, connection: _Connection, reason: str) -> bool:
        """Count a failure, if it is one, and connect anew; False where nobody listens any more."""
        if reason:
            self._window.errors[reason] += 1
        self._poller.unregister(connection.socket)
        try:
            connection.open()
        except OSError as error:
            self._window.errors[f"reconnect: {type(error).__name__}"] += 1
            return False
        self._poller.register(connection.socket, select.POLLIN)
        return True

    def _give_up_waiting(self) -> None:
        """Count the requests under way as failed, and close their connections: a late reply would be misread."""
        self._last_ns = time.perf_counter_ns()  # the time spent waiting in vain counts
        for connection in self._waiting.values():
            self._window.errors[f"no reply in {REPLY_TIMEOUT_S:.0f} s"] += 1
            connection.close()
        self._waiting.clear()

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
