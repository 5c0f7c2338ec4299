"""From how many rows a request, and for which network, is a GPU worth it? In
process, without a server.

    python gpu_crossover.py
        measure, if CUDA is here; otherwise show the measured figures
    python gpu_crossover.py --device cpu
        the half that needs no GPU: how much of a request is the model at all

Every variant's answers are proved equal to the CPU's before it is timed. Writes
results/gpu.json again after each cell; Ctrl-C keeps what was measured.
"""

import argparse
import math
import sys
from pathlib import Path

import machine.packages  # noqa: F401

# isort: split
from accelerator.crossover import GPU_PATH, read_crossover
from accelerator.measure import measure_cell
from accelerator.networks import OURS, WIDE, load_network
from accelerator.variants import MODEL_PATH, DeviceMissing, describe_gpu, has_cuda, list_variants
from drawing.crossover_words import list_lines
from figures.measured import Measured
from figures.result_file import SAMPLE_PATH, SCHEMA_VERSION, ResultError, read_result, write_result
from figures.words import format_count
from machine.environment import describe_environment, usable_cpus
from machine.signals import interrupt_on_sigterm

ROWS = (1, 1024, 64, 8, 512, 32, 4096, 32_768, 262_144)  # the most informative first
NEEDS_CUDA = "needs an NVIDIA GPU with its driver, CUDA and cuDNN"


def main() -> None:
    interrupt_on_sigterm()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    names = (OURS, *WIDE)
    parser.add_argument(
        "--models",
        nargs="+",
        choices=names,
        metavar="NAME",
        default=names,
        help=f"of {', '.join(names)} (default: all)",
    )
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, help="a run (default: from 1 to 262,144)")
    parser.add_argument("--seconds", type=float, default=0.2, help="of each round (default: 0.2)")
    parser.add_argument("--rounds", type=int, default=7, help="of each variant (default: 7)")
    parser.add_argument("--limit-ms", type=float, default=50.0, help="of a run; longer ones stay out (default: 50)")
    parser.add_argument("--price-gpu", type=float, default=3.0, help="USD an hour of the GPU's machine (default: 3)")
    parser.add_argument("--price-cpu", type=float, default=0.8, help="USD an hour of one without (default: 0.8)")
    parser.add_argument("--output", type=Path, default=GPU_PATH, help="the file (default: results/gpu.json)")
    arguments = parser.parse_args()
    if min(arguments.rows) < 1 or arguments.rounds < 1 or arguments.seconds <= 0:
        parser.error("rows and rounds of 1 or more and seconds above 0 are needed")
    try:
        run(arguments)
    except (ResultError, DeviceMissing, OSError) as error:
        sys.exit(f"gpu_crossover: {error}")


def run(arguments: argparse.Namespace) -> None:
    if not MODEL_PATH.exists():
        raise DeviceMissing(f"{MODEL_PATH} not found: make train")
    cuda = arguments.device != "cpu" and has_cuda()
    if arguments.device == "cuda" and not cuda:
        raise DeviceMissing(f"CUDA was requested and is not here: it {NEEDS_CUDA}")
    if arguments.device == "auto" and not cuda:
        print(f"gpu_crossover: {NEEDS_CUDA}, and there is none here; --device cpu measures the other half")
        show(read_crossover(arguments.output), arguments)
        return
    result = {
        "schema_version": SCHEMA_VERSION,
        "complete": False,
        "kind": "in-process",
        "environment": describe_environment(["onnxruntime-gpu", "onnxruntime", "numpy"]),
        "settings": {"seconds": arguments.seconds, "rounds": arguments.rounds, "limit_ms": arguments.limit_ms},
        "gpu": describe_gpu() if cuda else None,
        "cells": [],
        "refused": [],
    }
    variants = list_variants(len(usable_cpus()), cuda)
    try:
        for name in arguments.models:
            model = load_network(name, MODEL_PATH)
            too_many = math.inf  # rows of which no variant was fast enough
            for rows in arguments.rows:
                if rows >= too_many:
                    result["refused"].append(f"{name}, {rows:,} rows: not tried, {too_many:,} took too long")
                    continue
                cells, refused = measure_cell(
                    name, model, rows, variants, arguments.seconds, arguments.rounds, arguments.limit_ms / 1e3
                )
                result["cells"] += cells
                result["refused"] += refused
                too_many = too_many if cells else min(too_many, rows)
                write_result(result, arguments.output)
                print(f"{name}, {format_count(rows, 'row')}: {len(cells)} variants", flush=True)
        result["complete"] = True
        write_result(result, arguments.output)
    except KeyboardInterrupt:
        print("interrupted: what was measured is kept")
    show(result, arguments)
    print(f"wrote {arguments.output}")
    if not result["complete"]:
        sys.exit(130)


def show(result: dict, arguments: argparse.Namespace) -> None:
    try:
        measured = Measured(read_result(SAMPLE_PATH))
    except ResultError:
        measured = None
    for line in list_lines(result, measured, arguments.price_gpu, arguments.price_cpu):
        print(line)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("gpu_crossover: interrupted; what was measured before is kept")
