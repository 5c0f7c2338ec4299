"""A discrete-event simulation of a gateway and its replicas, fed with measured service times.

A replica is a server that works in turns: it takes all requests that wait, up to the connections of the measurement,
and answers them one after the other. How long a turn of k requests takes on average is measured: in a closed loop with
k connections it is k ÷ rate (the flow-equivalent server of Chandy, Herzog and Woo, "Parametric analysis of queuing
networks", IBM J. Res. Dev. 19, 1975). The part of it in which the server did not work at one connection (the client's
work, a timer that waits for a batch, a hand-over between processes) delays a reply and holds up no other. How much a
turn varies is drawn from the latencies at one connection: a turn as long as five such requests is five draws, so that
whatever interrupts a server meets it as often a second as when measured.

Events are kept in a heap: a library of processes (SimPy) would be a dependency for one loop, and slower.
"""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from figures.cells import Cell
from figures.measured import Measured
from planning.capacity import CapacityError

MOST_IDLE = 0.9  # of a turn: some of it is work, whatever the clocks show
POOL = 1 << 16  # draws made at a time
STEADY = 1.5  # a measurement is steady if no round's p99 is more than that many times another's
AGREES = 0.25  # a simulated p99 agrees within this share of the measured one
REPEATS = 8  # of a simulated measurement


@dataclass(frozen=True)
class ServiceTimes:
    """How long a replica takes."""

    turn_s: np.ndarray  # (most + 1,) mean seconds of a turn by the number of its requests; turn_s[0] is 0
    draws_s: np.ndarray  # (n,) seconds of turns of one request, whose mean is turn_s[1]
    delay_s: float = 0.0  # of every reply, besides its turn

    @property
    def most(self) -> int:
        """The requests that a turn takes at most."""
        return len(self.turn_s) - 1


def measure_service_times(measured: Measured, name: str) -> ServiceTimes:
    """Return a server's service times from its closed-loop cells of one row; CapacityError without at least two."""
    cells = [cell for cell in measured.closed(name) if cell.rows_per_request == 1 and len(cell.latencies_s)]
    if len(cells) < 2 or cells[0].connections != 1:
        raise CapacityError("needs closed loops at 1 connection and at more")
    counts = [cell.connections for cell in cells]
    means_s = np.array([cell.connections / float(np.mean(cell.rates)) for cell in cells])
    worked = np.array([cell.cores_used if measured.is_seen(name) else 1.0 for cell in cells])
    idle_s = np.clip(1 - worked, 0, MOST_IDLE) * means_s
    delay_s = float(idle_s[0])
    most = max(counts[-1], int(measured.settings.get("open_connections", counts[-1])))
    turn_s = np.maximum.accumulate(
        np.interp(np.arange(most + 1), [0, *counts], [0, *(means_s - np.minimum(idle_s, delay_s))])
    )
    latencies_s = cells[0].latencies_s
    return ServiceTimes(turn_s, latencies_s * (turn_s[1] / latencies_s.mean()), delay_s)


class Policy(Enum):
    """How the gateway chooses a replica."""

    RANDOM = "random"
    ROUND_ROBIN = "round robin"
    LEAST_CONNECTIONS = "least connections"


@dataclass(frozen=True)
class Gateway:
    """A gateway: each of its cores forwards one request at a time."""

    cores: int = 1
    request_s: float = 0.0
    policy: Policy = Policy.LEAST_CONNECTIONS

    def forward(self, arrivals_s: np.ndarray) -> np.ndarray:
        """Return when requests leave the gateway, first come, first served, (n,)."""
        if not self.request_s:
            return arrivals_s
        free_s = [0.0] * self.cores
        left_s = np.empty(len(arrivals_s))
        for place, arrival_s in enumerate(arrivals_s):
            left_s[place] = max(arrival_s, heapq.heappop(free_s)) + self.request_s
            heapq.heappush(free_s, left_s[place])
        return left_s


class _Replica:
    def __init__(self) -> None:
        self.waiting: deque[int] = deque()
        self.busy = False
        self.in_flight = 0


def poisson_arrivals(rate: float, count: int, random: np.random.Generator) -> np.ndarray:
    """Return when `count` requests of a Poisson process fall due, in seconds (count,)."""
    return np.cumsum(random.exponential(1 / rate, count))


def simulate(
    arrivals_s: np.ndarray,
    service: ServiceTimes,
    replicas: int,
    random: np.random.Generator,
    gateway: Gateway | None = None,
) -> np.ndarray:
    """Return each request's latency from its arrival at the gateway, in seconds (n,)."""
    gateway = gateway or Gateway()
    forwarded_s = gateway.forward(arrivals_s).tolist()
    replied_s = np.empty(len(arrivals_s))
    fleet = [_Replica() for _ in range(replicas)]
    chosen = random.integers(replicas, size=len(arrivals_s)).tolist() if gateway.policy is Policy.RANDOM else []
    turn_s, mean_s = service.turn_s.tolist(), float(service.turn_s[1])
    step_s = max(turn_s[2] - turn_s[1], 0.0) if service.most > 1 else 0.0
    pool: list[float] = []
    ends: list[tuple[float, int, int]] = []  # of turns: when, which replica, how many requests

    def draw(mean_turn_s: float) -> float:
        """Seconds of one turn whose mean is `mean_turn_s`."""
        nonlocal pool
        total_s, needed = 0.0, mean_turn_s / mean_s
        while needed > 0:
            if not pool:
                pool = random.choice(service.draws_s, POOL).tolist()
            total_s += pool.pop() * min(needed, 1.0)
            needed -= 1
        return total_s

    def start_turn(place: int, now_s: float) -> None:
        replica = fleet[place]
        count = min(len(replica.waiting), service.most)
        replica.busy = count > 0
        if count:
            length_s = draw(turn_s[count])
            each_s = min(step_s, length_s / count)  # what one more request costs; the rest comes before the first reply
            first_s = now_s + length_s - each_s * count
            for number in range(1, count + 1):
                replied_s[replica.waiting.popleft()] = first_s + each_s * number
            heapq.heappush(ends, (now_s + length_s, place, count))

    def end_turns(until_s: float) -> None:
        while ends and ends[0][0] <= until_s:
            now_s, place, count = heapq.heappop(ends)
            fleet[place].in_flight -= count
            start_turn(place, now_s)

    for number, now_s in enumerate(forwarded_s):
        end_turns(now_s)
        if gateway.policy is Policy.RANDOM:
            place = chosen[number]
        elif gateway.policy is Policy.ROUND_ROBIN:
            place = number % replicas
        else:  # the next in turn of those with the fewest, as HAProxy does
            place = min(range(replicas), key=lambda each: (fleet[each].in_flight, (each - number) % replicas))
        fleet[place].waiting.append(number)
        fleet[place].in_flight += 1
        if not fleet[place].busy:
            start_turn(place, now_s)
    end_turns(np.inf)
    latencies_s: np.ndarray = replied_s - arrivals_s + service.delay_s
    return latencies_s


@dataclass(frozen=True)
class Agreement:
    """A measured and a simulated p99 of one server at one offered rate."""

    server: str
    rate: float
    measured_s: float
    rounds_s: tuple[float, float]  # the lowest and the highest p99 of a round
    simulated_s: float

    @property
    def is_steady(self) -> bool:
        return self.rounds_s[1] <= STEADY * self.rounds_s[0]

    @property
    def is_close(self) -> bool:
        """Whether it is within a quarter of the measured p99, whatever the span of its rounds."""
        return abs(self.simulated_s / self.measured_s - 1) <= AGREES

    @property
    def agrees(self) -> bool:
        """Within a quarter of the measured p99; of what its rounds span, if these differ from each other by more."""
        low_s, high_s = (self.measured_s, self.measured_s) if self.is_steady else self.rounds_s
        return (1 - AGREES) * low_s <= self.simulated_s <= (1 + AGREES) * high_s


def list_agreements(measured: Measured, names: Sequence[str]) -> list[Agreement]:
    """Simulate the open loop of every rate that was kept up with and has a p99."""
    found = []
    for name in names:
        try:
            service = measure_service_times(measured, name)
        except CapacityError:
            continue
        for cell in measured.open(name):
            p99 = cell.percentile_s(99)
            if cell.keeps_up and p99 is not None:
                rounds_s = [float(np.percentile(part, 99)) for part in cell.rounds_s]
                simulated_s = simulate_measurement(cell, service)
                span_s = (min(rounds_s), max(rounds_s))
                found.append(Agreement(name, cell.nominal_rate, p99.estimate, span_s, simulated_s))
    return found


def simulate_measurement(cell: Cell, service: ServiceTimes) -> float:
    """Return the p99 of one server asked as `cell` was, all rounds together; the mean of REPEATS measurements."""
    percentiles = []
    for repeat in range(REPEATS):
        random = np.random.default_rng(repeat)
        rounds_s = [
            simulate(poisson_arrivals(cell.nominal_rate, len(part), random), service, 1, random)
            for part in cell.rounds_s
            if len(part)
        ]
        percentiles.append(np.percentile(np.concatenate(rounds_s), 99))
    return float(np.mean(percentiles))
