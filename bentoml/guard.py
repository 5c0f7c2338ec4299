"""What `bentoml serve` leaves to us: refuse a taken port in one line, end with the terminal or the supervisor, refuse
what is too much, and let go of a request that is answered.

BentoML starts a supervisor (circus), which opens the port and starts the workers that serve. Seen
with BentoML 1.4.39: on a taken port it shows a traceback; when its terminal closes (SIGHUP) it
restarts the workers and stays; when it is killed with -9 the workers go on serving, without it; its
`traffic.max_concurrency` refuses nobody, see `limit_connections`; and a worker keeps every request's timer,
and all that hangs on it, for 60 s.
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


def limit_connections(limit: int) -> None:
    """Make a worker answer 503 while it has `limit` connections or more, and close the one that asked.

    `traffic.max_concurrency` counts requests between their first and last `await`. A model that is asked without
    any is never counted twice, however many wait for the event loop: 1,200 connections waited 4.6 s each for their
    replies, and none was refused. BentoML hands no option of this kind on to uvicorn, so it becomes the default.
    """
    uvicorn.Config.__init__ = functools.partialmethod(uvicorn.Config.__init__, limit_concurrency=limit)


def accept_faster() -> None:
    """Make a worker, which is about to start uvicorn, take more new connections at once while it is busy."""
    uvicorn.Server = connections.Server


def cancel_timers() -> None:
    """Make BentoML cancel a request's timer (`traffic.timeout`) when the reply begins.

    Its own stays until it is due and keeps what the request left: 24 objects, for 60 s. At 5,000 requests/s that
    is seven million, and each full garbage collection walks through them and stops the server for as long.
    """
    TimeoutMiddleware.__call__ = answer_in_time


async def answer_in_time(middleware: TimeoutMiddleware, scope, receive, send) -> None:
    """Answer by the application, or with 504 where it has not begun to within the time; ASGI."""
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
