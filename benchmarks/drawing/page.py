"""The report of a result: one self-contained HTML page, and its plots as PNG files."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from drawing.answers import list_answers
from drawing.conclusion import conclude
from drawing.plots import PLOTS, Plot, render_svg
from drawing.tables import make_tables
from drawing.theme import DARK, LIGHT, PNG_DPI, RC
from endpoints.base import KINDS
from figures.cells import SAMPLES_BEYOND_PERCENTILE, Cell
from figures.measured import Measured
from figures.verdicts import list_warnings
from figures.words import (
    NOT_SEEN,
    UNKNOWN,
    describe_arrivals,
    describe_rounds,
    describe_warnings,
    format_count,
    format_interval,
    format_interval_ms,
    format_rate,
)

FOLDER = Path(__file__).resolve().parent
PERCENTILES = (50, 90, 99, 99.9)  # of the tables that hold every row
FIGURE_START = re.compile(rf"[\d≥>±?{UNKNOWN}]|{NOT_SEEN}|too few")


@dataclass(frozen=True)
class PageTable:
    """A table of the page. `floors` are the places of the rows that are set back, `words` of columns of text."""

    header: list[str]
    rows: list[list[str]]
    title: str = ""
    note: str = ""
    floors: frozenset[int] = frozenset()
    words: frozenset[int] = frozenset()

    @property
    def name(self) -> str:
        return self.title or f"{self.header[0]}: {', '.join(self.header[1:])}"


def render_page(measured: Measured, drawings: list[tuple[Plot, str]], theme: str | None = None) -> str:
    """Return the page; `drawings` are the plots with their <svg>, `theme` is "light", "dark" or the reader's."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    labels = {measured.label(name): measured.kind(name) for name in measured.names}

    def table(
        header: list[str], rows: list[list[str]], title: str = "", note: str = "", words: bool = False
    ) -> PageTable:
        floors = frozenset(place for place, row in enumerate(rows) if labels.get(row[0]) in ("floor", "local"))
        text = {0} | {
            column for column in range(len(header)) if any(not FIGURE_START.match(row[column]) for row in rows)
        }
        return PageTable(header, rows, title, note, floors, frozenset(range(len(header)) if words else text))

    answers = list_answers(measured)
    return environment.get_template("page.html.j2").render(
        measured=measured,
        facts=_facts(measured),
        style=Markup(_style(theme)),  # our own, and two palettes
        conclusions=conclude(measured),
        answers=[(answer, table(list(answer.header), [list(row) for row in answer.rows])) for answer in answers],
        warnings=describe_warnings(list_warnings(measured)),
        drawings=[(plot, Markup(svg)) for plot, svg in drawings],  # matplotlib's, words escaped in render_svg
        tables=[table(one.header, one.rows, one.title, one.note) for one in make_tables(measured)],
        every_row=[table(header, rows, title) for title, header, rows in _every_row(measured)],
        servers=table(*_servers(measured), title="Servers", words=True),
        environment=table(*_environment(measured), title="Environment and settings, as recorded", words=True),
        count=format_count,
    )


def _facts(measured: Measured) -> dict[str, Any]:
    """Return the facts for the method's sentences."""
    differences = [
        difference
        for name in measured.names
        if measured.closed(name) and (difference := measured.max_abs_difference(name)) is not None
    ]  # one that broke the contract was not timed
    closed = [cell for name in measured.names for cell in measured.closed(name)]
    opened = [cell for name in measured.names for cell in measured.open(name)]
    late = [cell.late_p99_s for cell in opened if cell.keeps_up and math.isfinite(cell.late_p99_s)]
    return {
        "difference": f"{max(differences):.0e}" if differences else "",
        "sizes": _join(measured.settings["rows_per_request"]),
        "connections": _join(measured.settings["connections"]),
        "server_cpus": _join(measured.settings["server_cpus"] or []),
        "client_cpus": _join(measured.settings["client_cpus"] or []),
        "busiest": f"{max((cell.client_share for cell in closed), default=0.0):.0%}",
        "floors": " and ".join(measured.label(name) for name in measured.names if measured.is_floor(name)),
        "arrivals": describe_arrivals(measured.settings),
        "late_ms": f"{max(late) * 1e3:.2f}" if late else "",
        "objective_ms": f"{measured.settings['objective_p99_s'] * 1e3:g}",
        "rounds": describe_rounds(measured),
        "sweeps": format_count(max((len(cell.rounds) for cell in opened), default=0), "sweep"),
        "beyond": SAMPLES_BEYOND_PERCENTILE,
        "precision": f"{measured.settings.get('precision', 0.1):.0%}",
    }


def _style(theme: str | None) -> str:
    """The page's style; its theme is the reader's, unless one is given."""
    light, dark = (" ".join(f"--{name}: {value};" for name, value in colours.items()) for colours in (LIGHT, DARK))
    when = {None: "screen and (prefers-color-scheme: dark)", "dark": "all", "light": "not all"}[theme]
    return f":root {{ {light} }}\n@media {when} {{ :root {{ {dark} }} }}\n{(FOLDER / 'page.css').read_text()}"


def _every_row(measured: Measured) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return (title, header, rows) of every closed-loop and every open-loop row, the figures behind the plots."""
    tail = ["failed", "wrong", "client CPU", "disturbed"]
    closed, opened = [], []
    for name in measured.names:
        for cell in measured.closed(name):
            cpu = [format_interval(cell.server_cpu_s_per_1000, ".4f"), f"{cell.rss_bytes / 1e6:,.0f}"]
            closed.append([
                measured.label(name), f"{cell.connections:,}", f"{cell.rows_per_request:,}", f"{len(cell.rounds):,}",
                format_rate(cell), *_percentiles(cell), *(cpu if measured.is_seen(name) else [NOT_SEEN, NOT_SEEN]),
                f"{cell.request_bytes:,}", f"{cell.reply_bytes:,}", *_doubts(cell),
            ])  # fmt: skip
        for cell in measured.open(name):
            late = f"{cell.late_p99_s * 1e3:.3f}" if math.isfinite(cell.late_p99_s) else UNKNOWN
            opened.append([
                measured.label(name), f"{cell.nominal_rate:,.0f}", format_interval(cell.rate, ",.0f"),
                *_percentiles(cell), late,
                *_doubts(cell),
            ])  # fmt: skip
    percentiles = [f"p{percent:g} ms" for percent in PERCENTILES]
    closed_header = ["server", "connections", "rows", "rounds", "req/s", *percentiles, "CPU s per 1,000", "MB"]
    closed_header += ["bytes out", "bytes in", *tail]
    open_header = ["server", "offered/s", "answered/s", *percentiles, "sent late p99 ms", *tail]
    tables = [("Every closed-loop row", closed_header, closed), ("Every open-loop row", open_header, opened)]
    return [table for table in tables if table[2]]


def _percentiles(cell: Cell) -> list[str]:
    return [format_interval_ms(cell.percentile_s(percent)) for percent in PERCENTILES]


def _doubts(cell: Cell) -> list[str]:
    client = UNKNOWN if math.isnan(cell.client_share) else f"{min(cell.client_share, 1.0):.0%}"
    return [f"{cell.failed:,}", f"{cell.wrong:,}", client, f"{cell.disturbed_share:.0%}"]


def _servers(measured: Measured) -> tuple[list[str], list[list[str]]]:
    rows = []
    for name, server in measured.servers.items():
        differences = server.get("max_abs_difference") or {}
        rows.append([
            measured.label(name), measured.protocol(name), KINDS.get(measured.kind(name), measured.kind(name)),
            ", ".join(f"{key} {value}" for key, value in (server.get("settings") or {}).items()) or UNKNOWN,
            ", ".join(f"version {key}: {value:.1e}" for key, value in differences.items()) or "no model",
            server.get("command", UNKNOWN),
        ])  # fmt: skip
    return ["server", "protocol", "what it is", "threads, workers, batching", "max |Δp|", "started with"], rows


def _environment(measured: Measured) -> tuple[list[str], list[list[str]]]:
    rows = []
    for part in (measured.environment, measured.settings):
        for key, value in part.items():
            if isinstance(value, dict):
                text = ", ".join(f"{name} {_join(v) if isinstance(v, list) else v}" for name, v in value.items())
            else:
                text = _join(value) if isinstance(value, list | tuple) else str(value)
            rows.append([key.replace("_", " "), text or UNKNOWN])
    return ["fact", "value"], rows


def _join(values: list[Any] | tuple[Any, ...]) -> str:
    return ", ".join(f"{value:,}" if isinstance(value, int) else str(value) for value in values)


def write_report(measured: Measured, folder: Path) -> Path:
    """Write the plots as PNG files and then report.html into `folder`; return the path of report.html."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(RC):
        drawings = []
        for plot in PLOTS:
            drawn = plot.draw(measured)
            if drawn is None:
                continue
            figure, words = drawn
            drawings.append((plot, render_svg(figure, plot, words)))
            figure.suptitle(plot.title, fontsize=10.5, fontweight="bold")  # the page has it as a heading
            figure.savefig(folder / f"{plot.stem}.png", dpi=PNG_DPI, facecolor=LIGHT["surface"])
    path = folder / "report.html"
    path.write_text(render_page(measured, drawings), encoding="utf-8")
    return path
