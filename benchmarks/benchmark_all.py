"""Compare all servers: verify that they give equal answers, then measure speed,
saturation and cost.

    python benchmark_all.py
        profile quick: under five minutes on two cores
    python benchmark_all.py --profile rigorous
        sample sizes after MLPerf's rules: hours
    python benchmark_all.py --containers
        the servers that docker compose runs
    python benchmark_all.py --address onnx-tuned=http://10.0.0.5/onnx
        whatever answers there: a gateway, a cluster

Starts every server with its README's command, proves |p - expected| <= 1e-5 on
all test rows of both versions, then runs many short rounds of load, all servers
in random order in each: closed loop by connections and by rows a request, until
the ratios are known well enough or the time is up, and open loop at rising
rates until each server breaks. A server that does not start or answers wrongly
is reported and left out; the others go on and the exit code is 1. Writes
results/<utc>.json (raw observations), results/<utc>.md (tables) and
results/<utc>/report.html with its plots. Ctrl-C stops every server and keeps
what was measured.
"""

import argparse
import contextlib
import functools
import math
import os
import random
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import machine.packages  # noqa: F401

# isort: split
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from drawing.tables import format_markdown, print_result
from endpoints.base import Endpoint, ServerError, describe_choices, load_endpoints
from endpoints.reference import TOLERANCE
from figures.cells import SAMPLES_BEYOND_PERCENTILE
from figures.measured import Measured, list_wide_rows
from figures.result_file import RESULTS_DIR, SCHEMA_VERSION, write_result, write_whole
from figures.words import describe_closed_load, format_count
from machine.environment import describe_environment, split_cpus
from machine.priority import lifted_priority
from machine.signals import interrupt_on_sigterm
from servers.containers import ContainerServer, list_container_endpoints
from servers.parity import max_abs_difference
from servers.process import ServerProcess
from servers.remote import RemoteServer
from servers.under_test import OPEN_CONNECTIONS, VERSION, AnyServer, ServerUnderTest

SHUFFLE_SEED = 0
LIMIT_FACTOR = 10.0  # at most: how many times longer a window may be that waits for its least number of requests
P99_REQUESTS = 100 * SAMPLES_BEYOND_PERCENTILE  # the fewest with a 99th percentile
OPEN_FACTOR = 3.0  # at most: how many times longer an open-loop window may be for a p99 of a low rate
LONGEST_S = 600.0  # of a window that waits for MLPerf's number of requests
LOOK_EVERY = 4  # rounds between two looks at how well the ratios are known
MANY_ROWS_EVERY = 2  # requests of many rows are measured in every second round
DISTURBED_SHARE = 0.2  # of a window's CPU time taken by others, or waited for a core: it is measured once more
MOST_REPEATED = 0.25  # of all windows
RAISE = 1.3  # the next offered rate, as a multiple of one that did not break the server
MOST_RAISES = 8
SAVE_EVERY_S = 10.0
OVERHEAD_S = 0.03  # of a window besides its load: connecting, reading the processes' state, checking the answers
REPORT_S = 25.0  # to end the servers, write and draw
# MLPerf Inference requires enough queries that a 99th percentile is known to a twentieth of its distance
# from 100 % with 99 % confidence: 0.99 * 0.01 * (2.576 / 0.0005)**2 = 262,742, in whole multiples of 2**13
# (mlcommons/inference_policies, inference_rules.adoc, "Number of queries").
MLPERF_QUERIES = 270_336


@dataclass(frozen=True)
class Plan:
    """How much one run measures: a profile with the command line's changes."""

    starts: int  # cold starts of each server
    rounds: int  # least, over all servers
    most_rounds: int  # for rows whose ratio is not known well enough before
    precision: float  # well enough: the 95 % interval is within this share of the estimate
    limit_seconds: float  # of the whole command, as far as the least rounds allow; 0: none
    spacing_s: float  # least time from one round to the next: a slow stretch of the machine fills but one of them
    seconds: float  # least length of a closed-loop window
    requests: int  # least in a closed-loop window; lengthens that of a slow server
    queries: int  # least in all least rounds of a row together; lengthens its windows
    warmup_seconds: float  # dropped before each window
    connections: tuple[int, ...]
    rows_per_request: tuple[int, ...]
    open_rounds: int  # sweeps of the offered rates
    open_seconds: float  # least length of an open-loop window
    rate_shares: tuple[float, ...]  # offered rates, as shares of the server's fastest closed-loop rate
    settle_seconds: float  # longest warm-up of a server after its check
    defaults_in_full: bool  # False: a default with a tuned set-up is measured by connections only, and not over gRPC
    rates: tuple[float, ...] = ()  # offered rates instead of shares; then they are not raised
    arrivals: str = "poisson"
    objective_ms: float = 50.0

    def turns(self, in_brief: bool) -> list[tuple[int, int]]:
        """(connections, rows a request): every number of connections with one row, the fewest with more."""
        return [(count, 1) for count in self.connections] + [
            (self.connections[0], size) for size in self.rows_per_request if size > 1 and not in_brief
        ]

    def least_requests(self, connections: int) -> int:
        """Of a closed-loop window: enough for its start and its end, when not all connections ask, to count little."""
        least = max(self.requests, 4 * connections) if self.requests else 0
        return max(least, -(-self.queries // self.rounds))

    def open_window_s(self, rate: float) -> float:
        """How long an open-loop window is: if OPEN_FACTOR allows, long enough for a p99 of all sweeps together."""
        sweeps = max(self.open_rounds, 1)
        enough_s = (-(-P99_REQUESTS // sweeps) + 0.5) / rate  # a half, for a window makes whole requests
        return max(self.open_seconds, min(enough_s, OPEN_FACTOR * self.open_seconds), self.queries / sweeps / rate)

    @property
    def longest_s(self) -> float:
        """How long a closed-loop window may wait for its least requests."""
        return LONGEST_S if self.queries else LIMIT_FACTOR * self.seconds


PROFILES = {
    "quick": Plan(
        starts=1, rounds=12, most_rounds=200, precision=0.1, limit_seconds=280.0, spacing_s=1.5, seconds=0.05,
        requests=30, queries=0, warmup_seconds=0.03, connections=(1, 16, 64), rows_per_request=(1, 32, 1024),
        open_rounds=3, open_seconds=0.4, rate_shares=(0.1, 0.3, 0.6, 0.9, 1.2), settle_seconds=3.0,
        defaults_in_full=False,
    ),
    "rigorous": Plan(
        starts=3, rounds=40, most_rounds=80, precision=0.02, limit_seconds=0.0, spacing_s=1.5, seconds=1.0,
        requests=100, queries=MLPERF_QUERIES, warmup_seconds=0.5, connections=(1, 4, 16, 64),
        rows_per_request=(1, 8, 32, 128, 1024), open_rounds=10, open_seconds=5.0,
        rate_shares=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1), settle_seconds=30.0, defaults_in_full=True,
    ),
}  # fmt: skip


def parse_arguments(classes: dict[str, type[Endpoint]]) -> tuple[argparse.Namespace, Plan]:
    names = list(classes)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--profile", choices=PROFILES, default="quick", help="how much is measured (default: quick)")
    add(
        "--endpoints",
        nargs="+",
        choices=names,
        metavar="NAME",
        help=describe_choices(names, "all but the peers; quick: no default over gRPC that has a tuned set-up"),
    )
    add(
        "--containers",
        action="store_true",
        help="recreate the containers of docker-compose.yml and measure those (default: start each server)",
    )
    add(
        "--address",
        nargs="+",
        default=[],
        metavar="NAME=URL",
        help="measure only what answers at http://host:port/prefix (default: start each server)",
    )
    add("--no-report", action="store_true", help="draw no report; report.py can later (default: draw it)")
    add("--output", type=Path, help="the result file (default: results/<utc>.json)")
    add(
        "--server-options",
        nargs="+",
        default=[],
        metavar="NAME=OPTIONS",
        help='added to a server\'s command, e.g. "onnx=--intra-op-threads 2" (default: none)',
    )
    plan = parser.add_argument_group("what is measured", "each default is the profile's")
    add = plan.add_argument
    add("--connections", type=int, nargs="+", metavar="N", help="numbers of connections")
    add("--rows", type=int, nargs="+", metavar="N", dest="rows_per_request", help="rows a request, 1 to 1024")
    add("--rounds", type=int, help="rounds over all servers, this many and no more")
    add("--precision", type=float, help="measure on until the interval of each ratio is within this share of it")
    add("--limit-seconds", type=float, help="of the whole command, 0: none; the least rounds are always measured")
    add("--seconds", type=float, help="least length of one closed-loop window")
    add("--warmup-seconds", type=float, help="dropped before each window")
    add("--settle-seconds", type=float, help="longest warm-up of a server after its check")
    add("--open-rounds", type=int, help="sweeps of the offered rates, 0: none")
    add(
        "--rates",
        type=float,
        nargs="+",
        metavar="R",
        help="offered requests per second (default: shares of each server's fastest, raised until it breaks)",
    )
    add(
        "--arrivals",
        choices=("poisson", "constant"),
        help="how the requests of an offered rate arrive: at random or evenly (default: poisson)",
    )
    add("--objective-ms", type=float, help="p99 beyond which a server counts as broken (default: 50)")
    arguments = parser.parse_args()
    plan = make_plan(parser, arguments)
    if arguments.containers:
        inside = list_container_endpoints(classes)
        names = [name for name in names if name in inside or not classes[name].has_model]
    arguments.address = dict(address.partition("=")[::2] for address in arguments.address)
    if arguments.address:
        if arguments.containers or arguments.endpoints or arguments.server_options:
            parser.error("--address names the servers, and starts none: no --containers, --endpoints, --server-options")
        if unknown := set(arguments.address) - set(names):
            parser.error(f"--address: no server called {', '.join(sorted(unknown))}; there are {', '.join(names)}")
        arguments.endpoints = list(arguments.address)
        try:
            for name, address in arguments.address.items():
                classes[name].at(address)
        except ServerError as error:
            parser.error(f"--address: {error}")
    if not arguments.endpoints:
        in_brief = set() if plan.defaults_in_full else defaults_beside_tuned(names)
        arguments.endpoints = [
            name
            for name in names
            if classes[name].kind != "peer" and (name not in in_brief or classes[name].protocol == "REST")
        ]
    if unknown := set(arguments.endpoints) - set(names):
        parser.error(f"no container answers {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if arguments.output and arguments.output.suffix != ".json":
        parser.error("--output must end in .json; tables and report are written next to it")
    options = dict(option.partition("=")[::2] for option in arguments.server_options)
    if unknown := set(options) - set(names):
        parser.error(f"--server-options: no server called {', '.join(sorted(unknown))}")
    arguments.server_options = {name: shlex.split(text) for name, text in options.items()}
    return arguments, plan


def make_plan(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Plan:
    """The profile with the options that were given; those have the names of the plan's fields."""
    profile = PROFILES[arguments.profile]
    given = {name: value for name in asdict(profile) if (value := getattr(arguments, name, None)) is not None}
    if "rounds" in given:
        given["most_rounds"] = given["rounds"]
        given.setdefault("open_rounds", min(given["rounds"], profile.open_rounds))
    for name in ("connections", "rows_per_request", "rates"):
        if name in given:
            given[name] = tuple(sorted({*given[name], *((1,) if name == "rows_per_request" else ())}))
    plan = replace(profile, **given)
    if min(*plan.connections, *plan.rows_per_request, plan.rounds) < 1 or max(plan.rows_per_request) > 1024:
        parser.error("connections and rounds must be positive, rows 1 to 1024")
    if plan.seconds <= 0 or plan.precision <= 0 or min(plan.rates or (1.0,)) <= 0 or not plan.objective_ms > 0:
        parser.error("--seconds, --precision, --rates and --objective-ms must be positive")
    if min(plan.warmup_seconds, plan.settle_seconds, plan.limit_seconds, plan.open_rounds) < 0:
        parser.error("--warmup-seconds, --settle-seconds, --limit-seconds and --open-rounds must not be negative")
    return plan


def defaults_beside_tuned(names: list[str]) -> frozenset[str]:
    """Return the servers whose tuned set-up is measured as well."""
    return frozenset(name for name in names if f"{name}-tuned" in names)


def start_and_verify(
    start: Callable[[], AnyServer], starts: int, stack: contextlib.ExitStack
) -> tuple[AnyServer | None, dict[str, Any]]:
    """Start one server and check it; return it with its entry for the result file, or None with the failure in it.

    `start` returns it, not yet entered. It is started `starts` times, and left running the last time.
    """
    server = start()
    endpoint = server.endpoint
    entry: dict[str, Any] = {
        "kind": endpoint.kind,
        "variant": endpoint.variant,
        "protocol": endpoint.protocol,
        "settings": endpoint.settings,
        "starts": [],
    }
    try:
        entry["command"] = server.command
        for number in range(starts):
            server = server if number == 0 else start()
            with contextlib.ExitStack() as attempt:
                attempt.enter_context(server)
                entry["starts"].append({"listens_s": server.listens_s, "ready_s": server.ready_s})
                if number == starts - 1:
                    stack.push(attempt.pop_all())
        entry["kind"] = server.kind
        entry["is_seen"] = server.is_seen
        if endpoint.has_model:
            entry["max_abs_difference"] = {
                version: max_abs_difference(endpoint, version) for version in endpoint.versions
            }
            if max(entry["max_abs_difference"].values()) > TOLERANCE:
                raise ServerError(f"{endpoint.name}: breaks the parity contract, so it is not timed")
    except (ServerError, OSError, ValueError) as error:
        entry["failure"] = str(error)
        return None, entry
    return server, entry


def list_failures(result: dict[str, Any]) -> list[str]:
    """Return what went wrong, a sentence each: servers that failed, and failed or wrong answers while timing."""
    failures = [entry["failure"] for entry in result["endpoints"].values() if entry.get("failure")]
    for window in result["windows"]:
        if window["wrong"] or (window["errors"] and window["load"] == "closed"):
            failures.append(
                f"{window['endpoint']}: round {window['round']}, {format_count(window['connections'], 'connection')}: "
                f"errors {window['errors']}, wrong answers {window['wrong']}"
            )
    return failures


@dataclass
class Run:
    """The measurement: fills `result` window by window, and saves it as it goes."""

    plan: Plan
    servers: dict[str, ServerUnderTest]
    result: dict[str, Any]
    progress: Progress
    save: Callable[[], None]
    deadline_s: float = math.inf  # by time.perf_counter: when the closed loop must be over
    end_s: float = math.inf  # and when no offered rate is raised any more
    shuffle: random.Random = field(default_factory=lambda: random.Random(SHUFFLE_SEED))
    windows: int = 0  # measured, repeated ones included
    repeated: int = 0

    def __post_init__(self) -> None:
        self.task = self.progress.add_task("", total=None)
        self.saved_s = time.perf_counter()
        in_brief = frozenset[str]() if self.plan.defaults_in_full else defaults_beside_tuned(list(self.servers))
        self.turns = {name: self.plan.turns(name in in_brief) for name in self.servers}
        self.swept = [
            name for name, server in self.servers.items() if server.endpoint.has_model and name not in in_brief
        ]

    def measure(self) -> None:
        self.measure_closed()
        self.measure_open()

    def is_lost(self, name: str) -> bool:
        return "failure" in self.result["endpoints"][name]

    def measure_closed(self) -> None:
        """Run the least rounds, then rounds of the rows that are not known well enough, until all are or time is up."""
        wide: set[tuple[str, int]] = set()
        round_s = 0.0
        for number in range(1, self.plan.most_rounds + 1):
            is_extra = number > self.plan.rounds
            if is_extra:
                if (number - self.plan.rounds) % LOOK_EVERY == 1:
                    wide = list_wide_rows(Measured(self.result), self.plan.precision)
                if not wide or time.perf_counter() + round_s > self.deadline_s:
                    break
            started_s = time.perf_counter()
            turns = [
                (
                    name,
                    describe_closed_load(count, rows),
                    functools.partial(self._measure_closed, name, count, rows, number),
                )
                for name in self.servers
                for count, rows in self.turns[name]
                if ((name, count) in wide and rows == 1 if is_extra else rows == 1 or number % MANY_ROWS_EVERY)
            ]
            self._run_round(f"round {number}, of {self.plan.rounds} or more", turns)
            time.sleep(max(0.0, started_s + self.plan.spacing_s - time.perf_counter()))
            round_s = time.perf_counter() - started_s

    def _measure_closed(self, name: str, connections: int, rows: int, number: int) -> dict[str, Any]:
        plan, requests = self.plan, self.plan.least_requests(connections)
        return self.servers[name].measure_closed(
            connections, rows, number, plan.seconds, requests, plan.longest_s, plan.warmup_seconds
        )

    def measure_open(self) -> None:
        """Sweep the offered rates, then raise them for each server that none of them broke."""
        rates = {name: self._first_rates(name) for name in self.swept}
        self._sweep(rates)
        raises = 0
        while not self.plan.rates and raises < MOST_RAISES and time.perf_counter() < self.end_s:
            measured = Measured(self.result)
            rates = {
                name: [_round(RAISE * max(cell.nominal_rate for cell in measured.open(name)))]
                for name, knee in measured.knees.items()
                if knee.is_open and not self.is_lost(name)
            }
            if not rates:
                break
            self._sweep(rates)
            raises += 1

    def _first_rates(self, name: str) -> list[float]:
        """The offered rates: those asked for, or shares of what the server reached."""
        fastest = self.servers[name].fastest
        shares = {_round(share * fastest) for share in self.plan.rate_shares} if fastest > 1 else set[float]()
        return sorted(self.plan.rates or shares)

    def _sweep(self, rates: dict[str, list[float]]) -> None:
        for number in range(1, self.plan.open_rounds + 1):
            turns = [
                (name, f"{rate:,.0f} requests/s offered", functools.partial(self._measure_open, name, rate, number))
                for name in rates
                for rate in rates[name]
            ]
            self._run_round(f"sweep {number} of {self.plan.open_rounds}", turns)

    def _measure_open(self, name: str, rate: float, number: int) -> dict[str, Any]:
        plan = self.plan
        return self.servers[name].measure_open(
            rate, number, plan.open_window_s(rate), plan.arrivals, plan.warmup_seconds
        )

    def _run_round(self, title: str, turns: list[tuple[str, str, Callable[[], dict[str, Any]]]]) -> None:
        """Take the turns in random order. A server that stops answering gets a "failure" and no turn from then on."""
        self.shuffle.shuffle(turns)
        self.progress.reset(self.task, total=len(turns))
        for name in {name for name, _, _ in turns}:
            self.servers[name].look_again()
        for name, load, measure in turns:
            if not self.is_lost(name):
                self.progress.update(self.task, description=f"{title}: {name}, {load}", refresh=True)
                try:
                    self.result["windows"].append(self._measure_undisturbed(measure))
                except OSError as error:
                    self.result["endpoints"][name]["failure"] = f"{name}: stopped answering, {load} ({error})"
            self.progress.advance(self.task)
        if time.perf_counter() - self.saved_s > SAVE_EVERY_S:
            self.save()
            self.saved_s = time.perf_counter()

    def _measure_undisturbed(self, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Measure a window, and once more if others disturbed it; return the less disturbed, whatever its figures."""
        window = measure()
        self.windows += 1
        is_whole = not window["errors"] and not window["wrong"]  # a failure is never measured away
        if is_whole and disturbed_share(window) > DISTURBED_SHARE and self.repeated < MOST_REPEATED * self.windows:
            again = measure()
            self.windows += 1
            self.repeated += 1
            self.result["repeated_windows"] = self.repeated
            if again["errors"] or again["wrong"] or disturbed_share(again) < disturbed_share(window):
                return again
        return window


def disturbed_share(window: dict[str, Any]) -> float:
    """How far others disturbed a window: the share of its CPU time that they took or that the client waited for."""
    return float(window["disturbed_share"])


def _round(rate: float) -> float:
    """A rate to two digits."""
    return float(f"{rate:.2g}")


def seconds_of_sweeps(plan: Plan, servers: int) -> float:
    """Return about how long the sweeps of that many servers take if raised twice and if the lowest rate is slow."""
    rates = len(plan.rates) or len(plan.rate_shares) + 2
    longer_s = (OPEN_FACTOR - 1) * plan.open_seconds
    window_s = plan.open_seconds + plan.warmup_seconds + OVERHEAD_S
    return servers * plan.open_rounds * (rates * window_s + longer_s)


def main() -> int:
    started_s = time.perf_counter()
    interrupt_on_sigterm()
    classes = load_endpoints(with_peers=True)
    arguments, plan = parse_arguments(classes)
    console = Console(highlight=False)
    environment = describe_environment({package for name in arguments.endpoints for package in classes[name].packages})
    server_cpus, client_cpus = split_cpus()
    if server_cpus is None:
        console.print("warning: one usable core: servers and client slow each other; use a machine with two or more")
    path = arguments.output or RESULTS_DIR / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    result: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "complete": False,
        "environment": environment,
        "settings": {
            **{name: value for name, value in asdict(plan).items() if name != "objective_ms"},
            "profile": arguments.profile,
            "version": VERSION,
            "open_connections": OPEN_CONNECTIONS,
            "objective_p99_s": plan.objective_ms / 1000,
            "server_cpus": sorted(server_cpus) if server_cpus else None,
            "client_cpus": sorted(client_cpus) if client_cpus else None,
            "goes_first": False,
        },
        "endpoints": {},
        "windows": [],
    }
    containers: dict[str, ContainerServer] = {}  # by service: two endpoints of one server share its container

    def start(name: str) -> AnyServer:
        endpoint_class = classes[name]
        if arguments.address:
            return RemoteServer(endpoint_class.at(arguments.address[name]))
        if arguments.containers and endpoint_class.has_model:
            server = ContainerServer(endpoint_class(), server_cpus, containers.get(endpoint_class.folder.name))
            containers[server.service] = server
            return server
        endpoint = endpoint_class.on_free_ports()
        endpoint.extra_options = arguments.server_options.get(name, [])
        return ServerProcess(endpoint, server_cpus, result["settings"]["goes_first"])

    try:
        with contextlib.ExitStack() as stack:
            if not arguments.containers and not arguments.address:  # those have their own priority
                result["settings"]["goes_first"] = stack.enter_context(lifted_priority())
            servers: dict[str, ServerUnderTest] = {}
            for name in arguments.endpoints:
                with console.status(f"{name}: starting, then comparing its answers with the reference"):
                    started, entry = start_and_verify(functools.partial(start, name), plan.starts, stack)
                result["endpoints"][name] = entry
                if started is None:
                    console.print(f"FAILED: {entry['failure']}", markup=False, soft_wrap=True)
                    continue
                server = ServerUnderTest(
                    started, server_cpus and client_cpus and server_cpus | client_cpus, result["settings"]["goes_first"]
                )
                try:
                    with console.status(f"{name}: warming up"):
                        entry["warmup_s"] = server.warm_up(plan.settle_seconds)
                except OSError as error:
                    entry["failure"] = f"{name}: stopped answering while warming up ({error})"
                servers[name] = server
                differences = entry.get("max_abs_difference", {})
                verdict = f"max |Δp| {max(differences.values()):.1e}" if differences else "no model: the floor"
                console.print(f"{name} ({started.kind}): ready after {started.ready_s:.1f} s, {verdict}")

            if client_cpus is not None:
                os.sched_setaffinity(0, client_cpus)
            columns = BarColumn(20), TimeElapsedColumn(), TextColumn("{task.description}")
            with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
                run = Run(plan, servers, result, progress, functools.partial(write_result, result, path))
                if plan.limit_seconds:
                    run.end_s = started_s + plan.limit_seconds - REPORT_S
                    run.deadline_s = run.end_s - seconds_of_sweeps(plan, len(run.swept))
                try:
                    run.measure()
                finally:
                    for server in servers.values():
                        server.server.ask_to_end()
        result["complete"] = True
    except KeyboardInterrupt:
        if not result["windows"]:
            raise
        console.print("interrupted: the servers are stopped, and what was measured is kept")
    try:
        return finish(arguments, result, path, console)
    except KeyboardInterrupt:
        console.print(f"interrupted: {path} is written, what is made from it is not; report.py can draw it")
        return 130


def finish(arguments: argparse.Namespace, result: dict[str, Any], path: Path, console: Console) -> int:
    """Write the result, its tables and its report; return the exit code."""
    write_result(result, path)
    measured = Measured(result)
    write_whole(path.with_suffix(".md"), format_markdown(measured))
    written = [str(path), path.with_suffix(".md").name]
    if not arguments.no_report:
        from drawing.page import write_report  # only here: matplotlib takes seconds to import

        written.append(str(write_report(measured, path.with_suffix(""))))
    print_result(measured, console)
    failures = list_failures(result)
    for failure in failures:
        console.print(f"FAILED: {failure}", markup=False, soft_wrap=True)
    console.print(f"wrote {', '.join(written[:-1])} and {written[-1]}", soft_wrap=True)
    if not result["complete"]:
        return 130
    return 1 if failures else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("benchmark_all: interrupted; the servers are stopped and no result is written", file=sys.stderr)
        sys.exit(130)
