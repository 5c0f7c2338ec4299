"""Which server for which needs: rules on measured figures and on facts, each refusal with its limit and the distance.

Nothing is weighted into a score. A need that a server does not meet takes it out; of those left the one that takes the
fewest cores is recommended, for each kind of row by itself, with all that the measurements do not tell from it; of
these the one with about the least memory comes first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from figures.measured import Measured
from planning.capacity import (
    CapacityError,
    ContainerCost,
    Plan,
    count_replicas,
    find_start_s,
    held_rates,
    make_plan,
)
from planning.facts import load_facts

FRAMEWORKS = ("any", "pytorch", "tensorflow", "scikit-learn")
KINDS = ("native", "docker", "local")  # that are recommended, each by itself
ABOUT = 1.1  # memory that differs by less is about the same
STEPS_A_DECADE = 20  # of the values that are looked at for one at which the answer changes


@dataclass(frozen=True)
class Needs:
    """What is asked of a server; None and False ask nothing."""

    rate: float = 1000.0  # requests/s
    p99_ms: float | None = None  # None: the objective that the run was measured with
    rows: int = 1  # a request
    memory_mb: float | None = None
    cold_start_s: float | None = None
    framework: str = "any"  # of the model
    python: bool = False  # own Python code around the model
    reload: bool = False  # new versions while it serves
    grpc: bool = False
    maintained: bool = False


@dataclass(frozen=True)
class Candidate:
    """One server that meets the needs."""

    plan: Plan
    broken_rate: float | None  # requests/s, the lowest offered that one replica did not hold; None: none was
    memory_mb: float
    start_s: float
    p99_ms: float | None  # measured at the highest rate kept up with; None: too few requests for one


@dataclass(frozen=True)
class Choice:
    """The candidates, those who are out with every reason, and the recommendation of each kind."""

    needs: Needs
    candidates: tuple[Candidate, ...]  # the fewest cores first
    refused: dict[str, list[str]]
    recommended: dict[str, tuple[str, ...]]  # by kind: all that the measurements do not tell apart, least memory first


def framework_of(name: str) -> str:
    """The framework that a server's name begins with: "onnx" of onnx-infer-tuned."""
    return name.partition("-")[0]


def choose(measured: Measured, containers: dict[str, ContainerCost], needs: Needs) -> Choice:
    """Return which servers meet the needs, and which of them are recommended."""
    candidates, refused = [], {}
    for name in measured.names:
        if measured.kind(name) not in KINDS or framework_of(name) not in load_facts()["framework"]:
            continue
        reasons = list_reasons(measured, containers, name, needs)
        try:
            candidate = make_candidate(measured, containers, name, needs)
        except CapacityError as error:
            reasons.append(str(error))
        if reasons:
            refused[name] = reasons
        else:
            candidates.append(candidate)
    candidates.sort(key=lambda one: (one.plan.cores, one.memory_mb, one.plan.server))
    return Choice(needs, tuple(candidates), refused, _recommend(candidates))


def list_reasons(measured: Measured, containers: dict[str, ContainerCost], name: str, needs: Needs) -> list[str]:
    """Return why a server does not meet the needs, its capacity aside, with how far off it is."""
    facts, framework = load_facts(), framework_of(name)
    about = facts["framework"][framework]
    reasons = []
    if needs.framework != "any" and not {needs.framework, "any"} & set(about["takes"]):
        reasons.append(f"takes {', '.join(about['takes'])} here, not {needs.framework}")
    memory_mb, start_s = peak_memory_mb(measured, name), find_start_s(measured, containers, name)
    if needs.memory_mb is not None and memory_mb > needs.memory_mb:
        reasons.append(f"{memory_mb:,.0f} MB > {needs.memory_mb:,g}")
    if needs.cold_start_s is not None and start_s > needs.cold_start_s:
        reasons.append(f"{start_s:.1f} s to the first answer > {needs.cold_start_s:g}")
    if needs.python and framework not in facts["capability"]["python"]:
        reasons.append("no test shows your own Python around the model")
    if needs.reload and framework not in facts["capability"]["reload"]:
        reasons.append("no test shows a new version while it serves")
    if needs.grpc and framework not in facts["capability"]["grpc"]:
        reasons.append("no test shows gRPC")
    if needs.maintained and not about["maintained"]:
        reasons.append("unmaintained")
    return reasons


def peak_memory_mb(measured: Measured, name: str) -> float:
    """Return the most resident memory seen of a server's process tree."""
    return max((cell.rss_bytes for cell in measured.cells(name)), default=0) / 1e6


def rows_factor(measured: Measured, name: str, rows: int) -> float:
    """Return how many times longer a request of `rows` rows takes than one of one row, at one connection.

    Between the measured sizes on a straight line, beyond them on the last one's. CapacityError if only one size
    was measured.
    """
    if rows == 1:
        return 1.0
    cells = [cell for cell in measured.closed(name) if cell.connections == 1 and cell.percentile_s(50)]
    sizes = [cell.rows_per_request for cell in cells]
    if len(cells) < 2 or sizes[0] != 1:
        raise CapacityError("requests of several rows were not measured")
    times_s = [half.estimate for cell in cells if (half := cell.percentile_s(50))]
    if rows > sizes[-1]:
        slope_s = max(times_s[-1] - times_s[-2], 0.0) / (sizes[-1] - sizes[-2])
        return (times_s[-1] + slope_s * (rows - sizes[-1])) / times_s[0]
    return float(np.interp(rows, sizes, times_s)) / times_s[0]


def make_candidate(measured: Measured, containers: dict[str, ContainerCost], name: str, needs: Needs) -> Candidate:
    """Return a server's plan and figures for the needs; CapacityError if none holds them.

    A request of several rows counts as `rows_factor` requests of one row.
    """
    objective_s = needs.p99_ms / 1e3 if needs.p99_ms else measured.settings["objective_p99_s"]
    plan = make_plan(measured, name, needs.rate * rows_factor(measured, name, needs.rows), objective_s, containers)
    before = next(cell for cell in measured.open(name) if cell.nominal_rate == plan.sustained_rate)
    p99 = before.percentile_s(99)
    return Candidate(
        plan,
        held_rates(measured, name, objective_s)[1],
        peak_memory_mb(measured, name),
        find_start_s(measured, containers, name),
        p99.estimate * 1e3 if p99 else None,
    )


def is_told_from(first: Candidate, other: Candidate) -> bool:
    """Whether the measurements tell `first`, which takes fewer cores, from `other`.

    They do if `other` would take more cores even at the rate that broke it, the highest that it may keep up with.
    """
    if other.broken_rate is None:
        return False
    headroom = other.plan.planned_rate / other.plan.sustained_rate
    best_case = count_replicas(other.plan.rate, other.broken_rate, headroom) * other.plan.cpu_request
    return first.plan.cores < best_case


def _recommend(candidates: Sequence[Candidate]) -> dict[str, tuple[str, ...]]:
    recommended = {}
    for kind in KINDS:
        own = [one for one in candidates if one.plan.kind == kind]
        if own:
            alike = [own[0], *(other for other in own[1:] if not is_told_from(own[0], other))]
            recommended[kind] = tuple(one.plan.server for one in _order(alike))
    return recommended


def _order(alike: Sequence[Candidate]) -> list[Candidate]:
    """Sort servers that are not told apart: those with about the least memory by their rate, then the others."""
    most_mb = ABOUT * min(one.memory_mb for one in alike)
    light = [one for one in alike if one.memory_mb <= most_mb]
    heavy = [one for one in alike if one.memory_mb > most_mb]
    return sorted(light, key=lambda one: -one.plan.sustained_rate) + sorted(heavy, key=lambda one: one.memory_mb)


@dataclass(frozen=True)
class Flip:
    """A value of one need at which the recommendation changes."""

    value: float  # about the lowest of the range with this answer
    recommended: dict[str, str]  # by kind, the first


def find_flips(
    measured: Measured, containers: dict[str, ContainerCost], needs: Needs, name: str, low: float, high: float
) -> list[Flip]:
    """Return the answers as the need `name` grows from `low` to `high`, each from the value at which it begins."""

    def answer(value: float) -> dict[str, str]:
        changed: dict[str, Any] = {name: round(value) if name == "rows" else value}
        recommended = choose(measured, containers, replace(needs, **changed)).recommended
        return {kind: names[0] for kind, names in recommended.items()}

    return _walk(answer, low, high)


def _walk(answer: Callable[[float], Any], low: float, high: float) -> list[Flip]:
    steps = max(round(STEPS_A_DECADE * np.log10(high / low)), 1)
    values = [low * (high / low) ** (step / steps) for step in range(steps + 1)]
    flips, last = [Flip(low, answer(low))], low
    for value in values[1:]:
        found = answer(value)
        if found != flips[-1].recommended:
            below, above = last, value
            while above - below > 0.005 * above:
                middle = (below + above) / 2
                if answer(middle) == flips[-1].recommended:
                    below = middle
                else:
                    above = middle
            flips.append(Flip(above, found))
        last = value
    return flips
