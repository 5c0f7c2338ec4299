"""Ask a running server once, by either protocol: for checks, not for measurements."""

import http.client
from typing import Any

import numpy as np

from client import grpc_connection
from endpoints.base import LOOPBACK, Endpoint, Request, ServerError


def send(port: int, request: Request, timeout_s: float = 30.0, host: str = LOOPBACK) -> tuple[int, bytes]:
    """Send one request on a new connection; return the status and the body. OSError if no server answers."""
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        headers = {"Content-Type": request.content_type, **request.headers}
        connection.request(request.method, request.path, request.body, headers)
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def ask(endpoint: Endpoint, rows: list[Any], version: str) -> np.ndarray:
    """Return the probabilities (n, 2) that a running server gives.

    Raises ServerError on any status but 200 and on a reply without probabilities, OSError if no server answers.
    """
    call = grpc_connection.send if endpoint.protocol == "gRPC" else send
    try:
        status, body = call(endpoint.port, endpoint.full_request(rows, version), host=endpoint.host)
    except http.client.HTTPException as error:
        raise ServerError(f"{endpoint.name}: its answer is not HTTP: {error!r}") from error
    if status != 200:
        raise ServerError(f"{endpoint.name}: answered {status} to version {version}: {body[:200]!r}")
    try:
        return endpoint.decode(body)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ServerError(f"{endpoint.name}: no probabilities in its answer {body[:200]!r}") from error
