"""Whatever answers at an address: found, asked, and left running."""

import time

import psutil

from endpoints.base import Endpoint, ServerError
from servers.parity import find_problem

POLL_INTERVAL_S = 0.1
WAIT_S = 5.0  # for the first right answer of what should have been answering before


class RemoteServer:
    """What answers at an endpoint's host, as a context manager with the face of ServerProcess.

    `ready_s` holds the seconds until the first correct prediction; what a start takes is not known. Raises ServerError
    where none comes within WAIT_S.
    """

    kind = "cluster"
    is_seen = False  # its processes are others' business

    def __init__(self, endpoint: Endpoint):
        self.endpoint = endpoint
        self.endpoint.settings = {"address": f"http://{endpoint.host}:{endpoint.port}{endpoint.prefix}"}
        self.listens_s = self.ready_s = float("nan")

    @property
    def command(self) -> str:
        return f"(asked at {self.endpoint.settings['address']})"

    def __enter__(self) -> "RemoteServer":
        started_s = time.perf_counter()
        while problem := find_problem(self.endpoint, "1"):
            if time.perf_counter() > started_s + WAIT_S:
                raise ServerError(
                    f"{self.endpoint.name}: no right answer at {self.endpoint.settings['address']}: {problem}"
                )
            time.sleep(POLL_INTERVAL_S)
        self.listens_s = self.ready_s = time.perf_counter() - started_s
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask_to_end(self) -> None:
        """Nothing: whoever started it ends it."""

    def processes(self) -> list[psutil.Process]:
        return []
