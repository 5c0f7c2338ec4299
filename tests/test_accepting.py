"""New users are heard while many are connected: accepting.py of two folders, on a real event loop."""

import asyncio
import socket

import pytest
import uvicorn
import uvloop

from endpoints.base import REPOSITORY_DIR
from helpers import DEADLINE_S, load_script

COPIES = [REPOSITORY_DIR / folder / "accepting.py" for folder in ("bentoml", "tfserving/local")]
NEW = 60
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def accepting():
    return load_script(COPIES[1])


async def application(_scope, _receive, send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


def connect(address: tuple[str, int]) -> socket.socket:
    return socket.create_connection(address, timeout=DEADLINE_S)


def with_ticks(server_class: type[uvicorn.Server]) -> type[uvicorn.Server]:
    """Return a subclass that sets `ticked` whenever uvicorn has looked around, which it does every 0.1 s."""

    class Server(server_class):
        ticked = asyncio.Event()

        async def on_tick(self, counter: int) -> bool:
            should_end = await super().on_tick(counter)
            self.ticked.set()
            return should_end

    return Server


def turns_until_accepted(server_class: type[uvicorn.Server], connected: int) -> int:
    """Return the turns of the event loop that NEW connections take to be accepted while `connected` are there.

    Every connection, old and new, gets its answer, and afterwards the server ends and no longer listens.
    """

    async def run() -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        address = listener.getsockname()
        server = with_ticks(server_class)(
            uvicorn.Config(application, http="httptools", lifespan="off", log_level="error")
        )
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        clients = []
        for number in (connected, NEW):
            clients += [connect(address) for _ in range(number)]
            turns = 0
            while len(server.server_state.connections) < len(clients):
                await asyncio.sleep(0)
                turns += 1
            server.ticked.clear()
            await server.ticked.wait()  # now it knows how many are connected
        for client in clients:
            client.sendall(REQUEST)
            reply = await asyncio.to_thread(client.recv, 1000)
            assert reply.startswith(b"HTTP/1.1 200"), reply
        server.should_exit = True
        await asyncio.wait_for(serving, DEADLINE_S)
        with pytest.raises(ConnectionRefusedError):
            connect(address)
        for client in clients:
            client.close()
        return turns

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())


def test_a_busy_server_takes_new_connections_together(accepting):
    assert turns_until_accepted(uvicorn.Server, 100) >= NEW  # why accepting.py is there
    assert turns_until_accepted(accepting.Server, 100) <= NEW / 5


def test_a_server_that_is_not_busy_accepts_as_uvicorn_does(accepting, monkeypatch):
    taken = []
    monkeypatch.setattr(accepting.Server, "accept", lambda _, listener: taken.append(listener))
    turns_until_accepted(accepting.Server, accepting.BUSY_CONNECTIONS - NEW)
    assert not taken


def test_connections_accepted_in_the_last_turn_do_not_hold_up_the_end(accepting):
    class EndsAtOnce(with_ticks(accepting.Server)):
        late = False

        async def on_tick(self, counter: int) -> bool:
            if self.late:
                self.accept(self.listeners[0])
            return self.late or await super().on_tick(counter)

    async def run() -> list[bytes]:
        listener = socket.create_server(("127.0.0.1", 0))
        server = EndsAtOnce(uvicorn.Config(application, http="httptools", lifespan="off", log_level="error"))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await server.ticked.wait()
        # No turn of the loop between these, so that it is accept() that takes them.
        clients = [connect(listener.getsockname()) for _ in range(10)]
        server.late = True
        await asyncio.wait_for(serving, DEADLINE_S)
        return [await asyncio.to_thread(client.recv, 1) for client in clients]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(run()) == [b""] * 10


def test_the_three_copies_are_the_same():
    assert len({path.read_bytes() for path in COPIES}) == 1
