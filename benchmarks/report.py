"""Draw a result file: one self-contained page with answers, plots and tables, and
the plots as PNG files.

    python report.py                        the newest result of this machine
    python report.py results/sample.json    that one
    python report.py --pictures             the root README's pictures

Writes <folder>/report.html and <folder>/*.png; the folder lies next to the file
and has its name without .json. The page needs no network, holds
every plot as SVG, and follows the reader's light or dark setting.
"""

import argparse
import sys
from pathlib import Path

import machine.packages  # noqa: F401

# isort: split
from drawing.page import write_report
from drawing.pictures import write_pictures
from figures.measured import Measured
from figures.result_file import SAMPLE_PATH, ResultError, find_newest_result, read_result
from machine.environment import describe_machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, nargs="?", help="a result file (default: this machine's newest in results/)")
    parser.add_argument("--pictures", action="store_true", help="write the README's pictures (default: the report)")
    arguments = parser.parse_args()
    try:
        if arguments.pictures:
            said = write_pictures(Measured(read_result(arguments.path or SAMPLE_PATH)))
            print("\n".join(said or ["the pictures are fresh"]))
            return
        path = arguments.path or find_newest_result(describe_machine())
        print(f"wrote {write_report(Measured(read_result(path)), path.with_suffix(''))}")
    except ResultError as error:
        sys.exit(f"report: {error}")


if __name__ == "__main__":
    main()
