"""Print a result file as tables, with verdicts, warnings and how it was
measured.

    python results.py
        the newest result of this machine
    python results.py results/sample.json
        that one
    python results.py --update-readme
        rewrite the measured parts of ../README.md, RESULTS.md, README.md and
        REFERENCE.md

Every number is computed from the raw observations in the file. The pages'
parts come from results/sample.json and results/peers.json.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import machine.packages  # noqa: F401

# isort: split
from rich.console import Console

from drawing.plan_tables import format_scale
from drawing.readme import README_PATH, format_lesson, format_summary, replace_part
from drawing.tables import format_markdown, format_peers, print_result
from figures.measured import Measured
from figures.result_file import PEERS_PATH, SAMPLE_PATH, ResultError, find_newest_result, read_result
from machine.environment import describe_machine

END = "<!-- end of the made part -->"


@cache
def load(source: Path) -> Measured:
    """Return a result with what is computed from it, once for all pages; raise ResultError if it cannot be read."""
    return Measured(read_result(source))


@dataclass(frozen=True)
class Part:
    """A part of a page that is written from a result file."""

    readme: Path
    source: Path
    format: Callable[[Measured], str]

    @property
    def begin(self) -> str:
        return f"<!-- made by `make readme` from benchmarks/results/{self.source.name}: do not edit -->"

    def update(self, readme: str) -> str:
        """Return the page's text with this part written again."""
        return replace_part(readme, self.begin, END, self.format(load(self.source)))


FOLDER = Path(__file__).resolve().parent
PARTS = (
    Part(README_PATH, SAMPLE_PATH, format_summary),
    Part(FOLDER / "RESULTS.md", SAMPLE_PATH, format_markdown),
    Part(FOLDER / "README.md", SAMPLE_PATH, format_lesson),
    Part(FOLDER / "REFERENCE.md", PEERS_PATH, format_peers),
    Part(FOLDER / "REFERENCE.md", SAMPLE_PATH, format_scale),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, nargs="?", help="a result file (default: this machine's newest in results/)")
    parser.add_argument("--update-readme", action="store_true", help="rewrite the pages (default: only print)")
    arguments = parser.parse_args()
    try:
        if arguments.update_readme:
            texts = {part.readme: part.readme.read_text() for part in PARTS}
            for part in PARTS:  # all, before one is written
                texts[part.readme] = part.update(texts[part.readme])
            for page, text in texts.items():
                page.write_text(text)
                print(f"wrote {page}")
            return
        path = arguments.path or find_newest_result(describe_machine())
        print_result(Measured(read_result(path)), Console(highlight=False))
        print(f"from {path}")
    except ResultError as error:
        sys.exit(f"results: {error}")


if __name__ == "__main__":
    main()
