"""Send users through the gateway's split and decide between version 1 and
version 2.

    python ab_test.py --endpoint onnx
        asks the gateway that runs: make gateway, in another terminal
    python ab_test.py --read results/x.json
        prints and draws a result again

Users send rows of data/test.csv; the gateway gives each user one of the
versions. The number of users follows from the accuracy difference to be found,
before the first one comes. They are looked at in ten parts, with boundaries
that keep the chance of a false verdict at 5 % over all looks together. The
verdict is `promote`, `roll back` or `not enough evidence`. Writes
results/ab-<time>.json, with the replies of every user, and a plot next to it.
Ctrl-C, or a gateway that is lost, ends it early: what came in by the last whole
look is judged and written, and the exit code is not 0.
"""

import argparse
import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import machine.packages  # noqa: F401

# isort: split
from rich.console import Console

from endpoints.base import load_endpoints
from figures.result_file import RESULTS_DIR, write_result
from machine.signals import interrupt_on_sigterm
from rollout.decision import Judgement, Plan, User, make_plan
from rollout.experiment import (
    EXPERIMENT_VERSION,
    add_user_options,
    baseline_accuracy,
    decode_users,
    describe_failures,
    describe_plan,
    describe_rows,
    encode_users,
    gather_crowd,
    plan_of,
    start_result,
    tell_look,
)
from rollout.gateway_cli import GatewayError, read_share
from rollout.split_users import Crowd, SplitError


def describe_end(result: dict, plan: Plan, judgement: Judgement, users: list[User]) -> list[str]:
    """The last lines: the next patient, the reasons of failures, the verdict."""
    reason = str(judgement.reason) if judgement.ends else result["interrupted"]
    verdict = f"verdict: {judgement.verdict} ({reason}; {len(users):,} of {plan.users[-1]:,} users)"
    return [*describe_failures(users), describe_rows(users), verdict]


def measure(plan: Plan, crowd: Crowd, result: dict, tell: Callable[[str], None]) -> list[Judgement]:
    """Send the users, look by look, until a look, Ctrl-C or the gateway ends it; fill `result`, return the judgements.

    SplitError if the gateway cannot be asked before the first look is done.
    """
    judgements = []
    try:
        for look in range(plan.looks):
            users = crowd.send(plan.users_of_look(look), plan.step(look))
            result["looks"].append({"users": encode_users(users)})
            judgements.append(tell_look(result, plan, look, tell))
            if judgements[-1].ends:
                break
    except KeyboardInterrupt:
        result["interrupted"] = "interrupted"
    except SplitError as error:
        if not judgements:
            raise
        result["interrupted"] = str(error)
    return judgements


def make_ab_plan(arguments: argparse.Namespace, server: str) -> Plan:
    """The plan that the command line asks for, at the split's own share."""
    share = read_share(server) if arguments.share is None else arguments.share / 100
    if not 0 < share < 1:
        raise GatewayError(
            f"{share:.0%} of the users get version 2, so there is nothing to compare: "
            f"python gateway/gateway.py set my_model v2=50 --server {server}"
        )
    return make_plan(
        baseline_accuracy(), arguments.margin / 100, arguments.latency_margin / 100, arguments.alpha, arguments.power,
        arguments.rows_per_user, (share,), arguments.looks, users_per_step=arguments.users,
    )  # fmt: skip


def main() -> int:
    interrupt_on_sigterm()
    arguments = parse_arguments()
    console = Console(highlight=False, soft_wrap=True, markup=False)
    if arguments.read:
        path = arguments.read
        result = read_ab_result(path)
        plan = plan_of(result)
        console.print(describe_plan(plan))
        judgements = [tell_look(result, plan, look, console.print) for look in range(len(result["looks"]))]
    else:
        path = arguments.output or RESULTS_DIR / f"ab-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
        endpoint = load_endpoints()[arguments.endpoint]()
        plan = make_ab_plan(arguments, endpoint.folder.name)
        result = start_result(arguments, endpoint, plan)
        console.print(describe_plan(plan))
        with gather_crowd(arguments, endpoint) as crowd:
            judgements = measure(plan, crowd, result, console.print)
        if not judgements:
            raise KeyboardInterrupt
        write_result(result, path)
    end = describe_end(result, plan, judgements[-1], decode_users(result["looks"]))
    console.print("\n".join(end))
    from rollout.plot import draw  # only here: matplotlib takes seconds to import

    plot_path = path.with_suffix(".png")
    draw(plan, judgements, end[-1], plot_path)
    console.print(f"wrote {plot_path}" if arguments.read else f"wrote {path} and {plot_path.name}")
    return {"": 0, "interrupted": 130}.get(result["interrupted"], 1)


def read_ab_result(path: Path) -> dict:
    """Return the file's content; GatewayError if it has another form."""
    try:
        result = json.loads(path.read_text())
        if result["schema_version"] == EXPERIMENT_VERSION and result["looks"]:
            return result
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise GatewayError(f"{path}: no result of ab_test.py")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_user_options(parser)
    parser.add_argument(
        "--share", type=float, help="per cent of the users who get version 2 (default: asks the gateway)"
    )
    parser.add_argument("--margin", type=float, default=2.0, help="accuracy difference to find, in points (default: 2)")
    parser.add_argument(
        "--latency-margin", type=float, default=20.0, help="per cent that version 2 may be slower (default: 20)"
    )
    parser.add_argument("--power", type=float, default=0.9, help="chance to find it (default: 0.9)")
    parser.add_argument("--looks", type=int, default=10, help="how often to look (default: 10)")
    parser.add_argument(
        "--users", type=int, help="number of users (instead of the number for the power) (default: as planned)"
    )
    parser.add_argument("--output", type=Path, help="the result file (default: results/ab-<time>.json)")
    parser.add_argument("--read", type=Path, metavar="FILE", help="print and draw this result again (default: measure)")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (SplitError, GatewayError) as error:
        sys.exit(f"ab_test: {error}")
    except KeyboardInterrupt:
        sys.exit("ab_test: interrupted before the first look; nothing is written")
