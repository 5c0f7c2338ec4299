"""Kubernetes' HorizontalPodAutoscaler under a load that changes, second by second.

The algorithm is the published one (https://kubernetes.io/docs/concepts/workloads/autoscaling/horizontal-pod-autoscale/):
desired = ⌈replicas × usage ÷ target⌉; nothing changes while usage is within the tolerance; replicas that do not yet
serve count as using nothing; the highest recommendation of the down window holds; policies bound each step. Requests
are a fluid: what a second brings above what the replicas hold waits, and is late or, at last, refused.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from figures.measured import Measured
from planning.capacity import HPA_TOLERANCE, QUIET_SHARE, CapacityError, Plan

SYNC_S = 15  # the controller looks every 15 s, and metrics-server measures as often
DAY_S = 86_400


@dataclass(frozen=True)
class Behavior:
    """The HPA's `behavior`, as in kubernetes/."""

    up_percent: int = 100
    up_pods: int = 2
    up_period_s: int = 15
    down_percent: int = 20
    down_period_s: int = 60
    down_window_s: int = 300
    tolerance: float = HPA_TOLERANCE


@dataclass
class Autoscaler:
    """The controller of one Deployment: sets the number of replicas every SYNC_S."""

    target: float  # usage of the request, a share
    min_replicas: int
    max_replicas: int
    behavior: Behavior = field(default_factory=Behavior)
    replicas: int = 0
    _recommended: deque[tuple[float, int]] = field(default_factory=deque, init=False)
    _changes: list[tuple[float, int]] = field(default_factory=list, init=False)  # when, and by how many

    def __post_init__(self) -> None:
        self.replicas = self.replicas or self.min_replicas

    def sync(self, now_s: float, usage: float, serving: int) -> int:
        """Look once: `usage` is the mean of the replicas that serve, a share of the request."""
        wanted = self._recommend(usage, serving)
        self._recommended.append((now_s, wanted))
        while self._recommended[0][0] <= now_s - self.behavior.down_window_s and len(self._recommended) > 1:
            self._recommended.popleft()
        if wanted < self.replicas:
            wanted = min(self.replicas, max(number for _, number in self._recommended))
        wanted = min(max(wanted, self.min_replicas), self.max_replicas)
        wanted = self._bound(now_s, wanted)
        if wanted != self.replicas:
            self._changes.append((now_s, wanted - self.replicas))
            self.replicas = wanted
        return self.replicas

    def _recommend(self, usage: float, serving: int) -> int:
        ratio = usage / self.target
        if abs(ratio - 1) <= self.behavior.tolerance:
            return self.replicas
        starting = max(self.replicas - serving, 0)
        if ratio < 1 or not starting:
            return math.ceil(serving * ratio - 1e-9) if serving else self.replicas
        diluted = usage * serving / self.replicas / self.target  # as if those that start used nothing
        if diluted <= 1 + self.behavior.tolerance:
            return self.replicas
        return math.ceil(self.replicas * diluted - 1e-9)

    def _bound(self, now_s: float, wanted: int) -> int:
        before_up = self.replicas - self._changed(now_s - self.behavior.up_period_s)
        before_down = self.replicas - self._changed(now_s - self.behavior.down_period_s)
        most = before_up + max(math.ceil(before_up * self.behavior.up_percent / 100), self.behavior.up_pods)
        least = math.floor(before_down * (1 - self.behavior.down_percent / 100))
        return min(max(wanted, min(least, self.replicas)), max(most, self.replicas))

    def _changed(self, since_s: float) -> int:
        """By how many replicas the Deployment has grown since then."""
        return sum(by for when_s, by in self._changes if when_s > since_s)


@dataclass(frozen=True)
class Server:
    """What the fluid knows of one replica."""

    sustained_rate: float  # requests/s within the objective
    usage_rates: tuple[float, ...]  # offered rates, ascending from 0 …
    usages: tuple[float, ...]  # … and the share of the request that it uses at each
    request_cores: int
    start_s: float  # from the order to the first right answer
    objective_s: float
    queue_s: float = 2.0  # the longest that the gateway lets a request wait (gateway/containers.cfg: timeout queue)

    def usage(self, rate: float) -> float:
        return float(np.interp(rate, self.usage_rates, self.usages))


def make_server(measured: Measured, plan: Plan, start_s: float) -> Server:
    """Return the fluid's view of a planned server; CapacityError if its CPU was not measured."""
    if plan.hpa_target_percent is None:
        raise CapacityError("the CPU of a container's processes was not seen: the autoscaler has nothing to go by")
    cells = measured.open(plan.server)
    usages = np.maximum.accumulate([0.0, *(cell.cores_used / plan.cpu_request for cell in cells)])
    rates = (0.0, *(cell.nominal_rate for cell in cells))
    return Server(plan.sustained_rate, rates, tuple(map(float, usages)), plan.cpu_request, start_s, plan.objective_s)


@dataclass(frozen=True)
class Outcome:
    """What a load curve did to a service."""

    seconds: int
    requests: float
    short_s: int  # under-provisioned: the rate was above what the serving replicas keep up with
    late: float  # requests that waited longer than the objective
    refused: float  # requests that would have waited longer than the gateway lets them
    replica_hours: float
    least: int
    most: int

    @property
    def late_share(self) -> float:
        return self.late / self.requests

    @property
    def refused_share(self) -> float:
        return self.refused / self.requests


def run(rates: np.ndarray, server: Server, scaler: Autoscaler) -> Outcome:
    """Let a service meet `rates`, requests/s second by second; replicas that are ordered serve after `start_s`."""
    starting: deque[float] = deque()  # when each replica that starts will serve
    serving = scaler.replicas
    waiting = requests = late = refused = replica_s = 0.0
    short_s, counts = 0, [scaler.replicas]
    usages: list[float] = []
    for now_s, rate in enumerate(rates.tolist()):
        while starting and starting[0] <= now_s:
            starting.popleft()
            serving += 1
        held = serving * server.sustained_rate
        waiting += rate
        answered = min(waiting, held)
        waiting -= answered
        over = max(waiting - held * server.queue_s, 0.0)  # refused at the gateway
        refused += over
        waiting -= over
        requests += rate
        short_s += rate > held
        if waiting > held * server.objective_s:
            late += rate - over
        usages.append(server.usage(min((answered + waiting) / serving, server.usage_rates[-1])))
        replica_s += serving + len(starting)
        if now_s % SYNC_S == SYNC_S - 1:
            # What the controller sees now was measured over the interval before.
            seen = usages[-2 * SYNC_S : -SYNC_S] or usages
            wanted = scaler.sync(now_s, float(np.mean(seen)), serving)
            while serving + len(starting) > wanted:
                if starting:
                    starting.pop()
                else:
                    serving -= 1
            starting.extend([now_s + server.start_s] * (wanted - serving - len(starting)))
            counts.append(wanted)
    return Outcome(len(rates), requests, short_s, late, refused, replica_s / 3600, min(counts), max(counts))


def step(rate: float) -> np.ndarray:
    """A quarter of the rate for two minutes, then all of it for thirteen."""
    return np.repeat([QUIET_SHARE * rate, rate], [120, 780])


def ramp(rate: float) -> np.ndarray:
    """From a quarter of the rate to all of it in ten minutes, and five minutes there."""
    return np.concatenate([np.linspace(QUIET_SHARE * rate, rate, 600), np.full(300, rate)])


def day(rate: float) -> np.ndarray:
    """A day from its quietest hour on: a quarter of the rate, all of it after twelve hours, a cosine between."""
    hours = np.arange(DAY_S) / 3600
    low = QUIET_SHARE * rate
    curve: np.ndarray = low + (rate - low) * (1 - np.cos(hours / 24 * 2 * np.pi)) / 2
    return curve


CURVES: dict[str, Callable[[float], np.ndarray]] = {"step": step, "ramp": ramp, "day": day}


def run_curve(curve: str, plan: Plan, server: Server) -> Outcome:
    """Let the plan's autoscaler, which starts at its fewest replicas, meet a curve up to the plan's rate."""
    target = (plan.hpa_target_percent or 0) / 100
    return run(CURVES[curve](plan.rate), server, Autoscaler(target, plan.min_replicas, plan.max_replicas))
