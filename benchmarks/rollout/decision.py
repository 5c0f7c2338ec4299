"""Decide between two versions of a model from what their users saw: the plan, the differences, the verdict.

Pure arithmetic on sums; nothing here asks a server. All arrays may have leading axes, so that tests judge
thousands of simulated experiments at once.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np
from scipy import special

from rollout.alpha_spending import find_boundaries, find_drift, find_power

PROMOTE, ROLL_BACK, UNDECIDED = "promote", "roll back", "not enough evidence"
METRICS = ("accuracy", "brier", "latency")
DECIDING = 4  # accuracy, Brier score, latency and failures share alpha evenly (Bonferroni)
MISMATCH_ALPHA = 0.01  # chance to find a sample-ratio mismatch if there is none, over all looks
PRIOR_USERS = 30
LEAST_STRAYS, STRAY_SHARE = 3, 0.01  # from here on users without a single version invalidate the comparison


@dataclass(frozen=True)
class Plan:
    """What is fixed before the first user comes. Made by `make_plan`."""

    baseline_accuracy: float  # version 1's, known from the test rows
    margin: float  # the accuracy difference to find, and the loss that a promotion must exclude
    latency_margin: float  # how much slower, as a share, a promoted version may be
    alpha: float  # chance of `promote` or `roll back` if the versions are equal, at most
    power: float  # chance to find a difference of `margin`, and to exclude a loss of it if there is none
    rows_per_user: int
    shares: tuple[float, ...]  # version 2's share of the users, by step; an A/B test has one step
    users_per_step: int
    looks_per_step: int
    needs_gain: bool  # promote only a better version (A/B test), or also an equal one (canary)
    users: np.ndarray = field(repr=False)  # (looks,) that have come by each look
    quality_z: np.ndarray = field(repr=False)  # (looks,) boundaries of accuracy and Brier score
    guard_z: np.ndarray = field(repr=False)  # (looks,) boundaries of latency and failures

    @property
    def looks(self) -> int:
        return len(self.users)

    def step(self, look: int) -> int:
        """The step that look number `look`, from 0, belongs to."""
        return look // self.looks_per_step

    def users_of_look(self, look: int) -> range:
        """The numbers of the users who come between the look before and this one."""
        return range(int(self.users[look - 1]) if look else 0, int(self.users[look]))


def make_plan(
    baseline_accuracy: float,
    margin: float,
    latency_margin: float,
    alpha: float = 0.05,
    power: float = 0.9,
    rows_per_user: int = 3,
    shares: Sequence[float] = (0.5,),
    looks_per_step: int = 10,
    needs_gain: bool = True,
    users_per_step: int | None = None,
) -> Plan:
    """Return the plan with the number of users that it needs, or, given `users_per_step`, with the power these have.

    A user's accuracy over m rows has variance p(1-p)/m, taken as the mean of that at the baseline and at the
    margin below it. The difference of two versions, v2 with share s of n users, has that times 1/(s(1-s)n),
    over all steps 1/sum(s(1-s)n). With one look, n is what makes the margin z(1-alpha/2) + z(power) standard
    errors wide (Fleiss, Levin and Paik, "Statistical Methods for Rates and Proportions", 3rd ed., chapter 4);
    with more, the drift that crosses the boundaries with chance `power` takes the place of that sum. A loss of
    the margin is excluded by the same interval, so with the same power.
    """
    weights = np.repeat([share * (1 - share) for share in shares], looks_per_step) / looks_per_step
    compared = int(np.count_nonzero(weights))  # at a share of 1 nothing is left to compare version 2 with
    fractions = np.cumsum(weights[:compared]) / weights.sum()
    fractions[-1] = 1.0
    quality_z = find_boundaries(fractions, alpha / DECIDING, "late")
    guard_z = find_boundaries(np.arange(1, len(weights) + 1) / len(weights), alpha / DECIDING, "evenly")
    variance = np.mean([p * (1 - p) for p in (baseline_accuracy, baseline_accuracy - margin)]) / rows_per_user
    if users_per_step is None:
        drift = find_drift(fractions, quality_z, power)
        users_per_step = int(np.ceil(drift**2 * variance / margin**2 / weights.sum()))
    else:
        power = find_power(fractions, quality_z, margin * np.sqrt(users_per_step * weights.sum() / variance))
    users = np.ceil(np.arange(1, len(weights) + 1) * users_per_step / looks_per_step).astype(int)
    quality_z = np.concatenate([quality_z, np.full(len(weights) - compared, quality_z[-1])])
    return Plan(
        baseline_accuracy, margin, latency_margin, alpha, power, rows_per_user, tuple(shares), users_per_step,
        looks_per_step, needs_gain, users, quality_z, guard_z,
    )  # fmt: skip


@dataclass
class User:
    """What one user saw."""

    number: int
    step: int
    versions: list[str] = field(default_factory=list)  # of the replies that named one, in order
    rows: list[int] = field(default_factory=list)  # the test rows that were answered
    benign: list[float] = field(default_factory=list)  # P(benign), row by row
    latencies_s: list[float] = field(default_factory=list)  # row by row
    failures: list[str] = field(default_factory=list)  # reasons: an error, no reply, no probabilities in it

    @property
    def version(self) -> str | None:
        """The first version that answered: the one that the split assigned."""
        return self.versions[0] if self.versions else None


@dataclass(frozen=True)
class Tally:
    """Sums over users, in arrays (..., steps, 2): the last axis is version 1, version 2."""

    users: np.ndarray
    failed: np.ndarray  # users with at least one failure
    measured: np.ndarray  # users with at least one answer: they have means
    sums: dict[str, np.ndarray]  # by metric: the sum of the users' means
    squares: dict[str, np.ndarray]  # by metric: the sum of their squares
    strays: np.ndarray  # (...): users who saw both versions, or none that was named


def tally_users(users: Iterable[User], labels: Sequence[int], steps: int) -> Tally:
    """Sum up what `users` saw; `labels` are those of the test rows.

    Accuracy is the share of right answers at a threshold of 0.5, the Brier score the mean of (p - label)^2
    (Brier, "Verification of forecasts expressed in terms of probability", 1950), latency the mean of log seconds.
    """
    counts = {name: np.zeros((steps, 2)) for name in ("users", "failed", "measured")}
    sums = {metric: np.zeros((steps, 2)) for metric in METRICS}
    squares = {metric: np.zeros((steps, 2)) for metric in METRICS}
    strays = 0
    for user in users:
        strays += len(set(user.versions)) != 1
        if user.version is None:
            continue
        place = (user.step, ("1", "2").index(user.version))
        counts["users"][place] += 1
        counts["failed"][place] += bool(user.failures)
        if not user.rows:
            continue
        counts["measured"][place] += 1
        answers = [(benign, labels[row]) for benign, row in zip(user.benign, user.rows, strict=True)]
        means = {  # of a few rows a user: plain numbers are quicker than arrays
            "accuracy": fmean((benign >= 0.5) == label for benign, label in answers),
            "brier": fmean((benign - label) ** 2 for benign, label in answers),
            "latency": fmean(map(math.log, user.latencies_s)),
        }
        for metric, mean in means.items():
            sums[metric][place] += mean
            squares[metric][place] += mean**2
    return Tally(**counts, sums=sums, squares=squares, strays=np.array(strays))


def find_difference(
    tally: Tally, metric: str, least_variance: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (version 2 minus version 1, its standard error, degrees of freedom), each (...).

    Versions are compared within each step and the steps are added up with Mantel and Haenszel's weights
    n1 n2 / (n1 + n2), so that a change over time, which meets the versions in unequal shares, does not
    pass for a difference (Simpson's paradox). A small arm's own variance is too small more often than not: it
    is mixed with the pooled one as if PRIOR_USERS more had shown that, and is `least_variance` at least. The
    error is infinite if an arm is empty.
    """
    counts, sums, squares = tally.measured, tally.sums[metric], tally.squares[metric]
    with np.errstate(divide="ignore", invalid="ignore"):
        means = np.where(counts > 0, sums / counts, 0.0)
        both = counts[..., 0] * counts[..., 1]
        weights = np.where(both > 0, both / counts.sum(-1), 0.0)  # (..., steps)
        total = weights.sum(-1)
        estimate = (weights * (means[..., 1] - means[..., 0])).sum(-1) / total
        spread = np.maximum(squares - counts * means**2, 0.0).sum(-2)  # (..., 2) around the steps' own means
        freedom = np.maximum(counts.sum(-2) - (counts > 0).sum(-2), 0.0)
        pooled = spread.sum(-1, keepdims=True) / np.maximum(freedom.sum(-1, keepdims=True), 1.0)
        variance = (spread + PRIOR_USERS * pooled) / (freedom + PRIOR_USERS)
        variance = np.maximum(variance, least_variance)  # (..., 2)
        parts = np.where(both > 0, weights**2 * (variance[..., None, :] / counts).sum(-1), 0.0)
        error = np.sqrt(parts.sum(-1)) / total
    known = total > 0
    return np.where(known, estimate, 0.0), np.where(known, error, np.inf), freedom.min(-1)


@dataclass(frozen=True)
class Judgement:
    """The result of one look; arrays (...), which are scalars for one experiment."""

    verdict: np.ndarray  # PROMOTE, ROLL_BACK or UNDECIDED
    reason: np.ndarray  # a few words
    ends: np.ndarray  # whether the experiment stops here, whatever is left of the plan
    estimates: dict[str, np.ndarray]  # version 2 minus version 1 by metric; latency in logarithms
    lows: dict[str, np.ndarray]  # repeated confidence intervals: they hold at all looks together
    highs: dict[str, np.ndarray]
    mismatch_p: np.ndarray  # of the users' split, in this step
    failure_p: np.ndarray  # that version 2 fails more users


def judge(plan: Plan, tally: Tally, look: int) -> Judgement:
    """Judge what has come in by look number `look`, from 0.

    The intervals are repeated confidence intervals (Jennison and Turnbull, "Group Sequential Methods", 2000,
    chapter 9): estimate -/+ the look's boundary times the standard error, the boundary taken from Student's t
    at the same level if an arm is small. Failures are compared by Fisher's exact test at the look's level.
    Harm in any of the four rolls back; a promotion needs a loss of the margin excluded and, in an A/B test, a
    gain in accuracy or Brier score.
    """
    estimates, lows, highs = {}, {}, {}
    variance = plan.baseline_accuracy * (1 - plan.baseline_accuracy) / plan.rows_per_user
    for metric in METRICS:
        estimate, error, freedom = find_difference(tally, metric, variance if metric == "accuracy" else 0.0)
        level = special.ndtr(-(plan.guard_z if metric == "latency" else plan.quality_z)[look])
        factor = np.where(freedom >= 1, -special.stdtrit(np.maximum(freedom, 1), level), np.inf)
        with np.errstate(invalid="ignore"):
            half = np.where(np.isfinite(factor) & np.isfinite(error), factor * error, np.inf)
        most = np.inf if metric == "latency" else 1.0  # shares and Brier scores lie between 0 and 1
        estimates[metric] = estimate
        lows[metric], highs[metric] = np.maximum(estimate - half, -most), np.minimum(estimate + half, most)

    step = plan.step(look)
    ones, twos = tally.users[..., step, 0], tally.users[..., step, 1]
    mismatch_p = _binomial_p(twos, ones + twos, plan.shares[step])
    failure_p = _fisher_p(tally)

    slower = np.log1p(plan.latency_margin)
    last = look == plan.looks - 1
    accurate, quick = lows["accuracy"] > -plan.margin, highs["latency"] < slower
    harmless = accurate & quick
    better = (lows["accuracy"] > 0) | (highs["brier"] < 0)
    good = harmless & (better if plan.needs_gain else last)
    cases = [
        (mismatch_p < MISMATCH_ALPHA / plan.looks, UNDECIDED, "sample ratio mismatch: the split is not as set"),
        (
            (tally.strays >= LEAST_STRAYS) & (tally.strays > STRAY_SHARE * tally.users.sum((-1, -2))),
            UNDECIDED, "users saw both versions or none: the split does not hold",
        ),
        (failure_p <= special.ndtr(-plan.guard_z[look]), ROLL_BACK, "version 2 fails more users"),
        (highs["accuracy"] < 0, ROLL_BACK, "version 2 is less accurate"),
        (lows["brier"] > 0, ROLL_BACK, "version 2's probabilities are worse (Brier score)"),
        (lows["latency"] > slower, ROLL_BACK, "version 2 is slower than allowed"),
        (good & (lows["accuracy"] > 0), PROMOTE, "version 2 is more accurate and harmless otherwise"),
        (good & (highs["brier"] < 0), PROMOTE, "version 2's probabilities are better (Brier score), and no harm"),
        (good, PROMOTE, "version 2 does no harm"),
    ]  # fmt: skip
    conditions = [np.asarray(condition) for condition, _, _ in cases]
    undecided = np.select(
        [~accurate, ~quick],
        ["version 2 may be less accurate than allowed", "version 2 may be slower than allowed"],
        "no harm, and no gain that is more than chance",
    )
    return Judgement(
        np.select(conditions, [verdict for _, verdict, _ in cases], UNDECIDED),
        np.select(conditions, [reason for _, _, reason in cases], undecided),
        np.any(conditions, axis=0) | last,
        estimates, lows, highs, mismatch_p, failure_p,
    )  # fmt: skip


def _binomial_p(successes: np.ndarray, count: np.ndarray, share: float) -> np.ndarray:
    """Return the exact two-sided p, twice the smaller tail, of a binomial count."""
    lower = special.bdtr(successes, count.astype(int), share)
    upper = special.bdtrc(successes - 1, count.astype(int), share)
    p: np.ndarray = np.minimum(1.0, 2 * np.minimum(lower, upper))
    return p


def _fisher_p(tally: Tally) -> np.ndarray:
    """Return Fisher's exact one-sided p that version 2 fails more users than version 1."""
    failed, users = tally.failed.sum(-2), tally.users.sum(-2)  # (..., 2)
    if not failed[..., 1].any():
        return np.ones(failed.shape[:-1])
    from scipy import stats  # only here: it takes seconds to import

    p: np.ndarray = stats.hypergeom.sf(failed[..., 1] - 1, users.sum(-1), failed.sum(-1), users[..., 1])
    return p
