"""Measure one server with two clients, Locust and our own load generator, and
explain why their figures differ.

    python cross_check.py --endpoint onnx --connections 1 8 --seconds 6

Both clients keep the same number of connections busy (closed loop) on the same
core, one after the other, on one server that stays up: half of the generator's
time before Locust, half after, so that a drift would show. Every reply is
checked. Exits non-zero if one failed or was wrong. Writes nothing.
"""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import machine.packages  # noqa: F401

# isort: split
import numpy as np
from rich.console import Console
from rich.table import Table

from client.load_generator import LoadGenerator, make_exchanges
from client.load_record import LoadRecord
from client.locust_process import run_locust
from endpoints.base import ServerError, describe_choices, load_endpoints
from endpoints.reference import load_expected, load_test_rows
from machine.environment import split_cpus
from machine.signals import interrupt_on_sigterm
from servers.process import ServerProcess

VERSION = "1"
BUSY_SHARE = 0.9  # of its core; above it the client sets the pace


@dataclass
class Observation:
    """What one client observed at one number of connections."""

    client: str
    latencies_s: np.ndarray  # (n,), right answers
    elapsed_s: float
    cpu_s: float  # the client's
    failed: int
    wrong: int

    @property
    def rate(self) -> float:
        """Right answers per second."""
        return len(self.latencies_s) / self.elapsed_s if self.elapsed_s else 0.0

    @property
    def cpu_us(self) -> float:
        """Microseconds of the client's core per right answer."""
        return self.cpu_s / max(len(self.latencies_s), 1) * 1e6

    @property
    def in_flight(self) -> float:
        """Unanswered requests on average: rate times mean latency (Little, "A proof for the queuing formula", 1961)."""
        return self.latencies_s.sum() / self.elapsed_s if self.elapsed_s else 0.0


def observe_generator(endpoint, connections: int, seconds: float) -> Observation:
    """Run our own closed loop."""
    exchanges = make_exchanges(endpoint, VERSION, load_test_rows()[0], load_expected(VERSION))
    with LoadGenerator(endpoint, exchanges, connections) as load:
        load.run_closed(min(0.5, seconds / 4))  # warm-up, dropped
        window = load.run_closed(seconds)
    return Observation(
        "generator", window.latencies_s, window.elapsed_s, window.client_cpu_s, window.errors.total(), window.wrong
    )


def observe_locust(endpoint, connections: int, seconds: int) -> Observation:
    """Run as many Locust users without waiting times: each is one connection in a closed loop."""
    with tempfile.TemporaryDirectory(prefix="cross_check-") as folder:
        prefix, log_path = Path(folder) / "locust", Path(folder) / "log"
        with log_path.open("wb") as log:
            code = run_locust([
                "--headless", "--only-summary", "--endpoint", endpoint.name,
                "--host", f"http://127.0.0.1:{endpoint.port}", "--csv", str(prefix),
                "--users", str(connections), "--spawn-rate", str(connections), "--run-time", f"{seconds}s",
            ], stdout=log, stderr=log)  # fmt: skip
        path = Path(f"{prefix}_record.json")
        if not path.exists():
            raise ServerError(f"Locust ended with exit code {code}: {log_path.read_text(errors='replace')[-500:]}")
        record = LoadRecord.from_dict(json.loads(path.read_text()))
    return Observation(
        "Locust", record.latencies_s, record.elapsed_s, record.cpu_s, record.errors.total(), record.wrong
    )


def join(first: Observation, second: Observation) -> Observation:
    """Both halves of a client's time as one."""
    return Observation(
        first.client,
        np.concatenate([first.latencies_s, second.latencies_s]),
        first.elapsed_s + second.elapsed_s,
        first.cpu_s + second.cpu_s,
        first.failed + second.failed,
        first.wrong + second.wrong,
    )


def explain(connections: int, generator: Observation, locust: Observation) -> str:
    """One line: how far the clients are apart, and what their own work has to do with it."""
    p50_ratio = np.median(locust.latencies_s) / np.median(generator.latencies_s)
    share = locust.cpu_s / locust.elapsed_s
    pace = (
        f"Locust filled {share:.0%} of its core and set the pace, not the server"
        if share > BUSY_SHARE
        else f"Locust used {share:.0%} of its core"
    )
    return (
        f"at {connections}: Locust's p50 is {p50_ratio:.2f}× and its rate {locust.rate / generator.rate:.2f}× the "
        f"generator's: a request costs {locust.cpu_us:.0f} µs of its core (gevent, geventhttpclient, events, "
        f"statistics) against {generator.cpu_us:.0f} µs; {pace}"
    )


def main() -> int:
    interrupt_on_sigterm()
    classes = {name: value for name, value in load_endpoints().items() if value.protocol == "REST"}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--endpoint", choices=list(classes), default="onnx", metavar="NAME", help=describe_choices(classes)
    )
    parser.add_argument(
        "--connections", type=int, nargs="+", default=[1, 8], help="connections, and users (default: 1 8)"
    )
    parser.add_argument("--seconds", type=int, default=6, help="for each client and number (default: 6)")
    arguments = parser.parse_args()
    if min(*arguments.connections, arguments.seconds) < 1:
        parser.error("--connections and --seconds: expected at least 1")
    console = Console(highlight=False)
    endpoint_class = classes[arguments.endpoint]
    endpoint = endpoint_class.on_free_ports()
    server_cpus, client_cpus = split_cpus()
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("client")
    for head in ("connections", "right/s", "p50 ms", "p99 ms", "client µs", "in flight", "bad"):
        table.add_column(head, justify="right")
    lines, bad = [], 0
    with console.status(f"{endpoint.name}: starting") as status, ServerProcess(endpoint, server_cpus):
        if client_cpus is not None:
            os.sched_setaffinity(0, client_cpus)  # Locust inherits it
        for connections in arguments.connections:
            status.update(f"{endpoint.name}: {connections} connections")
            before = observe_generator(endpoint, connections, arguments.seconds / 2)
            locust = observe_locust(endpoint, connections, arguments.seconds)
            generator = join(before, observe_generator(endpoint, connections, arguments.seconds / 2))
            for seen in (generator, locust):
                if not len(seen.latencies_s):
                    raise ServerError(f"{endpoint.name}: {seen.client} got no right answer, {seen.failed} failed")
                p50, p99 = np.percentile(seen.latencies_s, (50, 99)) * 1000
                table.add_row(
                    seen.client, str(connections), f"{seen.rate:,.0f}", f"{p50:.3f}", f"{p99:.3f}",
                    f"{seen.cpu_us:.0f}", f"{seen.in_flight:.2f}", str(seen.failed + seen.wrong),
                )  # fmt: skip
                bad += seen.failed + seen.wrong
            lines.append(explain(connections, generator, locust))
    console.print(table)
    for line in lines:
        console.print(line, soft_wrap=True)
    console.print(f"{endpoint.name}: both clients, {arguments.seconds} s each per row, {bad} failed or wrong answers")
    return 1 if bad else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ServerError, OSError) as error:
        sys.exit(f"cross_check: {error}")
    except KeyboardInterrupt:
        sys.exit("cross_check: interrupted; the server is stopped")
