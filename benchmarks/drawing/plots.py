"""The plots of a result file: each drawn once, for a PNG file and for an SVG whose colours follow the page's theme."""

import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from drawing.theme import FIGURE_WIDTH_IN, LIGHT, MARKERS
from figures.cells import SAMPLES_BEYOND_PERCENTILE, Cell, Knee
from figures.intervals import Interval
from figures.measured import Measured
from figures.words import describe_arrivals, describe_knee, format_count, format_ms

Dashes = str | tuple[int, tuple[float, ...]]  # a line style of matplotlib


@dataclass(frozen=True)
class Style:
    """How one server is named and drawn, alike in every plot."""

    label: str  # "onnx (local)": a row of another kind is never shown without its kind
    colour: str
    marker: str
    dashes: Dashes
    filled: bool  # hollow markers are gRPC

    @property
    def line(self) -> dict[str, Any]:
        face = self.colour if self.filled else LIGHT["surface"]
        return {"color": self.colour, "marker": self.marker, "linestyle": self.dashes, "markerfacecolor": face}


def make_styles(measured: Measured) -> dict[str, Style]:
    """Return each server's style: a framework has one colour and marker, gRPC is dashed and hollow, floors are grey.

    The Open Inference Protocol ("-infer") has long dashes, a default with a tuned set-up is dotted.
    """
    families: dict[str, int] = {}
    styles = {}
    for name, about in measured.servers.items():
        label = measured.label(name)
        is_grpc = measured.protocol(name) == "gRPC"
        if about["kind"] == "floor":
            dashes: Dashes = (0, (5, 1.5, 1, 1.5)) if is_grpc else (0, (1, 1.2))
            styles[name] = Style(label, LIGHT["floor"], "d", dashes, not is_grpc)
            continue
        server = name.removesuffix("-tuned")
        family = re.sub(r"[-_ ]?(grpc|infer)$", "", server, flags=re.IGNORECASE)
        number = families.setdefault(family, len(families))
        dashes = (0, (4, 1.8)) if is_grpc else (0, (8, 1.5)) if server.endswith("-infer") else "-"
        if about.get("variant") == "default":
            dashes = (0, (1, 1.6))
        styles[name] = Style(label, LIGHT[f"series{number % 7}"], MARKERS[number % 7], dashes, not is_grpc)
    return styles


# Plots: each function returns a figure and a sentence or more that say in words what it shows, or None where
# nothing of the kind was measured.


def draw_distribution(measured: Measured) -> tuple[Figure, str] | None:
    """Latency by percentile at the fewest connections; the x axis gives each further nine the same room."""
    styles = make_styles(measured)
    connections = measured.settings["connections"][0]
    cells = measured.cells_at(connections)
    if not cells:
        return None
    figure, axes = _figure()
    words, deepest = [], 1.0
    for name, cell in cells.items():
        latencies_s = cell.latencies_s
        depth = math.log10(max(len(latencies_s) / SAMPLES_BEYOND_PERCENTILE, 2))
        places = np.linspace(0, depth, 160)
        line = styles[name].line | {"markevery": 16, "markersize": 4}
        axes.plot(places, np.percentile(latencies_s, 100 * (1 - 10**-places)) * 1e3, label=measured.label(name), **line)
        deepest = max(deepest, depth)
        words.append(
            f"{measured.label(name)} p50 {format_ms(cell.percentile_s(50))}, p99 {format_ms(cell.percentile_s(99))}"
        )
    ticks = [0, 50, 90, 99, 99.9, 99.99, 99.999]
    kept = [(place, tick) for tick in ticks if (place := -math.log10(1 - tick / 100)) <= deepest]
    axes.set_xticks([place for place, _ in kept], [f"{tick:g} %" for _, tick in kept])
    axes.set_xlim(0, deepest * 1.02)
    axes.set_xlabel("share of requests that were at least this fast (percentile)")
    _log_axis(axes, "y", "latency (ms)")
    _legend(figure, axes)
    return figure, "; ".join(words)


def draw_rate_p99(measured: Measured) -> tuple[Figure, str] | None:
    """p99 latency against offered rate, all servers, the knee marked."""
    styles = make_styles(measured)
    swept = {name: points for name in measured.names if (points := _with_percentile(measured.open(name), 99))}
    if not swept:
        return None
    figure, axes = _figure(height_in=4.6)
    words = []
    for name, points in swept.items():
        style = styles[name]
        rates = [cell.nominal_rate for cell, _ in points]
        intervals = [p99 for _, p99 in points]
        axes.errorbar(
            rates, _estimates(intervals, 1e3), bar_lengths(intervals, 1e3), label=style.label, **_error(style)
        )
        _mark_knee(axes, measured.open(name), measured.knees[name], style.colour)
        words.append(f"{style.label}: {describe_knee(measured.knees[name])}")
    _objective(axes, measured)
    _log_axis(axes, "x", f"offered rate (requests/s, {describe_arrivals(measured.settings)} arrivals)")
    _fit(axes, [p99.estimate * 1e3 for points in swept.values() for _, p99 in points])
    _log_axis(axes, "y", "p99 latency from the intended send (ms)")
    _legend(figure, axes, _knee_handles())
    return figure, "; ".join(words)


def draw_rate_by_server(measured: Measured) -> tuple[Figure, str] | None:
    """p50 and p99 with their intervals against offered rate, one panel a server on common axes."""
    styles = make_styles(measured)
    found = {name: [cell for cell, _ in _with_percentile(measured.open(name), 50)] for name in measured.names}
    swept = {name: cells for name, cells in found.items() if cells}
    if not swept:
        return None
    lines = math.ceil(len(swept) / 2)
    figure = Figure(figsize=(FIGURE_WIDTH_IN, 1.1 + 1.55 * lines), layout="constrained")
    panels = figure.subplots(lines, 2, sharex=True, sharey=True, squeeze=False)
    words = []
    for axes, (name, cells) in zip(panels.flat, swept.items(), strict=False):
        style = styles[name]
        axes.set_title(style.label, fontsize=9, color=style.colour, loc="left", fontweight="bold")
        for percent, dashes in ((50, (0, (4, 1.8))), (99, "-")):
            points = _with_percentile(cells, percent)
            if not points:
                continue
            intervals = [interval for _, interval in points]
            line = style.line | {"linestyle": dashes, "markersize": 3.5}
            line["markerfacecolor"] = style.colour if percent == 99 else LIGHT["surface"]
            rates = [cell.nominal_rate for cell, _ in points]
            axes.errorbar(
                rates, _estimates(intervals, 1e3), bar_lengths(intervals, 1e3), capsize=2, elinewidth=1, **line
            )
        knee = measured.knees[name]
        _mark_knee(axes, cells, knee, style.colour)
        if knee.sustained_rate:
            axes.axvline(knee.sustained_rate, color=style.colour, linewidth=0.8, linestyle=(0, (1, 1.5)), zorder=0)
        objective = _objective(axes, measured)
        last = cells[-1]
        words.append(
            f"{style.label} at {last.nominal_rate:,.0f}/s offered: p50 {format_ms(last.percentile_s(50))}, "
            f"p99 {format_ms(last.percentile_s(99))}"
        )
    for axes in panels.flat[len(swept) :]:
        axes.set_visible(False)
    ends = [cell.percentile_s(percent) for cells in swept.values() for cell in cells for percent in (50, 99)]
    _fit(panels[0, 0], [end.estimate * 1e3 for end in ends if end is not None])
    for axes in panels.flat:
        _log_axis(axes, "x", "", subs=(1,))
        _log_axis(axes, "y", "", subs=(1,))
        axes.tick_params(labelsize=8, labelbottom=True)
    for place in (len(swept) - 1, len(swept) - 2)[: len(swept)]:  # the lowest panel of each column
        panels.flat[place].set_xlabel("offered rate (requests/s)")
    figure.supylabel("latency from the intended send (ms)", fontsize=9)
    ink = LIGHT["ink"]
    handles = [
        Line2D([], [], color=ink, marker="o", markersize=3.5, label="p99"),
        Line2D([], [], color=ink, marker="o", markersize=3.5, mfc=LIGHT["surface"], dashes=(4, 1.8), label="p50"),
        objective,
    ]
    figure.legend(handles=[*handles, *_knee_handles()], loc="outside lower center", ncols=3)
    return figure, "; ".join(words)


def draw_throughput(measured: Measured) -> tuple[Figure, str] | None:
    """Closed-loop rate against connections, with intervals."""
    styles = make_styles(measured)
    cells = _closed_cells(measured)
    if not cells:
        return None
    figure, axes = _figure()
    words = []
    for place, (name, points) in enumerate(cells.items()):
        style = styles[name]
        shift = 1.022 ** (place - (len(cells) - 1) / 2)  # so that intervals of equal servers lie side by side
        rates = [cell.rate for cell in points]
        axes.errorbar(
            [cell.connections * shift for cell in points], _estimates(rates), bar_lengths(rates), label=style.label,
            **_error(style),
        )  # fmt: skip
        words.append(
            f"{style.label}: "
            + ", ".join(
                f"{cell.rate.estimate:,.0f}/s at {format_count(cell.connections, 'connection')}" for cell in points
            )
        )
    _log_axis(
        axes, "x", "connections (closed loop)", sorted({c.connections for points in cells.values() for c in points})
    )
    _fit(axes, [cell.rate.estimate for points in cells.values() for cell in points])
    _log_axis(axes, "y", "right answers per second")
    _legend(figure, axes)
    return figure, "; ".join(words)


def draw_time_per_row(measured: Measured) -> tuple[Figure, str] | None:
    """Median time per row against rows a request, at the fewest connections."""
    styles = make_styles(measured)
    cells = _closed_cells(measured, measured.settings["connections"][0])
    sizes = sorted({cell.rows_per_request for points in cells.values() for cell in points})
    if len(sizes) < 2:
        return None
    medians = {name: _with_percentile(points, 50) for name, points in cells.items()}
    figure, axes = _figure()
    words = []
    for name, points in medians.items():
        style = styles[name]
        per_row = [(cell.rows_per_request, p50.scale(1e6 / cell.rows_per_request)) for cell, p50 in points]
        rows, intervals = [row for row, _ in per_row], [interval for _, interval in per_row]
        axes.errorbar(rows, _estimates(intervals), bar_lengths(intervals), label=style.label, **_error(style))
        words.append(
            f"{style.label}: "
            + ", ".join(f"{interval.estimate:,.3g} µs per row at {row:,}" for row, interval in per_row)
        )
    _log_axis(axes, "x", f"rows per request ({format_count(measured.settings['connections'][0], 'connection')})", sizes)
    _fit(axes, [p50.estimate * 1e6 / cell.rows_per_request for points in medians.values() for cell, p50 in points])
    _log_axis(axes, "y", "time per row (µs, from p50)")
    _legend(figure, axes)
    return figure, "; ".join(words)


def draw_cost(measured: Measured) -> tuple[Figure, str] | None:
    """CPU seconds per 1,000 rows at the most connections, and the most memory seen, of the whole process tree."""
    styles = make_styles(measured)
    costs = measured.costs
    if not costs:
        return None
    figure = Figure(figsize=(FIGURE_WIDTH_IN, 1.0 + 0.3 * len(costs)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    names = list(costs)
    panels[0].set_yticks(range(len(names)), [measured.label(name) for name in names])
    panels[0].invert_yaxis()
    for axes, column, title, form in (
        (panels[0], 0, "server CPU (s per 1,000 rows)", "{:.3f}"),
        (panels[1], 1, "peak memory (MB resident)", "{:,.0f}"),
    ):
        values = [0.0] * len(names)
        for place, name in enumerate(names):
            if cost := costs[name]:
                values[place] = cost[0].estimate if column == 0 else cost[1]
        for place, (name, value) in enumerate(zip(names, values, strict=True)):
            style = styles[name]
            axes.barh(place, value, height=0.62, color=style.colour, hatch="" if style.filled else "////")
            text = form.format(value) if costs[name] else "not seen"
            axes.annotate(text, (value, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set_xlim(0, max(values) * 1.3 or 1)
        axes.set_xlabel(title)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.locator_params(axis="x", nbins=4)
    words = [
        f"{measured.label(name)} " + (f"{cost[0].estimate:.3f} s, {cost[1]:,.0f} MB" if cost else "not seen")
        for name, cost in costs.items()
    ]
    return figure, "CPU seconds per 1,000 rows and peak memory: " + "; ".join(words)


def draw_cold_start(measured: Measured) -> tuple[Figure, str] | None:
    """From spawn until the port listens, and on until the first right answer; a dot is one start."""
    styles = make_styles(measured)
    starts = {name: server["starts"] for name, server in measured.servers.items() if server.get("starts")}
    if not starts:
        return None
    figure = Figure(figsize=(FIGURE_WIDTH_IN, 1.15 + 0.3 * len(starts)), layout="constrained")
    axes = figure.subplots()
    words = []
    for place, (name, runs) in enumerate(starts.items()):
        style = styles[name]
        listens_s, ready_s = measured.start_medians_s(name) or (0.0, 0.0)
        axes.barh(place, listens_s, height=0.62, color=style.colour)
        rest_s = max(ready_s - listens_s, 0)
        axes.barh(place, rest_s, left=listens_s, height=0.62, color=style.colour, alpha=0.55, hatch="////")
        dots_s = [run["ready_s"] for run in runs]
        axes.plot(dots_s, [place] * len(runs), "o", color=LIGHT["ink"], markerfacecolor=LIGHT["surface"], markersize=3)
        axes.annotate(
            f"{ready_s:.2f} s", (max(dots_s), place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8
        )
        words.append(f"{style.label} listens after {listens_s:.2f} s, first right answer after {ready_s:.2f} s")
    axes.set_yticks(range(len(starts)), [measured.label(name) for name in starts])
    axes.invert_yaxis()
    axes.set_xlim(0, max(run["ready_s"] for runs in starts.values() for run in runs) * 1.15)
    axes.set_xlabel("seconds since the process was spawned, median")
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    muted: dict[str, Any] = {"facecolor": LIGHT["muted"], "edgecolor": "none"}
    handles = [
        Patch(**muted, label="until it listens"),
        Patch(**muted, alpha=0.55, label="until the first right answer"),
        Line2D([], [], linestyle="", marker="o", markersize=3, c=LIGHT["ink"], mfc=LIGHT["surface"], label="one start"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure, "; ".join(words)


@dataclass(frozen=True)
class Plot:
    """One plot: the stem of its PNG file, the title, how to read it, and the function that draws it."""

    stem: str
    title: str
    reading: str
    draw: Callable[[Measured], tuple[Figure, str] | None]


PLOTS = (
    Plot(
        "latency_distribution", "Latency of one user's requests",
        "Closed loop at the fewest connections. Lower is better; a line that rises to the right has a slow tail. A "
        f"line ends where fewer than {SAMPLES_BEYOND_PERCENTILE} observations lie beyond it.", draw_distribution,
    ),
    Plot(
        "latency_against_rate", "p99 latency against offered rate",
        "Open loop: requests come whether or not earlier ones are answered, and time counts from when each was due. A "
        "ring marks the last rate kept up with, a cross the rate at which the server broke; they are on the bottom "
        "edge where too few requests support a p99.", draw_rate_p99,
    ),
    Plot(
        "throughput", "Throughput against connections",
        "Closed loop: each connection asks again as soon as it is answered. Bars are 95 % intervals: one that "
        "leaves the plot is wider than it, and a single round supports none.", draw_throughput,
    ),
    Plot(
        "latency_against_rate_by_server", "p50 and p99 against offered rate, server by server",
        "The same sweep on common axes. The dotted vertical line is the knee: the last rate kept up with.",
        draw_rate_by_server,
    ),
    Plot(
        "time_per_row", "Time per row against rows per request",
        "A line that falls by as much as rows rise means that the cost is per request; a flat one, per row.",
        draw_time_per_row,
    ),
    Plot(
        "cost", "What it costs to serve",
        "The server's whole process tree; CPU at the most connections. Hatched bars are gRPC.", draw_cost,
    ),
    Plot(
        "cold_start", "Cold start",
        "From spawning the process to its port listening, and on to the first answer that is right.", draw_cold_start,
    ),
)  # fmt: skip


def _closed_cells(measured: Measured, connections: int | None = None) -> dict[str, list[Cell]]:
    """Return the cells of each server that hold answers: with one row by connections, or at `connections` by rows."""
    found = {}
    for name in measured.names:
        cells = [cell for cell in measured.closed(name) if len(cell.latencies_s)]
        if connections is None:
            found[name] = [cell for cell in cells if cell.rows_per_request == 1]
        else:
            found[name] = [cell for cell in cells if cell.connections == connections]
    return {name: cells for name, cells in found.items() if cells}


def _figure(height_in: float = 4.2) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(FIGURE_WIDTH_IN, height_in), layout="constrained")
    return figure, figure.subplots()


def _with_percentile(cells: list[Cell], percent: float) -> list[tuple[Cell, Interval]]:
    """Return the cells with enough requests for the percentile, each with its interval."""
    return [(cell, interval) for cell in cells if (interval := cell.percentile_s(percent)) is not None]


def _estimates(intervals: list[Interval], factor: float = 1.0) -> list[float]:
    return [interval.estimate * factor for interval in intervals]


def bar_lengths(intervals: list[Interval], factor: float = 1.0) -> np.ndarray:
    """Lengths of the error bars, (2, n); none if an interval is open, since it has no end to draw."""
    lengths = [
        (i.estimate - i.low, i.high - i.estimate) if i.is_closed else (0.0, 0.0) for i in intervals
    ]  # fmt: skip
    bars: np.ndarray = np.maximum(np.array(lengths).T, 0) * factor
    return bars


def _error(style: Style) -> dict[str, Any]:
    return {**style.line, "capsize": 2.5, "elinewidth": 1.1}


def _plain(value: float, _: object = None) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:.3g}"


def _log_axis(
    axes: Axes, which: str, label: str, ticks: list[int] | None = None, subs: tuple[int, ...] | None = None
) -> None:
    """Make one axis logarithmic with plain numbers at `ticks`, or at `subs` of each decade (default: what fits)."""
    axis = getattr(axes, f"{which}axis")
    getattr(axes, f"set_{which}scale")("log", nonpositive="clip")
    if ticks is None:
        low, high = sorted(axis.get_view_interval())
        decades = math.log10(max(high / low, 1)) if low > 0 else 9
        axis.set_major_locator(LogLocator(10, subs=subs or ((1, 2, 5) if decades < 2.3 else (1,))))
        axis.set_major_formatter(FuncFormatter(_plain))
    else:
        axis.set_ticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.set_minor_locator(NullLocator())
    getattr(axes, f"set_{which}label")(label)


def _fit(axes: Axes, heights: list[float]) -> None:
    """Fit the y axis to the estimates, so that one wide interval does not flatten the rest: its bar leaves the plot."""
    if heights:
        axes.set_ylim(min(heights) / 2.5, max(heights) * 2.5)


def _legend(figure: Figure, axes: Axes, more: tuple[Line2D, ...] = ()) -> None:
    handles, _ = axes.get_legend_handles_labels()
    figure.legend(handles=[*handles, *more], loc="outside lower center", ncols=2, handlelength=3.2)


def _objective(axes: Axes, measured: Measured) -> Line2D:
    """Draw the p99 objective; return its line for the legend."""
    objective_ms = measured.settings["objective_p99_s"] * 1e3
    look: dict[str, Any] = {"color": LIGHT["alarm"], "linewidth": 1, "linestyle": (0, (2, 2))}
    return axes.axhline(objective_ms, zorder=1, label=f"p99 objective: {objective_ms:g} ms", **look)


def _mark_knee(axes: Axes, cells: list[Cell], knee: Knee, colour: str) -> None:
    """Ring the p99 of the last rate kept up with and cross the next; at the bottom edge where p99 is withheld."""
    for rate, mark, size in ((knee.sustained_rate, "o", 12), (knee.broken_rate, "x", 10)):
        if not rate:
            continue
        p99 = next((cell.percentile_s(99) for cell in cells if cell.nominal_rate == rate), None)
        place: dict[str, Any] = {} if p99 else {"transform": axes.get_xaxis_transform(), "clip_on": False}
        height = p99.estimate * 1e3 if p99 else 0.03
        look: dict[str, Any] = {"color": colour, "markerfacecolor": "none", "markeredgewidth": 1.8, "zorder": 5}
        axes.plot([rate], [height], marker=mark, markersize=size, **look, **place)


def _knee_handles() -> tuple[Line2D, ...]:
    mark: dict[str, Any] = {"linestyle": "", "color": LIGHT["ink"], "markerfacecolor": "none", "markeredgewidth": 1.6}
    return (
        Line2D([], [], marker="o", markersize=9, **mark, label="knee: last rate kept up with"),
        Line2D([], [], marker="x", markersize=7, **mark, label="broken"),
    )


def render_svg(figure: Figure, plot: Plot, words: str) -> str:
    """Return the figure as an inline <svg>: colours as CSS variables, a name, a description, no outside reference."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": plot.stem}):  # ids differ between plots, and not between runs
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawing = buffer.getvalue()
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing[drawing.index("<svg") :], flags=re.DOTALL)
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing)  # repeated from plot to plot, and never referred to
    drawing = re.sub(r"<style.*?</style>", "", drawing, flags=re.DOTALL)  # it would hold for the whole page
    drawing = re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", drawing).replace("inherit;", "var(--font);")
    drawing = drawing.replace("inherit", "var(--font)")
    for name, value in LIGHT.items():
        drawing = drawing.replace(value, f"var(--{name})")
    view_box = re.findall(r'viewBox="[^"]*"', drawing)[0]
    head = (
        f'<svg {view_box} role="img" aria-labelledby="{plot.stem}-title {plot.stem}-words">'
        f'<title id="{plot.stem}-title">{escape(plot.title)}</title><desc id="{plot.stem}-words">{escape(words)}</desc>'
    )
    return head + drawing[drawing.index(">") + 1 :].rstrip()
