"""Compare all servers: verify that they give equal answers, then measure speed, saturation and cost.

    python benchmark_all.py                       profile quick: under five minutes on two cores
    python benchmark_all.py --profile rigorous    sample sizes after MLPerf's rules: hours
    python benchmark_all.py --containers          the servers that docker compose runs

Starts every server with its README's command, proves |p - expected| <= 1e-5 on all test rows of both
versions, then runs interleaved rounds of load: closed loop by connections and by rows a request, and
open loop at rising rates until each server breaks. A server that does not start or answers wrongly is
reported and left out; the others go on and the exit code is 1. Writes results/<utc>.json (raw
observations), results/<utc>.md (tables) and results/<utc>/report.html with its plots. Ctrl-C writes
nothing and stops every server.
"""

import argparse
import contextlib
import functools
import os
import random
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil
from containers import ContainerServer, list_container_endpoints
from endpoint import Endpoint, load_endpoints
from environment import describe_environment, split_cpus
from load_generator import LoadGenerator, Window, constant_arrivals, make_exchanges, poisson_arrivals
from machine_load import MachineLoad
from reference import TOLERANCE, load_expected, load_test_rows
from results import RESULTS_DIR, SCHEMA_VERSION, encode_window, format_markdown, print_result, write_result, write_whole
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from server_process import ServerError, ServerProcess, interrupt_on_sigterm
from verify import max_abs_difference

VERSION = "1"
SHUFFLE_SEED = 0
WARMUP_CONNECTIONS = 16
WARMUP_WINDOW_S = 0.5
WARMUP_CHANGE = 0.1
OPEN_CONNECTIONS = 64  # what an open loop may have under way; a request that finds none free waits, and that counts
# MLPerf Inference asks for so many queries that a 99th percentile is known to a twentieth of its distance
# from 100 % with 99 % confidence: 0.99 * 0.01 * (2.576 / 0.0005)**2 = 262,742, in whole multiples of 2**13
# (mlcommons/inference_policies, inference_rules.adoc, "Number of queries").
MLPERF_QUERIES = 270_336


@dataclass(frozen=True)
class Profile:
    """How much is measured."""

    starts: int  # cold starts of each server
    rounds: int  # over all servers
    open_rounds: int  # of these, how many also sweep the offered rates
    seconds: float  # least length of one window
    queries: int  # least requests in all rounds of a window together; lengthens the window where it is too short
    warmup_seconds: float
    connections: tuple[int, ...]
    rows_per_request: tuple[int, ...]
    rate_shares: tuple[float, ...]  # offered rates, as shares of the server's fastest closed-loop rate
    settle_seconds: float  # longest warm-up of a server after its check
    defaults_in_full: bool  # False: a default beside its tuned set-up by connections only, and over gRPC not at all


PROFILES = {
    "quick": Profile(1, 5, 2, 0.25, 0, 0.1, (1, 16, 64), (1, 32, 1024), (0.25, 0.5, 0.75, 1.1), 3.0, False),
    "rigorous": Profile(
        3, 10, 10, 5.0, MLPERF_QUERIES, 1.0, (1, 4, 16, 64), (1, 8, 32, 128, 1024),
        (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1), 30.0, True,
    ),
}  # fmt: skip


def parse_arguments(classes: dict[str, type[Endpoint]]) -> argparse.Namespace:
    names = list(classes)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=PROFILES, default="quick", help="how much is measured (default: quick)")
    parser.add_argument(
        "--endpoints",
        nargs="+",
        choices=names,
        help="which servers (default: all; quick: no default over gRPC that has a tuned set-up)",
    )
    parser.add_argument(
        "--containers",
        action="store_true",
        help="make the containers of docker-compose.yml anew and measure those (default: start each server)",
    )
    parser.add_argument("--connections", type=int, nargs="+", help="numbers of connections (default: the profile's)")
    parser.add_argument("--rows", type=int, nargs="+", help="rows a request, 1 to 1024 (default: the profile's)")
    parser.add_argument(
        "--rates", type=float, nargs="+", help="offered requests per second (default: shares of each server's fastest)"
    )
    parser.add_argument(
        "--arrivals",
        choices=("poisson", "constant"),
        default="poisson",
        help="how the requests of an offered rate arrive: at random or evenly (default: poisson)",
    )
    parser.add_argument(
        "--objective-ms", type=float, default=50.0, help="p99 beyond which a server counts as broken (default: 50)"
    )
    parser.add_argument("--rounds", type=int, help="rounds over all servers (default: the profile's)")
    parser.add_argument("--seconds", type=float, help="length of one window (default: the profile's)")
    parser.add_argument("--warmup-seconds", type=float, help="dropped before each window (default: the profile's)")
    parser.add_argument(
        "--server-options",
        nargs="+",
        default=[],
        metavar="NAME=OPTIONS",
        help='added to a server\'s command, e.g. "onnx=--intra-op-threads 2" (default: none)',
    )
    parser.add_argument(
        "--settle-seconds", type=float, help="longest warm-up of a server after its check (default: the profile's)"
    )
    parser.add_argument(
        "--no-report",
        action="store_true",
        help="draw no report; report.py can later (default: draw it)",
    )
    parser.add_argument("--output", type=Path, help="the result file (default: results/<utc>.json)")
    arguments = parser.parse_args()
    if arguments.containers:
        inside = list_container_endpoints(classes)
        names = [name for name in names if name in inside or not classes[name].has_model]
    profile = PROFILES[arguments.profile]
    if not arguments.endpoints:
        beside = set() if profile.defaults_in_full else defaults_beside_tuned(names)
        arguments.endpoints = [name for name in names if name not in beside or classes[name].protocol == "REST"]
    if unknown := set(arguments.endpoints) - set(names):
        parser.error(f"no container answers {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    for name in ("connections", "rounds", "seconds", "warmup_seconds", "settle_seconds"):
        if getattr(arguments, name) is None:
            setattr(arguments, name, getattr(profile, name))
    arguments.rows = sorted({1, *(arguments.rows or profile.rows_per_request)})
    arguments.connections = sorted(set(arguments.connections))
    if min(*arguments.connections, *arguments.rows, arguments.rounds) < 1 or max(arguments.rows) > 1024:
        parser.error("connections and rounds must be positive, rows 1 to 1024")
    if arguments.seconds <= 0 or arguments.warmup_seconds < 0 or min(arguments.rates or [1]) <= 0:
        parser.error("seconds and rates must be positive")
    if not arguments.objective_ms > 0:
        parser.error("--objective-ms must be positive")
    if arguments.output and arguments.output.suffix != ".json":
        parser.error("--output must end in .json; tables and report are written beside it")
    options = dict(option.partition("=")[::2] for option in arguments.server_options)
    if unknown := set(options) - set(names):
        parser.error(f"--server-options: no server called {', '.join(sorted(unknown))}")
    arguments.server_options = {name: shlex.split(text) for name, text in options.items()}
    return arguments


class ServerUnderTest:
    """A started and verified server, and the requests that it is asked."""

    def __init__(self, server: ServerProcess | ContainerServer, cpus: set[int] | None):
        """`cpus` are the cores of server and client together, None where they are not pinned."""
        self.server = server
        self.cpus = cpus
        self.endpoint = server.endpoint
        self.name = server.endpoint.name
        self.fastest = 0.0  # requests per second seen in a closed loop, one row a request
        rows, _ = load_test_rows()
        self.rows, self.expected = rows, load_expected(VERSION)

    def exchanges(self, rows_per_request: int) -> list:
        """Requests of so many rows; the 114 test rows are repeated where one request needs more."""
        times = -(-rows_per_request // len(self.rows))
        rows, expected = self.rows * times, np.concatenate([self.expected] * times)
        return make_exchanges(self.endpoint, VERSION, rows, expected, rows_per_request)

    def cpu_s(self) -> float:
        """CPU seconds, user and system, that the server's process tree has used so far."""
        total_s = 0.0
        for process in self.server.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total_s += times.user + times.system
        return total_s

    def rss_bytes(self) -> int:
        """Resident memory of the server's process tree; pages that processes share count in each."""
        total = 0
        for process in self.server.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        return total

    def observe(self, run: Callable[[], Window], **about) -> dict:
        """Do one `run` of the load generator and return its window for the result file."""
        cpu_before_s = self.cpu_s()
        with MachineLoad(self.cpu_s, self.cpus) as machine:
            window = run()
        return encode_window(
            window,
            endpoint=self.name,
            server_cpu_s=self.cpu_s() - cpu_before_s,
            server_rss_bytes=self.rss_bytes(),
            foreign_share=machine.foreign_share,
            **about,
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
        return time.perf_counter() - started_s

    def measure_closed(self, connections: int, rows: int, round_number: int, plan: "Plan") -> dict:
        with LoadGenerator(self.endpoint, self.exchanges(rows), connections) as load:
            rate = load.run_closed(plan.warmup_seconds).rate if plan.warmup_seconds else 0.0
            seconds = max(plan.seconds, plan.queries / plan.rounds / rate) if rate else plan.seconds
            window = self.observe(
                lambda: load.run_closed(seconds),
                load="closed",
                round=round_number,
                rows_per_request=rows,
                nominal_rate=0.0,
            )
        if rows == 1:
            answers = sum(count for _, count in window["latency_us_counts"])
            self.fastest = max(self.fastest, answers / window["elapsed_s"])
        return window

    def measure_open(self, rate: float, round_number: int, plan: "Plan") -> dict:
        with LoadGenerator(self.endpoint, self.exchanges(1), OPEN_CONNECTIONS) as load:
            if plan.warmup_seconds:
                load.run_closed(plan.warmup_seconds)
            seconds = max(2 * plan.seconds, plan.queries / plan.open_rounds / rate)
            seconds = max(seconds, 1 / rate)
            due_s = (
                poisson_arrivals(rate, seconds, seed=round_number)
                if plan.arrivals == "poisson"
                else constant_arrivals(rate, seconds)
            )
            return self.observe(
                lambda: load.run_open(due_s), load="open", round=round_number, rows_per_request=1, nominal_rate=rate
            )


@dataclass(frozen=True)
class Plan:
    """What one run measures: the profile with what the command line changed."""

    rounds: int
    open_rounds: int
    seconds: float
    warmup_seconds: float
    queries: int
    connections: list[int]
    rows: list[int]
    rates: list[float] | None
    rate_shares: tuple[float, ...]
    arrivals: str
    in_brief: frozenset[str] = frozenset()  # servers that are measured by connections only

    def closed_turns(self, name: str) -> list[tuple[int, int]]:
        """(connections, rows a request): every number of connections with one row, the fewest with more."""
        return [(count, 1) for count in self.connections] + [
            (self.connections[0], size) for size in self.rows if size > 1 and name not in self.in_brief
        ]

    def rates_of(self, server: ServerUnderTest) -> list[float]:
        """The offered rates: those asked for, or shares of what the server reached, to two digits."""
        if server.name in self.in_brief:
            return []
        if self.rates:
            return sorted(set(self.rates))
        return sorted({float(f"{share * server.fastest:.2g}") for share in self.rate_shares if server.fastest > 1})


def defaults_beside_tuned(names: list[str]) -> frozenset[str]:
    """Return the servers whose tuned set-up is measured as well."""
    return frozenset(name for name in names if f"{name}-tuned" in names)


def start_and_verify(
    start: Callable[[], ServerProcess | ContainerServer], starts: int, stack: contextlib.ExitStack
) -> tuple[ServerProcess | ContainerServer | None, dict]:
    """Start one server and check it; return it with its entry for the result file, or None with the failure in it.

    `start` returns it, not yet entered. It is started `starts` times, and left running the last time.
    """
    server = start()
    endpoint = server.endpoint
    about = {
        "kind": endpoint.kind,
        "variant": endpoint.variant,
        "protocol": endpoint.protocol,
        "command": server.command,
        "settings": endpoint.settings,
        "starts": [],
    }
    try:
        for number in range(starts):
            server = server if number == 0 else start()
            with contextlib.ExitStack() as attempt:
                attempt.enter_context(server)
                about["starts"].append({"listens_s": server.listens_s, "ready_s": server.ready_s})
                if number == starts - 1:
                    stack.push(attempt.pop_all())
        about["kind"] = server.kind
        about["is_seen"] = server.is_seen
        if endpoint.has_model:
            about["max_abs_difference"] = {
                version: max_abs_difference(endpoint, version) for version in endpoint.versions
            }
            if max(about["max_abs_difference"].values()) > TOLERANCE:
                raise ServerError(f"{endpoint.name}: breaks the parity contract, so it is not timed")
    except (ServerError, OSError, ValueError) as error:
        about["failure"] = str(error)
        return None, about
    return server, about


def list_failures(result: dict) -> list[str]:
    """Return what went wrong, a sentence each: servers that failed, and failed or wrong answers while timing."""
    failures = [about["failure"] for about in result["endpoints"].values() if about.get("failure")]
    for window in result["windows"]:
        if window["wrong"] or (window["errors"] and window["load"] == "closed"):
            failures.append(
                f"{window['endpoint']}: round {window['round']}, {window['connections']} connections: "
                f"errors {window['errors']}, wrong answers {window['wrong']}"
            )
    return failures


def measure_all(
    servers: dict[str, ServerUnderTest], plan: Plan, abouts: dict[str, dict], progress: Progress
) -> list[dict]:
    """Run every round; return the windows. A server that stops answering gets a "failure" and is left out from then."""
    windows: list[dict] = []
    shuffle = random.Random(SHUFFLE_SEED)
    task = progress.add_task("", total=plan.rounds * sum(len(plan.closed_turns(name)) for name in servers))

    def run_round(turns: list[tuple[str, str, Callable[[], dict]]]) -> None:
        shuffle.shuffle(turns)
        for name, what, measure in turns:
            if "failure" not in abouts[name]:
                progress.update(task, description=f"{name}: {what}", refresh=True)
                try:
                    windows.append(measure())
                except OSError as error:
                    abouts[name]["failure"] = f"{name}: stopped answering, {what} ({error})"
            progress.advance(task)

    for number in range(1, plan.rounds + 1):
        run_round(
            [
                (
                    name,
                    f"round {number}, {count} connections, {rows} rows",
                    lambda s=server, c=count, r=rows, n=number: s.measure_closed(c, r, n, plan),
                )
                for name, server in servers.items()
                for count, rows in plan.closed_turns(name)
            ]  # fmt: skip
        )
    rates = {name: plan.rates_of(server) for name, server in servers.items()}
    progress.update(task, completed=0, total=plan.open_rounds * sum(map(len, rates.values())))
    for number in range(1, plan.open_rounds + 1):
        run_round(
            [
                (
                    name,
                    f"sweep {number}, {rate:,.0f} requests per second",
                    lambda s=server, r=rate, n=number: s.measure_open(r, n, plan),
                )
                for name, server in servers.items()
                for rate in rates[name]
            ]  # fmt: skip
        )
    return windows


def main() -> int:
    interrupt_on_sigterm()
    classes = load_endpoints()
    arguments = parse_arguments(classes)
    profile = PROFILES[arguments.profile]
    plan = Plan(
        rounds=arguments.rounds,
        open_rounds=min(arguments.rounds, profile.open_rounds),
        seconds=arguments.seconds,
        warmup_seconds=arguments.warmup_seconds,
        queries=profile.queries,
        connections=list(arguments.connections),
        rows=arguments.rows,
        rates=arguments.rates,
        rate_shares=profile.rate_shares,
        arrivals=arguments.arrivals,
        in_brief=frozenset() if profile.defaults_in_full else defaults_beside_tuned(arguments.endpoints),
    )
    console = Console(highlight=False)
    environment = describe_environment({package for name in arguments.endpoints for package in classes[name].packages})
    server_cpus, client_cpus = split_cpus()
    if server_cpus is None:
        console.print("warning: one usable core: servers and client slow each other; use a machine with two or more")

    abouts: dict[str, dict] = {}
    made: dict[str, ContainerServer] = {}  # by service: two endpoints of one server share its container

    def start(name: str) -> ServerProcess | ContainerServer:
        endpoint_class = classes[name]
        if arguments.containers and endpoint_class.has_model:
            server = ContainerServer(endpoint_class(), server_cpus, made.get(endpoint_class.folder.name))
            made[server.service] = server
            return server
        endpoint = endpoint_class.on_free_ports()
        endpoint.extra_options = arguments.server_options.get(name, [])
        return ServerProcess(endpoint, server_cpus)

    with contextlib.ExitStack() as stack:
        servers: dict[str, ServerUnderTest] = {}
        for name in arguments.endpoints:
            with console.status(f"{name}: starting, then comparing its answers with the reference"):
                server, abouts[name] = start_and_verify(functools.partial(start, name), profile.starts, stack)
            if server is None:
                console.print(f"FAILED: {abouts[name]['failure']}", markup=False, soft_wrap=True)
                continue
            servers[name] = ServerUnderTest(server, server_cpus and server_cpus | client_cpus)
            try:
                with console.status(f"{name}: warming up"):
                    abouts[name]["warmup_s"] = servers[name].warm_up(arguments.settle_seconds)
            except OSError as error:
                abouts[name]["failure"] = f"{name}: stopped answering while warming up ({error})"
            differences = abouts[name].get("max_abs_difference", {})
            verdict = f"max |Δp| {max(differences.values()):.1e}" if differences else "no model: the floor"
            console.print(f"{name} ({server.kind}): ready after {server.ready_s:.1f} s, {verdict}")

        if client_cpus is not None:
            os.sched_setaffinity(0, client_cpus)
        columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
            try:
                windows = measure_all(servers, plan, abouts, progress)
            finally:
                for server in servers.values():
                    server.server.ask_to_end()

    result = {
        "schema_version": SCHEMA_VERSION,
        "environment": environment,
        "settings": {
            "profile": arguments.profile,
            "version": VERSION,
            "connections": plan.connections,
            "open_connections": OPEN_CONNECTIONS,
            "rows_per_request": plan.rows,
            "rounds": plan.rounds,
            "open_rounds": plan.open_rounds,
            "seconds": plan.seconds,
            "queries": plan.queries,
            "warmup_seconds": plan.warmup_seconds,
            "arrivals": plan.arrivals,
            "objective_p99_s": arguments.objective_ms / 1000,
            "server_cpus": sorted(server_cpus) if server_cpus else None,
            "client_cpus": sorted(client_cpus) if client_cpus else None,
        },
        "endpoints": abouts,
        "windows": windows,
    }
    path = arguments.output or RESULTS_DIR / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    write_result(result, path)
    write_whole(path.with_suffix(".md"), format_markdown(result))
    written = [str(path), path.with_suffix(".md").name]
    if not arguments.no_report:
        from report import write_report  # only here: matplotlib takes seconds to import

        written.append(str(write_report(result, path.with_suffix(""))))
    print_result(result, console)
    for failure in list_failures(result):
        console.print(f"FAILED: {failure}", markup=False, soft_wrap=True)
    console.print(f"wrote {', '.join(written[:-1])} and {written[-1]}", soft_wrap=True)
    return 1 if list_failures(result) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("benchmark_all: interrupted; the servers are stopped and no result is written")
