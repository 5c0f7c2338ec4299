"""Load one server for half an hour and report whether its memory grows, its
latency drifts, or answers fail.

    python soak.py --endpoint onnx
        starts the server, loads it for 30 minutes, stops it
    python soak.py --endpoint onnx --seconds 120

Offers a steady rate (open loop) and, between slices of time, sums the resident
memory of the server's whole process tree. Memory's slope is a straight line
through what follows the warm-up, with its 95 % interval. Every reply is
compared with the reference. Writes results/soak_<endpoint>_<utc>.json: per
slice the memory, every latency, the errors.
"""

import argparse
import contextlib
import os
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import machine.packages  # noqa: F401

# isort: split
import numpy as np
import psutil
from rich.console import Console

from client.load_generator import LoadGenerator, make_exchanges, poisson_arrivals
from endpoints.base import ServerError, describe_choices, load_endpoints
from endpoints.reference import load_expected, load_test_rows
from figures.intervals import CONFIDENCE, Interval
from figures.result_file import RESULTS_DIR, encode_window, write_result
from figures.verdicts import SLOW_CONNECT_S
from machine.environment import describe_environment, split_cpus
from machine.signals import interrupt_on_sigterm
from servers.process import ServerProcess

VERSION = "1"
LONGEST_SLICE_S = 5.0
LEAST_SLICES = 60
LEAST_REQUESTS = 5  # in a slice, or its latencies say nothing
PRINTED_LINES = 30
CONNECTIONS = 32
CAPACITY_CONNECTIONS = 4
CAPACITY_SECONDS = 2.0
MODERATE = 1 / 3  # share of its closed-loop rate that the server is offered
WARM_UP_SHARE = 0.2  # of the time: caches fill, Java compiles itself; no part of the slope
BLOCKS = 8
LEAST_DRIFT = 0.05
SIGNIFICANCE = 0.01  # chance of calling a steady latency a drift
LEAST_GROWTH_BYTES = 1e6  # over the whole time; less is an allocator's own business


@dataclass(frozen=True)
class Growth:
    """What resident memory did after the warm-up."""

    bytes_per_s: Interval
    grows: bool

    def describe(self) -> str:
        slope, low, high = (value * 3600 / 1e6 for value in vars(self.bytes_per_s).values())
        verdict = "it grows: find what is kept" if self.grows else "no lasting growth"
        return f"{slope:+,.1f} MB/h ({low:+,.1f} to {high:+,.1f}): {verdict}"


def measure_growth(at_s: np.ndarray, memory_bytes: np.ndarray) -> Growth:
    """Return the slope of memory over time (n,), both after the warm-up, and whether that is lasting growth.

    Neighbouring samples of memory are alike, so the line goes through the means of BLOCKS consecutive
    blocks, and Student's t with BLOCKS - 2 degrees of freedom gives the interval (batch means: Law,
    "Simulation Modeling and Analysis", 5th ed., section 9.5.3). Lasting growth is a slope above zero beyond
    chance, worth LEAST_GROWTH_BYTES over the time, that went on in the second half: a cache that has
    filled up, or a heap that was enlarged once, is no leak.
    """
    from scipy import stats  # only here: it takes seconds to import

    times_s, means = (
        np.array([block.mean() for block in np.array_split(values, BLOCKS)]) for values in (at_s, memory_bytes)
    )
    line = stats.linregress(times_s, means)
    stderr = line.stderr if np.ptp(means) else 0.0  # undefined for a constant
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, BLOCKS - 2)) * stderr
    slope = Interval(float(line.slope), float(line.slope - half), float(line.slope + half))
    second_half = stats.linregress(times_s[BLOCKS // 2 :], means[BLOCKS // 2 :]).slope
    worth_it = slope.estimate * (at_s[-1] - at_s[0]) >= LEAST_GROWTH_BYTES
    return Growth(slope, bool(slope.low > 0 and worth_it and second_half >= slope.estimate / 2))


def read_memory_bytes(server: ServerProcess) -> int:
    """Resident memory of the server's process tree; pages that processes share count for each of them."""
    total = 0
    for process in server.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total


def soak(server: ServerProcess, rate: float | None, seconds: float, console: Console) -> tuple[float, list, list[dict]]:
    """Load a running server; return the rate offered, the windows, and per slice what goes into the file.

    `rate` None is MODERATE times the server's rate in a closed loop.
    """
    rows, _ = load_test_rows()
    exchanges = make_exchanges(server.endpoint, VERSION, rows, load_expected(VERSION))
    if rate is None:
        with LoadGenerator(server.endpoint, exchanges, CAPACITY_CONNECTIONS) as load:
            rate = MODERATE * load.run_closed(CAPACITY_SECONDS).rate
        if rate == 0:
            raise ServerError(f"{server.endpoint.name}: not one right answer in {CAPACITY_SECONDS:g} s")
    slice_s = min(LONGEST_SLICE_S, seconds / LEAST_SLICES)
    count = round(seconds / slice_s)
    if rate * slice_s < LEAST_REQUESTS:
        raise ServerError(
            f"{rate:g} requests/s are fewer than {LEAST_REQUESTS} in each of {count} slices: raise --rate or --seconds"
        )
    console.print(f"{server.endpoint.name}: {rate:,.0f} requests/s for {seconds:,.0f} s, {count} samples of memory")
    console.print(f"{'s':>7}{'memory MB':>12}{'right':>10}{'p50 ms':>10}{'p99 ms':>10}{'failed':>8}{'wrong':>8}")
    windows, slices = [], []
    since = 0  # the first slice of the next printed line
    started_s = time.perf_counter()
    with LoadGenerator(server.endpoint, exchanges, CONNECTIONS) as load:
        for number in range(count):
            windows.append(load.run_open(poisson_arrivals(rate, slice_s, seed=number)))
            memory_bytes, at_s = read_memory_bytes(server), time.perf_counter() - started_s
            slices.append(encode_window(windows[-1], at_s=at_s, server_rss_bytes=memory_bytes))
            if (number + 1) * PRINTED_LINES // count > number * PRINTED_LINES // count:
                console.print(format_line(at_s, memory_bytes, windows[since:]), soft_wrap=True)
                since = number + 1
    return rate, windows, slices


def format_line(at_s: float, memory_bytes: int, windows: list) -> str:
    """One line of the table: the memory now, and the figures of the windows since the last line."""
    latencies_s = np.concatenate([window.latencies_s for window in windows])
    p50, p99 = (f"{value * 1000:.3f}" for value in np.percentile(latencies_s, (50, 99))) if len(latencies_s) else "––"
    failed, wrong = sum(window.errors.total() for window in windows), sum(window.wrong for window in windows)
    return f"{at_s:>7,.0f}{memory_bytes / 1e6:>12,.1f}{len(latencies_s):>10,}{p50:>10}{p99:>10}{failed:>8,}{wrong:>8,}"


def describe_drift(windows: list) -> str:
    """One sentence on latency in the first and in the last third of the windows.

    It has drifted if the windows' medians differ by more than chance (Mann and Whitney, "On a test of
    whether one of two random variables is stochastically larger than the other", 1947) and p50 by LEAST_DRIFT.
    """
    from scipy import stats  # only here: it takes seconds to import

    answered = [window.latencies_s for window in windows if len(window.latencies_s)]
    first, last = answered[: len(answered) // 3], answered[-(len(answered) // 3) :]
    if not first:
        return "too few answers to say"
    changes = {}
    figures = []
    for percent in (50, 99):
        before_s, after_s = (np.percentile(np.concatenate(part), percent) for part in (first, last))
        changes[percent] = after_s / before_s - 1
        figures.append(f"p{percent} {before_s * 1000:.3f} ms, then {after_s * 1000:.3f} ms")
    medians_s = [[np.median(times_s) for times_s in part] for part in (first, last)]
    drifted = stats.mannwhitneyu(*medians_s).pvalue < SIGNIFICANCE and abs(changes[50]) >= LEAST_DRIFT
    verdict = ("it rises" if changes[50] > 0 else "it falls") if drifted else "no drift"
    return f"{'; '.join(figures)}: {verdict}"


def main() -> int:
    interrupt_on_sigterm()
    classes = load_endpoints(with_peers=True)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--endpoint", choices=classes, default="onnx", metavar="NAME", help=describe_choices(classes))
    parser.add_argument("--seconds", type=float, default=1800.0, help="how long (default: 1800, half an hour)")
    parser.add_argument(
        "--rate",
        type=float,
        help=f"requests per second (default: a third of its closed-loop rate at {CAPACITY_CONNECTIONS} connections)",
    )
    parser.add_argument("--output", type=Path, help="the result file (default: results/soak_<endpoint>_<utc>.json)")
    arguments = parser.parse_args()
    if arguments.seconds < 3 or (arguments.rate is not None and arguments.rate <= 0):
        parser.error("at least 3 seconds, and a rate above 0")
    name = arguments.endpoint
    output = arguments.output or RESULTS_DIR / f"soak_{name}_{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    console = Console(highlight=False)
    endpoint = classes[name].on_free_ports()
    server_cpus, client_cpus = split_cpus()
    environment = describe_environment(endpoint.packages)
    with ServerProcess(endpoint, server_cpus) as server:
        if client_cpus is not None:
            os.sched_setaffinity(0, client_cpus)
        kind = server.kind
        rate, windows, slices = soak(server, arguments.rate, arguments.seconds, console)
    settled = [(s["at_s"], s["server_rss_bytes"]) for s in slices if s["at_s"] > WARM_UP_SHARE * slices[-1]["at_s"]]
    growth = measure_growth(*np.array(settled, dtype=float).T)
    result = {
        "soak_version": 1,
        "environment": environment,
        "settings": {"endpoint": name, "kind": kind, "command": endpoint.full_command(), "version": VERSION,
                     "rate": rate, "seconds": arguments.seconds, "warm_up_share": WARM_UP_SHARE},
        "memory": {"bytes_per_s": vars(growth.bytes_per_s), "grows": growth.grows},
        "slices": slices,
    }  # fmt: skip
    write_result(result, output)
    right = sum(len(window.latencies_s) for window in windows)
    failed, wrong = sum(window.errors.total() for window in windows), sum(window.wrong for window in windows)
    console.print(f"memory: {settled[-1][1] / 1e6:,.1f} MB, {growth.describe()}", soft_wrap=True)
    console.print(f"latency, first third and last: {describe_drift(windows)}", soft_wrap=True)
    connect_s = max(window.connect_s for window in windows)
    if connect_s > SLOW_CONNECT_S:
        console.print(f"connections took {connect_s:.1f} s to open: raise the server's listen backlog", soft_wrap=True)
    console.print(
        f"{name} ({kind}): {right:,} right answers in {slices[-1]['at_s']:,.0f} s, {failed:,} failed, {wrong:,} wrong",
        soft_wrap=True,
    )
    console.print(f"wrote {output}", soft_wrap=True)
    return 1 if failed or wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ServerError, OSError) as error:
        sys.exit(f"soak: {error}")
    except KeyboardInterrupt:
        sys.exit("soak: interrupted; the server is stopped, nothing is written")
