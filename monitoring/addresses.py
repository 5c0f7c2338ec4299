"""Where collect.py and monitor.py listen: at an address and a port, or for HAProxy at a Unix socket."""

import argparse
import errno
import os
import socket
from contextlib import suppress
from pathlib import Path

Address = tuple[str, int] | Path

RECORDS_SOCKET = "records.sock"  # in the state folder
RECEIVE_BUFFER = 1 << 20  # bytes, of a TCP connection; the kernel may give less
LONGEST_PATH = 103  # bytes, of a Unix socket: macOS permits 103, Linux 107


def parse_address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an address and a port, as in 127.0.0.1:8405")
    return host.strip("[]"), int(port)


def parse_records_address(text: str) -> Address:
    """Return the path of a Unix socket, which has a /, or an address and a port."""
    if "/" in text:
        return Path(text).resolve()
    try:
        return parse_address(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected a path with a /, as in ./records.sock, or an address and a port, as in 127.0.0.1:8406"
        ) from None


def join(address: Address) -> str:
    """Return the address as one types it; of a path the shorter one, from the root or from this process's folder."""
    if isinstance(address, Path):
        path = min(str(address), os.path.relpath(address), key=len)
        return path if "/" in path else f"./{path}"
    return f"{address[0]}:{address[1]}"


def explain(address: Address, error: OSError, option: str) -> str:
    """Return one line that says why nothing can listen there, and what to do."""
    remedy = "stop what listens there, or " if error.errno == errno.EADDRINUSE else ""
    reason = os.strerror(error.errno) if (error.errno or 0) > 0 else error.strerror  # without the address again
    return f"{join(address)}: {reason}; {remedy}choose another {option}"


def listen(address: Address) -> socket.socket:
    """Return a socket that listens for HAProxy; OSError where the address is taken, or no socket can be made there.

    A Unix socket at which nobody listens any more, as after kill -9, is replaced. The umask says who may connect to it.
    """
    if not isinstance(address, Path):
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        listener = socket.create_server(address, family=family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)  # of its connections
        return listener
    path = join(address)
    if len(os.fsencode(path)) > LONGEST_PATH:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    if address.is_socket() and not _has_listener(path):
        address.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(path)
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


def _has_listener(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # it may be busy
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
        except BlockingIOError:
            pass
    return True


def stop_listening(listener: socket.socket) -> None:
    """Close a listening socket and remove its file; nothing if that has been done."""
    with suppress(OSError):
        if listener.family == socket.AF_UNIX and (path := listener.getsockname()):
            Path(path).unlink()
    listener.close()
