"""CHOOSING.md: seven questions, the values at which the answers change, proven abilities, eight scenarios."""

import tomllib
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from drawing.choices import (
    describe_candidate,
    describe_cores,
    describe_needs,
    describe_recommendations,
    name_recommendations,
)
from drawing.crossover_words import describe_bound, describe_crossover
from endpoints.base import REPOSITORY_DIR
from figures.measured import Measured
from figures.words import format_interval_ms, format_ratio
from planning.capacity import HEADROOM, ContainerCost, find_start_s
from planning.choosing import FRAMEWORKS, Choice, Flip, Needs, choose, find_flips, framework_of, peak_memory_mb
from planning.facts import STALE_DAYS, is_stale, load_facts

GUIDE_PATH = REPOSITORY_DIR / "CHOOSING.md"
FOLDER = Path(__file__).resolve().parent
SCENARIOS_PATH = FOLDER.parent / "planning" / "scenarios.toml"
# The needs at which each question is asked, the others being the defaults; and the range in which answers may change.
RATES = (10.0, 1e6)
OBJECTIVES_MS = (1.0, 100.0)
ROWS = (1.0, 1024.0)  # the sizes that were measured
MEMORIES_MB = (50.0, 2000.0)
STARTS_S = (0.2, 60.0)
# The table of the short answer.
SHORT_RATES = (50, 500, 3000, 10_000, 50_000)
SHORT_P99S_MS = (5, 10, 20, 50)


def load_scenarios() -> list[tuple[str, str, str, Needs]]:
    """Return (title, text, a note on the answer or "", needs) of each scenario."""
    scenarios = tomllib.loads(SCENARIOS_PATH.read_text())["scenario"]
    found = []
    for one in scenarios:
        needs = Needs(**one["needs"])
        text = one["text"].format(**_format_figures(one["needs"]))
        found.append((one["title"], text, one.get("note", ""), needs))
    return found


def _format_figures(needs: dict[str, Any]) -> dict[str, str]:
    return {name: f"{value:,g}" if isinstance(value, int | float) else value for name, value in needs.items()}


def render_guide(measured: Measured, containers: dict[str, ContainerCost], today: date) -> str:
    """Return the text of CHOOSING.md; `today` decides which facts are stale."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    facts = load_facts()
    base = Needs(maintained=True)
    return environment.get_template("choosing.md.j2").render(
        facts=facts,
        machine=measured.environment,
        objective_ms=f"{measured.settings['objective_p99_s'] * 1e3:g}",
        headroom=f"{HEADROOM:.0%}",
        base=describe_needs(base),
        short_p99s_ms=SHORT_P99S_MS,
        short_answers=[
            (title, _short_answers(measured, containers, framework))
            for title, framework in (("PyTorch or scikit-learn", "scikit-learn"), ("TensorFlow", "tensorflow"))
        ],
        frameworks={
            name: [
                choose(measured, containers, replace(base, framework=name, python=python)) for python in (False, True)
            ]
            for name in FRAMEWORKS[1:]
        },
        flips={
            "rate": _rows(find_flips(measured, containers, base, "rate", *RATES), "{:,.2g}"),
            "p99": _rows(find_flips(measured, containers, base, "p99_ms", *OBJECTIVES_MS), "{:.3g} ms"),
            "rows": _rows(find_flips(measured, containers, base, "rows", *ROWS), "{:,.0f}"),
            "memory": _rows(find_flips(measured, containers, base, "memory_mb", *MEMORIES_MB), "{:,.3g} MB"),
            "start": _rows(find_flips(measured, containers, base, "cold_start_s", *STARTS_S), "{:.2g} s"),
        },
        costs=[
            (measured.label(name), f"{peak_memory_mb(measured, name):,.0f}", _start(measured, containers, name))
            for name in measured.names
            if framework_of(name) in facts["framework"]
        ],
        short=lambda choice: name_recommendations(choice.recommended),
        describe=lambda choice: describe_recommendations(measured, choice),
        candidates=lambda choice: [describe_candidate(measured, one) for one in choice.candidates],
        reload=choose(measured, containers, replace(base, reload=True)),
        unmaintained=choose(measured, containers, replace(base, maintained=False)),
        claims=[_judge(measured, claim) for claim in facts["claim"].values()],
        scenarios=[
            (number, title, text, note, choose(measured, containers, needs), describe_needs(needs))
            for number, (title, text, note, needs) in enumerate(load_scenarios(), 1)
        ],
        refused=lambda choice: _group_refused(measured, choice),
        ranges={
            "rate": [f"{value:,.0f}" for value in RATES],
            "p99": [f"{value:g} ms" for value in OBJECTIVES_MS],
            "rows": [f"{value:,.0f}" for value in ROWS],
            "memory": [f"{value:,.0f} MB" for value in MEMORIES_MB],
            "start": [f"{value:g} s" for value in STARTS_S],
        },
        stale=[fact["what"] for kind in ("framework", "fact", "claim") for fact in facts[kind].values()
               if is_stale(fact, today)],
        stale_days=STALE_DAYS,
        bound=describe_bound(measured),
        gpu=describe_crossover(),
    )  # fmt: skip


def _short_answers(
    measured: Measured, containers: dict[str, ContainerCost], framework: str
) -> list[tuple[str, list[str]]]:
    """Return (rate, an answer for each p99) for maintained servers of one framework's model."""

    def answer(rate: float, p99_ms: float) -> str:
        return describe_cores(choose(measured, containers, Needs(rate, p99_ms, framework=framework, maintained=True)))

    return [(f"{rate:,}", [answer(rate, p99_ms) for p99_ms in SHORT_P99S_MS]) for rate in SHORT_RATES]


def _group_refused(measured: Measured, choice: Choice) -> list[tuple[str, str]]:
    """Return (reasons, servers) of those that were swept: servers with the same reasons share a line."""
    groups: dict[str, list[str]] = {}
    for name, reasons in choice.refused.items():
        if measured.open(name):
            groups.setdefault("; ".join(reasons), []).append(measured.label(name))
    return [
        (f"{'is' if len(names) == 1 else 'are'} out: {reasons}", ", ".join(names)) for reasons, names in groups.items()
    ]


def _start(measured: Measured, containers: dict[str, ContainerCost], name: str) -> str:
    start_s = find_start_s(measured, containers, name)
    return f"{start_s:.1f}" if start_s else "–"


def _rows(flips: list[Flip], form: str) -> list[tuple[str, str]]:
    """Return the lowest value and the recommendation of each answer."""
    rows: list[tuple[str, str]] = []
    for flip in flips:
        value = form.format(float(f"{flip.value:.2g}")) if flip.value >= 1000 else form.format(flip.value)
        rows.append((_plain(value), name_recommendations({kind: (name,) for kind, name in flip.recommended.items()})))
    return rows


def _plain(value: str) -> str:
    """1e4 as 10,000."""
    number, _, unit = value.partition(" ")
    return f"{float(number.replace(',', '')):,g} {unit}".strip() if "e" in number else value


def _judge(measured: Measured, claim: dict[str, Any]) -> dict[str, Any]:
    """Hold a published claim against every pair of rows of one set-up over REST, at the fewest connections."""
    connections = measured.settings["connections"][0]
    pairs = []
    for suffix in ("", "-tuned"):
        faster, slower = claim["faster"] + suffix, claim["slower"] + suffix
        if faster not in measured.servers or slower not in measured.servers:
            continue
        ratio = measured.ratio(faster, slower, connections)
        cells = measured.cell(faster, connections), measured.cell(slower, connections)
        if ratio is None or not all(cells):
            continue
        verdict = "agrees" if ratio.low > 1 else "contradicts" if ratio.high < 1 else "does not decide"
        same_kind = measured.kind(faster) == measured.kind(slower)
        medians = [format_interval_ms(cell.percentile_s(50)) for cell in cells if cell]
        pairs.append({
            "faster": measured.label(faster), "slower": measured.label(slower), "medians": medians,
            "ratio": format_ratio(ratio), "verdict": verdict, "same_kind": same_kind,
        })  # fmt: skip
    return {**claim, "pairs": pairs}
