"""A server, its sockets and the time, all played by one script, so that what the client measures is known exactly.

`Scene` gives the load generator its clock, its poller and its connections. Nothing waits: when the client polls and
nothing has happened, the time jumps to the moment at which something does.
"""

import errno
import heapq
import itertools
import json
import select
import socket
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from client.load_generator import Exchange, LoadGenerator, constant_arrivals, make_exchanges
from endpoints.base import Endpoint
from figures.result_file import Window

MS = 1_000_000  # nanoseconds
CLOSE = b""  # as the last part of a reply: the server closes the connection
ROWS = [[float(first), 0.0, 0.0, 0.0, 0.0] for first in range(1, 99)]
EXPECTED = np.array([[row[0] / 100, 1 - row[0] / 100] for row in ROWS])  # (98, 2)

Part = tuple[int, bytes]  # when it arrives, in nanoseconds, and what


class ScriptedEndpoint(Endpoint):
    """To a row that starts with x the right answer is [x / 100, 1 - x / 100]."""

    name = "scripted"
    kind = "local"
    default_ports = {"rest": 0}
    rows_key = "rows"

    def path(self, version):
        return f"/scripted/{version}"

    def decode(self, reply):
        return np.array(json.loads(reply)["answers"])


def encode_reply(body: bytes, head: bytes = b"", status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %s\r\n%sContent-Length: %d\r\n\r\n%s" % (status, head, len(body), body)


@dataclass
class Server:
    """Answers `delay_ns` after each request; a subclass says when and how else."""

    delay_ns: int = 0
    every: int = 4  # which replies are bad, where some are
    listens: bool = True
    refuses_late: bool = False  # while it does not listen: when a connection should open, not at once
    connect_ns: int = 0  # how long a connection takes to open
    asked: int = 0  # by all connections together

    def answer(self, now_ns: int, request: bytes) -> Iterable[Part]:
        """Return the parts of the reply to a request that arrives now."""
        self.asked += 1
        [row] = json.loads(request.partition(b"\r\n\r\n")[2])["rows"]
        body = json.dumps({"answers": [[row[0] / 100, 1 - row[0] / 100]]}).encode()
        return self.reply(now_ns, body)

    def reply(self, now_ns: int, body: bytes) -> Iterable[Part]:
        return [(now_ns + self.delay_ns, encode_reply(body))]

    @property
    def is_bad_turn(self) -> bool:
        return self.asked % self.every == 0


class ScriptedSocket:
    """One connection of the scene, with the methods of a socket that the client uses."""

    numbers = itertools.count(1000)

    def __init__(self, scene: "Scene"):
        self.scene = scene
        self.number = next(self.numbers)
        self.arriving: deque[Part] = deque()
        self.is_closed = False
        self.opens_ns = scene.now_ns + scene.server.connect_ns

    def fileno(self) -> int:
        return self.number

    def getsockopt(self, _level: int, option: int) -> int:
        assert option == socket.SO_ERROR
        return 0 if self.scene.server.listens else errno.ECONNREFUSED

    def send(self, request: bytes) -> int:
        self.arriving.extend(self.scene.server.answer(self.scene.now_ns, request))
        return len(request)

    def recv(self, _size: int) -> bytes:
        return self.arriving.popleft()[1]

    def close(self) -> None:
        self.arriving.clear()
        self.is_closed = True

    def ready_ns(self, events: int) -> int | None:
        """When there is something to do for who waits for `events`; None for never."""
        if events == select.POLLOUT:
            return self.opens_ns
        return self.arriving[0][0] if self.arriving else None


@dataclass
class Scene:
    """The clock, the poller and the connections of one LoadGenerator, and the server at their other end."""

    server: Server
    now_ns: int = 0
    wakes_ns: list[int] = field(default_factory=list)  # a heap: moments at which the client has something to do
    polled: dict[ScriptedSocket, int] = field(default_factory=dict)  # the events waited for

    def clock(self) -> int:
        return self.now_ns

    def connect(self, _port: int) -> ScriptedSocket:
        if not (self.server.listens or self.server.refuses_late):
            raise ConnectionRefusedError
        return ScriptedSocket(self)

    def poller(self) -> "Scene":
        self.polled = {}
        return self

    def register(self, polled: ScriptedSocket, events: int) -> None:
        self.polled[polled] = events

    def unregister(self, polled: ScriptedSocket) -> None:
        del self.polled[polled]

    def poll(self, timeout_ms: float) -> list[tuple[int, int]]:
        """Return what is ready; where nothing is, move the time first, at the most to the timeout's end."""
        assert not any(polled.is_closed for polled in self.polled), "poll would return at once, for ever"
        times_ns = {polled: polled.ready_ns(events) for polled, events in self.polled.items()}
        if not any(time_ns is not None and time_ns <= self.now_ns for time_ns in times_ns.values()):
            while self.wakes_ns and self.wakes_ns[0] <= self.now_ns:
                heapq.heappop(self.wakes_ns)
            end_ns = self.now_ns + round(timeout_ms * MS) if timeout_ms else self.now_ns + 1_000 * MS
            moments_ns = [time_ns for time_ns in times_ns.values() if time_ns is not None]
            self.now_ns = min([*moments_ns, *self.wakes_ns[:1], end_ns])
        return [
            (polled.fileno(), events)
            for polled, events in self.polled.items()
            if (time_ns := times_ns[polled]) is not None and time_ns <= self.now_ns
        ]

    def load(self, connections: int, reply_timeout_s: float = 30.0) -> LoadGenerator:
        """Return a load generator that lives in this scene."""
        return LoadGenerator(
            ScriptedEndpoint(), exchanges(), connections,
            reply_timeout_s=reply_timeout_s, clock=self.clock, poller=self.poller, connect=self.connect,
        )  # fmt: skip

    def knowing_load(self, connections: int, reply_timeout_s: float = 30.0) -> LoadGenerator:
        """Return a load generator that has found a reply to every row right; the time is 0 again."""
        server, self.server = self.server, Server(MS)
        load = self.load(connections, reply_timeout_s)
        for _ in range(2):  # the first time it learns the bodies, the second the whole replies
            window = self.run_open(load, constant_arrivals(100, len(ROWS) / 100))
            assert len(window.latencies_s) == len(ROWS)
        self.server, self.now_ns, self.wakes_ns = server, 0, []
        return load

    def run_open(self, load: LoadGenerator, due_s: np.ndarray) -> Window:
        """Run the open loop; the time stops at each moment at which a request is due."""
        self.wakes_ns = (self.now_ns + np.round(np.asarray(due_s) * 1e9).astype(np.int64)).tolist()
        return load.run_open(due_s)


@dataclass
class BusyScene(Scene):
    """A scene whose client works: each look at the clock takes it `look_ns`, and only that moves the time."""

    look_ns: int = 50_000

    def clock(self) -> int:
        self.now_ns += self.look_ns
        return self.now_ns

    def poll(self, timeout_ms: float) -> list[tuple[int, int]]:
        times_ns = {polled: polled.ready_ns(events) for polled, events in self.polled.items()}
        ready = [polled for polled, time_ns in times_ns.items() if time_ns is not None and time_ns <= self.now_ns]
        return [(polled.fileno(), self.polled[polled]) for polled in ready]


def exchanges() -> list[Exchange]:
    return make_exchanges(ScriptedEndpoint(), "1", ROWS, EXPECTED)


def closed(server: Server, connections: int, duration_s: float, **options) -> Window:
    """Return what the closed loop sees of `server`."""
    with Scene(server).load(connections, **options) as load:
        return load.run_closed(duration_s)


def opened(server: Server, connections: int, due_s: np.ndarray, **options) -> Window:
    """Return what the open loop sees of `server`."""
    scene = Scene(server)
    with scene.load(connections, **options) as load:
        return scene.run_open(load, due_s)


class Serial(Server):
    """Answers one request after the other, each in `delay_ns`: 1 / delay per second at the most."""

    free_ns = 0

    def reply(self, now_ns, body):
        self.free_ns = max(now_ns, self.free_ns) + self.delay_ns
        return [(self.free_ns, encode_reply(body))]


def stall_end_ns(now_ns: int, stall_ns: int, period_ns: int) -> int:
    """Return when a request that arrives now is looked at by a server that stalls in the middle of each period."""
    begin_ns = now_ns // period_ns * period_ns + period_ns // 2
    return begin_ns + stall_ns if begin_ns <= now_ns < begin_ns + stall_ns else now_ns


@dataclass
class Stalling(Server):
    """Stands still for `stall_ns` in the middle of every `period_ns`."""

    stall_ns: int = 100 * MS
    period_ns: int = 1000 * MS

    def reply(self, now_ns, body):
        return [(stall_end_ns(now_ns, self.stall_ns, self.period_ns) + self.delay_ns, encode_reply(body))]


class Faulty(Server):
    """Gives `bad(now_ns, body)` in place of every `every`-th reply."""

    bad: Callable[[int, bytes], Iterable[Part]]

    def reply(self, now_ns, body):
        return self.bad(now_ns, body) if self.is_bad_turn else super().reply(now_ns, body)


class Erring(Faulty):
    def bad(self, now_ns, body):
        return [(now_ns, encode_reply(b"", status=b"503 Service Unavailable"))]


class Wrong(Faulty):
    """Gives a wrong answer, 0.01 off."""

    def bad(self, now_ns, body):
        p0, p1 = json.loads(body)["answers"][0]
        return [(now_ns, encode_reply(json.dumps({"answers": [[p0 + 0.01, p1 - 0.01]]}).encode()))]


class Dropping(Faulty):
    def bad(self, now_ns, body):
        return [(now_ns, CLOSE)]


class Truncating(Faulty):
    def bad(self, now_ns, body):
        reply = encode_reply(body)
        return [(now_ns, reply[: len(reply) // 2]), (now_ns, CLOSE)]


class Dying(Faulty):
    """Ends at its `every`-th request, and with it every connection."""

    def answer(self, now_ns, request):
        return super().answer(now_ns, request) if self.listens else [(now_ns, CLOSE)]

    def bad(self, now_ns, body):
        self.listens = False
        return [(now_ns, CLOSE)]


class Chunked(Server):
    """Sends a reply in chunks of one byte, each in a segment."""

    def reply(self, now_ns, body):
        segments = [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", *(b"1\r\n%c\r\n" % byte for byte in body)]
        return [(now_ns + self.delay_ns, segment) for segment in [*segments, b"0\r\n\r\n"]]


class Segmented(Server):
    """Sends a reply in ten segments, `delay_ns` apart, the first at once."""

    segments = 10

    def reply(self, now_ns, body):
        reply, count = encode_reply(body), self.segments
        pieces = [reply[len(reply) * n // count : len(reply) * (n + 1) // count] for n in range(count)]
        return [(now_ns + number * self.delay_ns, piece) for number, piece in enumerate(pieces)]


class Closing(Server):
    """Closes the connection after each reply, as the reply's header says."""

    def reply(self, now_ns, body):
        return [(now_ns + self.delay_ns, encode_reply(body, b"Connection: close\r\n")), (now_ns + self.delay_ns, CLOSE)]


class Unframed(Server):
    """Gives no length: the reply ends with the connection, as HTTP/1.0 has it."""

    head = b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n"

    def reply(self, now_ns, body):
        time_ns = now_ns + self.delay_ns
        return [(time_ns, self.head + body[:9]), (time_ns, body[9:]), (time_ns + MS, CLOSE)]


class Cut(Unframed):
    """Says the length of what it cuts."""

    head = b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\n"


class Interim(Server):
    """Sends 100 and 103 before each reply, in a segment of their own or with it."""

    def reply(self, now_ns, body):
        interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>; rel=x\r\n\r\n"
        reply = encode_reply(body)
        time_ns = now_ns + self.delay_ns
        return [(now_ns, interim), (time_ns, reply)] if self.is_bad_turn else [(time_ns, interim + reply)]


class Silent(Server):
    def reply(self, now_ns, body):
        return []


class Switching(Server):
    """Answers that it goes on in another protocol, though nobody asked for one."""

    def reply(self, now_ns, body):
        head = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n"
        return [(now_ns + self.delay_ns, head)]


class Garbage(Server):
    def reply(self, now_ns, body):
        return [(now_ns + self.delay_ns, b"220 ready\r\n")]
