"""The report's last word: so take …, because …, unless …; and that the data do not decide, if they do not."""

from drawing.tables import KIND_ORDER
from figures.measured import Measured
from figures.verdicts import list_ties
from figures.words import format_count, format_ms
from planning.choosing import ABOUT

# How the rows of a kind are called.
OF_KIND = {
    "native": "Of the frameworks' own servers",
    "docker": "Of the servers in containers",
    "local": "Of this repository's own servers",
    "peer": "Of the servers that others wrote",
}


def conclude(measured: Measured) -> list[str]:
    """Return a sentence or more for each kind of row."""
    kinds = sorted(measured.kinds, key=lambda kind: KIND_ORDER.index(kind) if kind in KIND_ORDER else len(KIND_ORDER))
    return [sentence for kind in kinds if (sentence := _conclude_kind(measured, kind))]


def _conclude_kind(measured: Measured, kind: str) -> str:
    place = OF_KIND.get(kind, f"Of the {kind} servers") + ":"
    knees = {name: knee for name, knee in measured.knees.items() if measured.kind(name) == kind}
    held = {name: knee.sustained_rate for name, knee in knees.items() if knee.sustained_rate}
    if not held:
        return f"{place} the data do not decide: no offered rate was kept up with, or none was swept."
    best = max(held, key=lambda name: held[name])
    rivals = [name for name in knees if name != best and not knees[best].is_beyond(knees[name])]
    chosen = best
    rate = f"keeps up with {held[best]:,.0f} requests/s"
    if rivals:
        names = f"{', '.join([best, *rivals[:-1]])} and {rivals[-1]}"
        least = _least(measured, [best, *rivals], 1)
        words = f"{place} the data do not decide under load between {names}: {best} {rate}, and the rates offered do "
        words += "not tell the others from it."
        cost = measured.costs.get(best)
        if least and cost and cost[1] > ABOUT * least[1]:
            chosen = least[0]
            words += f" So take {chosen} for its memory, because it needs the least of them, {least[1]:,.0f} MB"
        elif least and cost:
            words += f" So take {best}, because none of them needs notably less memory"
        else:
            words += " So take the one that you know"
    elif len(knees) == 1:
        words = f"{place} so take {best}, because it {rate}, and is the only one that was swept"
    else:
        words = f"{place} so take {best}, because it {rate}, more than broke any other"
    unless = _list_unless(measured, kind, chosen)
    return f"{words}, unless {'; or unless '.join(unless)}." if unless else f"{words}."


def _least(measured: Measured, names: list[str], column: int) -> tuple[str, float] | None:
    """The server with the least CPU (0) or memory (1) of those whose processes were seen."""
    values = {}
    for name in names:
        if cost := measured.costs.get(name):
            values[name] = cost[0].estimate if column == 0 else cost[1]
    if not values:
        return None
    least = min(values, key=lambda name: values[name])
    return least, values[least]


def _list_unless(measured: Measured, kind: str, chosen: str) -> list[str]:
    """Other needs, and the server that meets each; only if the data tell it from the chosen one."""
    found = []
    connections = measured.settings["connections"][0]
    ranking = measured.ranking(connections, kind)
    if ranking and ranking[0] != chosen and chosen not in list_ties(measured, ranking[0], connections):
        cell = measured.cell(ranking[0], connections)
        half = format_ms(cell.percentile_s(50)) if cell else ""
        found.append(
            f"the latency of one user counts more: at {format_count(connections, 'connection')} {ranking[0]} is "
            f"significantly faster, p50 {half}"
        )
    own = [name for name in measured.costs if measured.kind(name) == kind]
    least = _least(measured, own, 1)
    if least and least[0] != chosen and (cost := measured.costs.get(chosen)) and cost[1] > ABOUT * least[1]:
        found.append(f"memory is short: {least[0]} needs {least[1]:,.0f} MB and {chosen} {cost[1]:,.0f}")
    starts = {name: start[1] for name in own if (start := measured.start_medians_s(name))}
    if starts and chosen in starts:
        quick = min(starts, key=lambda name: starts[name])
        if starts[chosen] > 1.5 * starts[quick]:
            found.append(
                f"it must be back quickly: {quick} answers {starts[quick]:.1f} s after its start and {chosen} "
                f"{starts[chosen]:.1f}"
            )
    return found
