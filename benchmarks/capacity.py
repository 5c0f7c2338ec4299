"""Print how many replicas a rate takes and what to give each, from a result file.

    python capacity.py --rate 5000 --p99-ms 50
        every server that was swept: replicas, cores, and the settings of its
        Deployment in Kubernetes
    python capacity.py --scale
        what 10,000, 100,000 and a million requests/s take, what they cost and
        what gives way first
    python capacity.py --simulate
        does a simulated replica have the measured p99, and does the plan hold
        behind a gateway with one replica dead
    python capacity.py --autoscale
        the autoscaler under a step, a ramp and a day: how long too few replicas
        serve, and how many requests are late
    python capacity.py --json
        the plans for a program

replicas = ⌈rate ÷ (the rate one replica keeps up with × headroom)⌉ + 1. Prices,
gateways and machines are assumptions of planning/facts.toml; the other figures
come from the result files. Writes nothing.
"""

import argparse
import json
import sys
from pathlib import Path

import machine.packages  # noqa: F401

# isort: split
from rich.console import Console

from drawing.plan_tables import (
    SCALES,
    describe_refused,
    make_agreement_table,
    make_autoscaler_table,
    make_fleet_table,
    make_plan_table,
    make_scale_table,
)
from drawing.tables import print_table
from figures.measured import Measured
from figures.result_file import SAMPLE_PATH, ResultError, read_result
from planning.capacity import CONTAINERS_PATH, HEADROOM, make_plans, read_containers
from planning.scale import Surroundings, describe_assumptions


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: a number above 0 is needed")
    return value


def share(text: str) -> float:
    value = positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text}: a share of at most 1 is needed")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, nargs="?", default=SAMPLE_PATH, help="a result file (default: sample.json)")
    parser.add_argument(
        "--containers", type=Path, default=CONTAINERS_PATH, help="costs of the containers (default: containers.json)"
    )
    parser.add_argument("--rate", type=positive, default=5000.0, help="requests/s at the busiest hour (default: 5000)")
    parser.add_argument("--p99-ms", type=positive, help="objective (default: the one that the run was measured with)")
    parser.add_argument("--servers", nargs="+", metavar="NAME", help="only these (default: all that were swept)")
    parser.add_argument(
        "--headroom", type=share, default=HEADROOM, help="of the rate kept up with that is used (default: 0.7)"
    )
    parser.add_argument("--scale", action="store_true", help="show three scales (default: show --rate)")
    parser.add_argument("--simulate", action="store_true", help="simulate replicas and gateway (default: show --rate)")
    parser.add_argument("--autoscale", action="store_true", help="simulate the autoscaler (default: show --rate)")
    parser.add_argument("--json", action="store_true", help="print JSON (default: print tables)")
    for name, what in (
        ("gateway-rate", "requests/s a core of the gateway"),
        ("gateway-cores", "cores of one gateway"),
        ("node-cores", "cores of one machine, two or more"),
        ("core-price", "USD for a core and an hour"),
        ("memory-price", "USD for a GB and an hour"),
    ):
        parser.add_argument(f"--{name}", type=positive, help=f"{what} (default: that of facts.toml)")
    arguments = parser.parse_args()
    try:
        show(parser, arguments)
    except ResultError as error:
        sys.exit(f"capacity: {error}")


def show(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    around = Surroundings.with_changes(
        gateway_rate=arguments.gateway_rate,
        gateway_cores=arguments.gateway_cores,
        node_cores=arguments.node_cores,
        core_price=arguments.core_price,
        memory_price=arguments.memory_price,
    )
    if around.node_cores < 2:
        parser.error("--node-cores: a machine keeps one core for the system, so it needs two or more")
    measured = Measured(read_result(arguments.path))
    containers = read_containers(arguments.containers)
    names = arguments.servers or [name for name in measured.names if name in measured.knees]
    unknown = [name for name in names if name not in measured.servers]
    if unknown:
        parser.error(f"{', '.join(unknown)}: not in {arguments.path.name}; it has {', '.join(measured.names)}")
    objective_s = (arguments.p99_ms or measured.settings["objective_p99_s"] * 1e3) / 1e3

    def plans_at(rate: float):
        return make_plans(measured, names, rate, objective_s, containers, arguments.headroom)

    plans, refused = plans_at(arguments.rate)
    if arguments.json:
        print(json.dumps({"plans": {plan.server: plan.as_dict() for plan in plans}, "refused": refused}, indent=1))
        return
    console = Console(highlight=False)
    tables = []
    if arguments.scale:
        tables.append(make_scale_table(measured, [plans_at(rate)[0] for rate in SCALES], containers, around))
    if arguments.simulate:
        tables += [make_agreement_table(measured, names), make_fleet_table(measured, plans, around)]
    if arguments.autoscale:
        tables.append(make_autoscaler_table(measured, plans, containers))
    for table in tables or [make_plan_table(measured, plans)]:
        if table.rows:
            print_table(table, console)
            console.print()
    for text in [*describe_refused(measured, refused), *(describe_assumptions() if arguments.scale else [])]:
        console.print(f"- {text}", markup=False, soft_wrap=True)
    print(f"from {arguments.path.name} and {arguments.containers.name}")
    if not plans:
        sys.exit(f"capacity: no server was measured to hold p99 within {objective_s * 1e3:g} ms at any rate")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("capacity: interrupted; nothing is written")
