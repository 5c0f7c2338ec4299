"""A uvicorn server whose new users are heard under overload, too. The same file is in bentoml/ and tfserving/local/.

uvloop accepts one new connection a turn of its event loop, and a turn answers every connection that has a request.
With 500 to 1,000 of them busy and as many new ones waiting, a new user waited 7 to 10 s to be heard at all; with up
to 16 a turn 0.6 to 1.5 s (tests/test_reliability.py). Only while many are connected: a server that is not busy would
lose a tenth of its speed for clients that connect anew for each request.
"""

import asyncio
import contextlib
import socket

import uvicorn

BUSY_CONNECTIONS = 64  # with more than these, new ones are taken together
ACCEPTS_A_TURN = 15  # beside the one that uvloop takes


class Server(uvicorn.Server):
    """Serves like uvicorn.Server; asked to serve without `sockets`, just like it."""

    listeners: tuple[socket.socket, ...] = ()
    watched: tuple[socket.socket, ...] = ()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.accepting: set[asyncio.Task] = set()
        # Duplicates, because uvloop watches the sockets themselves; non-blocking, because both share that flag.
        self.listeners = tuple(listener.dup() for listener in sockets or ())
        for listener in self.listeners:
            listener.setblocking(False)

    async def on_tick(self, counter: int) -> bool:
        """Watch the listeners, or stop watching them; uvicorn calls this every 0.1 s."""
        busy = len(self.server_state.connections) > BUSY_CONNECTIONS
        self.watch(self.listeners if busy else ())
        return await super().on_tick(counter)

    def watch(self, listeners: tuple[socket.socket, ...]) -> None:
        """Accept from `listeners`, and from no other, beside what uvloop does."""
        loop = asyncio.get_running_loop()
        for listener in set(self.watched) - set(listeners):
            loop.remove_reader(listener)
        for listener in set(listeners) - set(self.watched):
            loop.add_reader(listener, self.accept, listener)
        self.watched = listeners

    def accept(self, listener: socket.socket) -> None:
        """Take up to ACCEPTS_A_TURN of the connections that wait at `listener`."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):  # mostly BlockingIOError: none is left
            for _ in range(ACCEPTS_A_TURN):
                connection, _ = listener.accept()
                task = loop.create_task(loop.connect_accepted_socket(self.make_protocol, connection))
                self.accepting.add(task)  # the event loop itself does not keep it
                task.add_done_callback(self.accepting.discard)

    def make_protocol(self) -> asyncio.Protocol:
        """What uvicorn's startup makes for each connection."""
        return self.config.http_protocol_class(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End as uvicorn does. It closes the connections that it has; one that came after that would hold it up."""
        self.watch(())
        for listener in self.listeners:
            listener.close()
        await asyncio.gather(*self.accepting, return_exceptions=True)
        await super().shutdown(sockets)
