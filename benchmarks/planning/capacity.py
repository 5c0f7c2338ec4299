"""How many replicas a rate takes and what each must be given: arithmetic on measured figures.

Measured is one replica on the cores of the result file's `server_cpus`, asked in an open loop. N replicas are
taken for N times that: each has its own cores, and the gateway spreads the requests. `simulation.py` checks it.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from figures.measured import Measured
from figures.result_file import RESULTS_DIR, ResultError

CONTAINERS_PATH = RESULTS_DIR / "containers.json"
HEADROOM = 0.7  # of the rate that a replica keeps up with: latency climbs before the knee, and load is never even
SPARE_REPLICAS = 1  # a machine may die
LEAST_REPLICAS = 2  # fewer, and one that stops takes all with it
QUIET_SHARE = 0.25  # of the rate, at the quietest hour of a day
GROWTH = 2  # how far the autoscaler may go beyond the plan
HPA_TOLERANCE = 0.1  # Kubernetes changes nothing while usage is within a tenth of the target
COLD_STARTS = 3  # the startup probe waits that many times the longest cold start seen
PRE_STOP_S = 10  # a replica that stops goes on answering until every gateway has left it
STOPS, STOP_MARGIN_S = 2, 5
MEMORY_MARGIN = 1.5  # exceeding the limit kills a server, and the most seen may be exceeded
MEMORY_STEP_BYTES = 64 << 20


class CapacityError(ResultError):
    """The measurements do not show how much a server holds; the message names the missing part."""


@dataclass(frozen=True)
class ContainerCost:
    """What one server's container costs, from containers.json."""

    starts_s: tuple[float, ...]  # from `docker compose up` to the first right answer
    stop_s: float
    memory_bytes: int
    image_bytes: int


@dataclass(frozen=True)
class Plan:
    """One server at a rate: how many replicas, and what each of them is given."""

    server: str
    kind: str
    rate: float  # requests/s, asked for
    objective_s: float  # p99, asked for
    sustained_rate: float  # requests/s that one replica keeps up with within the objective
    planned_rate: float  # requests/s that one replica is planned for
    replicas: int
    min_replicas: int
    max_replicas: int
    cpu_request: int  # cores a replica
    hpa_target_percent: int | None  # CPU usage of the request to hold; None: the server's processes were not seen
    memory_limit_bytes: int
    startup_budget_s: int | None  # None: not measured in a container
    grace_period_s: int | None

    @property
    def cores(self) -> int:
        return self.replicas * self.cpu_request

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON-able values."""
        return {**asdict(self), "cores": self.cores}


def read_containers(path: Path = CONTAINERS_PATH) -> dict[str, ContainerCost]:
    """Return the costs of each container by its folder's name; ResultError if there is no such file."""
    try:
        containers = json.loads(path.read_text())["containers"]
        return {
            name: ContainerCost(tuple(cost["starts_s"]), cost["stop_s"], cost["memory_bytes"], cost["image_bytes"])
            for name, cost in containers.items()
        }
    except FileNotFoundError:
        raise ResultError(f"{path}: no such file; make docker-measure makes one") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ResultError(f"{path}: not what make docker-measure writes ({error!r})") from None


def find_container(containers: dict[str, ContainerCost], name: str) -> ContainerCost | None:
    """Return the costs of the container that holds the server `name`, whatever its set-up and protocol."""
    return containers.get(name.removesuffix("-tuned").removesuffix("-grpc").removesuffix("-infer"))


def find_start_s(measured: Measured, containers: dict[str, ContainerCost], name: str) -> float:
    """Return the median cold start of a server's container, else of the server itself; 0 if neither was measured."""
    cost, starts = find_container(containers, name), measured.start_medians_s(name)
    return median(cost.starts_s) if cost else starts[1] if starts else 0.0


def sustained_rate(measured: Measured, name: str, objective_s: float) -> float:
    """Return the highest offered rate up to which a server kept up with p99 within `objective_s`: see `held_rates`."""
    return held_rates(measured, name, objective_s)[0]


def held_rates(measured: Measured, name: str, objective_s: float) -> tuple[float, float | None]:
    """Return the last offered rate that a server held with p99 within `objective_s`, and the next, which it did not.

    The second is None if it held all, or if the client was the limit. A rate with too few requests for a p99 is judged
    without it, as the report does, unless the objective is tighter than the run's own. CapacityError if
    no rate was held.
    """
    cells = measured.open(name)
    if not cells:
        raise CapacityError("no offered rates were swept")
    may_skip_p99 = objective_s >= measured.settings["objective_p99_s"]
    sustained = broken = None
    for cell in cells:
        p99 = cell.percentile_s(99)
        if not cell.keeps_up or (p99 is not None and p99.estimate > objective_s):
            is_clients = cell.is_client_the_limit and not cell.failed and not cell.wrong
            broken = None if is_clients else cell.nominal_rate
            if sustained is None:
                rate = f"{cell.nominal_rate:,.0f}/s"
                raise CapacityError(
                    f"p99 is {p99.estimate * 1e3:.1f} ms at {rate}, the lowest rate with a p99"
                    if p99 and cell.keeps_up
                    else f"it does not keep up with {rate}, the lowest rate that counts"
                )
            break
        if p99 is not None or may_skip_p99:
            sustained = cell.nominal_rate
    if sustained is None:
        raise CapacityError("too few requests for a p99 at every rate: measure longer, with --open-rounds 10")
    return sustained, broken


def count_replicas(rate: float, sustained: float, headroom: float = HEADROOM, spare: int = SPARE_REPLICAS) -> int:
    """Return ⌈rate ÷ (sustained × headroom)⌉ + spare."""
    if not (rate > 0 and sustained > 0 and 0 < headroom <= 1):
        raise ValueError("rates must be above 0, and headroom above 0 and at most 1")
    return math.ceil(rate / (sustained * headroom) - 1e-9) + spare


def cpu_request(measured: Measured) -> int:
    """Return the cores that a replica had when it was measured."""
    cpus = measured.settings["server_cpus"]
    if cpus is None:
        raise CapacityError("servers and client shared their cores: measure on a machine with two or more")
    return len(cpus)


def cores_used_at(measured: Measured, name: str, rate: float) -> float:
    """Return the cores that a server uses at an offered rate, between the measured ones on a straight line."""
    cells = measured.open(name)
    rates, used = [cell.nominal_rate for cell in cells], [cell.cores_used for cell in cells]
    return float(np.interp(rate, [0, *rates], [0, *used]))


def hpa_target_percent(measured: Measured, name: str, planned_rate: float) -> int | None:
    """Return the CPU usage, in percent of the request, that a replica has at the rate planned for it.

    A saturated server cannot use more than its cores, and the autoscaler adds a replica only once usage is above the
    target by more than its tolerance. So the target is at most what the most usage seen exceeds by that.
    """
    if not measured.is_seen(name):
        return None
    request = cpu_request(measured)
    most = max(cell.cores_used for cell in measured.cells(name)) / request
    planned = cores_used_at(measured, name, planned_rate) / request
    return max(1, min(math.floor(100 * planned), math.ceil(100 * most / (1 + HPA_TOLERANCE)) - 1))


def startup_budget_s(cost: ContainerCost) -> int:
    """Return how long the startup probe waits: COLD_STARTS times the longest cold start seen."""
    return math.ceil(COLD_STARTS * max(cost.starts_s))


def grace_period_s(cost: ContainerCost, pre_stop_s: float = PRE_STOP_S) -> int:
    """Return the seconds from the order to stop to the kill: preStop + 2 × the stop measured + 5."""
    return math.ceil(pre_stop_s + STOPS * cost.stop_s + STOP_MARGIN_S)


def memory_limit_bytes(seen_bytes: Sequence[int], in_memory_volumes_bytes: int = 0) -> int:
    """Return a limit above the most memory seen, in steps of 64 MiB; volumes that lie in memory are added whole."""
    needed = MEMORY_MARGIN * max(seen_bytes) + in_memory_volumes_bytes
    return math.ceil(needed / MEMORY_STEP_BYTES) * MEMORY_STEP_BYTES


def make_plan(
    measured: Measured,
    name: str,
    rate: float,
    objective_s: float,
    containers: dict[str, ContainerCost],
    headroom: float = HEADROOM,
    in_memory_volumes_bytes: int = 0,
) -> Plan:
    """Return the plan of one server for `rate` requests/s with p99 within `objective_s`; CapacityError if none fits."""
    sustained = sustained_rate(measured, name, objective_s)
    cost = find_container(containers, name)
    seen_bytes = [cell.rss_bytes for cell in measured.cells(name)] + ([cost.memory_bytes] if cost else [])
    replicas = count_replicas(rate, sustained, headroom)
    return Plan(
        server=name,
        kind=measured.kind(name),
        rate=rate,
        objective_s=objective_s,
        sustained_rate=sustained,
        planned_rate=sustained * headroom,
        replicas=replicas,
        min_replicas=max(LEAST_REPLICAS, count_replicas(rate * QUIET_SHARE, sustained, headroom)),
        max_replicas=GROWTH * replicas,
        cpu_request=cpu_request(measured),
        hpa_target_percent=hpa_target_percent(measured, name, sustained * headroom),
        memory_limit_bytes=memory_limit_bytes(seen_bytes, in_memory_volumes_bytes),
        startup_budget_s=startup_budget_s(cost) if cost else None,
        grace_period_s=grace_period_s(cost) if cost else None,
    )


def make_plans(
    measured: Measured,
    names: Sequence[str],
    rate: float,
    objective_s: float,
    containers: dict[str, ContainerCost],
    headroom: float = HEADROOM,
) -> tuple[list[Plan], dict[str, str]]:
    """Return the plans, the fewest cores first, and the servers that have none with the reason."""
    plans, refused = [], {}
    for name in names:
        try:
            plans.append(make_plan(measured, name, rate, objective_s, containers, headroom))
        except CapacityError as error:
            refused[name] = str(error)
    return sorted(plans, key=lambda plan: (plan.cores, plan.memory_limit_bytes)), refused
