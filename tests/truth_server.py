"""A server whose latency, errors and answers are known exactly: the truth that the load generator is held against.

    python truth_server.py MANNER [--delay-s 0.02] [--period-s 1] [--every 4] [--cpu 0]

Prints its port, a free one, and serves until it is ended. Standard library only, one process, one thread.
To a row that starts with x it answers [[x / 100, 1 - x / 100]], except as MANNER says:

    constant    each reply comes `delay` after its request, however many are under way
    serial      one request after the other, `delay` each: at most 1 / delay per second
    stalling    at once, but in every `period` the whole server stands still for `delay`
    erring      every `every`-th reply is a 503
    wrong       every `every`-th answer is off by 0.01
    dropping    the connection is closed instead of every `every`-th reply
    truncating  the connection is closed after half of every `every`-th reply
    chunked     the body comes in chunks of one byte
    segmented   the reply comes in ten segments, `delay` apart
    closing     the connection is closed after each reply, as its header says
    silent      never replies
    garbage     replies with what is not HTTP
    dying       ends itself instead of its `every`-th reply
"""

import argparse
import asyncio
import json
import os
import time

SEGMENTS = 10


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
        self.answer(json.loads(body)["rows"][0][0])

    def answer(self, first: float) -> None:
        manner, delay_s = self.settings.manner, self.settings.delay_s
        bad_turn = Truth.asked % self.settings.every == 0
        off = 0.01 if bad_turn and manner == "wrong" else 0.0
        body = json.dumps({"answers": [[first / 100 + off, 1 - first / 100 - off]]}).encode()
        reply = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        if manner == "constant":
            asyncio.get_running_loop().call_later(delay_s, self.transport.write, reply)
            return
        if manner == "silent":
            return
        if manner == "serial":
            time.sleep(delay_s)
        elif manner == "garbage":
            reply = b"220 ready\r\n"
        elif manner == "chunked":
            chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
            reply = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
        elif manner == "closing":
            reply = reply.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
        elif manner == "segmented":
            for number in range(SEGMENTS):
                segment = reply[len(reply) * number // SEGMENTS : len(reply) * (number + 1) // SEGMENTS]
                asyncio.get_running_loop().call_later(number * delay_s, self.transport.write, segment)
            return
        elif bad_turn and manner == "erring":
            reply = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"
        elif bad_turn and manner == "dropping":
            reply = b""
        elif bad_turn and manner == "truncating":
            reply = reply[: len(reply) // 2]
        elif bad_turn and manner == "dying":
            os._exit(0)
        self.transport.write(reply)
        if manner == "closing" or (bad_turn and manner in ("dropping", "truncating")):
            self.transport.close()


def stall(loop: asyncio.AbstractEventLoop, start_s: float, settings: argparse.Namespace) -> None:
    loop.call_at(start_s + settings.period_s, stall, loop, start_s + settings.period_s, settings)
    time.sleep(max(0.0, start_s + settings.delay_s - loop.time()))


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manner")
    parser.add_argument("--delay-s", type=float, default=0.0)
    parser.add_argument("--period-s", type=float, default=1.0)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--cpu", type=int, help="the core to run on (default: any)")
    Truth.settings = parser.parse_args()
    if Truth.settings.cpu is not None:
        os.sched_setaffinity(0, {Truth.settings.cpu})
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Truth, "127.0.0.1", 0)
    if Truth.settings.manner == "stalling":
        first_s = loop.time() + Truth.settings.period_s / 2
        loop.call_at(first_s, stall, loop, first_s, Truth.settings)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
