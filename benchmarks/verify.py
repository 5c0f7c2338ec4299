"""Start each server in turn and prove that it gives the reference's answers,
for both versions and every test row.

    python verify.py
    python verify.py --containers    ask the servers that docker compose runs

The contract is |p - expected| <= 1e-5 on every row of data/test.csv
(data/expected.csv has the answers). Prints one line a server; exits non-zero
when one breaks the contract or does not start. Writes nothing.
"""

import argparse
import sys

import machine.packages  # noqa: F401

# isort: split
from rich.console import Console

from endpoints.base import ServerError, describe_choices, load_endpoints
from endpoints.reference import TOLERANCE
from machine.signals import interrupt_on_sigterm
from servers.containers import ContainerServer, list_container_endpoints
from servers.parity import max_abs_difference
from servers.process import ServerProcess


def main() -> int:
    interrupt_on_sigterm()
    classes = {name: value for name, value in load_endpoints(with_peers=True).items() if value.has_model}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--endpoints",
        nargs="+",
        choices=classes,
        metavar="NAME",
        help=describe_choices(classes, "all of this repository"),
    )
    parser.add_argument(
        "--containers", action="store_true", help="ask what docker compose runs (default: start each server)"
    )
    arguments = parser.parse_args()
    if arguments.containers:
        classes = list_container_endpoints(classes)
    names = arguments.endpoints or [name for name, value in classes.items() if value.kind != "peer"]
    if unknown := set(names) - set(classes):
        parser.error(f"no container answers {', '.join(sorted(unknown))}; there are {', '.join(classes)}")
    console = Console(highlight=False)
    broken = 0
    for name in names:
        if arguments.containers:
            started = ContainerServer(classes[name](), recreate=False)
        else:
            started = ServerProcess(classes[name].on_free_ports())
        endpoint = started.endpoint
        try:
            with console.status(f"{name}: starting"), started as server:
                differences = {version: max_abs_difference(endpoint, version) for version in endpoint.versions}
                kind = server.kind
        except (ServerError, OSError, ValueError) as error:
            console.print(f"FAILED: {error}", soft_wrap=True, markup=False)
            broken += 1
            continue
        right = max(differences.values()) <= TOLERANCE
        broken += not right
        figures = ", ".join(f"version {version} {difference:.1e}" for version, difference in differences.items())
        console.print(f"{name} ({kind}): {'equal' if right else 'BROKEN'}, max |Δp| {figures}", soft_wrap=True)
    count = len(names)
    console.print(f"{count - broken} of {count} servers give the reference's answers within {TOLERANCE:.0e}")
    return 1 if broken else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("verify: interrupted; the servers are stopped")
