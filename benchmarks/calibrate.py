"""Prove that the measuring client costs little: the load generator against wrk,
on the null server.

    python calibrate.py

In each of several rounds, in random order, both clients send the same request
over 1, 16 and 64 connections, and the open loop offers 20,000 requests a
second. The server has a core, the client another. The null server answers about
as fast as wrk's one thread can ask, so no real server asks more of the client.
Four bounds, each on the median over the rounds (of the differences or ratios
within a round if there are two clients, so that a slow stretch of the machine
hits both):

    p50 at 1 connection          within 30 µs of wrk's
    requests/s at 16 connections at least 0.7 times wrk's
    requests/s at 64 connections at least 0.85 times wrk's
    p99 of sending late          below 1 ms

A measurement is repeated, twice at most, if other programs used more than a
tenth of the two cores or, in the open loop, kept the client off its core for
more than 1/200 of the time; a bound that then does not hold is unclear, not
broken. Without wrk (https://github.com/wg/wrk) only the last bound is measured.
Writes nothing. The exit code is 1 if a bound is broken, 2 if none is but one is
unclear.
"""

import argparse
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import machine.packages  # noqa: F401

# isort: split
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from client.load_generator import Exchange, LoadGenerator, make_exchanges, poisson_arrivals
from endpoints.base import Endpoint, Request, ServerError
from endpoints.endpoint_null import NullEndpoint
from endpoints.reference import load_expected, load_test_rows
from figures.result_file import Window
from figures.verdicts import FOREIGN_LOAD_SHARE
from machine.environment import split_cpus
from machine.free_ports import find_free_ports
from machine.load import MachineLoad
from machine.priority import lifted_priority
from machine.signals import interrupt_on_sigterm
from servers.process import ServerProcess

VERSION = "1"
P50_CONNECTIONS = 1
P50_BOUND_S = 30e-6
RATE_BOUNDS = {16: 0.7, 64: 0.85}  # connections -> the least share of wrk's requests per second
OFFERED_RATE = 20_000.0  # requests per second
OPEN_CONNECTIONS = 128  # a server that stands still for 6 ms leaves some free: lateness is then the client's own
LATENESS_BOUND_S = 1e-3
WARMUP_SECONDS = 0.3
ATTEMPTS = 3  # at one measurement, until other programs leave the cores
MOST_DISTURBED = {"p50": FOREIGN_LOAD_SHARE, "rate": FOREIGN_LOAD_SHARE, "late": 0.005}  # p99 shows 1 % of the time
TURNS = [("p50", P50_CONNECTIONS), *(("rate", connections) for connections in RATE_BOUNDS)]  # of each client
SHUFFLE_SEED = 0
UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
NO_WRK = "skipped: wrk is not installed, p50 and requests/s are compared with nothing; apt install wrk (macOS: brew)"


class CalibrationError(RuntimeError):
    """wrk failed or printed what cannot be read; the message is one line."""


@dataclass
class Observed:
    """What the rounds gave, one value a round and client; the lists of wrk are empty if it is missing."""

    p50_s: dict[str, list[float]] = field(default_factory=lambda: {"own": [], "wrk": []})
    rates: dict[int, dict[str, list[float]]] = field(  # by connections
        default_factory=lambda: {connections: {"own": [], "wrk": []} for connections in RATE_BOUNDS}
    )
    lateness_s: list[float] = field(default_factory=list)  # p99
    disturbed: dict[tuple[str, int], list[float]] = field(  # shares that others took, by turn
        default_factory=lambda: {turn: [] for turn in [*TURNS, ("late", OPEN_CONNECTIONS)]}
    )


@dataclass
class Line:
    """One row of the table: a figure of both clients and whether the bound holds."""

    what: str
    own: str
    wrk: str
    difference: str
    bound: str
    verdict: str  # "holds", "BROKEN" or "unclear"


def format_script(request: Request) -> str:
    """Return the Lua script that makes wrk send `request`; as it holds no function, wrk builds the bytes once."""
    body = request.body.decode()
    if "]==]" in body or body.startswith("\n"):
        raise CalibrationError("the request's body cannot be quoted in Lua")
    return (
        f'wrk.method = "{request.method}"\n'
        f'wrk.headers["Content-Type"] = "{request.content_type}"\n'
        f"wrk.body = [==[{body}]==]\n"
    )


def parse_wrk(output: str) -> tuple[float, float]:
    """Return (p50 in seconds, requests per second) from what `wrk --latency` printed."""
    median = re.search(r"^\s+50%\s+([\d.]+)(us|ms|s|m|h)\s*$", output, re.MULTILINE)
    rate = re.search(r"^Requests/sec:\s+([\d.]+)\s*$", output, re.MULTILINE)
    problem = re.search(r"^\s*(Socket errors: .*|Non-2xx or 3xx responses: .*)$", output, re.MULTILINE)
    if problem:
        raise CalibrationError(f"wrk: {problem[1]}")
    if not median or not rate:
        raise CalibrationError(f"wrk: no p50 or no rate in its output: {output[-200:]!r}")
    return float(median[1]) * UNITS_S[median[2]], float(rate[1])


def run_wrk(wrk: str, script: Path, url: str, connections: int, seconds: int) -> tuple[float, float]:
    """Run wrk with one thread, on this process's core; return (p50 in seconds, requests per second)."""
    command = [wrk, "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-s", str(script), url]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 30)
    except subprocess.TimeoutExpired:
        raise CalibrationError(f"wrk: not done {30} s after its time was over") from None
    if done.returncode:
        raise CalibrationError(f"wrk: exit code {done.returncode}: {(done.stderr or done.stdout).strip()[-200:]}")
    return parse_wrk(done.stdout)


def check(window: Window) -> Window:
    """Return the window; CalibrationError if a request failed or was answered wrongly."""
    if window.errors.total() or window.wrong or not len(window.latencies_s):
        raise CalibrationError(f"the null server: errors {dict(window.errors)}, wrong answers {window.wrong}")
    return window


def run_own(endpoint: Endpoint, exchanges: list[Exchange], connections: int, seconds: float) -> tuple[float, float]:
    """Run the load generator's closed loop; return (p50 in seconds, requests per second)."""
    with LoadGenerator(endpoint, exchanges, connections) as load:
        load.run_closed(WARMUP_SECONDS)
        window = check(load.run_closed(seconds))
    return float(np.median(window.latencies_s)), window.rate


def measure_lateness(endpoint: Endpoint, exchanges: list[Exchange], seconds: float, seed: int) -> tuple[float, float]:
    """Return the open loop's p99 of sending late, in seconds, and the share of the time it was off its core.

    The loop never sleeps: time that its thread did not run was taken from it.
    """
    with LoadGenerator(endpoint, exchanges, OPEN_CONNECTIONS) as load:
        load.run_closed(WARMUP_SECONDS)
        window = check(load.run_open(poisson_arrivals(OFFERED_RATE, seconds, seed)))
    return float(np.percentile(window.lateness_s, 99)), max(0.0, 1 - window.client_cpu_s / window.elapsed_s)


def watch(run: Callable[[], tuple], other_cpu_s: Callable[[], float], cpus: set[int] | None) -> tuple:
    """Return what `run` gave, and the share of the cores that others took during it.

    `other_cpu_s` gives the CPU seconds that the server and wrk have used so far.
    """
    with MachineLoad(other_cpu_s, cpus) as machine:
        figures = run()
    return figures, machine.foreign_share


def measure_undisturbed(measure: Callable[[], tuple], most_disturbed: float) -> tuple:
    """Call `measure`, which gives a figure and the share that others took, until that is at most `most_disturbed`.

    Returns both as they were then, or after ATTEMPTS calls those of the least disturbed one.
    """
    attempts = []
    for _ in range(ATTEMPTS):
        attempts.append(measure())
        if attempts[-1][1] <= most_disturbed:
            break
    return min(attempts, key=lambda attempt: attempt[1])


def judge(observed: Observed) -> list[Line]:
    """Return the table's lines with the medians over the rounds, and in brackets the least and the most of a round.

    If there are two clients the median is of the differences, or ratios, within a round.
    """

    def verdict(holds: bool, kind: str, connections: int) -> str:
        disturbed = statistics.median(observed.disturbed[kind, connections]) > MOST_DISTURBED[kind]
        return "holds" if holds else "unclear" if disturbed else "BROKEN"

    lines = []
    if observed.p50_s["wrk"]:
        p50_s = {client: statistics.median(values) for client, values in observed.p50_s.items()}
        differences_s = [own - wrk for own, wrk in zip(*observed.p50_s.values(), strict=True)]
        difference_s = statistics.median(differences_s)
        lines.append(
            Line(
                f"p50 at {P50_CONNECTIONS} connection",
                f"{p50_s['own'] * 1e6:,.0f} µs",
                f"{p50_s['wrk'] * 1e6:,.0f} µs",
                f"{difference_s * 1e6:+.0f} µs ({min(differences_s) * 1e6:+.0f} to {max(differences_s) * 1e6:+.0f})",
                f"± {P50_BOUND_S * 1e6:.0f} µs",
                verdict(abs(difference_s) <= P50_BOUND_S, "p50", P50_CONNECTIONS),
            )
        )
        for connections, bound in RATE_BOUNDS.items():
            rates = observed.rates[connections]
            ratios = [own / wrk for own, wrk in zip(rates["own"], rates["wrk"], strict=True)]
            ratio = statistics.median(ratios)
            lines.append(
                Line(
                    f"requests/s at {connections}",
                    f"{statistics.median(rates['own']):,.0f}",
                    f"{statistics.median(rates['wrk']):,.0f}",
                    f"{ratio:.2f}× ({min(ratios):.2f} to {max(ratios):.2f})",
                    f"≥ {bound}×",
                    verdict(ratio >= bound, "rate", connections),
                )
            )
    late_s = statistics.median(observed.lateness_s)
    lines.append(
        Line(
            f"late p99 at {OFFERED_RATE:,.0f}/s",
            f"{late_s * 1e6:,.0f} µs",
            "–",
            f"({min(observed.lateness_s) * 1e6:,.0f} to {max(observed.lateness_s) * 1e6:,.0f})",
            f"< {LATENESS_BOUND_S * 1e6:,.0f} µs",
            verdict(late_s < LATENESS_BOUND_S, "late", OPEN_CONNECTIONS),
        )
    )
    return lines


def print_lines(lines: list[Line]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for column, title in enumerate(("", "own", "wrk", "own against wrk", "bound", "verdict")):
        table.add_column(title, justify="right" if 0 < column < 4 else "left", no_wrap=True)
    for line in lines:
        table.add_row(line.what, line.own, line.wrk, line.difference, line.bound, line.verdict)
    Console(highlight=False, width=200).print(table)  # a narrow terminal wraps a long line; no figure is cut off


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds, each with every measurement (default: 5)")
    parser.add_argument(
        "--seconds", type=int, default=2, help="length of one, whole seconds as wrk has it (default: 2)"
    )
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.seconds < 1:
        parser.error("rounds and seconds must be positive")
    return arguments


def main() -> int:
    interrupt_on_sigterm()
    arguments = parse_arguments()
    console = Console(highlight=False)
    wrk = shutil.which("wrk")
    if wrk is None:
        console.print(NO_WRK, soft_wrap=True)
    server_cpus, client_cpus = split_cpus()
    if server_cpus is None:
        console.print("warning: one usable core: server and client slow each other, no bound means much here")
    rows, _ = load_test_rows()
    endpoint = NullEndpoint(find_free_ports(["rest"]))
    exchanges = make_exchanges(endpoint, VERSION, rows[:1], load_expected(VERSION)[:1])
    request = endpoint.request(rows[:1], VERSION)
    url = f"http://127.0.0.1:{endpoint.ports['rest']}{request.path}"
    observed = Observed()
    shuffle = random.Random(SHUFFLE_SEED)
    with (
        tempfile.TemporaryDirectory(prefix="calibrate-") as folder,
        lifted_priority() as goes_first,
        ServerProcess(endpoint, server_cpus, goes_first) as server,
    ):
        script = Path(folder) / "request.lua"
        script.write_text(format_script(request))
        if client_cpus is not None:
            os.sched_setaffinity(0, client_cpus)  # wrk, a child, inherits it
        cpus = server_cpus | client_cpus if server_cpus is not None else None
        server_process = psutil.Process(server.pid)

        def other_cpu_s() -> float:
            times, ended_children = server_process.cpu_times(), os.times()
            return times.user + times.system + ended_children.children_user + ended_children.children_system

        for number in range(1, arguments.rounds + 1):
            console.print(f"round {number} of {arguments.rounds}")
            turns = [("late", OPEN_CONNECTIONS, "own")]
            for client in ("own", "wrk") if wrk is not None else ():
                turns += [(kind, connections, client) for kind, connections in TURNS]
            shuffle.shuffle(turns)
            for kind, connections, client in turns:
                if kind == "late":
                    measure = partial(measure_lateness, endpoint, exchanges, arguments.seconds, seed=number)
                elif client == "own":
                    run = partial(run_own, endpoint, exchanges, connections, arguments.seconds)
                    measure = partial(watch, run, other_cpu_s, cpus)
                else:
                    run = partial(run_wrk, wrk, script, url, connections, arguments.seconds)
                    measure = partial(watch, run, other_cpu_s, cpus)
                figure, disturbed = measure_undisturbed(measure, MOST_DISTURBED[kind])
                observed.disturbed[kind, connections].append(disturbed)
                if kind == "late":
                    observed.lateness_s.append(figure)
                elif kind == "p50":
                    observed.p50_s[client].append(figure[0])
                else:
                    observed.rates[connections][client].append(figure[1])
    lines = judge(observed)
    print_lines(lines)
    counts = Counter(line.verdict for line in lines)
    if counts["unclear"]:
        most = max(max(shares, default=0.0) for shares in observed.disturbed.values())
        console.print(f"other programs took up to {most:.0%} of the cores: stop them and run again")
    console.print(
        f"calibrate: {counts['holds']} of {len(lines)} bounds hold, {counts['BROKEN']} broken, "
        f"{counts['unclear']} unclear{f', {len(TURNS)} skipped' if wrk is None else ''}; "
        f"{arguments.rounds} rounds of {arguments.seconds} s",
        soft_wrap=True,
    )
    return 1 if counts["BROKEN"] else 2 if counts["unclear"] else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (CalibrationError, ServerError, OSError) as error:
        sys.exit(f"calibrate: {error}")
    except KeyboardInterrupt:
        sys.exit("calibrate: interrupted; the server is stopped")
