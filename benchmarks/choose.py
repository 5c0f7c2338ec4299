"""Print which servers meet your needs, and which do not and by how far, from a
result file.

    python choose.py --rate 5000 --p99-ms 20 --memory-mb 600 --maintained
    python choose.py --guide        write ../CHOOSING.md

The rules are planning/choosing.py's: a need that is not met takes a server out;
of the others the one that takes the fewest cores is recommended, for each kind
of row by itself, with all that the measurements do not tell from it. Without
--guide it writes nothing.
"""

import argparse
import math
import sys
from datetime import date
from pathlib import Path

import machine.packages  # noqa: F401

# isort: split
from drawing.choices import describe_choice
from drawing.guide import GUIDE_PATH, render_guide
from figures.measured import Measured
from figures.result_file import SAMPLE_PATH, ResultError, read_result, write_whole
from figures.verdicts import list_warnings
from figures.words import describe_warnings, format_count
from planning.capacity import CONTAINERS_PATH, read_containers
from planning.choosing import FRAMEWORKS, Needs, choose


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: a number above 0 is needed")
    return value


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: 1 or more is needed")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, nargs="?", default=SAMPLE_PATH, help="a result file (default: sample.json)")
    parser.add_argument("--rate", type=positive, default=Needs.rate, help="requests/s (default: 1000)")
    parser.add_argument("--p99-ms", type=positive, help="at most (default: the objective of the run)")
    parser.add_argument("--rows", type=count, default=1, help="of a request (default: 1)")
    parser.add_argument("--memory-mb", type=positive, help="a replica may take (default: any)")
    parser.add_argument("--cold-start-s", type=positive, help="until the first answer, at most (default: any)")
    parser.add_argument("--framework", choices=FRAMEWORKS, default="any", help="of the model (default: any)")
    parser.add_argument("--python", action="store_true", help="own Python code around the model (default: none)")
    parser.add_argument("--reload", action="store_true", help="new versions while it serves (default: not needed)")
    parser.add_argument("--grpc", action="store_true", help="gRPC is needed (default: not needed)")
    parser.add_argument("--maintained", action="store_true", help="it must be maintained (default: not needed)")
    parser.add_argument("--guide", action="store_true", help="write CHOOSING.md (default: answer)")
    arguments = parser.parse_args()
    needs = Needs(
        rate=arguments.rate,
        p99_ms=arguments.p99_ms,
        rows=arguments.rows,
        memory_mb=arguments.memory_mb,
        cold_start_s=arguments.cold_start_s,
        framework=arguments.framework,
        python=arguments.python,
        reload=arguments.reload,
        grpc=arguments.grpc,
        maintained=arguments.maintained,
    )
    try:
        measured, containers = Measured(read_result(arguments.path)), read_containers(CONTAINERS_PATH)
        if arguments.guide:
            write_whole(GUIDE_PATH, render_guide(measured, containers, date.today()))
            print(f"wrote {GUIDE_PATH.name} from {arguments.path.name}")
            return
        choice = choose(measured, containers, needs)
        print("\n".join(describe_choice(measured, choice)))
        warnings = describe_warnings(list_warnings(measured))
        warned = f"; its report has {format_count(len(warnings), 'warning')}: read them first" if warnings else ""
        print(f"from {arguments.path.name}{warned}")
        if not choice.candidates:
            sys.exit(1)
    except ResultError as error:
        sys.exit(f"choose: {error}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("choose: interrupted; nothing is written")
