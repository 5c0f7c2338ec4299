"""Listen for HTTP, keep the time of all connections, and end in order: what http_connection.py's connections share."""

import asyncio
import contextlib
import email.utils
import socket
import time

from http_connection import Connection
from http_messages import JSON, Application, Head, Limits, Refusal

TICK_S = 0.1  # how exact time limits are
STOP_S = 2.0  # what is under way when the server is ended may take so long
MAX_KNOWN_HEADS = 1024
BUSY_CONNECTIONS = 64  # with more than these, new ones are taken together
ACCEPTS_A_TURN = 15  # beside the one that uvloop takes
BACKLOG = 2048


class Server:
    """Serves one application at one address."""

    def __init__(self, application: Application, limits: Limits):
        self.application = application
        self.limits = limits
        self.connections: set[Connection] = set()
        self.known_heads: dict[bytes, Head] = {}  # clients repeat theirs byte for byte: parsed once is enough
        self.routes = application.routes
        self.accepting: set[asyncio.Task] = set()
        self.tick()

    def tick(self) -> None:
        """Look at the clock, for everything that need not be exact."""
        self.now_s = time.monotonic()
        self.date = email.utils.formatdate(usegmt=True).encode()
        self.ok_head = b"HTTP/1.1 200 OK\r\ndate: %b\r\n" % self.date
        self.json_head = b"%bcontent-type: %b\r\n" % (self.ok_head, JSON)
        if self.routes is not self.application.routes:  # what is served no more is not kept for a head
            self.known_heads.clear()
            self.routes = self.application.routes

    def remember(self, head_bytes: bytes, head: Head) -> None:
        """Have the next head of the same bytes not parsed."""
        if len(self.known_heads) >= MAX_KNOWN_HEADS:
            self.known_heads.clear()
        self.known_heads[head_bytes] = head

    def too_large(self) -> Refusal:
        largest = self.limits.max_body_bytes
        return Refusal(413, f"the body is larger than {largest} bytes; send fewer rows at a time")

    async def serve(self, listener: socket.socket, until: asyncio.Event) -> None:
        """Answer on `listener`, which is bound, until the event is set; then finish what is under way."""
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
        """Take up to ACCEPTS_A_TURN of the connections that wait at `listener`.

        uvloop takes one a turn, and a turn answers every connection that has a request: beside 500 busy ones a new
        user waited 7 to 10 s to be heard at all, so 0.6 to 1.5 s (tests/test_reliability.py). Only while many are
        connected: clients that connect anew for each request would lose a tenth of their speed.
        """
        with contextlib.suppress(OSError):  # mostly BlockingIOError: none is left
            for _ in range(ACCEPTS_A_TURN):
                accepted, _ = listener.accept()
                task = self.loop.create_task(self.loop.connect_accepted_socket(lambda: Connection(self), accepted))
                self.accepting.add(task)  # the event loop itself does not keep it
                task.add_done_callback(self.accepting.discard)

    async def finish(self) -> None:
        """Answer what has arrived, close every connection."""
        await asyncio.gather(*self.accepting, return_exceptions=True)
        deadline_s = time.monotonic() + STOP_S
        while self.connections and time.monotonic() < deadline_s:
            for connection in tuple(self.connections):
                if not connection.unanswered and connection.arriving is None and not connection.is_ending:
                    connection.end(lingers=False)
            await asyncio.sleep(0.01)
        for connection in tuple(self.connections):
            connection.transport.abort()
