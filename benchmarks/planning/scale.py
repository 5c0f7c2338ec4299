"""Plan a service of a given size, and find the limit that it meets first: a plan compared with limits of facts.toml."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

from figures.measured import Measured
from planning.capacity import HEADROOM, SPARE_REPLICAS, ContainerCost, Plan, count_replicas, find_start_s
from planning.facts import assume, load_facts

HOURS_A_MONTH = 730
MIN_READY_S = 5  # kubernetes/: minReadySeconds
LOG_LINE_BYTES = 200
SECONDS_A_DAY = 86_400
STEPS_A_DECADE = 20  # of the rates that are looked at for the first that passes a limit
PRECISION = 1e-3  # of that rate


@dataclass(frozen=True)
class Surroundings:
    """What stands around the replicas; the defaults are the assumptions of facts.toml."""

    gateway_rate: float = field(default_factory=lambda: assume("gateway_rate"))  # requests/s a core
    gateway_cores: int = field(default_factory=lambda: int(assume("gateway_cores")))
    node_cores: int = field(default_factory=lambda: int(assume("node_cores")))
    core_price: float = field(default_factory=lambda: assume("core_price"))  # USD an hour
    memory_price: float = field(default_factory=lambda: assume("memory_price"))  # USD an hour and GB
    header_bytes: int = field(default_factory=lambda: int(assume("headers")))

    @classmethod
    def with_changes(cls, **changes: float | None) -> Self:
        """Return the assumptions with those changed that are not None."""
        changed: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
        for name in changed.keys() & {"gateway_cores", "node_cores"}:
            changed[name] = int(changed[name])
        return replace(cls(), **changed)

    @property
    def planned_gateway_rate(self) -> float:
        """Requests/s that one gateway is planned for."""
        return self.gateway_cores * self.gateway_rate * HEADROOM


@dataclass(frozen=True)
class Limit:
    """A limit that a growing service has passed: its part, the rate from which it is passed, and the remedy."""

    name: str
    met_at_rate: float  # requests/s
    what: str
    then: str


@dataclass(frozen=True)
class Scale:
    """One plan with its gateways and machines, its cost, and the limits that it has passed, the first met first."""

    plan: Plan
    gateways: int
    nodes: int
    network_gbit: float  # into and out of the gateways
    cost_month: float  # USD
    passed: tuple[Limit, ...]


class Demands:
    """What one server at any rate asks of what stands around it."""

    def __init__(self, measured: Measured, plan: Plan, around: Surroundings, start_s: float):
        cell = measured.cells(plan.server)[0]
        self.plan, self.around, self.start_s = plan, around, start_s
        self.bits = 8 * (cell.request_bytes + cell.reply_bytes + 2 * around.header_bytes)

    def replicas(self, rate: float) -> int:
        return count_replicas(rate, self.plan.planned_rate, 1.0)

    def gateways(self, rate: float) -> int:
        """⌈rate ÷ what one gateway is planned for⌉ + 1."""
        return math.ceil(rate / self.around.planned_gateway_rate) + SPARE_REPLICAS

    def nodes(self, rate: float) -> int:
        """Machines of `node_cores`, each of which keeps a core for the system; two at least."""
        cores = self.replicas(rate) * self.plan.cpu_request + self.gateways(rate) * self.around.gateway_cores
        return max(2, math.ceil(cores / (self.around.node_cores - 1)))

    def network_gbit(self, rate: float) -> float:
        """Into and out of the gateways, the bytes of the server's measured requests and replies."""
        return rate * self.bits / 1e9

    def cost_month(self, rate: float) -> float:
        cores = self.replicas(rate) * self.plan.cpu_request + self.gateways(rate) * self.around.gateway_cores
        memory_gb = self.replicas(rate) * self.plan.memory_limit_bytes / 1e9
        return (cores * self.around.core_price + memory_gb * self.around.memory_price) * HOURS_A_MONTH

    def all(self, rate: float) -> dict[str, float]:
        """Every demand that a limit of facts.toml names."""
        replicas = self.replicas(rate)
        return {
            "replicas without the spare one": replicas - SPARE_REPLICAS,
            "cores": replicas * self.plan.cpu_request,
            "requests/s": rate,
            "network Gbit/s": self.network_gbit(rate),
            "replicas a machine": math.ceil(replicas / self.nodes(rate)),
            "seconds of a rollout": replicas * (self.start_s + MIN_READY_S),
            "replicas": replicas,
            "log GB a day": rate * LOG_LINE_BYTES * SECONDS_A_DAY / 1e9,
        }


def make_scale(
    measured: Measured, plan: Plan, containers: dict[str, ContainerCost], around: Surroundings | None = None
) -> Scale:
    """Return what surrounds a plan."""
    around = around or Surroundings()
    demands = Demands(measured, plan, around, find_start_s(measured, containers, plan.server))
    rate = plan.rate
    return Scale(
        plan, demands.gateways(rate), demands.nodes(rate), demands.network_gbit(rate), demands.cost_month(rate),
        _list_passed(demands, rate),
    )  # fmt: skip


def _list_passed(demands: Demands, rate: float) -> tuple[Limit, ...]:
    """Return the limits that are passed on the way to `rate`, each with the lowest rate that passes it."""
    values = {
        "node_cores": float(demands.around.node_cores),
        "gateway_cores × gateway_rate × headroom": demands.around.planned_gateway_rate,
    }
    found = []
    for name, limit in load_facts()["limit"].items():
        value = float(values[limit["value_from"]] if "value_from" in limit else limit["value"])
        met_at = _find_first_rate(partial(_is_passed, demands, limit["of"], value), rate)
        if met_at is not None:
            found.append(Limit(name, met_at, limit["what"], limit["then"]))
    return tuple(sorted(found, key=lambda limit: limit.met_at_rate))


def _is_passed(demands: Demands, of: str, value: float, rate: float) -> bool:
    return demands.all(rate)[of] > value


def _find_first_rate(is_passed: Callable[[float], bool], most: float) -> float | None:
    """Return about the lowest rate up to `most` at which a limit is passed: a walk in steps, then bisection."""
    steps = math.ceil(STEPS_A_DECADE * math.log10(max(most, 10)))
    below = 0.0
    for step in range(steps + 1):
        above = min(float(most ** (step / steps)), most)
        if is_passed(above):
            while above - below > PRECISION * above:
                middle = (above + below) / 2
                below, above = (below, middle) if is_passed(middle) else (middle, above)
            return above
        below = above
    return None


def list_new_limits(scale: Scale, above_rate: float) -> list[Limit]:
    """Return the limits that are met between a smaller scale and this one, the first met first."""
    return [limit for limit in scale.passed if limit.met_at_rate > above_rate]


def describe_assumptions() -> list[str]:
    """Return each assumption with its source and the day on which it was read."""
    facts: dict[str, dict[str, Any]] = load_facts()["assumption"]
    return [
        f"{name.replace('_', ' ')}: {fact['value']:g} {fact['unit']} ({fact['source']}; {fact['read']})"
        for name, fact in facts.items()
    ]
