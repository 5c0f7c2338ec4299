"""Figures, verdicts and warnings in words: the one family of formats of all tables, plots and texts."""

import math
from collections.abc import Iterable
from typing import Any

from figures.cells import Cell, Knee
from figures.intervals import CONFIDENCE, Interval
from figures.measured import Measured
from figures.verdicts import Doubt, RowWarning, Verdict

PLACES_NAMED = 4  # rows that a warning names before it only counts them
TOO_FEW = "too few"  # requests for this percentile
NOT_SEEN = "not seen"
UNKNOWN = "–"

DOUBTS = {
    Doubt.INTERRUPTED: "the run was interrupted: rows have fewer rounds than planned, and some are missing",
    Doubt.SHARED_CORES: "servers and client shared their cores and slowed each other; use a machine with two or more",
    Doubt.NOT_IN_FULL: "a server was not measured in full",
    Doubt.WIDE: "the rate is known less well than asked for: measure longer (--limit-seconds), or on a quieter machine",
    Doubt.BUSY_CLIENT: "the server is as fast as the client: read the rate as ≥",
    Doubt.LATE_SENDING: "requests were sent late, because no connection was free or other programs used the client's "
    "core",
    Doubt.SLOW_CONNECT: "connections took seconds to open, which no latency here counts: raise the server's listen "
    "backlog above their number",
    Doubt.FOREIGN_LOAD: "other programs used the cores of this measurement: stop them and measure again",
    Doubt.FAILED: "requests failed or answers were wrong",
}


def format_count(number: int, word: str) -> str:
    """A number with its word in the singular or plural: "1 row", "1,024 rows"."""
    return f"{number:,} {word}{'s' * (number != 1)}"


def format_interval(interval: Interval, form: str) -> str:
    """The estimate and its range, "0.30 (0.28–0.34)"; an open end is "?"."""
    low = f"{interval.low:{form}}" if interval.low > 0 else "?"
    high = f"{interval.high:{form}}" if interval.is_closed else "?"
    return f"{interval.estimate:{form}} ({low}–{high})"


def format_ms(interval: Interval | None) -> str:
    return TOO_FEW if interval is None else f"{interval.estimate * 1e3:.2f} ms"


def format_interval_ms(interval: Interval | None) -> str:
    return TOO_FEW if interval is None else format_interval(interval.scale(1e3), ".2f")


def format_ratio(interval: Interval | None, is_most: bool = False) -> str:
    """A ratio to two digits at least; "≤" if it is one to a floor whose own rate is a lower bound."""
    if interval is None:
        return UNKNOWN
    return "≤ " * is_most + format_interval(interval, ".2f" if interval.estimate >= 0.1 else ".3f")


def format_rate(cell: Cell) -> str:
    """Requests per second of a closed loop; "≥" if the client may have been the limit."""
    return f"{'≥ ' * cell.is_client_the_limit}{format_interval(cell.rate, ',.0f')}"


def format_offered(rate: float | None) -> str:
    return f"{rate:,.0f}" if rate else UNKNOWN


def format_broken(knee: Knee) -> str:
    """The rate that broke a server, or how far it was not broken."""
    return f"{knee.broken_rate:,.0f}" if knee.broken_rate else f"> {format_offered(knee.sustained_rate)}"


def format_rounds(knee: Knee) -> str:
    """The rates between which the knee lies by each round by itself."""
    return f"{knee.low_rate:,.0f}–{knee.high_rate:,.0f}" if math.isfinite(knee.high_rate) else f"{knee.low_rate:,.0f}–?"


def describe_knee(knee: Knee) -> str:
    held = f"keeps up with {knee.sustained_rate:,.0f}/s" if knee.sustained_rate else "keeps up with no rate offered"
    if knee.broken_rate:
        return f"{held}, breaks at {knee.broken_rate:,.0f}/s ({knee.reason})"
    return f"{held}, the most it was offered{describe_client_limit(knee)}"


def describe_client_limit(knee: Knee) -> str:
    """Why no more was offered, if the client could not ask faster."""
    return f": the client cannot ask {knee.client_limit_rate:,.0f}/s" if knee.client_limit_rate else ""


def describe_reason(knee: Knee) -> str:
    """Why a server broke, or why no rate is known that breaks it."""
    if knee.client_limit_rate:
        return f"client's limit at {knee.client_limit_rate:,.0f}"
    return knee.reason or "did not break"


def describe_load(cell: Cell) -> str:
    if cell.nominal_rate:
        return f"offered {cell.nominal_rate:,.0f}/s"
    return describe_closed_load(cell.connections, cell.rows_per_request)


def describe_closed_load(connections: int, rows: int) -> str:
    return format_count(connections, "connection") + (f", {format_count(rows, 'row')} a request" if rows > 1 else "")


def describe_arrivals(settings: dict[str, Any]) -> str:
    """How the requests of the open loop arrive."""
    return "Poisson" if settings.get("arrivals", "poisson") == "poisson" else "constant"


def describe_verdict(measured: Measured, verdict: Verdict) -> str:
    faster, slower = measured.label(verdict.faster), measured.label(verdict.slower)
    ratio = verdict.ratio
    if not ratio.is_closed:
        return f"{faster} and {slower}: too few rounds to tell a difference from chance"
    if verdict.is_decided:
        return f"{faster} is faster than {slower}, {_times(ratio.estimate)} ({_times(ratio.low)}–{_times(ratio.high)})"
    return f"{faster} and {slower}: no significant difference ({ratio.low:.2f}–{ratio.high:.2f}×)"


def _times(ratio: float) -> str:
    return f"{ratio:.3f}×" if ratio < 1.1 else f"{ratio:.2f}×"


def describe_verdicts(measured: Measured, verdicts: Iterable[Verdict]) -> list[str]:
    return [
        f"{format_count(verdict.connections, 'connection')}: {describe_verdict(measured, verdict)}"
        for verdict in verdicts
    ]


def describe_warnings(warnings: Iterable[RowWarning]) -> list[str]:
    """One sentence a doubt: what happened, what to do, and which rows."""
    by_doubt: dict[Doubt, list[str]] = {}
    for warning in warnings:
        by_doubt.setdefault(warning.doubt, []).append(_describe_place(warning))
    sentences = []
    for doubt, places in by_doubt.items():
        named = [place for place in places if place]
        if doubt is Doubt.NOT_IN_FULL:
            sentences += [f"{DOUBTS[doubt]}: {place}" for place in named]
        elif named:
            more = f"; and {len(named) - PLACES_NAMED} more" if len(named) > PLACES_NAMED else ""
            sentences.append(f"{DOUBTS[doubt]}. Rows: {'; '.join(named[:PLACES_NAMED])}{more}")
        else:
            sentences.append(DOUBTS[doubt])
    return sentences


def _describe_place(warning: RowWarning) -> str:
    if warning.cell is None:
        return warning.detail
    cell = warning.cell
    about = {
        Doubt.LATE_SENDING: f" ({cell.late_p99_s * 1e3:.1f} ms)",
        Doubt.SLOW_CONNECT: f" ({cell.connect_s:.1f} s)",
        Doubt.FOREIGN_LOAD: f" ({cell.disturbed_share:.0%})",
        Doubt.FAILED: f" ({cell.failed:,} failed, {cell.wrong:,} wrong)",
    }.get(warning.doubt, "")
    return f"{warning.server}, {describe_load(cell)}{about}"


def list_remarks(measured: Measured) -> list[str]:
    """Return the facts that the tables do not show, a sentence each."""
    settings, environment = measured.settings, measured.environment
    pinning = (
        f"servers on core {_join(settings['server_cpus'])}, client on core {_join(settings['client_cpus'])}"
        if settings["server_cpus"] is not None
        else "servers and client share the cores"
    )
    pinning += ", both before other programs" if settings.get("goes_first") else ""
    remarks = [
        f"{environment['utc']}, {environment['cpu']}, {environment['cores']} cores, {environment['system']}, "
        f"Python {environment['python']}, load average {environment['load_average_1min']:.1f} at the start, "
        f"commit {environment['git_commit'] or 'unknown'}{' with changes' if environment['git_dirty'] else ''}.",
        f"`{environment['command']}`, profile {settings['profile']}: version {settings['version']}, "
        f"{describe_rounds(measured)} of windows of {settings['seconds']:g} s or more in random order, {pinning}. Each "
        f"server was warmed up until its rate levelled off, for {settings['settle_seconds']:g} s at most, and for "
        f"{settings['warmup_seconds']:g} s before each window.",
        f"Rates and ratios are medians of the rounds, with {CONFIDENCE:.0%} intervals from order statistics; ratios "
        "are taken round by round.",
        ", ".join(f"{name} {version}" for name, version in environment["packages"].items()) + ".",
    ]
    for name, server in measured.servers.items():
        facts = dict(server.get("settings") or {})
        if "warmup_s" in server:
            facts["warmed up for"] = f"{server['warmup_s']:.0f} s"
        if facts:
            remarks.append(
                f"{measured.label(name)}: " + ", ".join(f"{key} {value}" for key, value in facts.items()) + "."
            )
    return remarks


def describe_rounds(measured: Measured) -> str:
    """How many interleaved rounds the one-row closed-loop rows have."""
    counts = [
        len(cell.rounds) for name in measured.names for cell in measured.closed(name) if cell.rows_per_request == 1
    ]
    if not counts:
        return "no rounds"
    if min(counts) == max(counts):
        return f"{format_count(counts[0], 'interleaved round')}"
    return f"{min(counts)} to {max(counts)} interleaved rounds"


def _join(values: Iterable[Any]) -> str:
    return ", ".join(f"{value:,}" if isinstance(value, int) else str(value) for value in values)
