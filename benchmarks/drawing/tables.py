"""The tables of a result, for a terminal of any width, for Markdown and for the report."""

from collections.abc import Callable
from dataclasses import dataclass, field

from rich.console import Console
from rich.text import Text

from figures.cells import Cell
from figures.intervals import Interval, percentile_interval
from figures.measured import Measured
from figures.verdicts import list_verdicts, list_warnings
from figures.words import (
    NOT_SEEN,
    UNKNOWN,
    describe_arrivals,
    describe_reason,
    describe_verdicts,
    describe_warnings,
    format_broken,
    format_interval,
    format_interval_ms,
    format_offered,
    format_rate,
    format_ratio,
    format_rounds,
    list_remarks,
)

KIND_ORDER = ("native", "docker", "local", "peer", "floor")
GAP = "  "
NOT_RIVALS = (
    "Rows of different kinds are not rivals: a native row is the framework's own server, a local one is a server of "
    "this repository that stands in for it (TensorFlow Serving) or that the framework lacks (ONNX Runtime), a peer "
    "one is a server that others wrote."
)


@dataclass
class TextTable:
    """A table whose cells are formatted. The first column is the server with its kind; `words` are columns of text."""

    title: str
    header: list[str]
    note: str  # what the columns mean
    words: set[int] = field(default_factory=lambda: {0})
    rows: list[list[str]] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)  # of each row's server


def make_tables(measured: Measured) -> list[TextTable]:
    """Return the tables that have rows: speed, ratios, saturation, rows a request, correctness and cost."""
    makers = (make_speed_table, make_ratio_table, make_saturation_table, make_batch_table, make_cost_table)
    return [table for table in (make(measured) for make in makers) if table.rows]


def _sort(measured: Measured, names: list[str], key: Callable[[str], float]) -> list[str]:
    """Sort servers by kind, and within each kind by `key`."""
    places = {kind: place for place, kind in enumerate(KIND_ORDER)}
    return sorted(names, key=lambda name: (places.get(measured.kind(name), len(places)), key(name)))


def add_row(table: TextTable, measured: Measured, name: str, *cells: str) -> None:
    """Append the row of a server, named with its kind."""
    table.rows.append([measured.label(name), *cells])
    table.kinds.append(measured.kind(name))


def make_speed_table(measured: Measured) -> TextTable:
    connections = measured.settings["connections"]
    table = TextTable(
        "Speed, closed loop",
        ["server", f"p50 ms at {connections[0]}", "p99 ms", *(f"req/s at {count}" for count in connections)],
        "Closed loop: each connection asks again as soon as it is answered. p50 and p99: half and 99 % of the requests "
        f"at {connections[0]} took at most this long. req/s at N: right answers per second over N connections. In "
        "brackets 95 % intervals; ≥: the client was the limit. Sorted by kind, then by the last column.",
    )
    most = measured.cells_at(connections[-1])

    def slowness(name: str) -> float:
        return -most[name].rate.estimate if name in most else 0.0

    for name in _sort(measured, measured.names, slowness):
        first = measured.cell(name, connections[0])
        percentiles = [format_interval_ms(first.percentile_s(percent)) if first else UNKNOWN for percent in (50, 99)]
        cells = [measured.cell(name, count) for count in connections]
        add_row(table, measured, name, *percentiles, *(format_rate(cell) if cell else UNKNOWN for cell in cells))
    return table


def make_ratio_table(measured: Measured) -> TextTable:
    connections = measured.settings["connections"]
    table = TextTable(
        "Ratios of requests per second: tuned to default, and each to the floor of its protocol",
        ["server", *(f"to default at {n}" for n in connections), *(f"to floor at {n}" for n in connections)],
        "Each ratio is taken round by round, so that a slow stretch of the machine cancels. The floor answers a "
        "constant over the same protocol; ≤: it is as fast as the client, so the true ratio is smaller. Sorted by "
        "kind, then by the last column.",
    )

    def floor_share(name: str) -> float:
        ratio = measured.floor_ratio(name, connections[-1])
        return -ratio.estimate if ratio else 0.0

    for name in _sort(measured, [name for name in measured.names if not measured.is_floor(name)], floor_share):
        default = measured.default_of(name)
        ratios = [measured.ratio(name, default, count) if default else None for count in connections]
        ratios += [measured.floor_ratio(name, count) for count in connections]
        if any(ratios):
            to_default, to_floor = ratios[: len(connections)], ratios[len(connections) :]
            limits = [measured.is_floor_limited(name, count) for count in connections]
            add_row(table, measured, name, *map(format_ratio, to_default), *map(format_ratio, to_floor, limits))
    return table


def make_saturation_table(measured: Measured) -> TextTable:
    settings = measured.settings
    objective_ms = settings["objective_p99_s"] * 1e3
    table = TextTable(
        f"Saturation, open loop, {describe_arrivals(settings)} arrivals",
        ["server", "keeps up with, req/s", "breaks at, req/s", "single rounds", "because", "p99 ms before"],
        "Open loop: requests fall due at an offered rate, whether or not earlier ones are answered. A server keeps up "
        f"while it answers 95 % of them, none fails, and p99 from the due time is within {objective_ms:g} ms, if 1,000 "
        "requests or more show a p99. > is the most it was offered. Single rounds: the lowest rate that one round "
        "sustained, the highest that broke one. Sorted by kind, then by the first figure.",
        words={0, 4},
    )
    for name in _sort(measured, list(measured.knees), lambda name: -(measured.knees[name].sustained_rate or 0.0)):
        knee, before = measured.knees[name], measured.before_knee(name)
        add_row(
            table, measured, name, format_offered(knee.sustained_rate), format_broken(knee), format_rounds(knee),
            describe_reason(knee), format_interval_ms(before.percentile_s(99)) if before else UNKNOWN,
        )  # fmt: skip
    return table


def make_batch_table(measured: Measured) -> TextTable:
    sizes, connections = measured.settings["rows_per_request"], measured.settings["connections"][0]
    table = TextTable(
        "Rows a request: microseconds per row",
        ["server", *(f"{size:,}" for size in sizes), "gain"],
        f"The median time of a request at {connections} connection, divided by its rows. gain: how many times less a "
        "row costs in the largest request than in the smallest. Sorted by kind, then by the largest.",
    )
    per_row = {}
    for name in measured.names:
        cells = [measured.cell(name, connections, size) for size in sizes]
        if len(sizes) > 1 and all(cells):
            per_row[name] = [_time_per_row(cell) for cell in cells if cell]
    for name in _sort(measured, list(per_row), lambda name: per_row[name][-1].estimate):
        times_s = per_row[name]
        figures = (format_interval(value.scale(1e6), ",.2f") for value in times_s)
        add_row(table, measured, name, *figures, f"{times_s[0].estimate / times_s[-1].estimate:,.0f}×")
    return table


def _time_per_row(cell: Cell) -> Interval:
    """The median time of a request by its rows, in seconds."""
    return percentile_interval(cell.rounds_s, 50).scale(1 / cell.rows_per_request)


def make_cost_table(measured: Measured) -> TextTable:
    connections = measured.settings["connections"]
    table = TextTable(
        "Correctness and cost",
        ["server", "max |Δp|", "failed", "wrong", "start s", "CPU s per 1,000", "memory MB", "bytes out", "bytes in"],
        "max |Δp|: the largest difference from the reference over all test rows and both versions. start: from the "
        "spawn to the first right answer. CPU seconds per 1,000 rows at the most connections, and the most resident "
        "memory, of the server's whole process tree; pages that processes share count in each. bytes: a one-row "
        "request with its headers, and the body of its reply. Sorted by kind, then by CPU.",
    )

    def cpu(name: str) -> float:
        cost = measured.costs.get(name)
        return cost[0].estimate if cost else float("inf")

    for name in _sort(measured, measured.names, cpu):
        difference, starts = measured.max_abs_difference(name), measured.start_medians_s(name)
        cells, first = measured.cells(name), measured.cell(name, connections[0])
        cost = measured.costs.get(name)
        hidden = NOT_SEEN if name in measured.costs else UNKNOWN
        add_row(
            table, measured, name,
            UNKNOWN if difference is None else f"{difference:.0e}",
            f"{sum(cell.failed for cell in cells):,}", f"{sum(cell.wrong for cell in cells):,}",
            f"{starts[1]:.1f}" if starts else UNKNOWN,
            format_interval(cost[0], ".4f") if cost else hidden, f"{cost[1]:,.0f}" if cost else hidden,
            f"{first.request_bytes:,}" if first else UNKNOWN, f"{first.reply_bytes:,}" if first else UNKNOWN,
        )  # fmt: skip
    return table


def make_sections(measured: Measured) -> dict[str, list[str]]:
    """Return the texts after the tables by title: verdicts, warnings, and how it was measured."""
    sections = {
        "Verdicts": describe_verdicts(measured, list_verdicts(measured)),
        "Warnings": describe_warnings(list_warnings(measured)),
        "How this was measured": list_remarks(measured),
    }
    return {title: items for title, items in sections.items() if items}


def format_markdown(measured: Measured) -> str:
    """Return tables, verdicts, warnings and remarks as Markdown."""
    lines = [f"**{NOT_RIVALS}**", ""]
    for table in make_tables(measured):
        lines += format_table(table)
    for title, items in make_sections(measured).items():
        lines += [f"**{title}**", "", *(f"- {item}" for item in items), ""]
    return "\n".join(lines)


def format_peers(measured: Measured) -> str:
    """Return the speed and the cost of a run with peers as Markdown, with its warnings, machine and command."""
    lines = ["", *format_table(make_speed_table(measured)), *format_table(make_cost_table(measured))]
    lines += [f"- {text}" for text in (*describe_warnings(list_warnings(measured)), *list_remarks(measured)[:2])]
    return "\n".join([*lines, "", ""])


def format_table(table: TextTable) -> list[str]:
    """Return the lines of a table in Markdown; local rows and floors are in italics."""
    lines = [f"**{table.title}**", "", _markdown_row(table.header)]
    lines.append("|" + "".join("---|" if place in table.words else "---:|" for place in range(len(table.header))))
    for row, kind in zip(table.rows, table.kinds, strict=True):
        first = f"*{row[0]}*" if kind in ("local", "floor") else row[0]
        lines.append(_markdown_row([first, *row[1:]]))
    return [*lines, "", table.note, ""]


def _markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def print_result(measured: Measured, console: Console) -> None:
    """Print the tables to the terminal, no figure cut: a table that is too wide continues below; a log has no width."""
    _print_text(console, NOT_RIVALS)
    for table in make_tables(measured):
        console.print()
        print_table(table, console)
    for title, items in make_sections(measured).items():
        console.print()
        console.print(Text(title, style="bold"))
        for item in items:
            _print_text(console, f"- {item}")


def print_table(table: TextTable, console: Console) -> None:
    """Print one table, as many columns at a time as fit."""
    width = console.width if console.is_terminal else 10_000
    for place, block in enumerate(_split_columns(table, width)):
        if place:
            console.print()
        console.print(Text(table.title + (" (continued)" if place else ""), style="bold"))
        for line in block:
            console.print(Text(line), soft_wrap=True)
    _print_text(console, table.note)


def _print_text(console: Console, text: str) -> None:
    console.print(Text(text), soft_wrap=not console.is_terminal)


def _split_columns(table: TextTable, width: int) -> list[list[str]]:
    """Return the lines of each block of columns that fits into `width`; every block begins with the server."""
    lines = [table.header, *table.rows]
    widths = [max(len(row[column]) for row in lines) for column in range(len(table.header))]
    blocks: list[list[int]] = [[]]
    used = widths[0]
    for column in range(1, len(widths)):
        needed = len(GAP) + widths[column]
        if blocks[-1] and used + needed > width:
            blocks.append([])
            used = widths[0]
        blocks[-1].append(column)
        used += needed
    return [[_format_line(row, [0, *block], widths, table.words) for row in lines] for block in blocks]


def _format_line(row: list[str], columns: list[int], widths: list[int], words: set[int]) -> str:
    cells = (row[c].ljust(widths[c]) if c in words else row[c].rjust(widths[c]) for c in columns)
    return GAP.join(cells).rstrip()
