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
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

DATAGRAM_BYTES = 65536
SO_RXQ_OVFL = 40  # linux/socket.h: with each datagram comes how many did not fit into the socket's buffer so far


def receive(log: socket.socket, pipe: int) -> Iterator[bytes]:
    """Yield the datagrams of `log` as lines, until the other end of `pipe` is closed and none is left.

    Prints how many were lost: those that came while the socket's buffer was full.
    """
    if sys.platform == "linux":
        log.setsockopt(socket.SOL_SOCKET, SO_RXQ_OVFL, 1)
    ended, lost = False, 0
    while not ended:
        ready, _, _ = select.select([log, pipe], [], [])
        ended = pipe in ready and not os.read(pipe, DATAGRAM_BYTES)
        known = lost
        with contextlib.suppress(BlockingIOError):
            while True:
                line, extra, _, _ = log.recvmsg(DATAGRAM_BYTES, socket.CMSG_SPACE(4), socket.MSG_DONTWAIT)
                lost = max([lost, *(int.from_bytes(count, sys.byteorder) for _, _, count in extra)])
                yield line.rstrip(b"\n") + b"\n"
        if lost > known:
            print(f"access log: {lost - known} lines lost; raise net.core.rmem_max", file=sys.stderr, flush=True)


def keep(lines: Iterable[bytes], path: Path, limit_bytes: int) -> None:
    """Append the requests of `lines` to the file at `path`; lines that a full disk does not accept are lost."""
    file, size = None, 0
    for line in lines:
        if not line.startswith(b"{"):
            continue
        with contextlib.suppress(OSError):
            if file is None or size + len(line) > limit_bytes:
                if file is not None:
                    file.close()
                    file = None
                if path.exists() and path.stat().st_size + len(line) > limit_bytes:
                    path.replace(path.with_name(f"{path.name}.1"))
                file = path.open("ab", buffering=0)
                size = path.stat().st_size
            size += file.write(line)


def show(lines: Iterable[bytes], output: BinaryIO) -> None:
    """Print the requests of `lines`."""
    for line in lines:
        if line.startswith(b"{"):
            output.write(line)
            output.flush()


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the last lines arrive while HAProxy ends
    number, name, limit_bytes = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    lines = receive(socket.socket(fileno=number), sys.stdin.fileno())
    with contextlib.suppress(BrokenPipeError):
        if name == "-":
            show(lines, sys.stdout.buffer)
        else:
            keep(lines, Path(name), limit_bytes)


if __name__ == "__main__":
    main()
