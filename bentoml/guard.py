"""What `bentoml serve` leaves to us: refuse a taken port in one line, and end with the terminal or the supervisor.

BentoML starts a supervisor (circus), which opens the port and starts the workers that serve. Seen
with BentoML 1.4.39: on a taken port it shows a traceback; when its terminal closes (SIGHUP) it
restarts the workers and stays; when it is killed with -9 the workers go on serving, without it.
"""

import ctypes
import errno
import signal
import socket
import sys

import click
from bentoml.exceptions import BentoMLException
from circus.sighandler import SysHandler

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def refuse_taken_port(default_host: str, default_port: int) -> None:
    """Raise BentoMLException where the address that `bentoml serve` was asked to open is in use."""
    context = click.get_current_context(silent=True)
    given = context.params if context else {}  # on the command line, or in BENTOML_HOST and BENTOML_PORT
    host = default_host if given.get("host") is None else given["host"]
    port = default_port if given.get("port") is None else given["port"]
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            if getattr(error, "errno", None) == errno.EADDRINUSE:
                message = f"{host}:{port} is in use; stop that program first, or add --port and another number"
            else:
                message = f"{host}:{port} cannot be opened: {error}"
            raise BentoMLException(message) from error


def stop_on_hangup() -> None:
    """Make the supervisor take SIGHUP as it takes SIGTERM; its own way is to restart the workers."""
    SysHandler.handle_hup = SysHandler.handle_term


def end_with_supervisor() -> None:
    """Have the kernel send this worker SIGTERM when its supervisor ends; Linux only, elsewhere nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
