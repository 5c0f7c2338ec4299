"""Compare all servers: verify that they give equal answers, then measure latency and throughput.

    python benchmark_all.py

Starts every server with its README's command, proves |p - expected| <= 1e-5 on all test rows of both
versions, then runs interleaved rounds of closed-loop load. A server that does not start or answers
wrongly is reported and left out; the others go on and the exit code is 1. Writes
results/<utc>.json (raw observations) and results/<utc>.md (the table); Ctrl-C writes nothing and
stops every server.
"""

import argparse
import contextlib
import os
import random
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import psutil
from endpoint import Endpoint, load_endpoints
from environment import describe_environment, split_cpus
from load_generator import LoadGenerator, make_exchanges
from reference import TOLERANCE, load_expected, load_test_rows
from results import RESULTS_DIR, SCHEMA_VERSION, encode_window, format_markdown, print_result, write_result
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from server_process import ServerError, ServerProcess, find_free_ports, interrupt_on_sigterm
from verify import max_abs_difference

VERSION = "1"
ROWS_PER_REQUEST = 1
SHUFFLE_SEED = 0
WARMUP_CONNECTIONS = 16
WARMUP_WINDOW_S = 1.0
WARMUP_CHANGE = 0.1


def parse_arguments(names: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--endpoints", nargs="+", choices=names, default=names, help="which servers (default: all)")
    parser.add_argument(
        "--connections", type=int, nargs="+", default=[1, 4, 16, 64], help="numbers of connections (default: 1 4 16 64)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds over all servers (default: 3)")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of one window (default: 1)")
    parser.add_argument("--warmup-seconds", type=float, default=0.3, help="dropped before each window (default: 0.3)")
    parser.add_argument(
        "--settle-seconds", type=float, default=15.0, help="longest warm-up of a server after its check (default: 15)"
    )
    parser.add_argument("--output", type=Path, help="the result file (default: results/<utc>.json)")
    arguments = parser.parse_args()
    if min(*arguments.connections, arguments.rounds, 1) < 1 or arguments.seconds <= 0 or arguments.warmup_seconds < 0:
        parser.error("connections, rounds and seconds must be positive")
    if arguments.output and arguments.output.suffix != ".json":
        parser.error("--output must end in .json; the table is written beside it as .md")
    arguments.connections = sorted(set(arguments.connections))
    return arguments


def start_and_verify(
    endpoint: Endpoint, cpus: set[int] | None, settle_s: float, stack: contextlib.ExitStack
) -> tuple[ServerProcess | None, dict]:
    """Start one server and check it; return it with its entry for the result file, or None with the failure in it."""
    about = {"kind": endpoint.kind, "command": " ".join(endpoint.command()), "settings": endpoint.settings}
    server = ServerProcess(endpoint, cpus)
    try:
        stack.enter_context(server)
        about.update(kind=server.kind, ready_s=server.ready_s)
        if endpoint.has_model:
            about["max_abs_difference"] = {
                version: max_abs_difference(endpoint, version) for version in endpoint.versions
            }
            if max(about["max_abs_difference"].values()) > TOLERANCE:
                raise ServerError(f"{endpoint.name}: breaks the parity contract, so it is not timed")
        about["warmup_s"] = warm_up(server, settle_s)
    except (ServerError, OSError, ValueError) as error:
        about["failure"] = str(error)
        return None, about
    return server, about


def warm_up(server: ServerProcess, limit_s: float) -> float:
    """Load the server until it is as fast as it gets; return the seconds that took.

    A Java server compiles itself while it runs and speeds up for seconds. The rule: stop when three
    windows of WARMUP_WINDOW_S in a row differ by less than WARMUP_CHANGE, at the latest after `limit_s`.
    """
    rows, _ = load_test_rows()
    exchanges = make_exchanges(server.endpoint, VERSION, rows, load_expected(VERSION), ROWS_PER_REQUEST)
    started_s = time.perf_counter()
    rates: list[float] = []
    with LoadGenerator(server.endpoint, exchanges, WARMUP_CONNECTIONS) as load:
        while time.perf_counter() - started_s < limit_s:
            rates.append(load.run_closed(WARMUP_WINDOW_S).rate)
            if len(rates) > 2 and max(rates[-3:]) < (1 + WARMUP_CHANGE) * min(rates[-3:]):
                break
    return time.perf_counter() - started_s


def measure(server: ServerProcess, connections: int, round_number: int, arguments: argparse.Namespace) -> dict:
    """Run one warm-up and one window of load; return the window for the result file."""
    rows, _ = load_test_rows()
    exchanges = make_exchanges(server.endpoint, VERSION, rows, load_expected(VERSION), ROWS_PER_REQUEST)
    with LoadGenerator(server.endpoint, exchanges, connections) as load:
        if arguments.warmup_seconds:
            load.run_closed(arguments.warmup_seconds)
        cpu_before_s = tree_cpu_s(server)
        window = load.run_closed(arguments.seconds)
        server_cpu_s = tree_cpu_s(server) - cpu_before_s
    return encode_window(window, server.endpoint.name, round_number, server_cpu_s, tree_rss_bytes(server))


def tree_cpu_s(server: ServerProcess) -> float:
    """CPU seconds, user and system, that the server's process tree has used so far."""
    total_s = 0.0
    for process in server.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total_s += times.user + times.system
    return total_s


def tree_rss_bytes(server: ServerProcess) -> int:
    """Resident memory of the server's process tree; pages that processes share count in each."""
    total = 0
    for process in server.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total


def list_failures(result: dict) -> list[str]:
    """Return what went wrong, a sentence each: servers that failed, and failed or wrong answers while timing."""
    failures = [about["failure"] for about in result["endpoints"].values() if about.get("failure")]
    for window in result["windows"]:
        if window["errors"] or window["wrong"]:
            failures.append(
                f"{window['endpoint']}: round {window['round']}, {window['connections']} connections: "
                f"errors {window['errors']}, wrong answers {window['wrong']}"
            )
    return failures


def main() -> int:
    interrupt_on_sigterm()
    classes = load_endpoints()
    arguments = parse_arguments(list(classes))
    console = Console(highlight=False)
    environment = describe_environment({package for name in arguments.endpoints for package in classes[name].packages})
    server_cpus, client_cpus = split_cpus()
    if server_cpus is None:
        console.print("warning: one usable core: servers and client slow each other; use a machine with two or more")

    abouts: dict[str, dict] = {}
    windows: list[dict] = []
    with contextlib.ExitStack() as stack:
        servers: dict[str, ServerProcess] = {}
        for name in arguments.endpoints:
            endpoint = classes[name](find_free_ports(list(classes[name].default_ports)))
            with console.status(f"{name}: starting, comparing its answers with the reference, warming up"):
                server, abouts[name] = start_and_verify(endpoint, server_cpus, arguments.settle_seconds, stack)
            if server is None:
                console.print(f"{name}: FAILED: {abouts[name]['failure']}", markup=False, soft_wrap=True)
                continue
            servers[name] = server
            differences = abouts[name].get("max_abs_difference", {})
            verdict = f"max |Δp| {max(differences.values()):.1e}" if differences else "no model: the floor"
            console.print(f"{name} ({server.kind}): ready after {server.ready_s:.1f} s, {verdict}")

        if client_cpus is not None:
            os.sched_setaffinity(0, client_cpus)
        columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
        shuffle = random.Random(SHUFFLE_SEED)
        with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
            task = progress.add_task("", total=arguments.rounds * len(servers) * len(arguments.connections))
            for round_number in range(1, arguments.rounds + 1):
                turns = [(name, count) for name in servers for count in arguments.connections]
                shuffle.shuffle(turns)
                for name, count in turns:
                    progress.update(
                        task, description=f"round {round_number}: {name}, {count} connections", refresh=True
                    )
                    try:
                        windows.append(measure(servers[name], count, round_number, arguments))
                    except OSError as error:
                        abouts[name]["failure"] = f"{name}: stopped answering at {count} connections ({error})"
                    progress.advance(task)

    result = {
        "schema_version": SCHEMA_VERSION,
        "environment": environment,
        "settings": {
            "version": VERSION,
            "rows_per_request": ROWS_PER_REQUEST,
            "connections": arguments.connections,
            "rounds": arguments.rounds,
            "seconds": arguments.seconds,
            "warmup_seconds": arguments.warmup_seconds,
            "server_cpus": sorted(server_cpus) if server_cpus else None,
            "client_cpus": sorted(client_cpus) if client_cpus else None,
        },
        "endpoints": abouts,
        "windows": windows,
    }
    path = arguments.output or RESULTS_DIR / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    write_result(result, path)
    path.with_suffix(".md").write_text(format_markdown(result))
    print_result(result, console)
    for failure in list_failures(result):
        console.print(f"FAILED: {failure}", markup=False, soft_wrap=True)
    console.print(f"wrote {path} and {path.with_suffix('.md').name}", soft_wrap=True)
    return 1 if list_failures(result) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("benchmark_all: interrupted; the servers are stopped and no result is written")
