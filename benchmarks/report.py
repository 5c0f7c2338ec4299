"""Draw a result file: one self-contained page that answers what was asked, and the plots as PNG files.

    python report.py                        the newest result
    python report.py results/sample.json    that one

Writes <folder>/report.html and <folder>/*.png; the folder lies beside the file and has its name without
.json. The page asks nothing of the network, holds every plot as SVG, and follows the reader's light or
dark setting.
"""

import argparse
import math
import re
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path

import matplotlib
from endpoint import KINDS
from intervals import mean_interval
from measured import (
    Measured,
    format_count,
    format_interval_ms,
    format_interval_rate,
    format_interval_s,
    format_ms,
    measured_costs,
    protocol_of,
    start_medians_s,
)
from plots import DARK, LIGHT, PLOTS, PNG_DPI, RC, Plot, render_svg
from results import (
    FOREIGN_LOAD_SHARE,
    SAMPLES_BEYOND_PERCENTILE,
    Cell,
    Knee,
    ResultError,
    describe_arrivals,
    newest_result_path,
    read_result,
)

PERCENTILES = (50, 90, 99, 99.9)  # of the tables that hold every row
NOT_SEEN = "not seen"
STYLE_PATH = Path(__file__).resolve().parent / "report.css"

# Answers


@dataclass(frozen=True)
class Answer:
    """One question, its answer in a sentence or two, a small table, and what limits it."""

    question: str
    answer: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str]


def answer_one_user(measured: Measured) -> Answer:
    """Which server for one user at a time: the highest closed-loop rate at the fewest connections."""
    connections = measured.settings["connections"][0]
    ranking = measured.ranking(connections)
    question = f"Which server for one user at a time ({format_count(connections, 'connection')})?"
    if not ranking:
        return Answer(question, "Nothing was measured.", [], [], [])
    (first, cell), rest = ranking[0], ranking[1:]
    tied = [name for name, other in rest if not _is_faster(cell, other)]
    cells = measured.closed_cells(connections)
    rows = [
        [measured.label(name), format_interval_ms(other.percentile_s(50)), format_interval_ms(other.percentile_s(99))]
        for name, (other,) in sorted(cells.items(), key=lambda item: -item[1][0].rate.estimate)
    ]
    notes = [
        verdict for verdict in measured.verdicts if verdict.startswith(f"at {format_count(connections, 'connection')}:")
    ][:1]
    floor = measured.floor(first, connections)
    if floor is not None:
        notes.append(_floor_note(measured, ranking, *floor))
    p50, p99 = (format_ms(cell.percentile_s(percent)) for percent in (50, 99))
    answer = f"{measured.label(first)}: p50 {p50}, p99 {p99}."
    if tied:
        names = ", ".join(map(measured.label, tied))
        answer = f"{measured.label(first)}, with no significant difference from {names}: p50 {p50}, p99 {p99}."
    return Answer(question, answer, ["server", "p50 ms", "p99 ms"], rows, notes)


def answer_under_load(measured: Measured) -> Answer:
    """Which server under load: the highest offered rate kept up with, and the highest closed-loop rate."""
    connections = measured.settings["connections"][-1]
    ranking = measured.ranking(connections)
    question = "Which server under load?"
    sustained = {
        name: knee.sustained_rate
        for name, knee in measured.knees.items()
        if knee.sustained_rate and not measured.is_floor(name)
    }
    answers = []
    if sustained:
        best = max(sustained, key=sustained.get)
        tied = [
            name
            for name in sustained
            if name != best and (measured.knees[name].broken_rate or math.inf) > sustained[best]
        ]
        answers.append(
            f"{measured.label(best)}: it keeps up with {sustained[best]:,.0f} requests/s within a p99 of "
            f"{measured.settings['objective_p99_s'] * 1e3:g} ms."
        )
        if tied:
            names = ", ".join(map(measured.label, tied))
            answers.append(f"The rates swept do not tell it from {names}, which broke later or not at all.")
    elif any(not measured.is_floor(name) for name in measured.knees):
        answers.append("No server kept up with even the lowest rate offered.")
    if ranking:
        first, cell = ranking[0]
        tied = [measured.label(name) for name, other in ranking[1:] if not _is_faster(cell, other)]
        answers.append(
            f"Flat out at {format_count(connections, 'connection')} {measured.label(first)} answers most, "
            f"{format_interval_rate(cell.rate)} requests/s"
            + (f", with no significant difference from {', '.join(tied)}." if tied else ".")
        )
    rows = []
    for name, cells in measured.closed_cells(connections).items():
        knee = measured.knees.get(name)
        rate = f"{knee.sustained_rate:,.0f}" if knee and knee.sustained_rate else "–"
        rows.append((cells[0].rate.estimate, [measured.label(name), rate, format_interval_rate(cells[0].rate)]))
    rows.sort(key=lambda pair: -pair[0])
    notes = [
        verdict for verdict in measured.verdicts if verdict.startswith(f"at {format_count(connections, 'connection')}:")
    ][:1]
    header = ["server", "keeps up with, req/s", f"flat out at {connections}, req/s"]
    return Answer(question, " ".join(answers) or "Nothing was measured.", header, [row for _, row in rows], notes)


def answer_breaking(measured: Measured) -> Answer:
    """At what rate each breaks."""
    objective_ms = measured.settings["objective_p99_s"] * 1e3
    question = "At what rate does each break?"
    if not measured.knees:
        return Answer(question, "No offered rate was swept, so this is not known.", [], [], [])
    rows, sentences = [], []
    for name, knee in sorted(measured.knees.items(), key=lambda item: -(item[1].sustained_rate or 0)):
        sustained = f"{knee.sustained_rate:,.0f}" if knee.sustained_rate else "none offered"
        broken = f"{knee.broken_rate:,.0f}" if knee.broken_rate else "did not"
        rows.append([measured.label(name), sustained, broken, knee.reason])
        if not measured.is_floor(name):
            sentences.append(f"{measured.label(name)} {_bracket(knee)}")
    note = (
        f"A server breaks where it answers less than it is offered, errs, or its p99 passes {objective_ms:g} ms. The "
        "truth lies between the two rates; finer steps (--rates) narrow it."
    )
    header = ["server", "keeps up with, req/s", "breaks at, req/s", "because"]
    return Answer(question, f"In requests/s: {'; '.join(sentences)}.", header, rows, [note])


def answer_cost(measured: Measured) -> Answer:
    """What each costs."""
    question = "What does each cost?"
    costs = measured_costs(measured)
    servers = [name for name in costs if costs[name] and not measured.is_floor(name)]
    if not servers:
        return Answer(question, "No cost was measured.", [], [], [])
    rows = []
    for name, cost in sorted(costs.items(), key=lambda item: item[1][0].estimate if item[1] else math.inf):
        starts = measured.result["endpoints"][name].get("starts")
        ready = f"{start_medians_s(starts)[1]:.2f}" if starts else "–"
        figures = [format_interval_s(cost[0]), f"{cost[1]:,.0f}"] if cost else [NOT_SEEN, NOT_SEEN]
        rows.append([measured.label(name), *figures, ready])
    notes = []
    if len(costs) > sum(map(bool, costs.values())):
        notes.append(f"{NOT_SEEN}: a container's processes are the engine's, so its CPU and memory are unknown.")
    by_cpu = min(servers, key=lambda name: costs[name][0].estimate)
    by_memory = min(servers, key=lambda name: costs[name][1])
    dearest = max(servers, key=lambda name: costs[name][0].estimate)
    answer = f"Least CPU: {measured.label(by_cpu)}, {format_interval_s(costs[by_cpu][0])} s per 1,000 rows"
    if dearest != by_cpu and costs[by_cpu][0].estimate > 0:
        times = costs[dearest][0].estimate / costs[by_cpu][0].estimate
        answer += f" ({measured.label(dearest)} takes {times:,.1f} times that)"
    answer += f". Least memory: {measured.label(by_memory)}, {costs[by_memory][1]:,.0f} MB."
    header = ["server", "CPU s per 1,000 rows", "peak MB", "cold start s"]
    return Answer(question, answer, header, rows, notes)


def answer_certainty(measured: Measured) -> Answer:
    """How sure all of this is."""
    settings, verdicts = measured.settings, measured.verdicts
    undecided = sum("no significant difference" in verdict for verdict in verdicts)
    unsteady = any("not steady" in warning for warning in measured.warnings)
    failed = [measured.label(name) for name in measured.names if measured.result["endpoints"][name].get("failure")]
    cells = [cell for name in measured.names for cell in measured.closed[name] + measured.open[name]]
    answer = (
        f"{len(verdicts) - undecided} of {len(verdicts)} comparisons are significant at 95 %, {undecided} "
        f"{'is' if undecided == 1 else 'are'} not. "
    )
    if unsteady:
        answer += "The machine was not steady: rounds differ by more than they should."
    elif settings["rounds"] > 1:
        answer += "The machine was steady: no row's rounds are far apart."
    else:
        answer += "One round cannot say whether the machine was steady."
    foreign_share = max((cell.foreign_share for cell in cells), default=0.0)
    if foreign_share > FOREIGN_LOAD_SHARE:
        answer += f" Other programs disturbed it: they used up to {foreign_share:.0%} of its cores."
    notes = [
        f"Profile {settings['profile']}: {format_count(settings['rounds'], 'round')} of {settings['seconds']:g} s a "
        "row, servers in shuffled order in each. Intervals rest on the rounds, so with few rounds they are wide.",
        "A percentile without enough observations beyond it is withheld: too few.",
    ]
    if settings["rounds"] < 2:
        notes.append("One round says nothing about the spread: rates have no interval, and no verdict is significant.")
    if cells:
        notes.append(
            f"{sum(len(cell.latencies_s) for cell in cells):,} right answers were timed, "
            f"{sum(cell.failed for cell in cells):,} requests failed and {sum(cell.wrong for cell in cells):,} answers "
            f"were wrong. Other programs used at most {foreign_share:.0%} of the cores."
        )
    if failed:
        notes.append(f"Not measured in full: {', '.join(failed)}. See the warnings.")
    notes.append(
        f"{format_count(len(measured.warnings), 'warning')} in all; a row with a warning is less sure than it looks."
    )
    rows = [list(verdict.partition(": ")[::2]) for verdict in verdicts]
    return Answer("How sure is this?", answer, ["load", "verdict"], rows, notes)


def _is_faster(cell: Cell, other: Cell) -> bool:
    """Whether the 95 % interval of the ratio of rates, round by round, lies above 1."""
    return mean_interval([a / b for a, b in zip(cell.rates, other.rates, strict=False)]).low > 1


def _floor_note(measured: Measured, ranking: list[tuple[str, Cell]], name: str, floor_cell: Cell) -> str:
    floor = floor_cell.percentile_s(50)
    note = (
        f"{measured.label(name)} answers a constant in {format_ms(floor)}: that much is the client, the kernel and the "
        "protocol."
    )
    medians = [(other, cell.percentile_s(50)) for other, cell in ranking]
    if floor is None or any(p50 is None for _, p50 in medians):
        return note
    for (a, p50_a), (b, p50_b) in zip(medians, medians[1:], strict=False):
        gap_s = abs(p50_b.estimate - p50_a.estimate)
        if gap_s < floor.estimate:
            note += (
                f" {measured.label(a)} and {measured.label(b)} are {gap_s * 1e3:.2f} ms apart, less than this floor: "
                "do not build on that difference."
            )
    return note


def _bracket(knee: Knee) -> str:
    if knee.broken_rate is None:
        return f"held at every rate up to {knee.sustained_rate:,.0f}"
    return (
        f"{knee.sustained_rate:,.0f}–{knee.broken_rate:,.0f}"
        if knee.sustained_rate
        else f"below {knee.broken_rate:,.0f}"
    )


# Method


def list_method(measured: Measured) -> list[tuple[str, str]]:
    """Return the twelve points of the method, each with what this run did about it."""
    settings, environment = measured.settings, measured.result["environment"]
    differences = [
        value
        for name in measured.names
        if measured.closed[name]  # one that broke the contract was not timed
        for value in (measured.result["endpoints"][name].get("max_abs_difference") or {}).values()
    ]
    cells = [cell for name in measured.names for cell in measured.closed[name]]
    opened = [cell for name in measured.names for cell in measured.open[name]]
    floors = [measured.label(name) for name in measured.names if measured.is_floor(name)]
    sizes = ", ".join(f"{size:,}" for size in settings["rows_per_request"])
    pinned = (
        f"Servers ran on core {_join(settings['server_cpus'])}, the client on core {_join(settings['client_cpus'])}"
        if settings["server_cpus"] is not None
        else "Servers and client shared their cores, since there was only one: they slowed each other"
    )
    busiest = max((cell.client_share for cell in cells), default=0.0)
    sweeps = max((len(cell.rates) for cell in opened), default=0)
    late = [cell.late_p99_s for cell in opened if math.isfinite(cell.late_p99_s)]
    commit = environment["git_commit"] or "unknown"
    return [
        (
            "Correct first",
            "A server is timed only after every test row of both versions matched the reference"
            + (f"; the largest difference was {max(differences):.0e}. " if differences else ". ")
            + "While the clock ran every reply was checked too. Failed and wrong answers are columns of their own "
            "and never among the latencies.",
        ),
        (
            "Same work",
            f"Version {settings['version']} of the model, the same test rows in turn with the same values, {sizes} "
            "rows a request, on connections kept open. Formats differ, so the bytes of a request and of a reply are in "
            "the tables.",
        ),
        (
            "Who eats which core",
            f"{pinned}. Threads, workers and batching stand beside each server below. "
            + (f"The client used at most {busiest:.0%} of its core in a closed loop. " if cells else "")
            + "Its CPU is a column among every row; where the client was the bottleneck a warning says so.",
        ),
        (
            "The floor",
            (f"{' and '.join(floors)} answered a constant" if floors else "No floor was measured in this run")
            + (" to the same client in the same rounds. Read no difference smaller than it." if floors else "."),
        ),
        (
            "Two kinds of load",
            f"Closed loop at {_join(settings['connections'])} connections: how fast can it go. Open loop, "
            f"{describe_arrivals(settings)} arrivals, time counted from when a request was due: what would users see. "
            "A closed loop hides a stall, since it stops asking; an open loop shows it."
            + (f" Requests left at most {max(late) * 1e3:.2f} ms late (p99)." if late else " No open loop was run."),
        ),
        (
            "Saturation",
            f"The offered rate rose until answers fell behind or p99 passed {settings['objective_p99_s'] * 1e3:g} ms. "
            "The knee is the last rate kept up with.",
        ),
        (
            "Enough samples",
            f"{format_count(settings['rounds'], 'round')}, and {sweeps} of the offered rates; servers interleaved and "
            "their order shuffled, so that a drift of the machine hits all alike. Percentiles carry 95 % intervals, "
            "the wider of order statistics and of the rounds' own spread, and are withheld with fewer than "
            f"{SAMPLES_BEYOND_PERCENTILE} observations beyond them. Verdicts compare round by round; no significant "
            "difference is a verdict.",
        ),
        (
            "Warm and cold apart",
            "A cold start is split: spawned, listening, first right answer. The first "
            f"{settings['warmup_seconds']:g} s of each window are warm-up and dropped by rule.",
        ),
        (
            "Cost",
            "CPU seconds per 1,000 rows and the most resident memory, of the server's whole process tree. Pages that "
            "processes share count in each.",
        ),
        (
            "Profile",
            f"{settings['profile']}: windows of {settings['seconds']:g} s. quick is for finding one's way; rigorous "
            "has sample sizes after MLPerf's rules, for a figure to be quoted.",
        ),
        (
            "Environment",
            f"{environment['cpu']}, {environment['cores']} cores, {environment['system']}, Python "
            f"{environment['python']}, governor {environment['governor']}, load average "
            f"{environment['load_average_1min']:.1f} at the start, "
            f"commit {commit}{' with changes' if environment['git_dirty'] else ''}, {environment['utc']}. All of it "
            "is below.",
        ),
        (
            "Look as well as read",
            "This page, its plots and its tables are made by a program from one file of raw observations; results.py "
            "prints the same tables in a terminal and as Markdown. Nothing is typed by hand.",
        ),
    ]


def _join(values: list) -> str:
    return ", ".join(f"{value:,}" if isinstance(value, int) else str(value) for value in values)


# The page


def _variables(theme: dict[str, str]) -> str:
    return " ".join(f"--{name}: {value};" for name, value in theme.items())


def _style() -> str:
    light, dark = f":root {{ {_variables(LIGHT)} }}", f":root {{ {_variables(DARK)} }}"
    return f"{light}\n@media screen and (prefers-color-scheme: dark) {{ {dark} }}\n{STYLE_PATH.read_text()}"


def _tag(name: str, content: str, **attributes: str | None) -> str:
    """Return an element around `content`, which is HTML already; attributes are escaped, empty ones left out."""
    written = "".join(
        f' {key.strip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items() if value
    )
    return f"<{name}{written}>{content}</{name}>"


def _table(header: list[str], rows: list[list[str]], floors: set[str], title: str = "", words: bool = False) -> str:
    """Return a table in a box of its own that scrolls; a row whose first cell is in `floors` is marked as floor."""
    is_words = [all(not re.match(rf"[\d–]|{NOT_SEEN}", row[column]) for row in rows) for column in range(len(header))]
    is_words = [True] * len(header) if words else is_words
    head = [_tag("th", escape(text), scope="col", class_="words" * is_words[i]) for i, text in enumerate(header)]
    lines = []
    for row in rows:
        cells = [_tag("th", escape(row[0]), scope="row", class_="words")]
        for column, text in enumerate(row[1:], 1):
            kind = " ".join(["words"] * is_words[column] + ["long"] * (len(text) > 30))
            cells.append(_tag("td", escape(text), class_=kind))
        lines.append(_tag("tr", "".join(cells), class_="floor" * (row[0] in floors)))
    parts = _tag("thead", _tag("tr", "".join(head))) + _tag("tbody", "".join(lines))
    caption = _tag("caption", escape(title)) if title else ""
    name = title or f"{header[0]}: {', '.join(header[1:])}"
    return _tag("div", _tag("table", caption + parts), class_="box", role="region", tabindex="0", aria_label=name)


def _items(items: list[str], **attributes: str) -> str:
    return _tag("ul", "".join(_tag("li", escape(item)) for item in items), **attributes) if items else ""


def _answer_card(answer: Answer, floors: set[str], wide: bool = False) -> str:
    table = _table(answer.header, answer.rows, floors) if answer.rows else ""
    content = (
        _tag("h3", escape(answer.question), class_="question")
        + _tag("p", escape(answer.answer), class_="answer")
        + table
        + _items(answer.notes, class_="notes")
    )
    return _tag("article", content, class_="card wide" if wide else "card")


def _plot_card(plot: Plot, svg: str) -> str:
    name = f"{plot.title}, plot"
    box = _tag("div", svg, class_="box", role="region", tabindex="0", aria_label=name)
    caption = _tag("figcaption", _tag("h3", escape(plot.title)) + _tag("p", escape(plot.reading)))
    return _tag("figure", caption + box, class_="card")


def _every_row(measured: Measured) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return (title, header, rows) of every closed-loop and every open-loop row, the figures behind the plots."""
    tail = ["failed", "wrong", "client CPU", "other programs"]
    closed, opened = [], []
    for name in measured.names:
        for cell in measured.closed[name]:
            first = [
                measured.label(name),
                f"{cell.connections:,}",
                f"{cell.rows_per_request:,}",
                format_interval_rate(cell.rate),
            ]
            cpu = [format_interval_s(cell.server_cpu_s_per_1000, 4), f"{cell.rss_bytes / 1e6:,.0f}"]
            cpu = [NOT_SEEN, NOT_SEEN] if measured.is_hidden(name) else cpu
            size = [f"{cell.request_bytes:,}", f"{cell.reply_bytes:,}"]
            closed.append([*first, *_percentiles(cell), *cpu, *size, *_doubts(cell)])
        for cell in measured.open[name]:
            late = f"{cell.late_p99_s * 1e3:.3f}" if math.isfinite(cell.late_p99_s) else "–"
            first = [measured.label(name), f"{cell.offered_rate:,.0f}", format_interval_rate(cell.rate)]
            opened.append([*first, *_percentiles(cell), late, *_doubts(cell)])
    percentiles = [f"p{percent:g} ms" for percent in PERCENTILES]
    closed_header = [
        "server",
        "connections",
        "rows",
        "req/s",
        *percentiles,
        "CPU s per 1,000",
        "MB",
        "bytes out",
        "in",
        *tail,
    ]
    open_header = ["server", "offered/s", "answered/s", *percentiles, "sent late p99 ms", *tail]
    tables = [("Every closed-loop row", closed_header, closed), ("Every open-loop row", open_header, opened)]
    return [table for table in tables if table[2]]


def _percentiles(cell: Cell) -> list[str]:
    return [format_interval_ms(cell.percentile_s(percent)) for percent in PERCENTILES]


def _doubts(cell: Cell) -> list[str]:
    return [str(cell.failed), str(cell.wrong), f"{cell.client_share:.0%}", f"{cell.foreign_share:.0%}"]


def _servers_table(measured: Measured, floors: set[str]) -> str:
    rows = []
    for name, about in measured.result["endpoints"].items():
        differences = about.get("max_abs_difference") or {}
        rows.append(
            [
                measured.label(name),
                protocol_of(about),
                KINDS.get(about["kind"], about["kind"]),
                ", ".join(f"{key} {value}" for key, value in (about.get("settings") or {}).items()) or "–",
                ", ".join(f"version {key}: {value:.1e}" for key, value in differences.items()) or "no model",
                about.get("command", "–"),
            ]
        )
    header = ["server", "protocol", "what it is", "threads, workers, batching", "max |Δp|", "started with"]
    return _table(header, rows, floors, "Servers", words=True)


def _environment_table(measured: Measured) -> str:
    rows = []
    for part in ("environment", "settings"):
        for key, value in measured.result[part].items():
            if isinstance(value, dict):
                text = ", ".join(f"{name} {_join(v) if isinstance(v, list) else v}" for name, v in value.items())
            else:
                text = _join(value) if isinstance(value, list) else str(value)
            rows.append([key.replace("_", " "), text or "–"])
    return _table(["fact", "value"], rows, set(), "Environment and settings, as recorded", words=True)


def render_page(measured: Measured, drawings: list[tuple[Plot, str]]) -> str:
    """Return the page; `drawings` are the plots with their <svg>."""
    environment, settings = measured.result["environment"], measured.result["settings"]
    floors = {measured.label(name) for name in measured.names if measured.is_floor(name)}
    answers = [
        answer_one_user(measured),
        answer_under_load(measured),
        answer_breaking(measured),
        answer_cost(measured),
        answer_certainty(measured),
    ]
    cards = [_answer_card(answer, floors, answer is answers[-1]) for answer in answers]
    tables = []
    for table in measured.tables:
        rows = [[measured.label(row[0]) if row[0] in measured.names else row[0], *row[1:]] for row in table.rows]
        tables.append(_tag("div", _table(table.header, rows, floors, table.title), class_="card"))
    everything = [_tag("div", _table(header, rows, floors, title)) for title, header, rows in _every_row(measured)]
    method = [_tag("li", f"{_tag('strong', escape(title))}. {escape(text)}") for title, text in list_method(measured)]
    warnings = len(measured.warnings)
    badge = (
        _tag("a", format_count(warnings, "warning"), href="#warnings", class_="alarm")
        if warnings
        else escape("no warnings")
    )
    facts = (
        f"{environment['utc']} · {environment['cpu']}, {environment['cores']} cores · profile {settings['profile']} · "
        f"{format_count(settings['rounds'], 'round')} of {settings['seconds']:g} s"
    )
    links = {
        "answers": "Answers",
        "plots": "Plots",
        "tables": "Tables",
        "method": "Method",
        "environment": "Environment",
    }
    sections = {
        "answers": _tag("div", "".join(cards), class_="cards"),
        "warnings": _items(measured.warnings) or "<p>There is nothing to warn of.</p>",
        "plots": _tag("div", "".join(_plot_card(plot, svg) for plot, svg in drawings), class_="plots")
        or "<p>Nothing was measured.</p>",
        "tables": _tag("div", "".join(tables), class_="tables")
        + _tag(
            "details",
            _tag("summary", "Every row: the figures behind the plots") + "".join(everything),
            class_="card tables",
        ),
        "method": _tag("ol", "".join(method), class_="method"),
        "environment": _tag(
            "div", _servers_table(measured, floors) + _environment_table(measured), class_="card tables"
        ),
    }
    titles = {
        "answers": "The answers",
        "warnings": "Warnings",
        "plots": "Plots",
        "tables": "Tables",
        "method": "How it was measured: twelve points",
        "environment": "Servers and environment",
    }
    body = "".join(
        _tag("section", _tag("h2", escape(titles[key])) + content, id=key)
        for key, content in sections.items()
        if content
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">\n<link rel="icon" href="data:,">\n'
        f"<title>Model servers, measured: {escape(environment['utc'])}</title>\n"
        f"<style>\n{_style()}</style>\n</head>\n<body>\n"
        "<header><h1>Model servers, measured</h1>"
        f'<p class="quiet">{escape(facts)} · {badge}</p>'
        f'<p class="quiet"><code>{escape(environment["command"])}</code></p>'
        f"{_tag('nav', ''.join(_tag('a', text, href=f'#{key}') for key, text in links.items()), aria_label='Sections')}"
        f"</header>\n<main>{body}</main>\n"
        '<footer class="quiet">Made by benchmarks/report.py from the result file alone.</footer>\n</body>\n</html>\n'
    )


def write_report(result: dict, folder: Path) -> Path:
    """Write the plots as PNG files and then report.html into `folder`; return the path of report.html."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(RC):
        measured = Measured(result)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, nargs="?", help="a result file (default: the newest in results/)")
    path = parser.parse_args().path or newest_result_path()
    try:
        print(f"wrote {write_report(read_result(path), path.with_suffix(''))}")
    except ResultError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
