"""The tables of a plan: replicas and settings at one rate, and what several scales take."""

import numpy as np

from drawing.tables import TextTable, add_row, format_table
from figures.measured import Measured
from figures.words import UNKNOWN
from planning.autoscaler import CURVES, make_server, run_curve
from planning.capacity import (
    CONTAINERS_PATH,
    HEADROOM,
    SPARE_REPLICAS,
    CapacityError,
    ContainerCost,
    Plan,
    find_start_s,
    make_plans,
    read_containers,
)
from planning.scale import Surroundings, list_new_limits, make_scale
from planning.simulation import (
    AGREES,
    STEADY,
    Gateway,
    Policy,
    list_agreements,
    measure_service_times,
    poisson_arrivals,
    simulate,
)

MIB = 1 << 20
FLEET_REQUESTS = 20_000
SCALES = (10_000.0, 100_000.0, 1_000_000.0)  # requests/s


def make_plan_table(measured: Measured, plans: list[Plan]) -> TextTable:
    """Return a row a server: how many replicas, and what each of them is given."""
    first = plans[0] if plans else None
    title = f"{first.rate:,.0f} requests/s with p99 within {first.objective_s * 1e3:g} ms" if first else ""
    table = TextTable(
        title,
        ["server", "keeps up with", "planned", "replicas", "cores", "min–max", "CPU target", "memory", "start", "stop"],
        "Requests/s that one replica keeps up with, and those planned for it. replicas: one more than the rate takes. "
        "min–max: the autoscaler's bounds, the lower for the quietest hour. CPU target: usage at the planned rate, in "
        "percent of the request of a core, lowered where a saturated server would not pass it. memory: limit in MiB. "
        "start: the startup probe's budget in s. stop: the grace period in s. Sorted by cores.",
    )
    for plan in plans:
        add_row(
            table, measured, plan.server, f"{plan.sustained_rate:,.0f}", f"{plan.planned_rate:,.0f}",
            f"{plan.replicas:,}", f"{plan.cores:,}", f"{plan.min_replicas:,}–{plan.max_replicas:,}",
            f"{plan.hpa_target_percent} %" if plan.hpa_target_percent else UNKNOWN,
            f"{plan.memory_limit_bytes // MIB:,}", _seconds(plan.startup_budget_s), _seconds(plan.grace_period_s),
        )  # fmt: skip
    return table


def _seconds(value: int | None) -> str:
    return UNKNOWN if value is None else f"{value}"


def make_scale_table(
    measured: Measured, plans_by_scale: list[list[Plan]], containers: dict[str, ContainerCost], around: Surroundings
) -> TextTable:
    """Return a row a server and scale, and which limits are new at it."""
    table = TextTable(
        "What each scale takes, and what gives way on the way to it, first things first",
        ["server", "requests/s", "replicas", "cores", "gateways", "machines", "Gbit/s", "USD a month", "gives way"],
        f"Replicas and cores from the measured rates at {HEADROOM:.0%} of what one replica keeps up with; gateways of "
        f"{around.gateway_cores} cores; machines of {around.node_cores} cores, one of which is left to the system. "
        "gives way: from how many requests/s on.",
        words={0, 8},
    )
    names = [plan.server for plan in plans_by_scale[0]]
    for name in names:
        below = 0.0
        for plans in plans_by_scale:
            for plan in plans:
                if plan.server == name:
                    scale = make_scale(measured, plan, containers, around)
                    new = "; ".join(
                        f"from {round_rate(limit.met_at_rate)}: {limit.what}" for limit in list_new_limits(scale, below)
                    )
                    add_row(
                        table, measured, name, f"{plan.rate:,.0f}", f"{plan.replicas:,}", f"{plan.cores:,}",
                        f"{scale.gateways:,}", f"{scale.nodes:,}", f"{scale.network_gbit:.2g}",
                        f"{scale.cost_month:,.0f}", new or "nothing new",
                    )  # fmt: skip
                    below = plan.rate
    return table


def make_agreement_table(measured: Measured, names: list[str]) -> TextTable:
    """Return a row for each measured rate: does a simulated replica have the p99 that the measured one had?"""
    found = list_agreements(measured, names)
    steady = [one for one in found if one.is_steady]
    table = TextTable(
        "p99 in ms of one replica, measured and simulated",
        ["server", "offered/s", "measured", "of single rounds", "simulated", "agrees"],
        f"Simulated from the closed loops alone. agrees: within {AGREES:.0%} of the measured p99; or, where the rounds "
        f"themselves differ by more than {STEADY:g}×, of what they span (marked ~), which asks for little. Within "
        f"{AGREES:.0%} of the measured p99: {sum(one.is_close for one in steady)} of {len(steady)} steady rates, "
        f"{sum(one.is_close for one in found)} of all {len(found)}.",
        words={0, 5},
    )
    for one in found:
        add_row(
            table, measured, one.server, f"{one.rate:,.0f}", f"{one.measured_s * 1e3:.1f}",
            f"{one.rounds_s[0] * 1e3:.1f}–{one.rounds_s[1] * 1e3:.1f}", f"{one.simulated_s * 1e3:.1f}",
            ("yes" if one.agrees else "no") + " ~" * (not one.is_steady),
        )  # fmt: skip
    return table


def make_fleet_table(measured: Measured, plans: list[Plan], around: Surroundings) -> TextTable:
    """Return a row a plan: the simulated p99 behind the gateway, with every replica and with one dead."""
    table = TextTable(
        f"p99 in ms behind a gateway of {around.gateway_cores} cores, simulated",
        ["server", "requests/s", "replicas", "p99", "one dead", "one dead, random", "objective"],
        f"{FLEET_REQUESTS:,} requests, Poisson arrivals. The gateway gives a request to the replica with the fewest "
        "connections; random: to any.",
    )
    for plan in plans:
        service = measure_service_times(measured, plan.server)
        fewer = max(plan.replicas - SPARE_REPLICAS, 1)
        figures = []
        for replicas, policy in (
            (plan.replicas, Policy.LEAST_CONNECTIONS),
            (fewer, Policy.LEAST_CONNECTIONS),
            (fewer, Policy.RANDOM),
        ):
            random = np.random.default_rng(0)
            gateway = Gateway(around.gateway_cores, 1 / around.gateway_rate, policy)
            arrivals_s = poisson_arrivals(plan.rate, FLEET_REQUESTS, random)
            latencies_s = simulate(arrivals_s, service, replicas, random, gateway)
            figures.append(f"{np.percentile(latencies_s, 99) * 1e3:.1f}")
        add_row(
            table, measured, plan.server, f"{plan.rate:,.0f}", f"{plan.replicas:,}", *figures,
            f"{plan.objective_s * 1e3:g}",
        )  # fmt: skip
    return table


def make_autoscaler_table(measured: Measured, plans: list[Plan], containers: dict[str, ContainerCost]) -> TextTable:
    """Return a row for each plan and load curve: how long too few replicas served, and what that did to requests."""
    table = TextTable(
        "The autoscaler under a load that changes, simulated",
        ["server", "load", "replicas", "short s", "late", "refused", "replica hours", "of a fixed plan's"],
        "step: from a quarter of the rate to all of it at once; ramp: in ten minutes; day: a cosine over 24 hours. "
        "short: seconds in which the rate was above what the serving replicas keep up with. late: requests that waited "
        "longer than the objective. refused: that would have waited more than the gateway lets them, two seconds.",
        words={0, 1},
    )
    for plan in plans:
        start_s = find_start_s(measured, containers, plan.server)
        try:
            server = make_server(measured, plan, start_s)
        except CapacityError:
            continue
        for curve in CURVES:
            outcome = run_curve(curve, plan, server)
            fixed_hours = plan.replicas * outcome.seconds / 3600
            add_row(
                table, measured, plan.server, curve, f"{outcome.least:,}–{outcome.most:,}", f"{outcome.short_s:,}",
                f"{outcome.late_share:.2%}", f"{outcome.refused_share:.2%}", f"{outcome.replica_hours:,.1f}",
                f"{outcome.replica_hours / fixed_hours:.0%}",
            )  # fmt: skip
    return table


def round_rate(rate: float) -> str:
    """A rate to two digits."""
    return f"{float(f'{rate:.2g}'):,.0f}"


def describe_refused(measured: Measured, refused: dict[str, str]) -> list[str]:
    """Return a sentence for each server that has no plan."""
    return [f"{measured.label(name)}: no plan, {reason}" for name, reason in refused.items()]


def format_scale(measured: Measured) -> str:
    """Return what three scales take of each tuned server, and how well the simulation agrees, in Markdown."""
    containers = read_containers(CONTAINERS_PATH)
    names = [name for name in measured.names if name in measured.knees]
    tuned = [name for name in names if name.endswith("-tuned") and measured.protocol(name) == "REST"]
    objective_s = measured.settings["objective_p99_s"]
    plans = [make_plans(measured, tuned, rate, objective_s, containers, HEADROOM)[0] for rate in SCALES]
    scale = make_scale_table(measured, plans, containers, Surroundings())
    return "\n".join(["", *format_table(scale), *format_table(make_agreement_table(measured, names))])
