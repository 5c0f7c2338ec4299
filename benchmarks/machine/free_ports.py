"""Find free ports of this machine, for servers that are about to start."""

import contextlib
import os
import random
import socket
from pathlib import Path

IANA_DYNAMIC_PORTS = 49_152  # RFC 6335, section 6: from here on systems give ports to connections
LEAST_PORT = 10_000
CHOICE = 10_000  # ports


def find_free_ports(roles: list[str]) -> dict[str, int]:
    """Return a free loopback port for each role, none twice.

    They lie below the range from which the system gives ports to connections: one of those could take a port before
    the server does. Each stays reserved for a minute: no process finds it again, a server may listen on it.
    FREE_PORTS="20000-21999" narrows the choice. OSError if too few are free.
    """
    with contextlib.ExitStack() as stack:
        ports: list[int] = []
        candidates = list(read_free_ports())
        random.SystemRandom().shuffle(candidates)  # another program that does the same chooses others
        for port in candidates:
            if len(ports) == len(roles):
                break
            held = socket.socket()
            try:
                held.bind(("127.0.0.1", port))
            except OSError:
                held.close()
                continue
            stack.enter_context(held)
            reserve(held)
            ports.append(port)
        if len(ports) < len(roles):
            raise OSError(f"{len(roles)} free ports are needed from {read_free_ports()}, and there are {len(ports)}")
        return dict(zip(roles, ports, strict=True))


def reserve(bound: socket.socket) -> None:
    """Leave a closed connection on the port that the socket is bound to.

    While it waits out its last packets (TIME-WAIT: RFC 9293, section 3.3.2; a minute on Linux), only sockets with
    SO_REUSEADDR can be bound to the port. Servers set it, `find_free_ports` does not.
    """
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.listen(1)
    with socket.create_connection(bound.getsockname()), bound.accept()[0] as first_to_close:
        first_to_close.shutdown(socket.SHUT_RDWR)


def read_free_ports() -> range:
    """Return the ports that `find_free_ports` may give: FREE_PORTS, or the 10,000 below the system's own range."""
    if given := os.environ.get("FREE_PORTS"):
        first, _, last = given.partition("-")
        return range(int(first), int(last) + 1)
    system_range = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first_of_system = int(system_range.read_text().split()[0]) if system_range.exists() else IANA_DYNAMIC_PORTS
    end = max(first_of_system, LEAST_PORT + CHOICE)
    return range(end - CHOICE, end)
