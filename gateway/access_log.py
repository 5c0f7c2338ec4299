"""Keep HAProxy's log; gateway.py starts this, and HAProxy sends to it.

    haproxy … | python access_log.py SOCKET FILE BYTES

Appends each datagram that is a request (JSON) to FILE as a line, or prints it
if FILE is -. SOCKET is the number of an open UDP socket. A FILE that would
become larger than BYTES first replaces FILE.1. Ends when HAProxy, which holds
the pipe, has ended.

Why not through the pipe: when two of HAProxy's threads write to it at the same
time, one gives up, and its line is lost (fd_write_frag_line in fd.c).
"""

import contextlib
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

DATAGRAM_BYTES = 8192  # haproxy.cfg's lines are no longer
MOST_LINES = 1000  # read at once
# Before each reading: woken for every line, this process would take HAProxy's core while the user waits. In that time
# the socket's buffer takes 330 lines on a usual Linux: 66,000 a second, if they come evenly.
READ_EVERY_S = 0.005
SO_MEMINFO, MEMINFO = 55, struct.Struct("9I")  # linux/sock_diag.h: the last number is how many datagrams did not fit


def receive(log: socket.socket, pipe: int) -> Iterator[list[bytes]]:
    """Yield the requests that have come to `log` as lines, until the other end of `pipe` is closed and none is left.

    Prints how many were lost: those that came while the socket's buffer was full.
    """
    ended, lost = False, 0
    while not ended:
        ready, _, _ = select.select([log, pipe], [], [])
        time.sleep(READ_EVERY_S)
        ended = pipe in ready and not os.read(pipe, DATAGRAM_BYTES)
        lines = []
        with contextlib.suppress(BlockingIOError):
            while len(lines) < MOST_LINES or ended:
                lines.append(log.recv(DATAGRAM_BYTES, socket.MSG_DONTWAIT).rstrip(b"\n") + b"\n")
        if requests := [line for line in lines if line.startswith(b"{")]:
            yield requests
        if (drops := count_drops(log)) > lost:
            print(f"access log: {drops - lost} lines lost; raise net.core.rmem_max", file=sys.stderr, flush=True)
            lost = drops


def count_drops(log: socket.socket) -> int:
    """Return how many datagrams did not fit into the socket's buffer so far; 0 where the system does not tell."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # before Linux 4.12
            return MEMINFO.unpack(log.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, MEMINFO.size))[-1]
    return 0


def keep(batches: Iterable[list[bytes]], path: Path, limit_bytes: int) -> None:
    """Append lines to the file at `path`; those that a full disk does not accept are lost."""
    file, size = None, 0
    for lines in batches:
        whole = b"".join(lines)
        for data in [whole] if size + len(whole) <= limit_bytes else lines:
            with contextlib.suppress(OSError):
                if file is None or size + len(data) > limit_bytes:
                    if file is not None:
                        file.close()
                        file = None
                    if path.exists() and path.stat().st_size + len(data) > limit_bytes:
                        path.replace(path.with_name(f"{path.name}.1"))
                    file = path.open("ab", buffering=0)
                    size = path.stat().st_size
                size += file.write(data)


def show(batches: Iterable[list[bytes]], output: BinaryIO) -> None:
    """Print lines."""
    for lines in batches:
        output.writelines(lines)
        output.flush()


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the last lines arrive while HAProxy ends
    number, name, limit_bytes = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    batches = receive(socket.socket(fileno=number), sys.stdin.fileno())
    with contextlib.suppress(BrokenPipeError):
        if name == "-":
            show(batches, sys.stdout.buffer)
        else:
            keep(batches, Path(name), limit_bytes)


if __name__ == "__main__":
    main()
