"""Ship version 2 step by step through the gateway, and take it back by itself
if it does harm.

    python canary.py --endpoint onnx

Sets the split to 5, 25, 50 and 100 % in turn. At each step users send rows of
data/test.csv, and four looks compare accuracy, Brier score, latency and
failures of the two versions: one sequential test that goes on over all steps,
so that the chance to take back a version that is as good stays below 5 % for
the whole walk. Harm takes version 2 back at once; so does a replica of it that
is lost, a split that does not do what it is set to, a step that takes too long,
and Ctrl-C: all users then get version 1. At 100 % no user is left to compare
with; failures are watched there, and a promotion is final only after that step.
Writes results/canary-<time>.json and a plot next to it; `ab_test.py --read`
prints it again. Exit code 0 only if version 2 was promoted.
"""

import argparse
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import machine.packages  # noqa: F401

# isort: split
from rich.console import Console

from endpoints.base import load_endpoints
from figures.result_file import RESULTS_DIR, write_result
from machine.signals import deferred_interrupts, interrupt_on_sigterm
from rollout.decision import PROMOTE, ROLL_BACK, Judgement, Plan, make_plan
from rollout.experiment import (
    add_user_options,
    baseline_accuracy,
    decode_users,
    describe_failures,
    describe_plan,
    encode_users,
    gather_crowd,
    start_result,
    tell_look,
)
from rollout.gateway_cli import MODEL, GatewayError, call_gateway, count_replicas
from rollout.split_users import Crowd, SplitError

SHARES = (0.05, 0.25, 0.5, 1.0)
LOOKS_PER_STEP = 4


def walk(
    plan: Plan,
    crowd: Crowd,
    replicas: int,
    step_s: float,
    result: dict,
    judgements: list[Judgement],
    tell: Callable[[str], None],
) -> tuple[str, str]:
    """Walk the steps until the end or the first harm; return (verdict, reason). Fills `result` and `judgements`.

    `replicas` is how many version 2 had to begin with.
    """
    server = crowd.endpoint.folder.name
    for look in range(plan.looks):
        step = plan.step(look)
        if look % plan.looks_per_step == 0:
            tell(f"step {step + 1} of {len(plan.shares)}: {plan.shares[step]:.0%} of the users get version 2")
            call_gateway("set", MODEL, f"v2={round(plan.shares[step] * 100)}", "--server", server)
            deadline_s = time.monotonic() + step_s
        wanted = plan.users_of_look(look)
        users = crowd.send(wanted, step, deadline_s)
        result["looks"].append({"users": encode_users(users)})
        judgement = tell_look(result, plan, look, tell)
        judgements.append(judgement)
        if len(users) < len(wanted):
            return ROLL_BACK, f"the step took more than {step_s:g} s"
        if count_replicas(server) < replicas:  # version 1 answers for it, so that no user need notice
            return ROLL_BACK, "version 2 lost a replica"
        if judgement.ends:
            break
    verdict, reason = str(judgement.verdict), str(judgement.reason)
    if look < plan.looks - 1:  # harm, or a split that does not hold
        verdict = ROLL_BACK
    return verdict, reason


def ship(
    plan: Plan, crowd: Crowd, replicas: int, step_s: float, result: dict, tell: Callable[[str], None]
) -> list[Judgement]:
    """Walk, and leave the split at 100 % version 2 if it is promoted, else at 100 % version 1.

    Fills `result`, returns the judgement of each look.
    """
    server = crowd.endpoint.folder.name
    verdict, reason, judgements = ROLL_BACK, "interrupted", []
    try:
        verdict, reason = walk(plan, crowd, replicas, step_s, result, judgements, tell)
        if verdict == PROMOTE:
            call_gateway("promote", MODEL, "--server", server)
    except KeyboardInterrupt:
        verdict, reason = ROLL_BACK, "interrupted"
        result["interrupted"] = reason
    finally:
        if verdict != PROMOTE:
            with deferred_interrupts():
                call_gateway("rollback", MODEL, "--server", server)
    result["verdict"], result["reason"] = verdict, reason
    return judgements


def main() -> int:
    interrupt_on_sigterm()
    arguments = parse_arguments()
    console = Console(highlight=False, soft_wrap=True, markup=False)
    endpoint = load_endpoints()[arguments.endpoint]()
    plan = make_plan(
        baseline_accuracy(), arguments.margin / 100, arguments.latency_margin / 100, arguments.alpha, arguments.power,
        arguments.rows_per_user, SHARES, LOOKS_PER_STEP, needs_gain=False,
    )  # fmt: skip
    path = arguments.output or RESULTS_DIR / f"canary-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    result = start_result(arguments, endpoint, plan)
    console.print(describe_plan(plan))
    replicas = count_replicas(endpoint.folder.name)
    with gather_crowd(arguments, endpoint) as crowd:
        judgements = ship(plan, crowd, replicas, arguments.step_seconds, result, console.print)
    write_result(result, path)
    users = decode_users(result["looks"])
    for line in describe_failures(users):
        console.print(line)
    now = 2 if result["verdict"] == PROMOTE else 1
    last = f"verdict: {result['verdict']} ({result['reason']}; {len(users):,} users); all users get version {now}"
    if judgements:
        from rollout.plot import draw  # only here: matplotlib takes seconds to import

        draw(plan, judgements, last, path.with_suffix(".png"))
    console.print(f"wrote {path}")
    console.print(last)
    return 130 if result["interrupted"] else int(result["verdict"] != PROMOTE)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_user_options(parser)
    parser.add_argument("--margin", type=float, default=5.0, help="accuracy loss to exclude, in points (default: 5)")
    parser.add_argument(
        "--latency-margin", type=float, default=50.0, help="per cent that version 2 may be slower (default: 50)"
    )
    parser.add_argument("--power", type=float, default=0.95, help="chance to exclude it (default: 0.95)")
    parser.add_argument("--step-seconds", type=float, default=60.0, help="most that a step may take (default: 60)")
    parser.add_argument("--output", type=Path, help="the result file (default: results/canary-<time>.json)")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (SplitError, GatewayError) as error:
        sys.exit(f"canary: {error}")
    except KeyboardInterrupt:
        sys.exit("canary: interrupted; the split is as it was")
