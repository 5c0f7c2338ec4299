"""Measure what the containers of docker-compose.yml cost: image size, cold
start, memory, time to stop.

    python container_costs.py
        measure and write results/containers.json
    python container_costs.py --update-readme
        rewrite the table in ../CONTAINERS.md from that file

Makes each container again STARTS times and waits for its first right answer,
asks it every test row, reads its memory as `docker stats` counts it, and stops
it. The containers run again when this ends.
"""

import argparse
import json
import re
import statistics
import sys
import time
from pathlib import Path

import machine.packages  # noqa: F401

# isort: split
from rich.console import Console

from drawing.readme import CONTAINERS_PAGE, replace_part
from endpoints.base import ServerError, describe_choices, load_endpoints
from endpoints.reference import TOLERANCE
from figures.result_file import RESULTS_DIR, ResultError, write_whole
from machine.environment import describe_environment
from machine.signals import interrupt_on_sigterm
from servers.containers import ContainerServer, list_container_endpoints, run_docker
from servers.parity import max_abs_difference

PATH = RESULTS_DIR / "containers.json"
BEGIN = "<!-- made by `make docker-measure` from benchmarks/results/containers.json: do not edit -->"
END = "<!-- end of the table of containers -->"
STARTS = 3
UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def read_memory_bytes(container_id: str) -> int:
    """Return the memory that the engine counts for a container, its file cache left out."""
    usage = run_docker("stats", "--no-stream", "--format", "{{.MemUsage}}", container_id)
    number, unit = re.match(r"([\d.]+)([A-Za-z]+)", usage).groups()
    return round(float(number) * UNITS[unit])


def measure(endpoint_class) -> dict:
    """Return the costs of one server's container; ServerError if it does not start or answers wrongly."""
    starts_s = []
    for _ in range(STARTS):
        with ContainerServer(endpoint_class()) as server:
            starts_s.append(server.ready_s)
    differences = [max_abs_difference(server.endpoint, version) for version in server.endpoint.versions]
    if max(differences) > TOLERANCE:
        raise ServerError(f"{endpoint_class.name}: breaks the parity contract, so it is not measured")
    container_id = server.containers[0]["Id"]
    memory_bytes = read_memory_bytes(container_id)
    started_s = time.perf_counter()
    run_docker("stop", container_id)
    stop_s = time.perf_counter() - started_s
    run_docker("start", container_id)
    return {
        "kind": server.kind,
        "image": server.containers[0]["Config"]["Image"],
        "image_bytes": server.image["Size"],
        "user": server.containers[0]["Config"]["User"],
        "starts_s": starts_s,
        "memory_bytes": memory_bytes,
        "stop_s": stop_s,
    }


def format_table(result: dict) -> str:
    """Return the measured table as Markdown, with the machine it was measured on."""
    environment = result["environment"]
    lines = [
        "| server | kind | image | size MB | user | cold start s | memory MB | stops in s |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for name, cost in result["containers"].items():
        low, middle, high = min(cost["starts_s"]), statistics.median(cost["starts_s"]), max(cost["starts_s"])
        lines.append(
            f"| {name} | {cost['kind']} | `{cost['image']}` | {cost['image_bytes'] / 1e6:,.0f} | {cost['user']} | "
            f"{middle:.1f} ({low:.1f}–{high:.1f}) | {cost['memory_bytes'] / 1e6:,.0f} | {cost['stop_s']:.1f} |"
        )
    lines += [
        "",
        f"{environment['utc'][:10]}, {environment['cpu']}, {environment['cores']} cores, load average "
        f"{environment['load_average_1min']:.1f} at the start, engine {result['engine']}, "
        f"base image: {result['base']}. Cold start: `docker compose up` to the first right answer, median of "
        f"{STARTS} and its range. Memory: what `docker stats` shows after every test row was asked.",
    ]
    return "\n".join(lines)


def describe_base() -> str:
    """Return the base of the images: Python's image, or one made in its place."""
    labels = json.loads(run_docker("image", "inspect", "my_model-torchserve"))[0]["Config"].get("Labels") or {}
    return labels.get("base", "as pulled")


def update_readme(readme: str, result: dict) -> str:
    """Return `readme` with the table between the two marks made again from `result`."""
    return replace_part(readme, BEGIN, END, f"\n{format_table(result)}\n\n")


def main() -> None:
    interrupt_on_sigterm()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--update-readme", action="store_true", help="rewrite ../CONTAINERS.md and measure nothing (default: measure)"
    )
    by_service = {}
    for endpoint_class in list_container_endpoints(load_endpoints()).values():
        by_service.setdefault(endpoint_class.folder.name, endpoint_class)
    parser.add_argument(
        "--services",
        nargs="+",
        choices=by_service,
        default=list(by_service),
        metavar="NAME",
        help=describe_choices(by_service, "all"),
    )
    parser.add_argument("--output", type=Path, default=PATH, help="the result file (default: results/containers.json)")
    arguments = parser.parse_args()
    if not arguments.update_readme:
        console = Console(highlight=False)
        by_service = {name: by_service[name] for name in arguments.services}
        packages = {package for endpoint_class in by_service.values() for package in endpoint_class.packages}
        result = {
            "environment": describe_environment(packages),
            "engine": run_docker("version", "--format", "{{.Server.Version}}").strip(),
            "base": describe_base(),
            "containers": {},
        }
        for service, endpoint_class in by_service.items():
            with console.status(f"{service}: starting {STARTS} times"):
                cost = result["containers"][service] = measure(endpoint_class)
            console.print(f"{service} ({cost['kind']}): ready after {statistics.median(cost['starts_s']):.1f} s")
        write_whole(arguments.output, json.dumps(result, indent=1) + "\n")
        print(f"wrote {arguments.output}")
        return
    CONTAINERS_PAGE.write_text(update_readme(CONTAINERS_PAGE.read_text(), json.loads(arguments.output.read_text())))
    print(f"wrote {CONTAINERS_PAGE.name} from {arguments.output.name}")


if __name__ == "__main__":
    try:
        main()
    except (ServerError, ResultError, OSError) as error:
        sys.exit(f"container_costs: {error}")
    except KeyboardInterrupt:
        sys.exit("container_costs: interrupted; nothing is written")
