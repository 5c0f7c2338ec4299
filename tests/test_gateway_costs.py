"""What the gateway's options cost users of the real servers: two gateways before one server, asked in turn."""

import contextlib
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from endpoints.base import load_endpoints
from figures.intervals import median_interval
from helpers import needs
from machine.environment import split_cpus
from servers.process import ServerProcess
from test_gateway import Gateway, script
from test_monitoring import TOYS, Collector, cpu_s, gateway_ready, wrk_command

pytestmark = [pytest.mark.slow, pytest.mark.timing, needs("wrk")]
STARTS, START_S, LEAST_ROUNDS = 8, 30, 75  # of the programs, for one figure
USERS = 16  # each asks again as soon as it has its reply
LAYOUTS = ("apart", "shared")


@dataclass(frozen=True)
class Windows:
    """What two gateways gave, medians of windows in turn."""

    rate: float  # requests/s of the first
    part: float  # those of the second, as a part of them
    added_us: float  # CPU time that the second HAProxy takes for each request more than the first

    @property
    def share(self) -> float:
        """Part of a core that the second HAProxy takes more; where one full core has all, so many requests fewer."""
        return self.added_us * self.rate / 1e6


@contextlib.contextmanager
def running_on(cpus: set[int]) -> Iterator[None]:
    """What starts inside runs on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def find_haproxies(gateway: Gateway) -> list[psutil.Process]:
    family = psutil.Process(gateway.process.pid).children(recursive=True)
    return [process for process in family if process.name() == "haproxy"]


def ask_in_windows(gateways: tuple[Gateway, Gateway], folder: Path, server: str, seconds: float) -> Windows:
    """Ask through two gateways in turn, users of both on this process's cores.

    A wrk for each gateway runs for a tenth of a second, or for 150 requests, and is stopped while the other runs, so
    that the machine's other programs take as much from a window as from its neighbour. HAProxy does the counting.
    """
    haproxies = [find_haproxies(gateway) for gateway in gateways]

    def read(i: int) -> dict[str, str]:
        rows = script.read_statistics(script.State(gateways[i].state))
        return next(row for row in rows if (row["pxname"], row["svname"]) == ("gateway", "FRONTEND"))

    def count(i: int) -> tuple[int, float, float]:
        row = read(i)
        return int(row["req_tot"]), time.perf_counter(), cpu_s(haproxies[i])

    def ask(i: int, window_s: float, settle_s: float) -> tuple[float, float]:
        users[i].send_signal(signal.SIGCONT)
        time.sleep(settle_s)
        before = count(i)
        time.sleep(window_s)
        requests, passed_s, used_s = (after - early for after, early in zip(count(i), before, strict=True))
        users[i].send_signal(signal.SIGSTOP)
        return requests / passed_s, used_s / requests * 1e6

    with contextlib.ExitStack() as stack:
        users = []
        for gateway in gateways:
            command = wrk_command(gateway, folder, USERS, int(10 * seconds) + 60, 0, server)
            users.append(stack.enter_context(subprocess.Popen(command, stdout=subprocess.DEVNULL)))
            stack.callback(users[-1].kill)
            users[-1].send_signal(signal.SIGSTOP)
        slowest = min(ask(i, 1, 1)[0] for i in (0, 1))
        window_s, settle_s = max(0.1, 150 / slowest), max(0.02, 2 * USERS / slowest)
        found: tuple[list, list] = ([], [])
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s or len(found[0]) < LEAST_ROUNDS:
            for i in (0, 1) if len(found[0]) % 2 else (1, 0):
                found[i].append(ask(i, window_s, settle_s))
        for i in (0, 1):
            assert {read(i)[f"hrsp_{code}"] for code in ("1xx", "3xx", "4xx", "5xx", "other")} == {"0"}
            assert users[i].poll() is None
    both = list(zip(*found, strict=True))
    return Windows(
        statistics.median(first[0] for first, _ in both),
        statistics.median(second[0] / first[0] for first, second in both),
        statistics.median(second[1] - first[1] for first, second in both),
    )


def compare(
    folder: Path, name: str, layout: str, settings: tuple[dict[str, str], dict[str, str]], is_tapped: bool = False
) -> list[Windows]:
    """Compare gateways with two settings before a real server; print the figures.

    apart: one core has server, gateways and users, the other the collector. shared: one has the server, the other all
    else. The programs start several times, because where they come to lie in memory makes a gateway faster or slower
    for as long as it runs; the interval is that of the median of the starts.

    Args:
        is_tapped: Whether the second gateway sends its predictions to a collector.
    """
    first, second = split_cpus()
    if not second:
        pytest.skip("needs two cores")
    server_cpus, collector_cpus = (second, first) if layout == "apart" else (first, second)
    found = []
    with ServerProcess(load_endpoints()[name].on_free_ports(), server_cpus) as server:
        address = f"127.0.0.1:{server.endpoint.port}"
        replicas = {f"GATEWAY_{name.upper()}_V{version}": address for version in "12"}
        for number in range(STARTS):
            place = folder / str(number)
            place.mkdir()
            with contextlib.ExitStack() as stack:
                tap = {}
                if is_tapped:
                    with running_on(collector_cpus):
                        collector = Collector(place)
                    stack.callback(collector.end)
                    tap = {"GATEWAY_PREDICTIONS": collector.records}
                stack.enter_context(running_on(second))
                gateways = []
                for environment in ({**replicas, **settings[0]}, {**replicas, **settings[1], **tap}):
                    state = place / f"gateway-{len(gateways)}"
                    gateway = stack.enter_context(Gateway(state, "--servers", name, environment=environment))
                    gateway_ready(gateway, name)
                    gateways.append(gateway)
                found.append(ask_in_windows(tuple(gateways), place, name, START_S))
                if is_tapped:
                    assert collector.value("gateway_records_total") > 1000
                    assert collector.end() == 0
    part, rate = median_interval([each.part for each in found]), statistics.median(each.rate for each in found)
    added, shares = sorted(each.added_us for each in found), sorted(each.share for each in found)
    print(
        f"\n{name}, {layout}: requests/s times {part.estimate:.3f} ({part.low:.3f} to {part.high:.3f}) of {rate:,.0f}; "
        f"HAProxy's CPU time {statistics.median(added):+.1f} µs a request ({added[0]:.1f} to {added[-1]:.1f} in "
        f"{STARTS} starts), {statistics.median(shares):.1%} of a core ({shares[0]:.1%} to {shares[-1]:.1%})"
    )
    return found


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_tap_costs_users_of_each_real_server_little(tmp_path, name, layout):
    part = median_interval([each.part for each in compare(tmp_path, name, layout, ({}, {}), is_tapped=True)])
    assert part.estimate >= 0.6
    if layout == "apart":
        assert part.high >= 0.97


@pytest.mark.parametrize("limit", ["16384", "1000000"])
def test_a_smaller_body_limit_gives_more_requests_and_a_larger_one_fewer(tmp_path, limit):
    """Against the limit that it has unasked, before the server whose requests are the cheapest."""
    part = median_interval(
        [each.part for each in compare(tmp_path, "onnx", "apart", ({}, {"GATEWAY_MAX_BODY": limit}))]
    )
    assert part.low > 1 if limit == "16384" else part.high < 1
