"""A real server whose truth is known, for the load generator's tests on real sockets.

    python truth_server.py constant|dropping [--delay-s 0.02] [--descriptor 3]

Prints its port, a free one, and serves until it is ended. Standard library only, one process, one thread. To a row
that starts with x it answers [[x / 100, 1 - x / 100]], `delay` after its request however many are unanswered;
`dropping` closes the connection instead of every fourth reply. `--descriptor` is a socket that listens already;
from it nothing is accepted until a line comes on standard input.
"""

import argparse
import asyncio
import json
import socket
import sys

EVERY = 4
LISTEN_BACKLOG = 128


class Truth(asyncio.Protocol):
    """One connection; requests come one at a time, with a Content-Length."""

    settings: argparse.Namespace
    asked = 0  # by all connections together

    def connection_made(self, transport):
        self.transport = transport
        self.data = b""

    def data_received(self, data):
        self.data += data
        head, end, body = self.data.partition(b"\r\n\r\n")
        if not end or len(body) < int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]):
            return
        self.data = b""
        Truth.asked += 1
        if self.settings.manner == "dropping" and Truth.asked % EVERY == 0:
            self.transport.close()
            return
        first = json.loads(body)["rows"][0][0]
        reply = json.dumps({"answers": [[first / 100, 1 - first / 100]]}).encode()
        reply = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(reply), reply)
        asyncio.get_running_loop().call_later(self.settings.delay_s, self.transport.write, reply)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manner", choices=("constant", "dropping"))
    parser.add_argument("--delay-s", type=float, default=0.0)
    parser.add_argument("--descriptor", type=int)
    Truth.settings = parser.parse_args()
    listener = socket.create_server(("127.0.0.1", 0))
    if Truth.settings.descriptor is not None:
        listener = socket.socket(fileno=Truth.settings.descriptor)
        sys.stdin.readline()
    server = await asyncio.get_running_loop().create_server(Truth, sock=listener, backlog=LISTEN_BACKLOG)
    print(listener.getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
