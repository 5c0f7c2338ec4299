"""The floor: a server without a model, on the same HTTP stack as onnx/server.py.

    python null_server.py [--port 8010]

Reads the whole body of a POST to any path and answers a constant, as long as a real answer to one row. What a
benchmark measures here is HTTP and the benchmark itself; no difference between models smaller than that means
anything. Writes nothing. Ctrl-C stops it.
"""

import argparse
import errno
import os
import signal
import socket
import sys

import uvicorn

REPLY = b'{"predictions":[[0.7607809901237488,0.23921898007392883]]}'
HEADERS = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(REPLY))]
UVICORN_SETTINGS = {  # those of onnx/server.py: tests/test_null_server.py compares them
    "loop": "uvloop",
    "http": "httptools",
    "ws": "none",
    "lifespan": "off",
    "access_log": False,
    "log_level": "warning",
    "server_header": False,
    "timeout_keep_alive": 75,
    "timeout_graceful_shutdown": 2,
}


async def application(_scope, receive, send) -> None:
    """Read the body to its end, keep none of it, answer the constant."""
    more_body = True
    while more_body:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        more_body = message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": REPLY})


def stop(*_) -> None:
    """End with exit code 0: being asked to stop is no failure. uvicorn hands the signal on after its clean-up.

    Raising SystemExit instead would be lost now and then: Python ignores what is raised inside a destructor.
    """
    os._exit(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8010, help="port to listen on, at 127.0.0.1 (default: 8010)")
    port = parser.parse_args().port
    if not 0 <= port <= 65535:
        parser.error(f"--port {port}: expected 0 (any free port) to 65535")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        listener = socket.create_server(("127.0.0.1", port))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        print(f"null_server: 127.0.0.1:{port} is in use; stop the program that listens there", file=sys.stderr)
        return 1
    print(f"serving on http://127.0.0.1:{listener.getsockname()[1]}, Ctrl-C to stop", flush=True)
    uvicorn.Server(uvicorn.Config(application, **UVICORN_SETTINGS)).run(sockets=[listener])
    return 0


if __name__ == "__main__":
    sys.exit(main())
