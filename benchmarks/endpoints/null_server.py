"""Answer every HTTP request with a constant: the floor under each server's
figures.

    python -m endpoints.null_server [--port 8010]

Run it in benchmarks/. It does the least that an HTTP server in Python must do:
uvloop moves the bytes, and the parser of llhttp (httptools) finds where a
request ends. There is no framework and no model. The body of a request is read
to its end and not kept; the reply is as long as a real answer to one row. A
server cannot be faster than this by much, and a difference between two servers
that is smaller than this server's own figures means little. It sends no `100
Continue`: curl waits a second for that before it sends a large body. Writes
nothing. Ctrl-C stops it.
"""

import argparse
import asyncio
import errno
import os
import signal
import socket
import sys
from typing import cast

import httptools
import uvloop

REPLY = b'{"predictions":[[0.7607809901237488,0.23921898007392883]]}'
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n" % len(REPLY)
OK = HEAD + b"\r\n" + REPLY
BAD_REQUEST = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
BACKLOG = 4096  # connections that wait to be accepted


class NullProtocol(asyncio.Protocol):
    """Answers the requests of one connection, in their order; httptools calls on_message_complete."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.parser = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:  # it has its reply, and another protocol is not spoken here
            self.transport.close()
        except httptools.HttpParserError:
            if not self.transport.is_closing():  # else a client sent it after its last request
                self.transport.write(BAD_REQUEST)
                self.transport.close()

    def on_message_complete(self) -> None:
        """Answer one request; uvloop sends the replies to pipelined requests together."""
        keeps_alive = self.parser.should_keep_alive()
        is_head = self.parser.get_method() == b"HEAD"
        if keeps_alive and not is_head:
            self.transport.write(OK)
            return
        self.transport.write(HEAD + (b"\r\n" if keeps_alive else b"connection: close\r\n\r\n"))
        if not is_head:
            self.transport.write(REPLY)
        if not keeps_alive:
            self.transport.close()  # after what was written is sent

    def pause_writing(self) -> None:
        """Read no more requests of a client that does not read its replies."""
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()


async def serve(listener: socket.socket) -> None:
    server = await asyncio.get_running_loop().create_server(NullProtocol, sock=listener, backlog=BACKLOG)
    print(f"serving on http://127.0.0.1:{listener.getsockname()[1]}, Ctrl-C to stop", flush=True)
    await server.serve_forever()


def stop(*_: object) -> None:
    """End with exit code 0: a requested stop is no failure.

    SystemExit would be lost now and then: Python ignores what is raised inside a destructor.
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
        listener = socket.create_server(("127.0.0.1", port), backlog=BACKLOG)  # with SO_REUSEADDR
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        print(f"null_server: 127.0.0.1:{port} is in use; stop the program that listens there", file=sys.stderr)
        return 1
    uvloop.run(serve(listener))
    return 0


if __name__ == "__main__":
    sys.exit(main())
