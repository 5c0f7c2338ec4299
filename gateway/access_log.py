"""Keep HAProxy's log: gateway.py starts this, and HAProxy writes to it.

    haproxy … | python access_log.py FILE BYTES

Appends each line that is a request, that is JSON, to FILE, or prints it where
FILE is -. A FILE that would become larger than BYTES first becomes FILE.1, in
the place of the FILE.1 before it. Ends when HAProxy has ended.
"""

import contextlib
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO


def keep(lines: Iterable[bytes], path: Path, limit_bytes: int) -> None:
    """Append the requests of `lines` to the file at `path`; what a full disk does not take is lost."""
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
        signal.signal(number, signal.SIG_IGN)  # the last lines come while HAProxy ends
    name, limit_bytes = sys.argv[1], int(sys.argv[2])
    with contextlib.suppress(BrokenPipeError):
        if name == "-":
            show(sys.stdin.buffer, sys.stdout.buffer)
        else:
            keep(sys.stdin.buffer, Path(name), limit_bytes)


if __name__ == "__main__":
    main()
