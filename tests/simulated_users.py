"""Thousands of experiments at once, whose users see the reference's answers: for the tests of rollout/decision.py."""

from collections.abc import Iterator

import numpy as np

from endpoints.reference import load_expected, load_test_rows
from rollout.decision import METRICS, ROLL_BACK, UNDECIDED, Plan, Tally, judge

LABELS = np.array(load_test_rows()[1])


def table(benign: np.ndarray) -> dict[str, np.ndarray]:
    """What each test row gives, (rows,) by metric, where the model says `benign`."""
    return {"accuracy": ((benign >= 0.5) == LABELS).astype(float), "brier": (benign - LABELS) ** 2}


def of_version(version: str) -> dict[str, np.ndarray]:
    return table(load_expected(version)[:, 1])


def with_accuracy(accuracy: float) -> dict[str, np.ndarray]:
    """Answers of an accuracy of any height: each row is right with that chance."""
    return {"accuracy": np.full(len(LABELS), accuracy), "brier": of_version("1")["brier"]}


def simulate(
    plan: Plan,
    tables: tuple[dict, dict],
    runs: int,
    seed: int,
    slower: float = 1.0,
    failing: tuple[float, float] = (0.0, 0.0),
    share: float | None = None,
    drift: float = 0.0,
) -> Iterator[Tally]:
    """Yield the tallies of `runs` experiments look by look; `drift` slows both versions from step to step."""
    random = np.random.default_rng(seed)
    both = {metric: np.stack([one[metric] for one in tables]) for metric in ("accuracy", "brier")}  # (2, rows)
    shape = (runs, len(plan.shares), 2)
    counts = {name: np.zeros(shape) for name in ("users", "failed", "measured")}
    sums, squares = ({metric: np.zeros(shape) for metric in METRICS} for _ in range(2))
    for look in range(plan.looks):
        step = plan.step(look)
        many = (runs, len(plan.users_of_look(look)))
        is_two = random.random(many) < (plan.shares[step] if share is None else share)
        rows = random.integers(len(LABELS), size=(plan.rows_per_user, *many))
        # The mean of rows_per_user logarithms that spread by 0.5.
        log_s = random.normal(0, 0.5 / plan.rows_per_user**0.5, many) + is_two * np.log(slower) + drift * step
        seen = {metric: both[metric][is_two.astype(int), rows] for metric in both}
        chances = seen["accuracy"]
        if np.any(chances % 1):
            seen["accuracy"] = random.random(rows.shape) < chances
        means = {"latency": log_s, **{metric: values.mean(0) for metric, values in seen.items()}}
        fails = random.random(many) < np.where(is_two, failing[1], failing[0])
        for version, is_here in enumerate((~is_two, is_two)):
            place = (slice(None), step, version)
            counts["users"][place] += is_here.sum(-1)
            counts["measured"][place] += is_here.sum(-1)
            counts["failed"][place] += (is_here & fails).sum(-1)
            for metric in METRICS:
                sums[metric][place] += (means[metric] * is_here).sum(-1)
                squares[metric][place] += (means[metric] ** 2 * is_here).sum(-1)
        yield Tally(**counts, sums=sums, squares=squares, strays=np.zeros(runs))


def run_to_the_end(plan: Plan, tallies: Iterator[Tally]) -> tuple[np.ndarray, np.ndarray]:
    """Return (verdicts, looks until they fell), each (runs,): everyone stops at the first look that ends it."""
    verdicts = looks = None
    for look, tally in enumerate(tallies):
        judgement = judge(plan, tally, look)
        if verdicts is None:
            verdicts = np.full(judgement.verdict.shape, UNDECIDED, dtype="<U20")
            looks = np.full(verdicts.shape, plan.looks)
            going = np.ones(verdicts.shape, bool)
        now = going & judgement.ends
        verdicts[now] = judgement.verdict[now]
        looks[now] = look + 1
        going &= ~judgement.ends
    return verdicts, looks


def share_of(verdicts: np.ndarray, *wanted: str) -> float:
    return float(np.isin(verdicts, wanted or (ROLL_BACK,)).mean())
