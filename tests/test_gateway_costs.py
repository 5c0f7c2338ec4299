"""What the gateway's options cost users of the real servers: two gateways before one server, asked in turn."""

import contextlib
import functools
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from endpoints.base import load_endpoints
from figures.intervals import Interval, median_interval
from helpers import needs
from machine.environment import split_cpus, usable_cpus
from machine.signals import end_with_parent
from servers.process import ServerProcess
from test_gateway import Gateway, script
from test_monitoring import TOYS, Collector, cpu_s, gateway_ready, wrk_command

STARTS = 8  # of gateways and collector, for one figure
USERS = 16  # each asks again as soon as it has its reply
# Before the windows: of each page of the buffer for 50,000 records the first write costs more than all that follow, as
# the kernel gives the page then. So it has been full once, as it is after a gateway's first seconds at full load.
WARM_UP_REQUESTS, LONGEST_WARM_UP_S = 60_000, 15.0
LAYOUTS = ("apart", "shared")


@dataclass(frozen=True)
class Windows:
    """What two gateways gave, medians of windows in turn."""

    rate: float  # requests/s of the first
    part: float  # those of the second, as a part of them
    added_us: float  # CPU time that the second HAProxy takes for each request more than the first


@contextlib.contextmanager
def running_on(cpus: set[int]) -> Iterator[None]:
    """What starts inside runs on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def ask_in_windows(gateways: list[Gateway], folder: Path, server: str, layout: str) -> Windows:
    """Warm two gateways up and ask through both in turn, users on this process's cores, for half a minute or longer.

    A wrk for each gateway runs for a tenth of a second, or for 150 requests, and is stopped while the other runs, so
    that the machine's other programs take as much from a window as from its neighbour. Where the collector shares the
    core a window lasts three seconds, because it reads up to a quarter of a second after the requests, and counts a
    thousand at once, or those of five seconds. HAProxy does the counting.
    """

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
        time.sleep(window_s)  # the time that is measured
        requests, passed_s, used_s = (after - early for after, early in zip(count(i), before, strict=True))
        users[i].send_signal(signal.SIGSTOP)
        return requests / passed_s, used_s / max(requests, 1) * 1e6

    haproxies = [gateway.haproxy() for gateway in gateways]
    with contextlib.ExitStack() as stack:
        users, end = [], functools.partial(end_with_parent, os.getpid(), signal.SIGKILL)
        for gateway in gateways:
            command = wrk_command(gateway, folder, USERS, 600, 0, server)
            user = stack.enter_context(subprocess.Popen(command, stdout=subprocess.DEVNULL, preexec_fn=end))
            stack.callback(user.kill)
            user.send_signal(signal.SIGSTOP)
            users.append(user)
        slowest = min(ask(i, 1, 1)[0] for i in (0, 1))
        for i in (0, 1):
            ask(i, min(WARM_UP_REQUESTS / slowest, LONGEST_WARM_UP_S), 0)
        if layout == "shared":
            window_s, settle_s, least_rounds = 3.0, 0.3, 5
        else:
            window_s, settle_s, least_rounds = max(0.1, 150 / slowest), max(0.02, 2 * USERS / slowest), 75
        found: tuple[list, list] = ([], [])
        end_s = time.monotonic() + 30
        while time.monotonic() < end_s or len(found[0]) < least_rounds:
            pair = {i: ask(i, window_s, settle_s) for i in ((0, 1) if len(found[0]) % 2 else (1, 0))}
            if pair[0][0]:  # without an answer in the whole window the other has nothing to be compared with
                found[0].append(pair[0])
                found[1].append(pair[1])
            assert [user.poll() for user in users] == [None, None]
        for i in (0, 1):
            assert {read(i)[f"hrsp_{code}"] for code in ("1xx", "3xx", "4xx", "5xx", "other")} == {"0"}
    both = list(zip(*found, strict=True))
    return Windows(
        statistics.median(first[0] for first, _ in both),
        statistics.median(second[0] / first[0] for first, second in both),
        statistics.median(second[1] - first[1] for first, second in both),
    )


def compare(folder: Path, name: str, layout: str, settings: dict[str, str], is_tapped: bool = False) -> Interval:
    """Compare a gateway with these settings to one without, before a real server; print the figures.

    apart: one core has server, gateways and users, the other the collector. shared: one has the server, the other all
    else. free: all cores have all. Gateways and collector start several times, either gateway first, because
    where they come to lie in memory makes one faster or slower for as long as it runs; the interval is that of the
    median of the starts.

    Args:
        is_tapped: Whether the gateway with the settings sends its predictions to a collector.

    Returns:
        Its requests/s, as a part of those of the other.
    """
    first, second = split_cpus()
    if not second:
        pytest.skip("needs two cores")
    server_cpus, collector_cpus = (second, first) if layout == "apart" else (first, second)
    if layout == "free":
        server_cpus = second = os.sched_getaffinity(0)
    found = []
    with ServerProcess(load_endpoints()[name].on_free_ports(), server_cpus) as server:
        address = f"127.0.0.1:{server.endpoint.port}"
        plain = {f"GATEWAY_{name.upper()}_V{version}": address for version in "12"}
        plain |= dict.fromkeys(("GATEWAY_PREDICTIONS", "GATEWAY_MAX_BODY", "GATEWAY_THREADS"), "")
        for number in range(STARTS):
            place = folder / str(number)
            place.mkdir()
            environments = [plain, {**plain, **settings}]
            with contextlib.ExitStack() as stack:
                if is_tapped:
                    with running_on(collector_cpus):
                        collector = Collector(place)
                    stack.callback(collector.end)
                    environments[1]["GATEWAY_PREDICTIONS"] = collector.records
                stack.enter_context(running_on(second))
                gateways = {}
                for i in (0, 1) if number % 2 else (1, 0):
                    gateway = Gateway(place / f"gateway-{i}", "--servers", name, environment=environments[i])
                    gateways[i] = stack.enter_context(gateway)
                    gateway_ready(gateway, name)
                found.append(ask_in_windows([gateways[0], gateways[1]], place, name, layout))
                if is_tapped:
                    assert collector.value("gateway_records_total") > 1000
                    assert collector.end() == 0
    part, rate = median_interval([each.part for each in found]), statistics.median(each.rate for each in found)
    added = sorted(each.added_us for each in found)
    print(
        f"\n{name}, {layout}: requests/s times {part.estimate:.3f} ({part.low:.3f} to {part.high:.3f}) of {rate:,.0f}; "
        f"HAProxy's CPU time {statistics.median(added):+.1f} µs a request ({added[0]:.1f} to {added[-1]:.1f} in "
        f"{STARTS} starts)"
    )
    return part


@pytest.mark.slow
@pytest.mark.timing
@needs("wrk")
@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_tap_costs_users_of_each_real_server_little(tmp_path, name, layout):
    part = compare(tmp_path, name, layout, {}, is_tapped=True)
    assert part.estimate >= 0.6
    if layout == "apart":
        assert part.high >= 0.97


@pytest.mark.slow
@pytest.mark.timing
@needs("wrk")
def test_two_equal_gateways_are_equally_fast(tmp_path):
    """What this method gives where there is nothing to find."""
    assert 0.98 <= compare(tmp_path, "onnx", "apart", {}).estimate <= 1.02


@pytest.mark.slow
@pytest.mark.timing
@needs("wrk")
@pytest.mark.parametrize("limit", ["16384", "1000000"])
def test_a_smaller_body_limit_gives_more_requests_and_a_larger_one_fewer(tmp_path, limit):
    """Against the default limit, before the server whose requests are the cheapest."""
    part = compare(tmp_path, "onnx", "apart", {"GATEWAY_MAX_BODY": limit})
    assert part.low > 1 if limit == "16384" else part.high < 1


@pytest.mark.slow
@pytest.mark.timing
@needs("wrk")
def test_on_two_cores_a_second_thread_gives_fewer_requests(tmp_path):
    """The default is one: the core that a second would take is the server's and the users'."""
    with running_on(set(usable_cpus()[:2])):
        assert compare(tmp_path, "onnx", "free", {"GATEWAY_THREADS": "2"}).estimate < 1
