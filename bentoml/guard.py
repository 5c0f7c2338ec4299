"""Guard `bentoml serve`: against a taken port, a lost terminal or supervisor, too many clients, and kept timers.

BentoML starts a supervisor (circus), which opens the port and starts the workers that serve. Observed with BentoML
1.4.39: on a taken port it prints a traceback; when its terminal closes (SIGHUP) it restarts the workers and stays;
when it is killed with -9 the workers go on serving without it; its `traffic.max_concurrency` refuses no client, see
`limit_connections`; and a worker keeps the timer of every request, and the objects that it refers to, for 60 s.
"""

import asyncio
import ctypes
import errno
import functools
import signal
import socket
import sys

import click
import connections
import uvicorn
from bentoml._internal.server.http.traffic import TimeoutMiddleware
from bentoml.exceptions import BentoMLException
from circus.sighandler import SysHandler
from starlette.responses import JSONResponse

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def refuse_taken_port(default_host: str, default_port: int) -> None:
    """Raise BentoMLException if the address that `bentoml serve` must open is in use."""
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
    """Make the supervisor end on SIGHUP as on SIGTERM; by default it restarts the workers."""
    SysHandler.handle_hup = SysHandler.handle_term


def end_with_supervisor() -> None:
    """Have the kernel send this worker SIGTERM when its supervisor ends; does nothing except on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def limit_connections(limit: int) -> None:
    """Make a worker with `limit` connections or more answer 503 and close the connection.

    `traffic.max_concurrency` counts requests between their first and last `await`. A method without any `await` never
    counts more than one, however many wait for the event loop: 1,200 connections waited 4.6 s each for their replies,
    and none was refused. BentoML passes no such option to uvicorn, so this changes uvicorn's default.
    """
    uvicorn.Config.__init__ = functools.partialmethod(uvicorn.Config.__init__, limit_concurrency=limit)


def accept_faster() -> None:
    """Make a worker that is about to start uvicorn accept several new connections at once while it is busy."""
    uvicorn.Server = connections.Server


def cancel_timers() -> None:
    """Make BentoML cancel a request's timer (`traffic.timeout`) when the reply begins.

    BentoML keeps it, and with it 24 objects of the request, for 60 s. At 5,000 requests/s these are seven million
    objects, and each full garbage collection walks through them and halts the server.
    """
    TimeoutMiddleware.__call__ = answer_in_time


async def answer_in_time(middleware: TimeoutMiddleware, scope, receive, send) -> None:
    """Answer by the application, or with 504 if it has not started to in time; ASGI."""
    if scope["type"] != "http":
        await middleware.app(scope, receive, send)
        return
    try:
        async with asyncio.timeout(middleware.timeout) as deadline:

            async def send_and_rest(message: dict) -> None:
                deadline.reschedule(None)
                await send(message)

            await middleware.app(scope, receive, send_and_rest)
    except TimeoutError:
        if not deadline.expired():
            raise
        error = {"error": f"Not able to process the request in {middleware.timeout} seconds"}
        await JSONResponse(error, status_code=504)(scope, receive, send)
