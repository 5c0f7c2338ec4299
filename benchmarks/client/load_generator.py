"""The measuring client: many keep-alive connections in one thread, under closed-loop or open-loop load.

In a closed loop each connection asks again as soon as it is answered: "how fast can it go". A slow
server then also slows the asking, so a stall is seen by few requests.

In an open loop requests are due at times drawn beforehand, whether or not earlier ones are answered,
and latency counts from the time a request was due: "what would users see". This is what wrk2 and
MLPerf LoadGen's server scenario do (Schroeder, Wierman, Harchol-Balter, "Open versus closed", NSDI 2006).

A loop around `requests` costs eight times as much as a small server, and would measure itself: here are plain sockets
and `select.poll`. The clock and the poller are arguments, so that the tests can own the time.
"""

import array
import collections
import contextlib
import functools
import gc
import itertools
import select
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from client.connection import Connection, begin_connecting
from client.grpc_connection import GrpcConnection, GrpcRequest
from client.http_connection import HttpConnection
from endpoints.base import Endpoint
from endpoints.reference import TOLERANCE
from figures.result_file import Window

REPLY_TIMEOUT_S = 30.0


@dataclass
class Exchange:
    """A request as its connection sends it, and the answer to expect."""

    request: bytes | GrpcRequest
    expected: np.ndarray  # (n, 2)


def make_exchanges(
    endpoint: Endpoint, version: str, rows: list[Any], expected: np.ndarray, batch: int = 1
) -> list[Exchange]:
    """Encode `rows` (n, 5) once, `batch` rows a request, with their `expected` answers (n, 2)."""
    encode = CONNECTION_CLASSES[endpoint.protocol].encode
    exchanges = []
    for first in range(0, len(rows) - batch + 1, batch):
        request = encode(endpoint.port, endpoint.full_request(rows[first : first + batch], version), endpoint.host)
        exchanges.append(Exchange(request, expected[first : first + batch]))
    return exchanges


def constant_arrivals(rate: float, duration_s: float) -> np.ndarray:
    """Return when requests are due, in seconds (n,): `rate` per second, evenly spaced."""
    return np.arange(1, int(rate * duration_s) + 1) / rate


def poisson_arrivals(rate: float, duration_s: float, seed: int) -> np.ndarray:
    """Return when requests are due, in seconds (n,): a Poisson process of `rate` per second, n = rate * duration_s."""
    gaps_s = np.random.default_rng(seed).exponential(1 / rate, int(rate * duration_s))
    return np.cumsum(gaps_s)


CONNECTION_CLASSES: dict[str, type[Connection]] = {
    "REST": HttpConnection,
    "gRPC": GrpcConnection,
}  # by endpoint.protocol


class LoadGenerator:
    """Asks `exchanges` in turn over `connections` keep-alive connections; OSError if no server listens.

    Every reply is checked. Its bytes are compared with a reply to the same rows that was found right
    before; if they differ, it is parsed and its body compared; if that differs too, its numbers are
    compared with the expected ones after the clock has stopped. A
    connection that fails is opened again; if no server listens any more it is given up. All are opened
    at once and none is waited for while others ask: a server whose listen backlog is too short for
    them takes seconds, which `Window.connect_s` records.

    `clock` gives nanoseconds, `poller` makes an object with the methods of `select.poll`, and `connect`
    begins to connect to a port (None: of the endpoint's host): a test that gives all three decides what time it is.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        exchanges: list[Exchange],
        connections: int,
        *,
        reply_timeout_s: float = REPLY_TIMEOUT_S,
        clock: Callable[[], int] = time.perf_counter_ns,
        poller: Callable[[], Any] = select.poll,
        connect: Callable[[int], Any] | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.exchanges = exchanges
        self.reply_timeout_s = reply_timeout_s
        self.clock = clock
        self.make_poller = poller
        connection_class = CONNECTION_CLASSES[endpoint.protocol]
        connect = connect or functools.partial(begin_connecting, address=endpoint.find_address())
        self.connections = [connection_class(endpoint.port, clock, connect) for _ in range(connections)]
        self._turns = itertools.cycle(list(enumerate(exchanges)))
        self._right_bodies: dict[int, bytes] = {}  # exchange number -> a body that was decoded and found right
        self._right_replies: dict[int, bytes] = {}  # exchange number -> a reply with that body, every byte of it
        for connection in self.connections:
            connection.right_replies = self._right_replies
        self._connect_ns = 0  # the longest so far
        self._start_ns = self._last_ns = self._now_ns = 0  # a run's start, its last reply, the last look at the clock
        self._last_right: int | None = None  # exchange number of the last reply, if it is one of _right_replies
        try:
            self._open_all()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "LoadGenerator":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection."""
        for connection in self.connections:
            connection.close()

    def _open_all(self) -> None:
        """Open the connections that are closed, all at once; OSError if no server listens or accepts one in time."""
        self._poller = self.make_poller()
        self._waiting: dict[int, Connection] = {}  # by descriptor: those with an unanswered request
        self._opening: dict[int, tuple[Connection, int]] = {}  # by descriptor: those that connect, and since when
        try:
            for connection in self.connections:
                if connection.socket is None:
                    self._begin_opening(connection)
            while self._opening:
                events = self._poller.poll(self.reply_timeout_s * 1000)
                if not events:
                    raise TimeoutError(f"{len(self._opening)} connections not open within {self.reply_timeout_s:.0f} s")
                for descriptor, _ in events:
                    self._end_opening(descriptor)
        except OSError:
            self._close_opening()
            raise

    def _close_opening(self) -> None:
        """Close what is not open yet, so that nothing takes it for open."""
        for connection, _ in self._opening.values():
            connection.close()
        self._opening.clear()

    def _begin_opening(self, connection: Connection) -> None:
        started_ns = self.clock()
        connection.begin_opening()
        self._opening[connection.descriptor] = connection, started_ns
        self._poller.register(connection.socket, select.POLLOUT)

    def _end_opening(self, descriptor: int) -> Connection:
        connection, started_ns = self._opening.pop(descriptor)
        self._poller.unregister(connection.socket)
        connection.end_opening()
        self._now_ns = self.clock()
        self._connect_ns = max(self._connect_ns, self._now_ns - started_ns)
        return connection

    def run_closed(self, duration_s: float, min_requests: int = 0, limit_s: float | None = None) -> Window:
        """Keep every connection asking for `duration_s`, then wait for the unfinished replies.

        Goes on until `min_requests` have an answer with status 200, but asks nothing more after `limit_s`; default:
        ten times `duration_s` if there is such a minimum.
        """
        if limit_s is None:
            limit_s = 10 * duration_s if min_requests else duration_s
        with self._observation() as window:
            limit_ns = self._start_ns + int(limit_s * 1e9)
            duration_end_ns = min(limit_ns, self._start_ns + int(duration_s * 1e9))
            latencies_ns, waiting, turns, clock = self._latencies_ns, self._waiting, self._turns, self.clock

            def stop_ns() -> int:
                return duration_end_ns if len(latencies_ns) >= min_requests else limit_ns

            for connection in self.connections:
                self._send(connection)
            while waiting or (self._opening and self._now_ns < stop_ns()):
                timeout_s = self.reply_timeout_s if waiting else (stop_ns() - self._now_ns) / 1e9
                events = self._poller.poll(timeout_s * 1000)
                if not events:
                    self._now_ns = clock()
                    self._give_up_waiting()
                for descriptor, _ in events:
                    asked = waiting.get(descriptor)
                    if asked is None:
                        free = self._take_unasked(descriptor)
                    else:
                        reason = asked.receive()
                        if asked.is_right:  # what _take_reply and _send do, without their calls: a fifth faster
                            self._last_ns = self._now_ns = now_ns = clock()
                            latencies_ns.append(now_ns - asked.sent_ns)
                            self._last_right = asked.number
                            if now_ns < duration_end_ns or now_ns < stop_ns():
                                number, exchange = next(turns)
                                asked.send(number, exchange.request)
                            else:
                                del waiting[descriptor]
                            continue
                        free = self._take_reply(asked, reason)
                    if free is not None and self._now_ns < stop_ns():
                        self._send(free)
            if self._opening:  # the time without a connection counts, too
                self._last_ns = self._now_ns
        return window

    def run_open(self, due_s: np.ndarray) -> Window:
        """Send a request at each of the times `due_s` (n,), seconds from the start, ascending.

        A request that is due while every connection is busy waits for one, and its latency counts that
        wait. Waiting ends `reply_timeout_s` after the last was due; requests that are unsent by then count as failed.
        The thread never sleeps between two sends: it would wake too late. Give it its own core. The turns in
        which it found nothing to do are its `client_idle_s`: without them the client, not the server, is the limit.
        """
        lateness_ns = array.array("q")
        idle_ns = 0
        with self._observation() as window:
            due_ns = (self._start_ns + np.round(np.asarray(due_s) * 1e9).astype(np.int64)).tolist()
            idle = collections.deque(self.connections)
            position, count = 0, len(due_ns)
            end_ns = (due_ns[-1] if due_ns else self._start_ns) + int(self.reply_timeout_s * 1e9)
            turn_ns, first = self._start_ns, 0  # when the last turn began, and with which request; -1: it had a reply
            while position < count or self._waiting:
                now_ns = self.clock()
                if position == first:
                    idle_ns += now_ns - turn_ns
                turn_ns, first = now_ns, position
                while position < count and due_ns[position] <= now_ns and idle:
                    connection = idle.popleft()
                    if not self._is_open(connection):  # closed while idle: it comes back if it opens again
                        continue
                    self._send(connection)
                    lateness_ns.append(connection.sent_ns - due_ns[position])
                    connection.sent_ns = due_ns[position]  # the latency counts from here
                    position += 1
                for descriptor, _ in self._poller.poll(0):
                    first = -1
                    was_asked = descriptor in self._waiting
                    free = self._take(descriptor)
                    if free is not None and (was_asked or free not in idle):
                        idle.append(free)
                if now_ns > end_ns or not (idle or self._waiting or self._opening):
                    self._give_up_waiting()
                    window.errors["not sent: no connection was free"] += count - position
                    break
        window.offered_rate = count / float(due_s[-1]) if count else 0.0
        window.lateness_s = np.array(lateness_ns, dtype=np.int64) / 1e9
        window.client_idle_s = idle_ns / 1e9
        return window

    @contextlib.contextmanager
    def _observation(self) -> Iterator[Window]:
        """Set up what one run observes, and after it fill the Window that is given."""
        window = self._window = Window(len(self.connections), request_bytes=len(self.exchanges[0].request))
        self._latencies_ns = array.array("q")
        self._unchecked: list[tuple[int, int, bytes]] = []  # place in _latencies_ns, exchange number, body
        self._last_right = None
        self._open_all()
        for connection in self.connections:
            self._poller.register(connection.socket, select.POLLIN)
        gc_was_enabled = gc.isenabled()
        gc.disable()
        cpu_before_s = time.process_time()
        self._start_ns = self._last_ns = self._now_ns = self.clock()
        try:
            yield window
        finally:
            window.client_cpu_s = time.process_time() - cpu_before_s
            window.elapsed_s = (self._last_ns - self._start_ns) / 1e9
            window.connect_s = self._connect_ns / 1e9
            if gc_was_enabled:
                gc.enable()
            self._close_opening()  # not needed until the next run
        if self._last_right is not None:
            window.reply_bytes = len(self._right_bodies[self._last_right])
        wrong_places = self._check(self._unchecked)
        window.wrong = len(wrong_places)
        window.latencies_s = np.delete(np.array(self._latencies_ns, dtype=np.int64), wrong_places) / 1e9

    def _is_open(self, connection: Connection) -> bool:
        return connection.socket is not None and connection.descriptor not in self._opening

    def _send(self, connection: Connection) -> None:
        number, exchange = next(self._turns)
        self._waiting[connection.descriptor] = connection
        connection.send(number, exchange.request)

    def _take(self, descriptor: int) -> Connection | None:
        """Take in what has happened on a descriptor; return its connection when it is free to ask, else None."""
        connection = self._waiting.get(descriptor)
        if connection is None:
            return self._take_unasked(descriptor)
        return self._take_reply(connection, connection.receive())

    def _take_reply(self, connection: Connection, reason: str | None) -> Connection | None:
        """Handle the bytes that a connection with an unanswered request received, or its failure, `reason`."""
        if reason is None and not connection.complete:
            return None
        self._last_ns = self._now_ns = self.clock()
        del self._waiting[connection.descriptor]
        if reason is None:
            if connection.is_right:
                self._latencies_ns.append(self._last_ns - connection.sent_ns)
                self._last_right = connection.number
            elif connection.status == 200:
                self._take_answer(connection)
            else:
                self._window.errors[connection.failure] += 1
            if connection.keep_alive:
                return connection
            reason = connection.closing_reason
        self._reopen(connection, reason)
        return None

    def _take_answer(self, connection: Connection) -> None:
        """Time a reply that was parsed, and leave its body to `_check` if it is not known to be right."""
        number, body = connection.number, connection.body
        if body != self._right_bodies.get(number):
            self._unchecked.append((len(self._latencies_ns), number, body))
        elif connection.raw and connection.keep_alive:
            self._right_replies[number] = connection.raw
        self._latencies_ns.append(self._last_ns - connection.sent_ns)
        self._window.reply_bytes = len(body)
        self._last_right = None

    def _take_unasked(self, descriptor: int) -> Connection | None:
        """Handle an event without a request: a connection opens, or the server closes an idle one."""
        if descriptor in self._opening:
            try:
                connection = self._end_opening(descriptor)
            except OSError as error:
                self._window.errors[f"reconnect: {type(error).__name__}"] += 1
                return None
            self._poller.register(connection.socket, select.POLLIN)
            return connection
        for idle in self.connections:
            if idle.socket is not None and idle.descriptor == descriptor and idle.receive() is not None:
                self._reopen(idle, "")  # no failure
        return None

    def _reopen(self, connection: Connection, reason: str) -> None:
        """Count a failure, if it is one, and begin to connect again."""
        if reason:
            self._window.errors[reason] += 1
        self._poller.unregister(connection.socket)
        try:
            self._begin_opening(connection)
        except OSError as error:
            self._window.errors[f"reconnect: {type(error).__name__}"] += 1

    def _give_up_waiting(self) -> None:
        """Count the unanswered requests as failed, and close their connections: a late reply would be misread."""
        reason = f"no reply in {self.reply_timeout_s:g} s"
        for connection in self._waiting.values():
            self._last_ns = self._now_ns = self.clock()  # the time spent waiting in vain counts
            self._window.errors[reason] += 1
            self._poller.unregister(connection.socket)
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
                self._right_replies.pop(number, None)  # it has another body
            else:
                wrong.append(place)
        return wrong
