"""Measure one server's latency, one request at a time: how long, how steady, and
where the time goes.

    python latency_test.py --endpoint onnx
        starts the server, measures a minute, stops it
    python latency_test.py --endpoint onnx --running
        measures the one that already runs on its usual port
    python latency_test.py --endpoint onnx --address http://10.0.0.5/onnx
        measures whatever answers there: a gateway, a cluster

Prints a histogram, percentiles with 95 % intervals, the first, middle and last
third of the time with a verdict on whether the server was steady, and, from a
short pass after the timing, the parts of a request that the client can see.
Every reply is compared with the reference. Writes nothing.
"""

import argparse
import contextlib
import functools
import os
import select
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import machine.packages  # noqa: F401

# isort: split
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from client.ask import ask
from client.connection import Connection, begin_connecting
from client.load_generator import CONNECTION_CLASSES, REPLY_TIMEOUT_S, Exchange, LoadGenerator, make_exchanges
from endpoints.base import Endpoint, ServerError, describe_choices, load_endpoints
from endpoints.reference import load_expected, load_test_rows
from figures.cells import SAMPLES_BEYOND_PERCENTILE
from figures.intervals import Interval, percentile_interval
from figures.result_file import Window
from machine.environment import split_cpus
from machine.signals import interrupt_on_sigterm
from servers.process import ServerProcess

PERCENTILES = (50, 90, 95, 99, 99.9)
HISTOGRAM_BINS = 12
BAR_WIDTH = 44  # with the bounds and the count 80 columns
BATCHES = 20  # stretches of time whose percentiles are compared to see how far one lies from the truth
THIRDS = ("first", "middle", "last")
PIECES_PER_THIRD = 10
SIGNIFICANCE = 0.01  # chance of calling a steady server unsteady, each for p50 and p99
LEAST_CHANGE = {50: 0.05, 99: 0.2}  # by percentile: thirds that differ by a smaller share are called alike
PARTS_REQUESTS = 300
PARTS_SECONDS = 5.0
PROGRESS_SECONDS = 2.0  # how often the progress bar moves: between two stretches of the measurement, by no thread


def find_interval(latencies_s: np.ndarray, percent: float) -> Interval | None:
    """Return a percentile in seconds with its 95 % interval; None if fewer than 10 observations lie beyond it.

    `latencies_s` (n,) are in order of time. Consecutive batches are the clusters of `percentile_interval`,
    so that it also covers slow stretches.
    """
    beyond = round(len(latencies_s) * (1 - percent / 100), 6)
    if beyond < SAMPLES_BEYOND_PERCENTILE:
        return None
    return percentile_interval(np.array_split(latencies_s, BATCHES), percent)


def format_percentiles(latencies_s: np.ndarray) -> list[str]:
    """One line a percentile, in ms with its interval; those without enough observations beyond them are marked."""
    lines = []
    for percent in PERCENTILES:
        interval = find_interval(latencies_s, percent)
        if interval is None:
            lines.append(f"p{percent:<5g} too few requests to say")
            continue
        high = f"{interval.high * 1000:.3f}" if np.isfinite(interval.high) else "?"
        lines.append(f"p{percent:<5g}{interval.estimate * 1000:8.3f} ms ({interval.low * 1000:.3f} to {high})")
    lines.append(f"mean  {latencies_s.mean() * 1000:8.3f} ms, slowest {latencies_s.max() * 1000:.3f} ms")
    return lines


def format_histogram(latencies_s: np.ndarray) -> list[str]:
    """Bars over logarithmic bins, so that the bulk and the tail are both seen."""
    edges = np.geomspace(latencies_s.min() * 0.999, latencies_s.max() * 1.001, HISTOGRAM_BINS + 1)
    counts, _ = np.histogram(latencies_s, edges)
    lines = []
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        bar = "█" * round(BAR_WIDTH * count / counts.max())
        lines.append(f"{low * 1000:8.3f} – {high * 1000:8.3f} ms {bar:<{BAR_WIDTH}} {count:,}")
    return lines


def split_by_time(latencies_s: np.ndarray, parts: int) -> list[np.ndarray]:
    """Split latencies, one after the other on one connection, into `parts` stretches equally long in time."""
    ends_s = np.cumsum(latencies_s)  # (n,)
    places = np.searchsorted(ends_s, ends_s[-1] * np.arange(1, parts) / parts)
    return np.split(latencies_s, places)


def judge_steadiness(latencies_s: np.ndarray) -> tuple[bool | None, str]:
    """Return whether latency stayed the same over the three thirds of the time, and the sentence that reports it.

    Each third gives ten pieces, each piece a percentile; the Kruskal-Wallis test decides whether the three
    sets of ten differ by more than chance (Kruskal and Wallis, JASA 47, 1952). With a hundred thousand
    requests it finds differences too small to matter, so a change must also be at least LEAST_CHANGE.
    p50 is always judged, p99 if each piece supports it; None if there are too few requests for either.
    """
    from scipy import stats  # only here: it takes seconds to import

    pieces = split_by_time(latencies_s, len(THIRDS) * PIECES_PER_THIRD)
    thirds = split_by_time(latencies_s, len(THIRDS))
    judged = []
    for percent, least_change in LEAST_CHANGE.items():
        if min(map(len, pieces)) * (100 - percent) < 100 * SAMPLES_BEYOND_PERCENTILE:
            continue
        figures = np.array([np.percentile(piece, percent) for piece in pieces]).reshape(len(THIRDS), PIECES_PER_THIRD)
        middles_s = np.array([np.percentile(third, percent) for third in thirds])
        change = middles_s.max() / middles_s.min() - 1
        alike = bool((figures == figures[0, 0]).all())  # the test is not defined for equal values
        by_chance = alike or stats.kruskal(*figures).pvalue > SIGNIFICANCE
        if not by_chance and change >= least_change:
            values = ", ".join(f"{value * 1000:.3f}" for value in middles_s)
            return False, f"not steady: p{percent} of the thirds is {values} ms; find what changed"
        judged.append(f"p{percent} within {change:.1%}" + (" (chance)" if change >= least_change else ""))
    if not judged:
        return None, "steady? too few requests to say; measure longer"
    return True, f"steady: the thirds agree, {', '.join(judged)}"


def format_thirds(latencies_s: np.ndarray) -> list[str]:
    """One line a third of the time, then the verdict."""
    lines = [f"{'third':<8}{'requests':>10}{'p50 ms':>10}{'p90 ms':>10}{'p99 ms':>10}{'slowest ms':>12}"]
    for name, third in zip(THIRDS, split_by_time(latencies_s, len(THIRDS)), strict=True):
        cells = []
        for percent in (50, 90, 99):
            interval = find_interval(third, percent)
            cells.append("too few" if interval is None else f"{interval.estimate * 1000:.3f}")
        slowest = f"{third.max() * 1000:.3f}" if len(third) else "–"
        lines.append(f"{name:<8}{len(third):>10,}" + "".join(f"{cell:>10}" for cell in cells) + f"{slowest:>12}")
    return [*lines, judge_steadiness(latencies_s)[1]]


@dataclass
class Parts:
    """Where the time of requests went, one entry a request, in seconds."""

    connect_s: list[float] = field(default_factory=list)  # TCP handshake, each on a fresh connection
    fresh_s: list[float] = field(default_factory=list)  # the first request on that connection, send to whole reply
    send_s: list[float] = field(default_factory=list)  # handing the request to the kernel, on a kept-alive connection
    wait_s: list[float] = field(default_factory=list)  # from there to the reply's first bytes: the server
    receive_s: list[float] = field(default_factory=list)  # from there to its end
    failed: int = 0  # connections and requests that failed, or whose status was not 200

    @property
    def request_s(self) -> np.ndarray:
        """Send, wait and receive together, (n,)."""
        return np.array(self.send_s) + np.array(self.wait_s) + np.array(self.receive_s)


def ask_in_parts(connection: Connection, number: int, request, poller: Callable) -> tuple[float, float, float]:
    """Send exchange `number`'s request and read its reply; return the seconds of send, wait and receive.

    `poller` makes an object with the methods of select.poll. OSError if the connection breaks or the status is not 200.
    """
    polling = poller()
    polling.register(connection.socket, select.POLLIN)
    first_ns = None
    start_ns = connection.clock()
    connection.send(number, request)
    sent_ns = connection.clock()
    while not connection.complete:
        if not polling.poll(REPLY_TIMEOUT_S * 1000):
            raise TimeoutError(f"no reply in {REPLY_TIMEOUT_S:.0f} s")
        if first_ns is None:
            first_ns = connection.clock()
        reason = connection.receive()
        if reason is not None and not connection.complete:
            raise ConnectionError(reason)
    end_ns = connection.clock()
    if connection.status != 200:
        raise ConnectionError(connection.failure)
    return (sent_ns - start_ns) / 1e9, (first_ns - sent_ns) / 1e9, (end_ns - first_ns) / 1e9


def measure_parts(
    endpoint: Endpoint,
    exchanges: list[Exchange],
    count: int = PARTS_REQUESTS,
    *,
    clock: Callable[[], int] = time.perf_counter_ns,
    poller: Callable = select.poll,
    connect: Callable | None = None,
) -> Parts:
    """Ask `count` times on fresh connections, then `count` times on a kept one; each for PARTS_SECONDS at most.

    `clock`, `poller` and `connect` are those of LoadGenerator.
    """
    parts = Parts()
    connect = connect or functools.partial(begin_connecting, address=endpoint.find_address())
    connection = CONNECTION_CLASSES[endpoint.protocol](endpoint.port, clock, connect)
    for keep in (False, True):
        end_ns = clock() + int(PARTS_SECONDS * 1e9)
        connection.close()
        for number in range(count):
            if clock() > end_ns:
                break
            try:
                start_ns = clock()
                if connection.socket is None:
                    connection.open(poller)
                connected_ns = clock()
                times_s = ask_in_parts(connection, number, exchanges[number % len(exchanges)].request, poller)
            except OSError:
                parts.failed += 1
                connection.close()
                continue
            if keep:
                for values_s, value_s in zip((parts.send_s, parts.wait_s, parts.receive_s), times_s, strict=True):
                    values_s.append(value_s)
            else:
                parts.connect_s.append((connected_ns - start_ns) / 1e9)
                parts.fresh_s.append(sum(times_s))
            if not (keep and connection.keep_alive):
                connection.close()
    connection.close()
    return parts


def format_parts(parts: Parts) -> list[str]:
    """One line a part of a request: p50 and p95 in ms, and the share of the whole time."""
    if not parts.send_s or not parts.connect_s:
        return [f"where the time goes: not one request of this pass was answered ({parts.failed} failed)"]
    whole_s = parts.request_s.sum()
    lines = [f"{'where the time goes':<46}{'p50 ms':>9}{'p95 ms':>9}{'share':>9}"]
    for what, times_s, is_part in (
        ("send: into the kernel", parts.send_s, True),
        ("wait: network, server, to the first byte back", parts.wait_s, True),
        ("receive: the rest of the reply", parts.receive_s, True),
        (f"whole, {len(parts.send_s)} requests on a kept connection", parts.request_s, True),
        ("beside it, connect: a fresh connection", parts.connect_s, False),
        ("beside it, the first request on a fresh one", parts.fresh_s, False),
    ):
        share = f"{np.sum(times_s) / whole_s:.1%}" if is_part else "–"
        p50_s, p95_s = np.percentile(times_s, (50, 95))
        lines.append(f"{what:<46}{p50_s * 1000:>9.3f}{p95_s * 1000:>9.3f}{share:>9}")
    if parts.failed:
        lines.append(f"{parts.failed} requests of this pass failed and are not in it")
    return lines


def measure(load: LoadGenerator, seconds: float, console: Console) -> Window:
    """Run the closed loop for `seconds`, in stretches between which a terminal's progress bar moves."""
    whole = Window(len(load.connections))
    columns = TextColumn("measuring"), BarColumn(), TimeRemainingColumn()
    # No second thread draws the bar: it would take turns with the measuring one.
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("", total=seconds)
        while whole.elapsed_s < seconds:
            try:
                window = load.run_closed(min(PROGRESS_SECONDS, seconds - whole.elapsed_s))
            except OSError as error:  # what came before counts
                whole.errors[f"reconnect: {type(error).__name__}"] += 1
                break
            whole.elapsed_s += window.elapsed_s
            whole.latencies_s = np.concatenate([whole.latencies_s, window.latencies_s])
            whole.errors += window.errors
            whole.wrong += window.wrong
            progress.update(task, completed=whole.elapsed_s, refresh=True)
    return whole


def main() -> int:
    interrupt_on_sigterm()
    classes = load_endpoints(with_peers=True)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--endpoint", choices=classes, default="onnx", metavar="NAME", help=describe_choices(classes))
    parser.add_argument("--version", choices=("1", "2"), default="1", help="the model's version (default: 1)")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to measure (default: 60)")
    parser.add_argument("--warmup-seconds", type=float, default=1.0, help="dropped before that (default: 1)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--running", action="store_true", help="use the server on its usual port (default: start one)")
    where.add_argument(
        "--address", metavar="URL", help="use what answers there, http://host:port/prefix (default: none)"
    )
    arguments = parser.parse_args()
    if arguments.seconds <= 0 or arguments.warmup_seconds < 0:
        parser.error("seconds must be positive")
    console = Console(highlight=False)
    endpoint_class = classes[arguments.endpoint]
    server_cpus, client_cpus = split_cpus()
    rows, _ = load_test_rows()
    with contextlib.ExitStack() as stack:
        if arguments.address:
            endpoint = endpoint_class.at(arguments.address)
            try:
                ask(endpoint, rows[:1], arguments.version)
            except OSError as error:
                raise ServerError(f"{endpoint.name}: nobody answers at {arguments.address} ({error})") from None
        elif arguments.running:
            endpoint = endpoint_class()
            try:
                ask(endpoint, rows[:1], arguments.version)
            except OSError as error:
                raise ServerError(
                    f"{endpoint.name}: nobody answers on 127.0.0.1:{endpoint.port} ({error}); "
                    f"start it in another terminal: cd {endpoint.folder.name} && {shlex.join(endpoint.command())}"
                ) from None
        else:
            endpoint = endpoint_class.on_free_ports()
            with console.status(f"{endpoint.name}: starting"):
                stack.enter_context(ServerProcess(endpoint, server_cpus))
            if client_cpus is not None:
                os.sched_setaffinity(0, client_cpus)
        exchanges = make_exchanges(endpoint, arguments.version, rows, load_expected(arguments.version))
        console.print(f"{endpoint.name}: measuring for {arguments.seconds:g} s", soft_wrap=True)
        with LoadGenerator(endpoint, exchanges, connections=1) as load:
            if arguments.warmup_seconds:
                load.run_closed(arguments.warmup_seconds)
            window = measure(load, arguments.seconds, console)
        if len(window.latencies_s) == 0:
            raise ServerError(
                f"{endpoint.name}: not one right answer; errors {dict(window.errors)}, wrong {window.wrong}"
            )
        parts = measure_parts(endpoint, exchanges)
    for section in (format_histogram, format_percentiles, format_thirds):
        for line in ["", *section(window.latencies_s)]:
            console.print(line, markup=False, soft_wrap=True)
    for line in ["", *format_parts(parts), ""]:
        console.print(line, markup=False, soft_wrap=True)
    failed = window.errors.total()
    console.print(
        f"{endpoint.name}: {len(window.latencies_s):,} right answers in {window.elapsed_s:.1f} s at 1 connection, "
        f"{failed} failed, {window.wrong} wrong",
        soft_wrap=True,
    )
    return 1 if failed or window.wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ServerError, OSError) as error:
        sys.exit(f"latency_test: {error}")
    except KeyboardInterrupt:
        sys.exit("latency_test: interrupted; the server is stopped")
