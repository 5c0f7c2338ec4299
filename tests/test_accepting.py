"""New users are heard while many are connected: bentoml/, onnx/ and tfserving/accepting.py, on a real event loop."""

import asyncio
import importlib.util
import socket

import pytest
import uvicorn
import uvloop
from endpoint import REPOSITORY_DIR

COPIES = [REPOSITORY_DIR / folder / "accepting.py" for folder in ("bentoml", "onnx", "tfserving")]
NEW = 60
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def accepting():
    spec = importlib.util.spec_from_file_location("onnx_accepting", COPIES[1])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def application(_scope, _receive, send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


def turns_until_accepted(server_class: type[uvicorn.Server], connected: int) -> int:
    """Return the turns of the event loop that NEW connections take to be accepted while `connected` are there.

    Every connection, old and new, gets its answer, and afterwards the server ends and no longer listens.
    """

    async def run() -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        address = listener.getsockname()
        server = server_class(uvicorn.Config(application, http="httptools", lifespan="off", log_level="error"))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        clients = []
        for number in (connected, NEW):
            clients += [socket.create_connection(address, timeout=5) for _ in range(number)]
            turns = 0
            while len(server.server_state.connections) < len(clients):
                await asyncio.sleep(0)
                turns += 1
            await asyncio.sleep(0.3)  # uvicorn looks around every 0.1 s
        for client in clients:
            client.sendall(REQUEST)
            reply = await asyncio.to_thread(client.recv, 1000)
            assert reply.startswith(b"HTTP/1.1 200"), reply
        server.should_exit = True
        await asyncio.wait_for(serving, 5)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, timeout=5)
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
    class EndsAtOnce(accepting.Server):
        late = False

        async def on_tick(self, counter: int) -> bool:
            if self.late:
                self.accept(self.listeners[0])
            return self.late or await super().on_tick(counter)

    async def run() -> list[bytes]:
        listener = socket.create_server(("127.0.0.1", 0))
        server = EndsAtOnce(uvicorn.Config(application, http="httptools", lifespan="off", log_level="error"))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await asyncio.sleep(0.3)
        # No turn of the loop between these, so that it is accept() that takes them.
        clients = [socket.create_connection(listener.getsockname(), timeout=5) for _ in range(10)]
        server.late = True
        await asyncio.wait_for(serving, 5)
        return [await asyncio.to_thread(client.recv, 1) for client in clients]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(run()) == [b""] * 10


def test_the_three_copies_are_the_same():
    assert len({path.read_bytes() for path in COPIES}) == 1
