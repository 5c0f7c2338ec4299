"""Listen for HTTP, keep the time for all connections, and stop cleanly: the state shared by all connections."""

import asyncio
import contextlib
import email.utils
import socket
import time

from http_connection import Connection
from http_messages import JSON, Application, Head, Limits, Refusal

TICK_S = 0.1  # precision of time limits
STOP_S = 2.0  # time for unfinished requests when the server stops
MAX_KNOWN_HEADS = 1024
BUSY_CONNECTIONS = 64  # above it, several new ones are accepted per turn
ACCEPTS_A_TURN = 15  # in addition to the one that uvloop accepts
BACKLOG = 2048


class Server:
    """A server of one application at one address."""

    def __init__(self, application: Application, limits: Limits):
        self.application = application
        self.limits = limits
        self.connections: set[Connection] = set()
        self.known_heads: dict[bytes, Head] = {}  # clients repeat theirs byte for byte, so each is parsed once
        self.routes = application.routes
        self.accepting: set[asyncio.Task] = set()
        self.tick()

    def tick(self) -> None:
        """Read the clock, for everything that need not be exact."""
        self.now_s = time.monotonic()
        self.date = email.utils.formatdate(usegmt=True).encode()
        self.ok_head = b"HTTP/1.1 200 OK\r\ndate: %b\r\n" % self.date
        self.json_head = b"%bcontent-type: %b\r\n" % (self.ok_head, JSON)
        if self.routes is not self.application.routes:  # drop routes that are no longer served
            self.known_heads.clear()
            self.routes = self.application.routes

    def remember(self, head_bytes: bytes, head: Head) -> None:
        """Let the next head of the same bytes skip parsing."""
        if len(self.known_heads) >= MAX_KNOWN_HEADS:
            self.known_heads.clear()
        self.known_heads[head_bytes] = head

    def too_large(self) -> Refusal:
        largest = self.limits.max_body_bytes
        return Refusal(413, f"the body is larger than {largest} bytes; send fewer rows at a time")

    async def serve(self, listener: socket.socket, until: asyncio.Event) -> None:
        """Answer on the bound `listener` until the event is set; then finish the unfinished requests."""
        loop = self.loop = asyncio.get_running_loop()
        listening = await loop.create_server(lambda: Connection(self), sock=listener, backlog=BACKLOG)
        with listener.dup() as more:  # because uvloop watches the socket itself
            more.setblocking(False)
            is_watched = False
            while not until.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(until.wait(), TICK_S)
                self.tick()
                for connection in tuple(self.connections):
                    connection.check_time()
                if is_watched != (len(self.connections) > BUSY_CONNECTIONS):
                    is_watched = not is_watched
                    loop.add_reader(more, self.accept, more) if is_watched else loop.remove_reader(more)
            if is_watched:
                loop.remove_reader(more)
        listening.close()
        await self.finish()

    def accept(self, listener: socket.socket) -> None:
        """Accept up to ACCEPTS_A_TURN of the connections that wait at `listener`.

        uvloop accepts one per turn, and a turn answers every connection that has a request: with 500 busy ones a new
        user waited 7 to 10 s, with this 0.6 to 1.5 s (tests/test_reliability.py). Only while many are connected:
        clients that open a connection for each request would lose a tenth of their speed.
        """
        with contextlib.suppress(OSError):  # usually BlockingIOError: none is left
            for _ in range(ACCEPTS_A_TURN):
                accepted, _ = listener.accept()
                task = self.loop.create_task(self.loop.connect_accepted_socket(lambda: Connection(self), accepted))
                self.accepting.add(task)  # the event loop keeps no reference
                task.add_done_callback(self.accepting.discard)

    async def finish(self) -> None:
        """Answer the requests that have arrived, close every connection."""
        await asyncio.gather(*self.accepting, return_exceptions=True)
        deadline_s = time.monotonic() + STOP_S
        while self.connections and time.monotonic() < deadline_s:
            for connection in tuple(self.connections):
                if not connection.unanswered and connection.arriving is None and not connection.is_ending:
                    connection.end(lingers=False)
            await asyncio.sleep(0.01)
        for connection in tuple(self.connections):
            connection.transport.abort()
