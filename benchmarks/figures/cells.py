"""The figures of one server under one load, and the rate at which it breaks, from the raw windows."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from figures.intervals import Interval, median_interval, percentile_interval
from figures.result_file import decode_times

SAMPLES_BEYOND_PERCENTILE = 10  # a percentile is withheld if fewer observations lie beyond it
BUSY_CLIENT_SHARE = 0.9  # of its core, or of the server's CPU time; above it the client may be measured instead
KEEPS_UP_SHARE = 0.95  # an offered rate is kept up with if at least this share of it is answered in time


@dataclass
class Cell:
    """One server under one load, all rounds together. Rates count requests; multiply by rows_per_request for rows."""

    rounds: list[int]  # their numbers; a server that stopped midway has fewer
    rounds_s: list[np.ndarray]  # latencies of right answers, ascending, one array a round
    rates: list[float]  # right answers per second, one a round
    nominal_rate: float  # open loop: the rate that was planned; 0 in a closed one
    offered_rate: float  # open loop: the rate of the requests that fell due; 0 in a closed one
    connections: int
    rows_per_request: int
    failures: list[int]  # errors and dropped connections, one a round
    wrongs: list[int]  # wrong answers, one a round
    client_share: float  # of its core that the client needed, 0 to 1; nan: an open loop that did not record it
    client_per_server: float  # the client's CPU seconds by the server's
    server_cpu_s: list[float]  # per 1,000 predicted rows, one a round
    rss_bytes: int  # the largest seen
    late_p99_s: float  # open loop: 99th percentile of sending after a request was due; nan in a closed loop
    foreign_share: float  # of the cores, used by other programs, over all windows
    disturbed_share: float  # how far that, or what else kept client and server from their cores, disturbed them
    request_bytes: int
    reply_bytes: int
    connect_s: float  # longest that a connection took to open
    _percentiles: dict[float, Interval] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def failed(self) -> int:
        return sum(self.failures)

    @property
    def wrong(self) -> int:
        return sum(self.wrongs)

    @cached_property
    def latencies_s(self) -> np.ndarray:
        """All rounds' latencies, ascending, (n,)."""
        return np.sort(np.concatenate(self.rounds_s)) if self.rounds_s else np.empty(0)

    @cached_property
    def rate(self) -> Interval:
        """Right answers per second: the median round."""
        return median_interval(self.rates)

    @cached_property
    def server_cpu_s_per_1000(self) -> Interval:
        """CPU seconds of the server's process tree per 1,000 predicted rows."""
        return median_interval(self.server_cpu_s)

    @cached_property
    def cores_used(self) -> float:
        """Cores that the server's process tree kept busy, the median round."""
        pairs = zip(self.server_cpu_s, self.rates, strict=True)
        return float(np.median([cpu_s / 1000 * self.rows_per_request * rate for cpu_s, rate in pairs]))

    def percentile_s(self, percent: float) -> Interval | None:
        """The percentile over all rounds with its interval, or None if the sample does not support it."""
        if round(len(self.latencies_s) * (1 - percent / 100), 6) < SAMPLES_BEYOND_PERCENTILE:
            return None
        if percent not in self._percentiles:
            self._percentiles[percent] = percentile_interval(self.rounds_s, percent)
        return self._percentiles[percent]

    @property
    def is_client_the_limit(self) -> bool:
        """Whether the server may be as fast as the client.

        The client then needs nearly all of its core, or in a closed loop works as long as the server for a request
        and the two wait for each other. With one connection they always do, and both are in the latency.
        """
        works_as_long = self.connections > 1 and self.client_per_server > BUSY_CLIENT_SHARE
        return self.client_share > BUSY_CLIENT_SHARE or (works_as_long and not self.nominal_rate)

    @property
    def keeps_up(self) -> bool:
        """Whether an open loop's offered rate was answered, and nothing failed."""
        return not self.failed and not self.wrong and self.rate.estimate >= KEEPS_UP_SHARE * self.offered_rate


def paired_ratio(cell: Cell, other: Cell) -> Interval | None:
    """How many times the requests per second of `other`, round by round; None if they share no round."""
    own, others = (dict(zip(each.rounds, each.rates, strict=True)) for each in (cell, other))
    both = sorted(own.keys() & others.keys())
    return median_interval([own[number] / others[number] for number in both]) if both else None


def make_cell(windows: Sequence[dict[str, Any]]) -> Cell:
    """Gather the windows of one server under one load, at least one."""
    rounds_s = [decode_times(window["latency_us_counts"]) for window in windows]
    elapsed_s = [max(window["elapsed_s"], 1e-9) for window in windows]
    lateness_s = np.concatenate([decode_times(window["lateness_us_counts"]) for window in windows])
    first = windows[0]
    return Cell(
        rounds=[window["round"] for window in windows],
        rounds_s=rounds_s,
        rates=[max(len(part), 1e-9) / seconds for part, seconds in zip(rounds_s, elapsed_s, strict=True)],
        nominal_rate=first.get("nominal_rate", 0.0),
        offered_rate=float(np.mean([window["offered_rate"] for window in windows])),
        connections=first["connections"],
        rows_per_request=first["rows_per_request"],
        failures=[Counter(window["errors"]).total() for window in windows],
        wrongs=[window["wrong"] for window in windows],
        client_share=sum(map(_client_work_s, windows)) / sum(elapsed_s),
        client_per_server=sum(window["client_cpu_s"] for window in windows)
        / max(sum(window["server_cpu_s"] for window in windows), 1e-9),
        server_cpu_s=[
            1000 * window["server_cpu_s"] / max(len(part) * first["rows_per_request"], 1)
            for part, window in zip(rounds_s, windows, strict=True)
        ],
        rss_bytes=max(window["server_rss_bytes"] for window in windows),
        late_p99_s=float(np.percentile(lateness_s, 99)) if len(lateness_s) else math.nan,
        foreign_share=_mean([window["foreign_share"] for window in windows], elapsed_s),
        disturbed_share=_mean(
            [window.get("disturbed_share", window["foreign_share"]) for window in windows], elapsed_s
        ),
        request_bytes=first["request_bytes"],
        reply_bytes=windows[-1]["reply_bytes"],
        connect_s=max(window.get("connect_s", 0.0) for window in windows),  # not in files of before 2026-11-28
    )


def _client_work_s(window: dict[str, Any]) -> float:
    """The client's CPU seconds without those in which an open loop only looked; nan in files of before 2026-11-29."""
    idle_s = window.get("client_idle_s", math.nan) if window["load"] == "open" else 0.0
    return float(np.maximum(window["client_cpu_s"] - idle_s, 0.0))  # which keeps nan


def _mean(shares: list[float], weights: list[float]) -> float:
    """A window's share is known in steps and may come out below 0; the mean is not."""
    return max(float(np.average(shares, weights=weights)), 0.0)


def make_cells(windows: Iterable[dict[str, Any]]) -> dict[tuple[str, str], list[Cell]]:
    """Return every cell by (server, "closed" or "open"), ascending by connections, rows and offered rate."""
    loads: dict[tuple[str, str, int, int, float], list[dict[str, Any]]] = defaultdict(list)
    for window in windows:
        rate = window.get("nominal_rate", 0.0)
        key = (window["endpoint"], window["load"], window["connections"], window["rows_per_request"], rate)
        loads[key].append(window)
    cells: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for key in sorted(loads):
        cells[key[:2]].append(make_cell(loads[key]))
    return dict(cells)


@dataclass(frozen=True)
class Knee:
    """The offered rates between which a server breaks."""

    sustained_rate: float | None  # the largest rate kept up with at all rates up to it; None: not even the smallest
    broken_rate: float | None  # the next one, which it was not; None: it broke at none, so its limit is not known
    reason: str  # what broke; "" if nothing did
    low_rate: float = 0.0  # each round judged by itself: the lowest rate that one of them sustained
    high_rate: float = math.inf  # and the highest at which one of them broke; inf: one of them did not
    client_limit_rate: float | None = None  # the next one, if the client could not ask so fast; then nothing is known

    @property
    def is_open(self) -> bool:
        """Whether a higher rate may still be offered."""
        return self.broken_rate is None and self.client_limit_rate is None

    def is_beyond(self, other: "Knee") -> bool:
        """Whether this server surely keeps up with more: with all that broke the other."""
        return bool(self.sustained_rate and other.broken_rate and self.sustained_rate >= other.broken_rate)


def find_knee(cells: Sequence[Cell], objective_s: float) -> Knee | None:
    """Return where a server's open-loop `cells` break and how far the rounds agree; None if there are none."""
    if not cells:
        return None
    numbers = sorted({number for cell in cells for number in cell.rounds})
    by_round = [
        _judge([part for cell in cells if (part := _one_round(cell, number))], objective_s) for number in numbers
    ]
    return replace(
        _judge(cells, objective_s),
        low_rate=min(part.sustained_rate or 0.0 for part in by_round),
        high_rate=max(part.broken_rate or math.inf for part in by_round),
    )


def _one_round(cell: Cell, number: int) -> Cell | None:
    if number not in cell.rounds:
        return None
    place = cell.rounds.index(number)
    return replace(
        cell,
        rounds=[number],
        rounds_s=[cell.rounds_s[place]],
        rates=[cell.rates[place]],
        failures=[cell.failures[place]],
        wrongs=[cell.wrongs[place]],
    )


def _judge(cells: Sequence[Cell], objective_s: float) -> Knee:
    sustained = None
    for cell in sorted(cells, key=lambda cell: cell.nominal_rate):
        p99 = cell.percentile_s(99)
        breaks = not cell.keeps_up or (p99 is not None and p99.estimate > objective_s)
        if breaks and cell.is_client_the_limit and not cell.failed and not cell.wrong:
            return Knee(sustained, None, "", client_limit_rate=cell.nominal_rate)
        if not cell.keeps_up:
            reason = f"{cell.failed + cell.wrong:,} failed" if cell.failed + cell.wrong else ""
            return Knee(sustained, cell.nominal_rate, reason or f"answered {cell.rate.estimate:,.0f}/s")
        if p99 is not None and p99.estimate > objective_s:
            return Knee(sustained, cell.nominal_rate, f"p99 {p99.estimate * 1000:.0f} ms")
        sustained = cell.nominal_rate
    return Knee(sustained, None, "")
