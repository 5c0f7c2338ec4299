"""A benchmark's result file: its form, how it is written and read, and every figure that is computed from it.

    python results.py                       the newest result as tables
    python results.py results/sample.json   that one
    python results.py --update-readme       rewrite the measured comparison in ../README.md from results/sample.json

A file holds raw observations: every latency, as a histogram of whole microseconds (above a
millisecond of three digits), for each window of load. Every number in a table, a plot or the report
is computed from it, here.
"""

import argparse
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from intervals import Interval, compare_rates, mean_interval, percentile_interval
from load_generator import Window
from rich.console import Console
from rich.table import Table

RESULTS_DIR = Path(__file__).resolve().parent / "results"
SAMPLE_PATH = RESULTS_DIR / "sample.json"
README_PATH = RESULTS_DIR.parent.parent / "README.md"
README_BEGIN = "<!-- made by `make readme` from benchmarks/results/sample.json: do not edit -->"
README_END = "<!-- end of the made part -->"
SCHEMA_VERSION = 2
SAMPLES_BEYOND_PERCENTILE = 10  # a percentile is withheld where fewer observations lie beyond it
KEEPS_UP_SHARE = 0.95  # an offered rate is kept up with where at least this share of it is answered in time
BUSY_CLIENT_SHARE = 0.9  # of its core; above it the client may be what is measured
LATE_SENDING_S = 1e-3  # p99 of sending late; above it an open-loop row does not show the server
FOREIGN_LOAD_SHARE = 0.1  # of the cores, used by programs that are neither client nor server
SLOW_CONNECT_S = 1.0  # a kernel whose first attempt was dropped asks again after a second
UNSTEADY_RATIO = 1.5  # between the fastest and the slowest round of a closed loop
PLACES_NAMED = 4  # rows that a warning names before it only counts them


class ResultError(RuntimeError):
    """A result file is missing or is not one; the message says what to do."""


def encode_times(times_s: np.ndarray) -> list[list[int]]:
    """Return times as [[microseconds, count], ...]: whole microseconds below 1 ms, three digits (0.5 %) above."""
    microseconds = np.round(np.asarray(times_s) * 1e6).astype(np.int64)
    step = 10 ** np.maximum(0, np.floor(np.log10(np.maximum(microseconds, 1))) - 2).astype(np.int64)
    values, counts = np.unique((microseconds + step // 2) // step * step, return_counts=True)
    return [[int(value), int(count)] for value, count in zip(values, counts, strict=True)]


def decode_times(pairs: list[list[int]]) -> np.ndarray:
    """Return the times in seconds, ascending, (n,)."""
    if not pairs:
        return np.empty(0)
    values, counts = np.array(pairs, dtype=np.int64).T
    return np.repeat(values, counts) / 1e6


def encode_window(window: Window, **about) -> dict:
    """Return one window as JSON-able values.

    `about` are the keys that the load generator does not know: endpoint, load ("closed" or "open"),
    round, rows_per_request, server_cpu_s and server_rss_bytes of the whole process tree, foreign_share.
    """
    return {
        **about,
        "connections": window.connections,
        "offered_rate": window.offered_rate,
        "elapsed_s": window.elapsed_s,
        "latency_us_counts": encode_times(window.latencies_s),
        "lateness_us_counts": encode_times(window.lateness_s),
        "errors": dict(window.errors),
        "wrong": window.wrong,
        "client_cpu_s": window.client_cpu_s,
        "request_bytes": window.request_bytes,
        "reply_bytes": window.reply_bytes,
        "connect_s": window.connect_s,
    }


def write_result(result: dict, path: Path) -> None:
    """Write the result file, whole or not at all."""
    write_whole(path, json.dumps(result, separators=(",", ":")) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write the file whole or not at all: an interrupted run leaves no half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text)
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
        raise ResultError(f"{path}: not a result file of schema version {SCHEMA_VERSION}; measure again")
    return result


@dataclass
class Cell:
    """One endpoint under one load, all rounds together. Rates count requests; multiply by rows_per_request for rows."""

    rounds: list[int]  # their numbers; a server that stopped midway has fewer
    rounds_s: list[np.ndarray]  # latencies of right answers, ascending, one array a round
    rates: list[float]  # right answers per second, one a round
    offered_rate: float  # open loop; 0 in a closed one
    connections: int
    rows_per_request: int
    failed: int  # errors and dropped connections
    wrong: int
    client_share: float  # of its core that the client used, 0 to 1; an open loop always uses all of it
    server_cpu_s: list[float]  # per 1,000 predicted rows, one a round
    rss_bytes: int  # the largest seen
    late_p99_s: float  # open loop: 99th percentile of sending after a request was due; nan in a closed loop
    foreign_share: float  # of the machine, used by other programs, the worst window
    request_bytes: int
    reply_bytes: int
    connect_s: float  # longest that a connection took to open

    @cached_property
    def latencies_s(self) -> np.ndarray:
        """All rounds' latencies, ascending, (n,)."""
        return np.sort(np.concatenate(self.rounds_s)) if self.rounds_s else np.empty(0)

    @property
    def rate(self) -> Interval:
        return mean_interval(self.rates)

    @property
    def server_cpu_s_per_1000(self) -> Interval:
        """CPU seconds of the server's process tree per 1,000 predicted rows."""
        if min(self.server_cpu_s) <= 0:  # below the kernel's tick of 10 ms: too short a window to tell
            return Interval(float(np.mean(self.server_cpu_s)), 0.0, float("inf"))
        return mean_interval(self.server_cpu_s)

    def percentile_s(self, percent: float) -> Interval | None:
        """The percentile over all rounds with its interval, or None where the sample does not support it.

        The interval is the wider of two: from order statistics, as if requests were independent, and
        from the rounds' own percentiles, which also holds what differs between rounds. Two rounds give
        no usable estimate of their spread (one degree of freedom): then both rounds' own are covered,
        and the interval is narrower than its name says.
        """
        latencies_s = self.latencies_s
        if round(len(latencies_s) * (1 - percent / 100), 6) < SAMPLES_BEYOND_PERCENTILE:
            return None
        pooled = percentile_interval(latencies_s, percent)
        if len(self.rounds_s) < 2 or min(map(len, self.rounds_s)) == 0:
            return pooled
        own = [float(np.percentile(part, percent)) for part in self.rounds_s]
        if len(own) == 2:
            return Interval(pooled.estimate, min(pooled.low, *own), max(pooled.high, *own))
        between = mean_interval(own)
        factor = between.high / between.estimate
        return Interval(
            pooled.estimate, min(pooled.low, pooled.estimate / factor), max(pooled.high, pooled.estimate * factor)
        )

    @property
    def keeps_up(self) -> bool:
        """Whether an open loop's offered rate was answered, and nothing failed."""
        return not self.failed and not self.wrong and self.rate.estimate >= KEEPS_UP_SHARE * self.offered_rate


def select(
    result: dict,
    endpoint: str,
    load: str = "closed",
    connections: int | None = None,
    rows_per_request: int = 1,
    offered_rate: float | None = None,
) -> Cell | None:
    """Gather the windows of one endpoint under one load; None where there are none.

    `offered_rate` is the nominal one, as in settings["rates"] or a window's "nominal_rate".
    """
    windows = [
        window
        for window in result["windows"]
        if window["endpoint"] == endpoint
        and window["load"] == load
        and window["rows_per_request"] == rows_per_request
        and (connections is None or window["connections"] == connections)
        and (offered_rate is None or window["nominal_rate"] == offered_rate)
    ]
    if not windows:
        return None
    rounds_s = [decode_times(window["latency_us_counts"]) for window in windows]
    elapsed_s = sum(window["elapsed_s"] for window in windows) or 1e-9
    lateness_s = np.concatenate([decode_times(window["lateness_us_counts"]) for window in windows])
    return Cell(
        rounds=[window["round"] for window in windows],
        rounds_s=rounds_s,
        rates=[max(len(part), 1e-9) / max(w["elapsed_s"], 1e-9) for part, w in zip(rounds_s, windows, strict=True)],
        offered_rate=float(np.mean([window["offered_rate"] for window in windows])),
        connections=windows[0]["connections"],
        rows_per_request=rows_per_request,
        failed=sum(Counter(window["errors"]).total() for window in windows),
        wrong=sum(window["wrong"] for window in windows),
        client_share=sum(window["client_cpu_s"] for window in windows) / elapsed_s,
        server_cpu_s=[
            1000 * window["server_cpu_s"] / max(len(part) * rows_per_request, 1)
            for part, window in zip(rounds_s, windows, strict=True)
        ],
        rss_bytes=max(window["server_rss_bytes"] for window in windows),
        late_p99_s=float(np.percentile(lateness_s, 99)) if len(lateness_s) else float("nan"),
        foreign_share=max(window["foreign_share"] for window in windows),
        request_bytes=windows[0]["request_bytes"],
        reply_bytes=windows[-1]["reply_bytes"],
        connect_s=max(window.get("connect_s", 0.0) for window in windows),  # not in files of before 2026-11-28
    )


def list_cells(result: dict, endpoint: str, load: str) -> list[Cell]:
    """Return every cell of one endpoint under closed or open load, ascending by connections, rows and rate."""
    keys = sorted(
        {
            (w["connections"], w["rows_per_request"], w.get("nominal_rate", 0.0))
            for w in result["windows"]
            if w["endpoint"] == endpoint and w["load"] == load
        }
    )
    cells = []
    for connections, rows, rate in keys:
        cell = select(result, endpoint, load, connections, rows, rate if load == "open" else None)
        if cell is not None:
            cells.append(cell)
    return cells


@dataclass(frozen=True)
class Knee:
    """Where an endpoint saturates, by the swept offered rates."""

    sustained_rate: float | None  # the largest rate kept up with at all rates up to it; None: not even the smallest
    broken_rate: float | None  # the next one, which it was not; None: the sweep ended before it broke
    reason: str  # what broke
    low_rate: float = 0.0  # each round judged alone: the lowest rate that one of them sustained
    high_rate: float = float("inf")  # and the highest at which one of them broke; inf: one of them did not


def find_knee(result: dict, endpoint: str) -> Knee | None:
    """Return where the endpoint saturates and how far the rounds agree; None where it was not swept."""
    knee = _judge_sweep(result, endpoint)
    if knee is None:
        return None
    opened = [window for window in result["windows"] if window["endpoint"] == endpoint and window["load"] == "open"]
    alone = [
        _judge_sweep({**result, "windows": [window for window in opened if window["round"] == number]}, endpoint)
        for number in {window["round"] for window in opened}
    ]
    return replace(
        knee,
        low_rate=min(part.sustained_rate or 0.0 for part in alone),
        high_rate=max(part.broken_rate or float("inf") for part in alone),
    )


def _judge_sweep(result: dict, endpoint: str) -> Knee | None:
    cells = list_cells(result, endpoint, "open")
    objective_s = result["settings"]["objective_p99_s"]
    sustained = None
    for cell in sorted(cells, key=lambda cell: cell.offered_rate):
        p99 = cell.percentile_s(99)
        if not cell.keeps_up:
            return Knee(sustained, cell.offered_rate, f"answered {cell.rate.estimate:,.0f}/s")
        if p99 is not None and p99.estimate > objective_s:
            return Knee(sustained, cell.offered_rate, f"p99 {p99.estimate * 1000:.0f} ms")
        sustained = cell.offered_rate
    return Knee(sustained, None, "held at every rate offered") if cells else None


def list_verdicts(result: dict) -> list[str]:
    """Return a verdict for each pair of servers with a model, at one connection and at the most."""
    names = [name for name, about in result["endpoints"].items() if about["kind"] != "floor"]
    connections = result["settings"]["connections"]
    verdicts = []
    for count in dict.fromkeys((connections[0], connections[-1])):
        cells = {name: select(result, name, connections=count) for name in names}
        measured = [name for name, cell in cells.items() if cell is not None and len(cell.latencies_s)]
        measured.sort(key=lambda name: -cells[name].rate.estimate)
        for faster, slower in zip(measured, measured[1:], strict=False):
            rates = [dict(zip(cells[name].rounds, cells[name].rates, strict=True)) for name in (faster, slower)]
            both = sorted(rates[0].keys() & rates[1].keys())
            titles = [f"{name} ({result['endpoints'][name]['kind']})" for name in (faster, slower)]
            verdict = compare_rates(titles[0], [rates[0][n] for n in both], titles[1], [rates[1][n] for n in both])
            verdicts.append(f"at {count} connection{'s' * (count > 1)}: {verdict}")
    return verdicts


def list_warnings(result: dict) -> list[str]:
    """Return what makes rows less certain than they look: what happened, why it matters, where, what to do."""
    warnings = []
    if result["settings"]["server_cpus"] is None:
        warnings.append("servers and client shared their cores and slowed each other; use a machine with two or more")
    for name, about in result["endpoints"].items():
        if about.get("failure"):
            warnings.append(f"{name} is not measured in full: {about['failure']}")
    rows: dict[str, list[str]] = {}

    def warn(message: str, where: str) -> None:
        rows.setdefault(message, []).append(where)

    for name in result["endpoints"]:
        for load in ("closed", "open"):
            for cell in list_cells(result, name, load):
                where = f"{name}, {_describe_load(cell, load)}"
                if load == "closed" and cell.client_share > BUSY_CLIENT_SHARE:
                    warn("the client used nearly all of its core: read the rate as a lower bound", where)
                if load == "open" and cell.keeps_up and cell.late_p99_s > LATE_SENDING_S:
                    late = f"{where} ({cell.late_p99_s * 1000:.1f} ms)"
                    warn(
                        "requests were sent late, for want of a free connection or of a core of the client's own", late
                    )
                if cell.connect_s > SLOW_CONNECT_S:
                    warn(
                        "connections took seconds to open, which no latency here counts: raise the server's listen "
                        "backlog above their number",
                        f"{where} ({cell.connect_s:.1f} s)",
                    )
                if cell.foreign_share > FOREIGN_LOAD_SHARE:
                    warn(
                        "other programs used the cores of this measurement: stop them and measure again",
                        f"{where} ({cell.foreign_share:.0%})",
                    )
                if cell.wrong or (cell.failed and (load == "closed" or cell.keeps_up)):
                    warn("answers failed or were wrong", f"{where} ({cell.failed} failed, {cell.wrong} wrong)")
                if load == "closed" and len(cell.rates) > 1 and max(cell.rates) > UNSTEADY_RATIO * min(cell.rates):
                    warn(
                        "the machine was not steady, rounds differ: measure with more rounds",
                        f"{where} ({min(cell.rates):,.0f} to {max(cell.rates):,.0f} per second)",
                    )
    for message, places in rows.items():
        more = f"; and {len(places) - PLACES_NAMED} more" if len(places) > PLACES_NAMED else ""
        warnings.append(f"{message}. Rows: {'; '.join(places[:PLACES_NAMED])}{more}")
    return warnings


@dataclass
class TextTable:
    """A table whose cells are formatted; the first `left_columns` are words, the rest figures."""

    title: str
    header: list[str]
    rows: list[list[str]]
    left_columns: int


def make_tables(result: dict) -> list[TextTable]:
    """Return the tables: speed with intervals, saturation, rows a request, correctness and cost."""
    settings = result["settings"]
    connections = settings["connections"]
    speed = TextTable(
        "Speed, closed loop, with 95 % intervals",
        ["server", "kind", "p50 ms", "p99 ms", *(f"req/s at {count}" for count in connections)],
        [],
        left_columns=2,
    )
    saturation = TextTable(
        f"Saturation, open loop, {describe_arrivals(settings)} arrivals: p99 within "
        f"{settings['objective_p99_s'] * 1000:g} ms",
        ["server", "keeps up with", "breaks at", "rounds alone", "because", "p99 ms before"],
        [],
        left_columns=1,
    )
    sizes = settings["rows_per_request"]
    batch = TextTable(
        "Rows a request, one connection: microseconds per row",
        ["server", *(f"{size:,}" for size in sizes), "gain"],
        [],
        left_columns=1,
    )
    cost = TextTable(
        "Correctness and cost",
        ["server", "max |Δp|", "failed", "wrong", "start s", "CPU s per 1,000", "memory MB", "bytes out", "in"],
        [],
        left_columns=1,
    )
    for name, about in result["endpoints"].items():
        cells = [select(result, name, connections=count) for count in connections]
        differences = about.get("max_abs_difference") or {}
        difference = f"{max(differences.values()):.0e}" if differences else "no model"
        if any(cell is None for cell in cells):
            speed.rows.append([name, about["kind"], *["–"] * (len(speed.header) - 2)])
            cost.rows.append([name, difference, "did not", "finish", *["–"] * 5])
            continue
        percentiles = [_milliseconds(cells[0].percentile_s(percent)) for percent in (50, 99)]
        speed.rows.append([name, about["kind"], *percentiles, *(_rate(cell.rate) for cell in cells)])
        knee = find_knee(result, name)
        if knee is not None:
            before = _at(result, name, knee)
            saturation.rows.append(
                [
                    name,
                    f"{knee.sustained_rate:,.0f}/s" if knee.sustained_rate else "–",
                    f"{knee.broken_rate:,.0f}/s" if knee.broken_rate else "–",
                    describe_rounds(knee),
                    knee.reason,
                    _milliseconds(before.percentile_s(99)) if before else "–",
                ]
            )
        per_row = [
            float(np.median(cell.latencies_s)) / size if (cell := _batch_cell(result, name, size)) is not None else None
            for size in sizes
        ]
        if len(sizes) > 1 and all(per_row):
            batch.rows.append(
                [name, *(f"{value * 1e6:,.2f}" for value in per_row), f"{per_row[0] / per_row[-1]:,.0f}×"]
            )
        everything = [cell for load in ("closed", "open") for cell in list_cells(result, name, load)]
        cost.rows.append(
            [
                name,
                difference,
                str(sum(cell.failed for cell in everything)),
                str(sum(cell.wrong for cell in everything)),
                f"{np.median([start['ready_s'] for start in about['starts']]):.1f}",
                _seconds(cells[-1].server_cpu_s_per_1000) if is_seen(about) else "not seen",
                f"{max(c.rss_bytes for c in everything) / 1e6:,.0f}" if is_seen(about) else "not seen",
                str(cells[0].request_bytes),
                str(cells[0].reply_bytes),
            ]
        )
    return [table for table in (speed, _make_ratio_table(result), saturation, batch, cost) if table.rows]


def is_seen(about: dict) -> bool:
    """Whether CPU and memory of an endpoint's processes were seen: a container's may be those of another system."""
    return about.get("is_seen", about["kind"] != "docker")


def find_default(result: dict, name: str) -> str | None:
    """Return the name of the default set-up of a tuned server, None where it was not measured."""
    about = result["endpoints"][name]
    default = name.removesuffix("-tuned")
    return default if about.get("variant") == "tuned" and default in result["endpoints"] else None


def find_floor(result: dict, name: str) -> str | None:
    """Return the name of the floor of the same protocol, None where it was not measured."""
    protocol = result["endpoints"][name].get("protocol", "REST")
    for floor, about in result["endpoints"].items():
        if about["kind"] == "floor" and about.get("protocol", "REST") == protocol:
            return floor
    return None


def rate_ratio(result: dict, name: str, other: str, connections: int) -> Interval | None:
    """Return how many times the requests per second of `other` a server answers, round by round; None if unknown."""
    cells = [select(result, each, connections=connections) for each in (name, other)]
    if any(cell is None or not len(cell.latencies_s) for cell in cells):
        return None
    own, others = (dict(zip(cell.rounds, cell.rates, strict=True)) for cell in cells)
    both = sorted(own.keys() & others.keys())
    return mean_interval([own[number] / others[number] for number in both]) if both else None


def _make_ratio_table(result: dict) -> TextTable:
    connections = result["settings"]["connections"]
    header = [f"to default at {count}" for count in connections] + [f"to the floor at {count}" for count in connections]
    table = TextTable(
        "Tuned against default, and each against the floor of its protocol: ratios of requests per second",
        ["server", *header],
        [],
        left_columns=1,
    )
    for name, about in result["endpoints"].items():
        if about["kind"] == "floor":
            continue
        others = [find_default(result, name)] * len(connections) + [find_floor(result, name)] * len(connections)
        ratios = [
            rate_ratio(result, name, other, count) if other else None
            for other, count in zip(others, connections * 2, strict=True)
        ]
        if any(ratios):
            table.rows.append([name, *("–" if ratio is None else _ratio(ratio) for ratio in ratios)])
    return table


def list_remarks(result: dict) -> list[str]:
    """Return what a reader must know beside the tables, a sentence each."""
    settings, environment = result["settings"], result["environment"]
    pinning = (
        f"servers on core {settings['server_cpus']}, client on core {settings['client_cpus']}"
        if settings["server_cpus"] is not None
        else "servers and client share the cores"
    )
    remarks = [
        f"{environment['utc']}, {environment['cpu']}, {environment['cores']} cores, {environment['system']}, "
        f"Python {environment['python']}, load average {environment['load_average_1min']:.1f} at the start, "
        f"commit {environment['git_commit'] or 'unknown'}{' with changes' if environment['git_dirty'] else ''}.",
        f"`{environment['command']}`, profile {settings['profile']}: version {settings['version']}, "
        f"{settings['rounds']} interleaved rounds of {settings['seconds']} s windows, {pinning}; each server was "
        f"warmed up until its rate stood still, and for {settings['warmup_seconds']} s before each window.",
        "p50 and p99 at one connection. CPU is of the server's whole process tree, per 1,000 rows at the most "
        "connections; memory is resident, shared pages counted in each process, the most seen; start is to the first "
        "right answer; bytes are a one-row request with its headers, and the body of its reply.",
        ", ".join(f"{name} {version}" for name, version in environment["packages"].items()) + ".",
    ]
    for name, about in result["endpoints"].items():
        facts = dict(about.get("settings") or {})
        if "warmup_s" in about:
            facts["warmed up for"] = f"{about['warmup_s']:.0f} s"
        if facts:
            remarks.append(f"{name}: " + ", ".join(f"{key} {value}" for key, value in facts.items()) + ".")
    return remarks


def format_markdown(result: dict) -> str:
    """Return tables, verdicts, warnings and remarks as Markdown."""
    lines = []
    for table in make_tables(result):
        alignment = "|" + "---|" * table.left_columns + "---:|" * (len(table.header) - table.left_columns)
        body = [
            "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [table.header, *table.rows]
        ]
        lines += [f"**{table.title}**", "", body[0], alignment, *body[1:], ""]
    for title, items in _sections(result).items():
        lines += [f"**{title}**", "", *(f"- {item}" for item in items), ""]
    return "\n".join(lines)


def print_result(result: dict, console: Console) -> None:
    """Print the same to the terminal."""
    for table in make_tables(result):
        console.print(f"\n{table.title}", style="bold")
        grid = Table(box=None, pad_edge=False, header_style="bold")
        for column, title in enumerate(table.header):
            is_word = column < table.left_columns
            grid.add_column(title, justify="left" if is_word else "right", no_wrap=is_word)
        for row in table.rows:
            grid.add_row(*row)
        console.print(grid)
    for title, items in _sections(result).items():
        console.print(f"\n{title}", style="bold")
        for item in items:
            console.print(f"- {item}", markup=False)


def update_readme(readme: str, result: dict) -> str:
    """Return `readme` with the part between the two marks made anew from `result`."""
    before, begin, rest = readme.partition(README_BEGIN)
    _, end, after = rest.partition(README_END)
    if not begin or not end:
        raise ResultError(f"README.md: the marks {README_BEGIN!r} and {README_END!r} are not both there")
    return f"{before}{begin}\n{format_markdown(result)}{end}{after}"


def newest_result_path() -> Path:
    """The newest result of this machine, or the sample where there is none."""
    paths = RESULTS_DIR.glob("2*.json")  # named by their time
    return max(paths, default=SAMPLE_PATH)


def _sections(result: dict) -> dict[str, list[str]]:
    sections = {
        "Verdicts": list_verdicts(result),
        "Warnings": list_warnings(result),
        "How this was measured": list_remarks(result),
    }
    return {title: items for title, items in sections.items() if items}


def _at(result: dict, name: str, knee: Knee) -> Cell | None:
    return next((c for c in list_cells(result, name, "open") if c.offered_rate == knee.sustained_rate), None)


def _batch_cell(result: dict, name: str, size: int) -> Cell | None:
    cell = select(result, name, connections=result["settings"]["connections"][0], rows_per_request=size)
    return cell if cell is not None and len(cell.latencies_s) else None


def _describe_load(cell: Cell, load: str) -> str:
    if load == "open":
        return f"offered {cell.offered_rate:,.0f}/s"
    return f"{cell.connections} connection{'s' * (cell.connections > 1)}, {cell.rows_per_request} rows a request"


def describe_arrivals(settings: dict) -> str:
    """Return the word for how requests of the open loop arrive."""
    return "Poisson" if settings.get("arrivals", "poisson") == "poisson" else "constant"


def describe_rounds(knee: Knee) -> str:
    """Return the rates between which the knee lies by each round alone."""
    high = f"{knee.high_rate:,.0f}" if np.isfinite(knee.high_rate) else "?"
    return f"{knee.low_rate:,.0f}–{high}"


def _ratio(interval: Interval) -> str:
    high = f"{interval.high:.2f}" if np.isfinite(interval.high) else "?"
    return f"{interval.estimate:.2f} ({interval.low:.2f}–{high})"


def _milliseconds(interval: Interval | None) -> str:
    if interval is None:
        return "too few"
    return f"{interval.estimate * 1000:.2f} ({interval.low * 1000:.2f}–{interval.high * 1000:.2f})"


def _seconds(interval: Interval) -> str:
    high = f"{interval.high:.3f}" if np.isfinite(interval.high) else "?"
    return f"{interval.estimate:.3f} ({interval.low:.3f}–{high})"


def _rate(interval: Interval) -> str:
    high = f"{interval.high:,.0f}" if np.isfinite(interval.high) else "?"
    return f"{interval.estimate:,.0f} ({interval.low:,.0f}–{high})"


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
