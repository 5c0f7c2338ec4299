"""Measure one server's latency, one request at a time: percentiles in the terminal.

    python latency_test.py --endpoint onnx             starts the server, measures, stops it
    python latency_test.py --endpoint onnx --running   measures the one that already runs on its usual port

Every reply is compared with the reference. Writes nothing.
"""

import argparse
import contextlib
import os
import shlex
import sys

import numpy as np
from endpoint import load_endpoints
from environment import split_cpus
from load_generator import LoadGenerator, make_exchanges
from reference import load_expected, load_test_rows
from results import SAMPLES_BEYOND_PERCENTILE
from rich.console import Console
from server_process import ServerError, ServerProcess, ask, find_free_ports, interrupt_on_sigterm

PERCENTILES = (50, 90, 95, 99, 99.9)
HISTOGRAM_BINS = 12
BAR_WIDTH = 48


def format_percentiles(latencies_s: np.ndarray) -> list[str]:
    """One line a percentile, in ms; those that too few observations lie beyond are said to be so."""
    lines = []
    for percent in PERCENTILES:
        enough = len(latencies_s) * (1 - percent / 100) >= SAMPLES_BEYOND_PERCENTILE
        figure = f"{np.percentile(latencies_s, percent) * 1000:8.3f} ms" if enough else " too few requests to say"
        lines.append(f"p{percent:<5g}{figure}")
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


def main() -> int:
    interrupt_on_sigterm()
    classes = load_endpoints()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--endpoint", choices=classes, default="onnx", help="which server (default: onnx)")
    parser.add_argument("--version", choices=("1", "2"), default="1", help="the model's version (default: 1)")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long to measure (default: 10)")
    parser.add_argument("--warmup-seconds", type=float, default=1.0, help="dropped before that (default: 1)")
    parser.add_argument("--running", action="store_true", help="use the server on its usual port (default: start one)")
    arguments = parser.parse_args()
    console = Console(highlight=False)
    endpoint_class = classes[arguments.endpoint]
    server_cpus, client_cpus = split_cpus()
    rows, _ = load_test_rows()
    with contextlib.ExitStack() as stack:
        if arguments.running:
            endpoint = endpoint_class()
            try:
                ask(endpoint, rows[:1], arguments.version)
            except OSError as error:
                raise ServerError(
                    f"{endpoint.name}: nobody answers on 127.0.0.1:{endpoint.ports['rest']} ({error}); "
                    f"start it in another terminal: cd {endpoint.folder.name} && {shlex.join(endpoint.command())}"
                ) from None
        else:
            endpoint = endpoint_class(find_free_ports(list(endpoint_class.default_ports)))
            with console.status(f"{endpoint.name}: starting"):
                stack.enter_context(ServerProcess(endpoint, server_cpus))
            if client_cpus is not None:
                os.sched_setaffinity(0, client_cpus)
        exchanges = make_exchanges(endpoint, arguments.version, rows, load_expected(arguments.version))
        with console.status(f"{endpoint.name}: measuring"), LoadGenerator(endpoint, exchanges, connections=1) as load:
            load.run_closed(arguments.warmup_seconds)
            window = load.run_closed(arguments.seconds)
    if len(window.latencies_s) == 0:
        raise ServerError(f"{endpoint.name}: not one right answer; errors {dict(window.errors)}, wrong {window.wrong}")
    for line in [*format_histogram(window.latencies_s), "", *format_percentiles(window.latencies_s)]:
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
