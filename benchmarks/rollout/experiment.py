"""What an A/B test and a canary share: the users' record, its looks in words, and the options of both commands."""

import argparse
import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special

from endpoints.base import Endpoint, load_endpoints
from endpoints.reference import load_expected, load_test_rows
from figures.intervals import CONFIDENCE
from machine.environment import describe_environment
from rollout.decision import Judgement, Plan, User, judge, make_plan, tally_users
from rollout.gateway_cli import find_certificate, gateway_url, lent_key
from rollout.split_users import Crowd, Split

EXPERIMENT_VERSION = 1
PLAN_SETTINGS = (
    "baseline_accuracy margin latency_margin alpha rows_per_user shares looks_per_step needs_gain users_per_step"
).split()


def plan_of(result: dict[str, Any]) -> Plan:
    """The plan of a result file."""
    return make_plan(**{name: result["plan"][name] for name in PLAN_SETTINGS})


def encode_users(users: Iterable[User]) -> list[dict[str, Any]]:
    """Return what each user saw as JSON-able values; latencies in whole microseconds."""
    return [
        {**{key: value for key, value in asdict(user).items() if key != "latencies_s"},
         "latencies_us": [round(latency_s * 1e6) for latency_s in user.latencies_s]}
        for user in users
    ]  # fmt: skip


def decode_users(looks: Iterable[dict[str, Any]]) -> list[User]:
    """Return the users of some looks of a result file."""
    users = []
    for about in (about for look in looks for about in look["users"]):
        latencies_s = [latency_us / 1e6 for latency_us in about["latencies_us"]]
        seen = {key: value for key, value in about.items() if key != "latencies_us"}
        users.append(User(**seen, latencies_s=latencies_s))
    return users


def judge_look(result: dict[str, Any], plan: Plan, look: int) -> tuple[Judgement, list[User]]:
    """Judge a result file's users up to look number `look`, from 0; return also the users."""
    users = decode_users(result["looks"][: look + 1])
    return judge(plan, tally_users(users, load_test_rows()[1], len(plan.shares)), look), users


def describe_plan(plan: Plan) -> str:
    """The plan in one line."""
    users = f"{plan.users[-1]:,} users of {plan.rows_per_user} rows"
    share = ", ".join(f"{share:.0%}" for share in plan.shares)
    return (
        f"plan: {users}, {share} of them with version 2, in {plan.looks} looks: finds an accuracy {plan.margin * 100:g}"
        f" points off {plan.baseline_accuracy:.3f} with power {plan.power:.2f}, alpha {plan.alpha:g} in all"
    )


def describe_look(plan: Plan, judgement: Judgement, users: list[User], look: int) -> list[str]:
    """One look in a few lines: who was there, the differences with intervals, the failures."""
    counts = Counter(user.version for user in users)
    failed = Counter(user.version for user in users if user.failures)
    strays = sum(len(set(user.versions)) != 1 for user in users)
    middle_ms = middle_latency_ms(users)
    ratio, low, high = (
        float(np.exp(part["latency"])) for part in (judgement.estimates, judgement.lows, judgement.highs)
    )
    return [
        f"look {look + 1} of {plan.looks}: {len(users):,} users, version 1 {counts['1']:,}, version 2 {counts['2']:,}, "
        f"both or none {strays:,}",
        f"  accuracy     {_signed(judgement, 'accuracy', 100, 2)} points",
        f"  Brier score  {_signed(judgement, 'brier', 1, 4)} (lower is better)",
        f"  latency      {ratio:.2f}× ({low:.2f} to {high:.2f}) of {middle_ms:.2f} ms: "
        f"{(ratio - 1) * middle_ms:+.2f} ms ({(low - 1) * middle_ms:+.2f} to {(high - 1) * middle_ms:+.2f})",
        f"  failed       version 1 {failed['1']:,} users, version 2 {failed['2']:,}",
    ]


def middle_latency_ms(users: Iterable[User]) -> float:
    """The geometric mean of version 1's users' latencies; nan if there is none."""
    logs = [np.mean(np.log(user.latencies_s)) for user in users if user.version == "1" and user.rows]
    return float(np.exp(np.mean(logs))) * 1e3 if logs else float("nan")


def describe_rows(users: Iterable[User]) -> str:
    """The interval for the next patient, the rows being a sample of patients: paired, each row under both versions."""
    labels = load_test_rows()[1]
    benign: dict[str, dict[int, float]] = {"1": {}, "2": {}}
    for user in users:
        if len(set(user.versions)) == 1:
            benign[user.versions[0]].update(zip(user.rows, user.benign, strict=True))
    rows = sorted(benign["1"].keys() & benign["2"].keys())
    if len(rows) < 2:
        return "for the next patient: too few rows were seen with both versions"
    truth = np.array([labels[row] for row in rows])
    ones, twos = (np.array([benign[version][row] for row in rows]) for version in ("1", "2"))
    right = [((values >= 0.5) == truth).astype(float) for values in (ones, twos)]
    figures = []
    for differences in (100 * (right[1] - right[0]), (twos - truth) ** 2 - (ones - truth) ** 2):
        half = -special.stdtrit(len(rows) - 1, (1 - CONFIDENCE) / 2) * differences.std(ddof=1) / np.sqrt(len(rows))
        figures.append((differences.mean(), differences.mean() - half, differences.mean() + half))
    (accuracy, low, high), brier = figures
    return (
        f"for the next patient, from {len(rows)} rows: accuracy {accuracy:+.1f} points ({low:+.1f} to {high:+.1f}), "
        "Brier score {:+.3f} ({:+.3f} to {:+.3f})".format(*brier)
    )


def _signed(judgement: Judgement, metric: str, factor: float, digits: int) -> str:
    values = (judgement.estimates[metric], judgement.lows[metric], judgement.highs[metric])
    return "{:+.{d}f} ({:+.{d}f} to {:+.{d}f})".format(*(float(value) * factor for value in values), d=digits)


def describe_failures(users: Iterable[User]) -> list[str]:
    """The most frequent failures, one a line."""
    failures = Counter((user.version or "?", reason) for user in users for reason in user.failures)
    return [f"version {version}: {count:,} × {reason}" for (version, reason), count in failures.most_common(5)]


def tell_look(result: dict[str, Any], plan: Plan, look: int, tell: Callable[[str], None]) -> Judgement:
    """Judge one look of a result and print it; return the judgement."""
    judgement, users = judge_look(result, plan, look)
    tell("\n".join(describe_look(plan, judgement, users, look)))
    return judgement


def baseline_accuracy() -> float:
    """Version 1's accuracy on the test rows, by the reference's answers."""
    return float(np.mean((load_expected("1")[:, 1] >= 0.5) == np.array(load_test_rows()[1])))


def start_result(arguments: argparse.Namespace, endpoint: Endpoint, plan: Plan) -> dict[str, Any]:
    """A result file's content before the first look."""
    return {
        "schema_version": EXPERIMENT_VERSION,
        "environment": describe_environment(["numpy", "scipy", *endpoint.packages]),
        "settings": {
            name: getattr(arguments, name) for name in ("endpoint", "url", "connections", "seed", "timeout", "power")
        },
        "plan": {name: getattr(plan, name) for name in PLAN_SETTINGS},
        "looks": [],
        "interrupted": "",
    }


@contextlib.contextmanager
def gather_crowd(arguments: argparse.Namespace, endpoint: Endpoint) -> Iterator[Crowd]:
    """The users that the command line describes, with a key that is made for them unless one is given."""
    with contextlib.nullcontext(arguments.api_key) if arguments.api_key else lent_key() as key:
        split = Split(arguments.url, key, arguments.certificate or find_certificate())
        with Crowd(
            endpoint, split, arguments.rows_per_user, arguments.seed, arguments.connections, arguments.timeout
        ) as crowd:
            yield crowd


def add_user_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the users, their rows and the gateway."""
    choices = [name for name, one in load_endpoints().items() if one.has_model and name == one.folder.name]
    parser.add_argument("--endpoint", choices=choices, default="onnx", help="which server (default: onnx)")
    parser.add_argument("--url", default=gateway_url(), help=f"the split's address (default: {gateway_url()})")
    parser.add_argument("--api-key", default="", help="the key to send (default: one made for this run)")
    parser.add_argument("--certificate", type=Path, help="PEM file that vouches for it (default: the gateway's own)")
    parser.add_argument("--alpha", type=float, default=0.05, help="chance of a false verdict (default: 0.05)")
    parser.add_argument("--rows-per-user", type=int, default=3, help="test rows that each user sends (default: 3)")
    parser.add_argument("--connections", type=int, default=4, help="users at a time (default: 4)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the users and their rows (default: 1)")
    parser.add_argument("--timeout", type=float, default=2.0, help="seconds until a reply has failed (default: 2)")
