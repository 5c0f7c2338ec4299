"""What a reader asks of a comparison, each question answered in a sentence or two, a table, and what limits it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from drawing.tables import KIND_ORDER, NOT_RIVALS
from figures.cells import Knee
from figures.measured import Measured
from figures.verdicts import FOREIGN_LOAD_SHARE, list_ties, list_verdicts, list_warnings
from figures.words import (
    NOT_SEEN,
    UNKNOWN,
    describe_client_limit,
    describe_reason,
    describe_rounds,
    describe_verdict,
    describe_warnings,
    format_broken,
    format_count,
    format_interval,
    format_interval_ms,
    format_ms,
    format_offered,
    format_rate,
)

NOTHING = "Nothing was measured."


@dataclass(frozen=True)
class Answer:
    """One question, its answer in paragraphs, a small table whose first column is the server, and what limits it."""

    question: str
    answer: Sequence[str]
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()


def list_answers(measured: Measured) -> list[Answer]:
    """Return the answers to five questions."""
    makers = (answer_one_user, answer_under_load, answer_breaking, answer_cost, answer_certainty)
    return [make(measured) for make in makers]


def _kinds(measured: Measured) -> list[str]:
    return sorted(measured.kinds, key=lambda kind: KIND_ORDER.index(kind) if kind in KIND_ORDER else len(KIND_ORDER))


def _sort(measured: Measured, rows: list[tuple[str, float, list[str]]]) -> list[list[str]]:
    """Rows of (server, key, cells), by kind and then by key; floors last."""
    kinds = [*_kinds(measured), "floor"]
    rows.sort(key=lambda row: (kinds.index(measured.kind(row[0])), row[1]))
    return [[measured.label(name), *cells] for name, _, cells in rows]


def _join(measured: Measured, names: Sequence[str]) -> str:
    return " and ".join(map(measured.label, names))


def _caveat(measured: Measured) -> list[str]:
    return [NOT_RIVALS] if len(measured.kinds) > 1 else []


def answer_one_user(measured: Measured) -> Answer:
    """Which server for one user at a time: of each kind the highest closed-loop rate at the fewest connections."""
    connections = measured.settings["connections"][0]
    question = f"Which server for one user at a time ({format_count(connections, 'connection')})?"
    cells = measured.cells_at(connections)
    answer = []
    for kind in _kinds(measured):
        ranking = measured.ranking(connections, kind)
        if ranking:
            half, most = (format_ms(cells[ranking[0]].percentile_s(percent)) for percent in (50, 99))
            sentence = f"{measured.label(ranking[0])}: p50 {half}, p99 {most}"
            if ties := list_ties(measured, ranking[0], connections):
                sentence += f", with no significant difference from {_join(measured, ties)}"
            answer.append(sentence + ".")
    rows = []
    for name, cell in cells.items():
        p50, p99 = cell.percentile_s(50), cell.percentile_s(99)
        key = p50.estimate if p50 else math.inf
        ratio = measured.floor_ratio(name, connections)
        most = "≤ " * measured.is_floor_limited(name, connections)
        share = f"{most}{ratio.estimate:.0%}" if ratio else UNKNOWN
        rows.append((name, key, [format_interval_ms(p50), format_interval_ms(p99), share]))
    notes = [
        "p50 and p99: half and 99 % of the requests took at most this long. Of the floor: its share of the requests/s "
        "of a server without a model, which answers a constant over the same protocol.",
        *_list_small_gaps(measured, connections),
        *_caveat(measured),
    ]
    header = ["server", "p50 ms", "p99 ms", "of the floor"]
    return Answer(question, answer or [NOTHING], header, _sort(measured, rows), notes)


def _list_small_gaps(measured: Measured, connections: int) -> list[str]:
    """A sentence for each two neighbours of one kind whose p50 differ by less than the floor's."""
    sentences = []
    for kind in _kinds(measured):
        ranking = measured.ranking(connections, kind)
        for name, other in zip(ranking, ranking[1:], strict=False):
            floor = measured.floor_of(name)
            own_s, other_s, floor_s = (_median_s(measured, each, connections) for each in (name, other, floor))
            gap_s = abs(own_s - other_s)
            if gap_s < floor_s:  # never with a nan
                sentences.append(
                    f"{measured.label(name)} and {measured.label(other)} are {gap_s * 1e3:.2f} ms apart, less than the "
                    f"{floor_s * 1e3:.2f} ms of the floor: do not build on that difference."
                )
    return sentences


def _median_s(measured: Measured, name: str | None, connections: int) -> float:
    cell = measured.cell(name, connections) if name else None
    p50 = cell.percentile_s(50) if cell else None
    return p50.estimate if p50 else math.nan


def answer_under_load(measured: Measured) -> Answer:
    """Which server under load: of each kind the highest offered rate kept up with, and the highest closed-loop rate."""
    connections, objective_ms = measured.settings["connections"][-1], measured.settings["objective_p99_s"] * 1e3
    answer = []
    for kind in _kinds(measured):
        sentences = []
        knees = {name: knee for name, knee in measured.knees.items() if measured.kind(name) == kind}
        sustained = {name: knee.sustained_rate for name, knee in knees.items() if knee.sustained_rate}
        if sustained:
            best = max(sustained, key=lambda name: sustained[name])
            sentence = f"{measured.label(best)} keeps up with {sustained[best]:,.0f} requests/s within a p99 of "
            sentence += f"{objective_ms:g} ms"
            others = [name for name in knees if name != best and not knees[best].is_beyond(knees[name])]
            if others:
                sentence += f"; at the rates offered it cannot be told apart from {_join(measured, others)}"
            sentences.append(sentence + ".")
        elif knees:
            sentences.append(f"No {kind} server kept up with even the lowest rate offered.")
        ranking = measured.ranking(connections, kind)
        if ranking and (cell := measured.cell(ranking[0], connections)):
            ties = list_ties(measured, ranking[0], connections)
            tied = f", with no significant difference from {_join(measured, ties)}" if ties else ""
            sentences.append(f"Flat out {measured.label(ranking[0])} answers {format_rate(cell)} requests/s{tied}.")
        if sentences:
            answer.append(" ".join(sentences))
    rows = []
    for name, cell in measured.cells_at(connections).items():
        knee = measured.knees.get(name)
        rate = (knee.sustained_rate or 0.0) if knee else 0.0
        rows.append((name, -rate if rate else -cell.rate.estimate / 1e9, [format_offered(rate), format_rate(cell)]))
    notes = [
        f"Keeps up with: the highest offered rate of which 95 % is answered with a p99 within {objective_ms:g} ms from "
        "the time a request was due. Flat out: each of the connections asks again as soon as it is answered. The first "
        f"can be the larger: it may use up to {measured.settings['open_connections']} connections unevenly, which "
        "fills larger batches.",
        *_caveat(measured),
    ]
    header = ["server", "keeps up with, req/s", f"flat out at {connections}, req/s"]
    return Answer("Which server under load?", answer or [NOTHING], header, _sort(measured, rows), notes)


def answer_breaking(measured: Measured) -> Answer:
    """At what rate each breaks."""
    objective_ms = measured.settings["objective_p99_s"] * 1e3
    question = "At what rate does each break?"
    if not measured.knees:
        return Answer(question, ["No offered rate was swept, so this is not known."])
    rows, parts = [], []
    for name, knee in sorted(measured.knees.items(), key=lambda item: -(item[1].sustained_rate or 0)):
        cells = [format_offered(knee.sustained_rate), format_broken(knee), describe_reason(knee)]
        rows.append((name, -(knee.sustained_rate or 0.0), cells))
    ordered = _sort(measured, rows)
    names = {measured.label(name): name for name in measured.knees}
    parts = [f"{row[0]} {_bracket(measured.knees[names[row[0]]])}" for row in ordered]
    note = (
        f"A server breaks when it answers less than 95 % of what it is offered, fails a request, or its p99 passes "
        f"{objective_ms:g} ms. The truth lies between the two rates; finer steps (--rates) narrow it. > marks the "
        "most that a server was offered without breaking. At the client's limit, it and not the server fell behind."
    )
    header = ["server", "keeps up with, req/s", "breaks at, req/s", "because"]
    return Answer(question, [f"In requests/s: {'; '.join(parts)}."], header, ordered, [note])


def _bracket(knee: Knee) -> str:
    if knee.broken_rate is None:
        most = format_offered(knee.sustained_rate)
        return f"not broken up to {most}, the most it was offered{describe_client_limit(knee)}"
    if knee.sustained_rate is None:
        return f"below {knee.broken_rate:,.0f}"
    return f"{knee.sustained_rate:,.0f}–{knee.broken_rate:,.0f}"


def answer_cost(measured: Measured) -> Answer:
    """What each costs."""
    question = "What does each cost?"
    costs = measured.costs
    if not any(costs[name] and not measured.is_floor(name) for name in costs):
        return Answer(question, ["No cost was measured."])
    answer, rows = [], []
    for kind in _kinds(measured):
        own = {name: cost for name, cost in costs.items() if cost and measured.kind(name) == kind}
        if own:
            by_cpu = min(own, key=lambda name: own[name][0].estimate)
            by_memory = min(own, key=lambda name: own[name][1])
            answer.append(
                f"{kind}: least CPU {by_cpu}, {format_interval(own[by_cpu][0], '.4f')} s per 1,000 rows; least memory "
                f"{by_memory}, {own[by_memory][1]:,.0f} MB."
            )
    for name, cost in costs.items():
        starts = measured.start_medians_s(name)
        figures = [format_interval(cost[0], ".4f"), f"{cost[1]:,.0f}"] if cost else [NOT_SEEN, NOT_SEEN]
        key = cost[0].estimate if cost else math.inf
        rows.append((name, key, [*figures, f"{starts[1]:.2f}" if starts else UNKNOWN]))
    notes = [
        f"At {format_count(measured.settings['connections'][-1], 'connection')}. Of the server's whole process tree; "
        "memory is the most seen. Cold start: from the spawn to the first right answer."
    ]
    if not all(costs.values()):
        notes.append(f"{NOT_SEEN}: a container's processes are the engine's, so its CPU and memory are unknown.")
    header = ["server", "CPU s per 1,000 rows", "peak MB", "cold start s"]
    return Answer(question, answer, header, _sort(measured, rows), notes)


def answer_certainty(measured: Measured) -> Answer:
    """How sure all of this is."""
    settings, verdicts, warnings = measured.settings, list_verdicts(measured), list_warnings(measured)
    cells = [cell for name in measured.names for cell in measured.cells(name)]
    precision = settings.get("precision", 0.1)
    ratios = [
        ratio
        for name in measured.names
        for count in settings["connections"]
        if (ratio := measured.floor_ratio(name, count)) is not None
    ]
    known = sum(ratio.half_width <= precision for ratio in ratios)
    decided = sum(verdict.is_decided for verdict in verdicts)
    sentences = []
    if ratios:
        sentences.append(f"{known} of {len(ratios)} ratios to the floor are known within ±{precision:.0%}.")
    if verdicts:
        sentences.append(
            f"Of {format_count(len(verdicts), 'comparison')} of neighbours of one kind {decided} "
            f"{'is' if decided == 1 else 'are'} significant at 95 %."
        )
    foreign = sum(cell.disturbed_share for cell in cells) / max(len(cells), 1)
    if foreign > FOREIGN_LOAD_SHARE / 2:
        sentences.append(
            f"The run was disturbed: others took {foreign:.0%} of its CPU time, or kept the client waiting for it."
        )
    notes = [
        f"Profile {settings['profile']}: {describe_rounds(measured)} of {settings['seconds']:g} s a row, servers in "
        "random order in each. A percentile with too few requests beyond it is withheld: too few."
    ]
    if cells:
        notes.append(
            f"{sum(len(cell.latencies_s) for cell in cells):,} right answers were timed, "
            f"{sum(cell.failed for cell in cells):,} requests failed and {sum(cell.wrong for cell in cells):,} answers "
            "were wrong."
        )
    failed = [measured.label(name) for name in measured.names if measured.servers[name].get("failure")]
    if failed:
        notes.append(f"Not measured in full: {', '.join(failed)}. See the warnings.")
    count = len(describe_warnings(warnings))
    notes.append(f"{format_count(count, 'warning')} in all; a row with a warning is less sure than it looks.")
    rows = [
        [format_count(verdict.connections, "connection"), describe_verdict(measured, verdict)] for verdict in verdicts
    ]
    return Answer("How sure is this?", [" ".join(sentences)], ["load", "verdict"], rows, notes)
