"""How sure a figure is: confidence intervals of percentiles and rates, and verdicts that compare two servers.

Requests of one round share its luck (a neighbour on the machine, a warm cache), so they are not
independent observations of the server. Every interval here therefore rests on the rounds: each
round's figure is one observation, and Student's t says how far their mean may lie from the truth.
"""

from dataclasses import dataclass

import numpy as np
from scipy import special  # scipy.stats has the same quantiles, and takes seconds to import

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate and the range that covers the truth in 95 of 100 such measurements."""

    estimate: float
    low: float
    high: float

    def overlaps(self, other: "Interval") -> bool:
        return self.low <= other.high and other.low <= self.high


def mean_interval(values: list[float]) -> Interval:
    """Interval of the geometric mean of positive `values`, one a round.

    Student's t on logarithms (ratios and times vary in proportion), k - 1 degrees of freedom. With
    fewer than two rounds the range is (0, inf): one round says nothing about the spread.
    """
    logs = np.log(np.asarray(values, dtype=float))
    middle = float(logs.mean())
    if len(logs) < 2:
        return Interval(float(np.exp(middle)), 0.0, float("inf"))
    half = float(special.stdtrit(len(logs) - 1, (1 + CONFIDENCE) / 2) * logs.std(ddof=1) / np.sqrt(len(logs)))
    return Interval(*(float(np.exp(middle + shift)) for shift in (0, -half, half)))


def percentile_interval(sorted_values: np.ndarray, percent: float) -> Interval:
    """Interval of a percentile of independent observations, from order statistics.

    The number of observations below the true percentile is binomial, so two of the sorted values
    bracket it with known confidence whatever the distribution (David and Nagaraja, "Order
    Statistics", 3rd ed., section 7.1). Where the sample is too small the range is open: 0 or inf.
    """
    count = len(sorted_values)
    low, high = (
        binomial_quantile(share, count, percent / 100) for share in ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
    )
    return Interval(
        float(np.percentile(sorted_values, percent)),
        float(sorted_values[low - 1]) if low >= 1 else 0.0,
        float(sorted_values[high]) if high < count else float("inf"),
    )


def binomial_quantile(share: float, count: int, probability: float) -> int:
    """Return the least number of successes in `count` trials whose cumulative probability reaches `share`."""
    successes = int(np.ceil(special.bdtrik(share, count, probability)))
    one_less_reaches = successes > 0 and special.bdtr(successes - 1, count, probability) >= share  # bdtrik is rounded
    return successes - 1 if one_less_reaches else successes


def compare_rates(name_a: str, rates_a: list[float], name_b: str, rates_b: list[float]) -> str:
    """Return the verdict on two servers measured in the same rounds: how many times faster, or no difference.

    The rounds are pairs (interleaved in time), so the ratio is taken round by round.
    """
    if len(rates_a) < 2:
        return f"{name_a} and {name_b}: one round cannot tell a difference from chance"
    ratio = mean_interval([a / b for a, b in zip(rates_a, rates_b, strict=True)])
    if ratio.low > 1:
        return f"{name_a} faster than {name_b} by {ratio.low:.2f}–{ratio.high:.2f}×"
    if ratio.high < 1:
        return f"{name_b} faster than {name_a} by {1 / ratio.high:.2f}–{1 / ratio.low:.2f}×"
    return f"{name_a} and {name_b}: no significant difference ({ratio.low:.2f}–{ratio.high:.2f}×)"


def ratio_interval(values_a: list[float], values_b: list[float]) -> Interval:
    """Interval of how many times larger a is than b, from rounds of two separate runs.

    Welch's t on logarithms: unequal variances, degrees of freedom after Welch and Satterthwaite. With
    fewer than two rounds on a side the range is (0, inf).
    """
    logs = [np.log(np.asarray(values, dtype=float)) for values in (values_a, values_b)]
    middle = float(logs[0].mean() - logs[1].mean())
    if min(map(len, logs)) < 2:
        return Interval(float(np.exp(middle)), 0.0, float("inf"))
    parts = [part.var(ddof=1) / len(part) for part in logs]
    variance = sum(parts)
    if variance == 0:
        return Interval(*[float(np.exp(middle))] * 3)
    freedom = variance**2 / sum(part**2 / (len(log) - 1) for part, log in zip(parts, logs, strict=True))
    half = float(special.stdtrit(freedom, (1 + CONFIDENCE) / 2) * np.sqrt(variance))
    return Interval(*(float(np.exp(middle + shift)) for shift in (0, -half, half)))
