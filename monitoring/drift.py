"""Detect that data no longer are those that the model was trained for, with a proved bound on false alarms.

A mixture Shiryaev-Roberts e-detector (Shin, Ramdas & Rinaldo, "E-detectors", NEJSDS 2023, article 59) watches a number
z from 0 to 1 that has a mean of at most m as long as nothing has changed:

    M <- (M + 1) · (1 + bet · (z - m)),    alarm when the mean of M over the bets is at least the threshold

With E[z | past] <= m the expected M grows by at most 1 an observation, whatever z's distribution and however its values
depend on each other. So the mean time until a false alarm is at least the threshold less the M to begin with, the head
start (Moustakides, Polunchenko & Tartakovsky, "A numerical approach to performance analysis of quickest change-point
detection procedures", Statistica Sinica 21, 2011). With K numbers each has the threshold K · (bound + head start), so
the bound holds for all together.
"""

import csv
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

# Requests or labels until a false alarm: requests come often, labels seldom.
INPUT_BOUND, PREDICTION_BOUND, ACCURACY_BOUND = 1e8, 1e8, 1e5
# Evidence to begin with, about as much as there is after a long time without a change: what is wrong from the first
# observation on is found as fast as what changes later. It adds at most HEAD_START / bound to the chance of a false
# alarm, once for each start.
HEAD_START = 30.0
# A reference is a sample, too: 455 rows give a mean rank to ± 0.0135 (one standard deviation), 114 to ± 0.027. And a
# drift within the tolerance harms nobody: 0.05 is a shift by 0.18 standard deviations.
INPUT_TOLERANCE, PREDICTION_TOLERANCE = 0.05, 0.10
# Bets as fractions of the largest that keeps M above 0: the small ones find small changes, the large ones large ones.
BETS = np.array([0.03, 0.06, 0.12, 0.24, 0.42, 0.62, 0.82])
# Of errors the limit is low, and so are the best bets. 0.09, the best where errors have doubled, weighs three times.
ERROR_BETS = np.array([0.04, 0.09, 0.09, 0.09, 0.22])
CONFIDENCE = 0.95  # of the bound on the error that the reference's own errors allow
LARGEST = 1e250  # beyond the alarm evidence grows without an end
BLOCK = 64  # observations at once: 64 factors of 0.18 to 3 multiply to numbers that a double holds


class Detectors:
    """K e-detectors over the same observations."""

    def __init__(self, limits: np.ndarray, bound: float, bets: np.ndarray = BETS):
        """`limits` (K,): the largest means without a change; `bets` as fractions of the largest."""
        self.limits = np.asarray(limits, float)
        self.bets = bets / self.limits[:, None]  # (K, bets)
        self.evidence = np.full_like(self.bets, HEAD_START)
        self.threshold = len(self.limits) * (bound + HEAD_START)
        self.observations = 0

    def observe(self, z: np.ndarray) -> np.ndarray:
        """Take the next n observations, (n, K); return which detectors are at the threshold after each, (n, K) of bool.

        The recursion is solved for a block of observations at once: with F(t) the product of the first t factors,
        M(t) = F(t) · (M(0) + the sum of 1 / F(s) over s < t). Time is the last axis, along which numpy multiplies and
        adds up fastest.
        """
        reached = []
        for first in range(0, len(z), BLOCK):
            part = z[first : first + BLOCK].T - self.limits[:, None]
            factors = 1 + self.bets[:, :, None] * part[:, None]  # (K, bets, block)
            products = np.cumprod(factors, axis=2)
            sums = np.cumsum(factors / products, axis=2)  # factors / products is 1 / the product before
            evidence = products * (self.evidence[:, :, None] + sums)
            reached.append(evidence.sum(axis=1) >= self.threshold * self.bets.shape[1])
            self.evidence = np.minimum(evidence[:, :, -1], LARGEST)
        self.observations += len(z)
        return np.concatenate(reached, axis=1).T

    @property
    def progress(self) -> np.ndarray:
        """The evidence on a logarithmic scale from that at the start, or less, (0) to an alarm (1), (K,)."""
        evidence = np.maximum(self.evidence.mean(axis=1), HEAD_START)
        return np.log(evidence / HEAD_START) / math.log(self.threshold / HEAD_START)


def rank(values: np.ndarray, reference: list[np.ndarray]) -> np.ndarray:
    """Return the share of the reference below each value, equal ones half: uniform from 0 to 1 without a drift.

    `values` (n, k); `reference` k sorted arrays; returns (n, k).
    """
    counts = [np.searchsorted(r, v) + np.searchsorted(r, v, "right") for r, v in zip(reference, values.T, strict=True)]
    return np.stack(counts, axis=1) / (2 * len(reference[0]))


def spread_out(u: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return what is watched of ranks (rows, k): higher, lower, wider; the means over each request's rows, (n, 3k).

    `starts` (n,) are the places of each request's first row. A request of many rows is one observation: its rows need
    not be independent.
    """
    sums = np.add.reduceat(np.concatenate([u, 1 - u, np.abs(2 * u - 1)], axis=1), starts, axis=0)
    return sums / np.diff(starts, append=len(u))[:, None]


def bound_error(errors: int, n: int) -> float:
    """Return the largest error rate that `errors` of `n` do not exclude (Clopper & Pearson 1934, one-sided)."""
    low, high = 0.0, 1.0
    for _ in range(60):
        rate = (low + high) / 2
        at_most = sum(math.comb(n, k) * rate**k * (1 - rate) ** (n - k) for k in range(errors + 1))
        low, high = (rate, high) if at_most > 1 - CONFIDENCE else (low, rate)
    return low


@dataclass
class Reference:
    """The training and test data, from data/, with which new data are compared."""

    features: list[np.ndarray]  # train.csv by columns, 5 of 455, each sorted
    benign: dict[str, list[np.ndarray]]  # by version: P(benign) of test.csv's rows, 1 of 114, sorted
    errors: dict[str, tuple[int, int]]  # by version: errors in test.csv, and its rows
    names: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> "Reference":
        """Read train.csv, test.csv and expected.csv; raise OSError, ValueError or KeyError if they are damaged."""
        with (folder / "train.csv").open(newline="") as file:
            head, *lines = csv.reader(file)
        features = np.array([line[:-1] for line in lines], float)
        with (folder / "test.csv").open(newline="") as file:
            targets = np.array([int(line["target"]) for line in csv.DictReader(file)])
        with (folder / "expected.csv").open(newline="") as file:
            expected = list(csv.DictReader(file))
        benign = {v: np.array([float(row[f"v{v}_benign"]) for row in expected]) for v in ("1", "2")}
        errors = {v: (int(((p >= 0.5) != targets).sum()), len(targets)) for v, p in benign.items()}
        return cls(list(np.sort(features.T)), {v: [np.sort(p)] for v, p in benign.items()}, errors, head[:-1])


class Watch:
    """Watches inputs, predictions and errors of one server and version; of an unknown version only the inputs.

    An alarm stays until `reset`: the end of new evidence does not show that the drift is over.
    """

    KINDS = ("input", "prediction", "accuracy")

    def __init__(self, reference: Reference, version: str):
        self.reference, self.version = reference, version
        k = len(reference.names)
        ways = ("higher", "lower", "wider")
        self.statistics = {
            "input": [f"{name} {way}" for way in ways for name in reference.names],
            "prediction": [f"P(benign) {way}" for way in ways],
            "accuracy": ["errors"],
        }
        self.detectors = {"input": Detectors(np.full(3 * k, 0.5 + INPUT_TOLERANCE), INPUT_BOUND)}
        if version in reference.benign:
            limit = bound_error(*reference.errors[version])
            self.detectors["prediction"] = Detectors(np.full(3, 0.5 + PREDICTION_TOLERANCE), PREDICTION_BOUND)
            self.detectors["accuracy"] = Detectors(np.array([limit]), ACCURACY_BOUND, ERROR_BETS)
        self.alarms: dict[str, dict[str, int]] = {kind: {} for kind in self.KINDS}

    def observe(self, rows: np.ndarray, benign: np.ndarray, starts: np.ndarray) -> list[tuple[str, str]]:
        """Take the rows (rows, 5) and the P(benign) (rows,) of n requests, in order; return the new alarms.

        `starts` (n,) are the places of each request's first row. An alarm is its kind and its statistic.
        """
        found = self._observe("input", spread_out(rank(rows, self.reference.features), starts))
        if "prediction" in self.detectors:
            u = rank(benign[:, None], self.reference.benign[self.version])
            found += self._observe("prediction", spread_out(u, starts))
        return found

    def observe_labels(self, errors: np.ndarray) -> list[tuple[str, str]]:
        """Take n labels, (n,): 1 where the prediction was wrong, 0 where it was right; return the new alarms."""
        return self._observe("accuracy", errors[:, None]) if "accuracy" in self.detectors else []

    def _observe(self, kind: str, z: np.ndarray) -> list[tuple[str, str]]:
        detectors, known = self.detectors[kind], self.alarms[kind]
        before, found = detectors.observations, []
        reached = detectors.observe(z)
        for place in sorted(np.flatnonzero(reached.any(axis=0)), key=lambda place: reached[:, place].argmax()):
            name = self.statistics[kind][place]
            if name not in known:
                known[name] = before + int(reached[:, place].argmax()) + 1
                found.append((kind, name))
        return found

    def reset(self) -> None:
        """Forget all evidence and all alarms."""
        self.__init__(self.reference, self.version)

    def dump(self) -> dict:
        """Return the state for `load`, in JSON's types."""
        detectors = {k: [d.observations, d.evidence.tolist()] for k, d in self.detectors.items()}
        return {"detectors": detectors, "alarms": self.alarms}

    def load(self, kept: dict) -> None:
        """Restore the state of `dump`; ValueError, KeyError, TypeError, AttributeError or OverflowError if it is none.

        A detector whose state does not fit begins again, which keeps its bound.
        """
        for kind, (observations, evidence) in kept["detectors"].items():
            detectors = self.detectors.get(kind)
            if detectors and np.shape(evidence) == detectors.evidence.shape:
                numbers = np.array(evidence, float)
                if not ((numbers >= 0) & (numbers <= LARGEST)).all():  # NaN would never be at the threshold
                    raise ValueError("evidence is from 0 to LARGEST")
                detectors.observations, detectors.evidence = int(observations), numbers
        for kind in self.KINDS:
            self.alarms[kind] = {str(name): int(at) for name, at in kept["alarms"].get(kind, {}).items()}
