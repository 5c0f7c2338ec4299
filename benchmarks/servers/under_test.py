"""A started and verified server, the requests that it is asked, and the windows of load that are put on it."""

import contextlib
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import psutil

from client.load_generator import Exchange, LoadGenerator, constant_arrivals, make_exchanges, poisson_arrivals
from endpoints.reference import load_expected, load_test_rows
from figures.result_file import Window, encode_window
from machine.load import MachineLoad, process_cpu_s
from servers.containers import ContainerServer
from servers.process import ServerProcess
from servers.remote import RemoteServer

AnyServer = ServerProcess | ContainerServer | RemoteServer
VERSION = "1"
WARMUP_CONNECTIONS = 16
WARMUP_WINDOW_S = 0.3
WARMUP_CHANGE = 0.1
OPEN_CONNECTIONS = 64  # unanswered requests of an open loop; one that finds none free waits, and that counts


class ServerUnderTest:
    """A started server. `cpus` are the cores of server and client together, None if they are not pinned.

    `goes_first`: both have a higher priority than other programs, which then disturb them only by what the
    hypervisor takes and by what keeps the client waiting for its core.
    """

    def __init__(self, server: AnyServer, cpus: set[int] | None, goes_first: bool = False):
        self.server = server
        self.goes_first = goes_first
        self.cpus = cpus
        self.endpoint = server.endpoint
        self.name = server.endpoint.name
        self.fastest = 0.0  # requests per second seen in a closed loop, one row a request
        self._processes: list[psutil.Process] = []
        self._ended_cpu_s = 0.0  # used by processes that have ended since
        self._cpu_s: dict[int, float] = {}  # last seen, by process
        self.look_again()

    def look_again(self) -> None:
        """Find the server's processes again: it may have started some, whose CPU time counts from then on.

        Takes tens of milliseconds, so it is done once a round.
        """
        self._processes = self.server.processes()

    @cache  # noqa: B019
    def exchanges(self, rows_per_request: int) -> list[Exchange]:
        """Requests of `rows_per_request` rows; the 114 test rows are repeated if one request needs more."""
        rows, _ = load_test_rows()
        times = -(-rows_per_request // len(rows))
        expected = np.concatenate([load_expected(VERSION)] * times)
        return make_exchanges(self.endpoint, VERSION, rows * times, expected, rows_per_request)

    def cpu_s(self) -> float:
        """CPU seconds, user and system, that the server's process tree has used so far."""
        for process in self._processes:
            try:
                self._cpu_s[process.pid] = process_cpu_s(process.pid)
            except ProcessLookupError:
                self._ended_cpu_s += self._cpu_s.pop(process.pid, 0.0)
        return self._ended_cpu_s + sum(self._cpu_s.values())

    def rss_bytes(self) -> int:
        """Resident memory of the server's process tree; pages that processes share count in each."""
        total = 0
        for process in self._processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        return total

    def observe(self, run: Callable[[], Window], **facts: Any) -> dict[str, Any]:
        """Do one `run` of the load generator and return its window for the result file."""
        cpu_before_s = self.cpu_s()
        with MachineLoad(self.cpu_s, self.cpus) as machine:
            window = run()
        is_told_apart = self.server.is_seen and not self.goes_first
        taken = machine.foreign_share if is_told_apart else machine.stolen_share
        return encode_window(
            window,
            endpoint=self.name,
            server_cpu_s=self.cpu_s() - cpu_before_s,
            server_rss_bytes=self.rss_bytes(),
            foreign_share=round(machine.foreign_share, 4),
            disturbed_share=round(max(taken, machine.waiting_share), 4),
            **facts,
        )

    def warm_up(self, limit_s: float) -> float:
        """Load the server until it is as fast as it gets; return the seconds that took.

        A Java server compiles itself while it runs and speeds up for seconds. The rule: stop when three
        windows of WARMUP_WINDOW_S in a row differ by less than WARMUP_CHANGE, at the latest after `limit_s`.
        """
        started_s = time.perf_counter()
        rates: list[float] = []
        with LoadGenerator(self.endpoint, self.exchanges(1), WARMUP_CONNECTIONS) as load:
            while time.perf_counter() - started_s < limit_s:
                rates.append(load.run_closed(WARMUP_WINDOW_S).rate)
                if len(rates) > 2 and max(rates[-3:]) < (1 + WARMUP_CHANGE) * min(rates[-3:]):
                    break
        self.look_again()
        return time.perf_counter() - started_s

    def measure_closed(
        self,
        connections: int,
        rows: int,
        number: int,
        seconds: float,
        requests: int,
        longest_s: float,
        warmup_seconds: float,
    ) -> dict[str, Any]:
        """Return round `number`'s window of at least `seconds`, and of `requests` if they take at most `longest_s`."""
        with LoadGenerator(self.endpoint, self.exchanges(rows), connections) as load:
            if warmup_seconds:
                load.run_closed(warmup_seconds)
            window = self.observe(
                lambda: load.run_closed(seconds, requests, longest_s),
                load="closed", round=number, rows_per_request=rows, nominal_rate=0.0,
            )  # fmt: skip
        if rows == 1:
            answers = sum(count for _, count in window["latency_us_counts"])
            self.fastest = max(self.fastest, answers / max(window["elapsed_s"], 1e-9))
        return window

    def measure_open(
        self, rate: float, number: int, seconds: float, arrivals: str, warmup_seconds: float
    ) -> dict[str, Any]:
        """Return sweep `number`'s window at `rate` requests a second, due as `arrivals` says: poisson or constant."""
        with LoadGenerator(self.endpoint, self.exchanges(1), OPEN_CONNECTIONS) as load:
            if warmup_seconds:
                load.run_closed(warmup_seconds)
            seconds = max(seconds, 1 / rate)
            due_s = (
                poisson_arrivals(rate, seconds, seed=number)
                if arrivals == "poisson"
                else constant_arrivals(rate, seconds)
            )
            return self.observe(
                lambda: load.run_open(due_s), load="open", round=number, rows_per_request=1, nominal_rate=rate
            )
