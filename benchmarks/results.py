"""A benchmark's result file: its form, how it is written and read, and the table that is made of it.

    python results.py                       the newest result as a table
    python results.py results/sample.json   that one
    python results.py --update-readme       rewrite the measured comparison in ../README.md from results/sample.json

A file holds raw observations: every latency, as a histogram of whole microseconds (finer than the
clock's own jitter here), for each window of load. Every number in a table is computed from it.
"""

import argparse
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from load_generator import Window
from rich.console import Console
from rich.table import Table

RESULTS_DIR = Path(__file__).resolve().parent / "results"
SAMPLE_PATH = RESULTS_DIR / "sample.json"
README_PATH = RESULTS_DIR.parent.parent / "README.md"
README_BEGIN = "<!-- made by `make readme` from benchmarks/results/sample.json: do not edit -->"
README_END = "<!-- end of the made part -->"
SCHEMA_VERSION = 1
HISTOGRAM_RESOLUTION_S = 1e-6
SAMPLES_BEYOND_PERCENTILE = 10  # a percentile is withheld where fewer observations lie beyond it


class ResultError(RuntimeError):
    """A result file is missing or is not one; the message says what to do."""


def encode_window(window: Window, endpoint: str, round_number: int, server_cpu_s: float, server_rss_bytes: int) -> dict:
    """Return one window as JSON-able values; `server_cpu_s` and `server_rss_bytes` are of its whole process tree."""
    microseconds = np.round(window.latencies_s / HISTOGRAM_RESOLUTION_S).astype(int)
    values, counts = np.unique(microseconds, return_counts=True)
    return {
        "endpoint": endpoint,
        "round": round_number,
        "connections": window.connections,
        "elapsed_s": window.elapsed_s,
        "latency_us_counts": [[int(value), int(count)] for value, count in zip(values, counts, strict=True)],
        "errors": dict(window.errors),
        "wrong": window.wrong,
        "client_cpu_s": window.client_cpu_s,
        "server_cpu_s": server_cpu_s,
        "server_rss_bytes": server_rss_bytes,
        "request_bytes": window.request_bytes,
        "reply_bytes": window.reply_bytes,
    }


def write_result(result: dict, path: Path) -> None:
    """Write the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(result, separators=(",", ":")) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_result(path: Path) -> dict:
    """Return a result file's content; ResultError where there is none or of another form."""
    try:
        result = json.loads(path.read_text())
    except FileNotFoundError:
        raise ResultError(f"{path}: no such file; python benchmark_all.py makes one") from None
    except ValueError as error:
        raise ResultError(f"{path}: not JSON ({error}); was it cut off?") from None
    if not isinstance(result, dict) or result.get("schema_version") != SCHEMA_VERSION:
        raise ResultError(f"{path}: not a result file of schema version {SCHEMA_VERSION}")
    return result


@dataclass
class Cell:
    """One endpoint at one number of connections, all rounds together."""

    latencies_s: np.ndarray  # sorted
    rates: list[float]  # right answers per second, one a round
    failed: int  # errors and dropped connections
    wrong: int
    client_share: float  # of the client's core that the client used, 0 to 1
    server_cpu_s_per_1000: float

    def percentile_s(self, percent: float) -> float | None:
        """The percentile, or None where fewer than SAMPLES_BEYOND_PERCENTILE observations lie beyond it."""
        if len(self.latencies_s) * (1 - percent / 100) < SAMPLES_BEYOND_PERCENTILE:
            return None
        return float(np.percentile(self.latencies_s, percent))


def collect_cell(result: dict, endpoint: str, connections: int) -> Cell | None:
    """Gather the windows of one endpoint at one number of connections; None where there are none."""
    windows = [w for w in result["windows"] if w["endpoint"] == endpoint and w["connections"] == connections]
    if not windows:
        return None
    pairs = [pair for window in windows for pair in window["latency_us_counts"]]
    values = np.array([value for value, _ in pairs], dtype=float)
    latencies_s = np.sort(np.repeat(values, [count for _, count in pairs])) * HISTOGRAM_RESOLUTION_S
    elapsed_s = sum(window["elapsed_s"] for window in windows) or 1e-9
    return Cell(
        latencies_s=latencies_s,
        rates=[sum(count for _, count in w["latency_us_counts"]) / max(w["elapsed_s"], 1e-9) for w in windows],
        failed=sum(Counter(w["errors"]).total() for w in windows),
        wrong=sum(w["wrong"] for w in windows),
        client_share=sum(w["client_cpu_s"] for w in windows) / elapsed_s,
        server_cpu_s_per_1000=1000 * sum(w["server_cpu_s"] for w in windows) / max(len(latencies_s), 1),
    )


@dataclass
class TextTable:
    """A table whose cells are formatted; the first `left_columns` are words, the rest figures."""

    title: str
    header: list[str]
    rows: list[list[str]]
    left_columns: int


def make_tables(result: dict) -> list[TextTable]:
    """Return the tables of speed and of correctness and cost; a server that failed has its row in the second."""
    connections = result["settings"]["connections"]
    speed = TextTable(
        "Speed, closed loop, by number of connections",
        ["server", "kind", f"p50 ms at {connections[0]}", f"p99 ms at {connections[0]}"]
        + [f"req/s at {count}" for count in connections],
        [],
        left_columns=2,
    )
    cost = TextTable(
        "Correctness and cost",
        ["server", "max |Δp|", "failed", "wrong", "start s", "CPU s per 1,000", "memory MB"],
        [],
        left_columns=1,
    )
    for name, about in result["endpoints"].items():
        cells = [collect_cell(result, name, count) for count in connections]
        differences = about.get("max_abs_difference") or {}
        difference = f"{max(differences.values()):.0e}" if differences else "no model"
        if about.get("failure") or any(cell is None for cell in cells):
            speed.rows.append([name, about["kind"], *["–"] * (len(speed.header) - 2)])
            cost.rows.append([name, difference, "did not", "finish", "–", "–", "–"])
            continue
        percentiles = [_milliseconds(cells[0].percentile_s(percent)) for percent in (50, 99)]
        speed.rows.append([name, about["kind"], *percentiles, *(f"{np.median(cell.rates):,.0f}" for cell in cells)])
        windows = [window for window in result["windows"] if window["endpoint"] == name]
        cost.rows.append(
            [
                name,
                difference,
                str(sum(cell.failed for cell in cells)),
                str(sum(cell.wrong for cell in cells)),
                f"{about['ready_s']:.1f}",
                # A container's processes belong to the engine: they are not in the tree that is seen here.
                "not seen" if about["kind"] == "docker" else f"{cells[-1].server_cpu_s_per_1000:.3f}",
                "not seen"
                if about["kind"] == "docker"
                else f"{max(window['server_rss_bytes'] for window in windows) / 1e6:,.0f}",
            ]
        )
    return [speed, cost]


def list_remarks(result: dict) -> list[str]:
    """Return what a reader must know beside the table, a sentence each."""
    settings, environment = result["settings"], result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    pinning = (
        f"servers on core {settings['server_cpus']}, client on core {settings['client_cpus']}"
        if settings["server_cpus"] is not None
        else "servers and client share the cores: they slow each other"
    )
    remarks = [
        f"{environment['utc']}, {environment['cpu']}, {environment['cores']} cores, {environment['system']}, "
        f"Python {environment['python']}, load average {environment['load_average_1min']:.1f} at the start, "
        f"commit {environment['git_commit'] or 'unknown'}{' with changes' if environment['git_dirty'] else ''}.",
        f"`{environment['command']}`: version {settings['version']}, {settings['rows_per_request']} row a request, "
        f"{settings['rounds']} interleaved rounds of {settings['seconds']} s, closed loop, {pinning}; each server was "
        f"warmed up until its rate stood still, and for {settings['warmup_seconds']} s before each window.",
        "req/s is the median of the rounds; CPU is of the server's whole process tree at the most connections; "
        "memory is resident, shared pages counted in each process; start is to the first right answer.",
        f"{versions}.",
    ]
    for name, about in result["endpoints"].items():
        facts = dict(about.get("settings") or {})
        if "warmup_s" in about:
            facts["warmed up for"] = f"{about['warmup_s']:.0f} s"
        if facts:
            remarks.append(f"{name}: " + ", ".join(f"{key} {value}" for key, value in facts.items()) + ".")
        for count in settings["connections"]:
            cell = collect_cell(result, name, count)
            if cell is not None and cell.client_share > 0.9:
                remarks.append(
                    f"{name} at {count} connections: the client used {cell.client_share:.0%} of its core; "
                    "read this row as at least so many."
                )
    return remarks


def format_markdown(result: dict) -> str:
    """Return the tables and the remarks as Markdown."""
    lines = []
    for table in make_tables(result):
        alignment = "|" + "---|" * table.left_columns + "---:|" * (len(table.header) - table.left_columns)
        body = [
            "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [table.header, *table.rows]
        ]
        lines += [f"**{table.title}**", "", body[0], alignment, *body[1:], ""]
    return "\n".join([*lines, *(f"- {remark}" for remark in list_remarks(result))]) + "\n"


def print_result(result: dict, console: Console) -> None:
    """Print the tables and the remarks to the terminal; they fit 80 columns."""
    for table in make_tables(result):
        console.print(f"\n{table.title}", style="bold")
        grid = Table(box=None, pad_edge=False, header_style="bold")
        for column, title in enumerate(table.header):
            is_word = column < table.left_columns
            grid.add_column(title, justify="left" if is_word else "right", no_wrap=is_word)
        for row in table.rows:
            grid.add_row(*row)
        console.print(grid)
    console.print()
    for remark in list_remarks(result):
        console.print(f"- {remark}", markup=False)


def update_readme(readme: str, result: dict) -> str:
    """Return `readme` with the part between the two marks made anew from `result`."""
    before, begin, rest = readme.partition(README_BEGIN)
    _, end, after = rest.partition(README_END)
    if not begin or not end:
        raise ResultError(f"README.md: the marks {README_BEGIN!r} and {README_END!r} are not both there")
    return f"{before}{begin}\n{format_markdown(result)}{end}{after}"


def newest_result_path() -> Path:
    """The newest result of this machine, or the sample where there is none."""
    paths = sorted(path for path in RESULTS_DIR.glob("*.json") if path != SAMPLE_PATH)
    return paths[-1] if paths else SAMPLE_PATH


def _milliseconds(seconds: float | None) -> str:
    return "too few" if seconds is None else f"{seconds * 1000:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, nargs="?", help="a result file (default: the newest in results/)")
    parser.add_argument("--update-readme", action="store_true", help="rewrite ../README.md (default: only print)")
    arguments = parser.parse_args()
    try:
        if arguments.update_readme:
            path = arguments.path or SAMPLE_PATH
            README_PATH.write_text(update_readme(README_PATH.read_text(), read_result(path)))
            print(f"wrote {README_PATH.name} from {path.name}")
            return
        path = arguments.path or newest_result_path()
        print_result(read_result(path), Console(highlight=False))
        print(f"from {path}")
    except ResultError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
