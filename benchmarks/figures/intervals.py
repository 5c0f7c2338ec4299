"""How sure a figure is: medians, ratios and percentiles with intervals from order statistics.

On a shared machine another program slows some rounds by a third or more. A mean and its t-interval are
ruined by one such round; the median of many short rounds, with an interval from order statistics, is not.
Requests of one round share its luck, so the observations here are rounds, never single requests.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import special  # scipy.stats has the same quantiles, and takes seconds to import

CONFIDENCE = 0.95
LEAST_ROUNDS = 6  # of fewer, not even the smallest and the largest bracket the median with 95 % confidence


@dataclass(frozen=True)
class Interval:
    """An estimate and the range that covers the truth in 95 of 100 such measurements."""

    estimate: float
    low: float
    high: float

    @property
    def is_closed(self) -> bool:
        return math.isfinite(self.high)

    @property
    def half_width(self) -> float:
        """The longer of its two arms, relative to the estimate; inf if the interval is open."""
        if not self.is_closed or self.estimate <= 0:
            return math.inf
        return max(self.high / self.estimate, 2 - self.low / self.estimate) - 1

    def overlaps(self, other: "Interval") -> bool:
        return self.low <= other.high and other.low <= self.high

    def scale(self, factor: float) -> "Interval":
        return Interval(self.estimate * factor, self.low * factor, self.high * factor)


def invert(interval: Interval) -> Interval:
    """The interval of 1 / x, for positive x."""
    return Interval(1 / interval.estimate, 1 / interval.high, 1 / interval.low if interval.low > 0 else math.inf)


def median_interval(values: Sequence[float]) -> Interval:
    """Interval of the median of positive `values`, one a round.

    The k-th smallest and the k-th largest value bracket the median of any distribution with probability
    1 - 2 P(B < k), B binomial (n, 1/2) (David and Nagaraja, "Order Statistics", 3rd ed., section 7.1). Each
    end lies between the last k that gives 95 % and the next, interpolated after Hettmansperger and Sheather
    ("Confidence intervals based on interpolated order statistics", Statistics & Probability Letters 4, 1986),
    because whole steps of k would give up to 98 %. With fewer than LEAST_ROUNDS values the range is (0, inf).
    """
    ordered = np.sort(np.asarray(values, dtype=float))
    middle = float(np.median(ordered))
    if len(ordered) < LEAST_ROUNDS:
        return Interval(middle, 0.0, math.inf)
    rank, weight = _outer_rank(len(ordered))
    low = (1 - weight) * ordered[rank - 1] + weight * ordered[rank]
    high = (1 - weight) * ordered[-rank] + weight * ordered[-rank - 1]
    return Interval(middle, float(low), float(high))


@cache
def _outer_rank(count: int) -> tuple[int, float]:
    """Return k of `median_interval` for `count` >= LEAST_ROUNDS values, and the weight of its inner neighbour."""
    ranks = np.arange(1, count // 2 + 1)
    coverages = 1 - 2 * special.bdtr(ranks - 1, count, 0.5)
    rank = int(ranks[coverages >= CONFIDENCE][-1])
    outer, inner = coverages[rank - 1], coverages[rank] if rank < len(ranks) else 0.0
    share = (outer - CONFIDENCE) / (outer - inner)
    return rank, float((count - rank) * share / (rank + (count - 2 * rank) * share))


def percentile_interval(rounds: Sequence[np.ndarray], percent: float) -> Interval:
    """Interval of a percentile of all `rounds`' values together, each an array (n_i,).

    Woodruff's interval: the share of values below the percentile gets an interval, whose two ends are read
    as percentiles (Woodruff, "Confidence intervals for medians and other position measures", JASA 47, 1952).
    The share varies from round to round as a ratio estimator of clusters, and its interval is that of Korn
    and Graubard (Survey Methodology 24, 1998): Clopper and Pearson's with the effective sample size. If the
    sample is too small for an end, that end is open: 0 or inf.
    """
    filled = [part for part in rounds if len(part)]
    pooled = np.sort(np.concatenate(filled))
    count, share = len(pooled), percent / 100
    estimate = float(np.percentile(pooled, percent))
    effective = float(count)
    if len(filled) > 1:
        sizes = np.array([len(part) for part in filled], dtype=float)
        below = np.array([np.count_nonzero(part <= estimate) for part in filled], dtype=float)
        residuals = below - share * sizes
        variance = len(filled) / (len(filled) - 1) * float(residuals @ residuals) / count**2
        if variance > 0:
            effective = min(effective, share * (1 - share) / variance)
        quantile = (1 + CONFIDENCE) / 2
        effective *= float(special.ndtri(quantile) / special.stdtrit(len(filled) - 1, quantile)) ** 2
    successes, tail = share * effective, (1 - CONFIDENCE) / 2
    low = float(special.betaincinv(successes, effective - successes + 1, tail))
    high = float(special.betaincinv(successes + 1, effective - successes, 1 - tail))
    return Interval(
        estimate,
        float(np.quantile(pooled, low)) if low * count >= 1 else 0.0,
        float(np.quantile(pooled, high)) if (1 - high) * count >= 1 else math.inf,
    )


def shift_interval(values: Sequence[float], others: Sequence[float]) -> Interval:
    """Interval of how many times larger `values` are than `others`, rounds of two separate runs.

    Hodges and Lehmann's estimate on logarithms: the median of all n·m ratios, between the two ratios that a
    Mann-Whitney test at 5 % leaves (Hollander, Wolfe and Chicken, "Nonparametric Statistical Methods", 3rd
    ed., section 4.2; the normal approximation). With fewer than LEAST_ROUNDS rounds on a side it is open.
    """
    first, second = (np.asarray(part, dtype=float) for part in (values, others))
    ratios = np.sort((first[:, None] / second[None, :]).ravel())
    middle = float(np.exp(np.median(np.log(ratios))))
    if min(len(first), len(second)) < LEAST_ROUNDS:
        return Interval(middle, 0.0, math.inf)
    pairs = len(first) * len(second)
    spread = math.sqrt(pairs * (len(first) + len(second) + 1) / 12)
    rank = max(1, math.floor(pairs / 2 - float(special.ndtri((1 + CONFIDENCE) / 2)) * spread))
    return Interval(middle, float(ratios[rank - 1]), float(ratios[-rank]))
