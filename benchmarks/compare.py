"""Compare two result files: the effect of a change on each server, with 95 %
intervals.

    python compare.py BEFORE.json AFTER.json

For every server and load that is in both files: requests per second and median
latency, after as a multiple of before. If the interval holds 1, no difference
is shown. Measure both on the same machine; the floor's rows show whether the
machine itself changed. The rounds of a file ask one process of each server, and
another start of the same server may be a few percent faster or slower: believe
a small difference once it has come twice. Writes nothing.
"""

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine.packages  # noqa: F401

# isort: split
import numpy as np
from rich.console import Console

from drawing.tables import TextTable, print_table
from figures.cells import Cell
from figures.intervals import Interval, median_interval, shift_interval
from figures.measured import Measured
from figures.result_file import ResultError, read_result
from figures.words import describe_load, format_interval

PORT = re.compile(r"(port[ =])\d+")  # a free one, another at each start


@dataclass(frozen=True)
class Change:
    """One figure of one server under one load, after as a multiple of before."""

    server: str
    kind: str
    load: str
    figure: str
    before: Interval
    after: Interval
    ratio: Interval
    more_is_better: bool

    @property
    def verdict(self) -> str:
        if not self.ratio.is_closed:
            return "too few rounds"
        if self.ratio.low <= 1 <= self.ratio.high:
            return "no difference"
        return "better" if (self.ratio.estimate > 1) == self.more_is_better else "worse"


def list_changes(before: Measured, after: Measured) -> list[Change]:
    """Return the changes of every closed-loop cell that both results hold."""
    changes = []
    for name in before.names:
        for new in after.closed(name) if name in after.servers else []:
            old = before.cell(name, new.connections, new.rows_per_request)
            if old is None or not len(new.latencies_s):
                continue
            load = describe_load(new)
            for figure, values, more_is_better in (("requests/s", _rates, True), ("p50 ms", _medians_ms, False)):
                figures = values(old), values(new)
                intervals = map(median_interval, figures)
                ratio = shift_interval(figures[1], figures[0])
                changes.append(Change(name, after.kind(name), load, figure, *intervals, ratio, more_is_better))
    return changes


def _rates(cell: Cell) -> list[float]:
    return cell.rates


def _medians_ms(cell: Cell) -> list[float]:
    return [float(np.median(part)) * 1e3 for part in cell.rounds_s if len(part)]


def list_differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the differences of the two environments and settings, a sentence each."""
    differences = []
    for part, keys in (
        ("environment", ("cpu", "cores", "system", "python", "packages")),
        ("settings", ("profile", "version", "seconds", "server_cpus", "client_cpus", "goes_first")),
    ):
        for key in keys:
            if before[part].get(key) != after[part].get(key):
                differences.append(f"{key}: {before[part].get(key)} before, {after[part].get(key)} after")
    for name, server in after["endpoints"].items():
        old = before["endpoints"].get(name, server)
        for key in ("kind", "command"):
            one, other = (PORT.sub(r"\1…", str(entry.get(key))) for entry in (old, server))
            if one != other:
                differences.append(f"{name}'s {key}: {one} before, {other} after")
    return differences


def format_figure(value: float) -> str:
    """Three significant digits, and all of those before the decimal point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def make_table(changes: list[Change]) -> TextTable:
    table = TextTable(
        "Changes",
        ["server", "load", "figure", "before", "after", "after / before", "verdict"],
        "Medians of the rounds; the ratio with its 95 % interval (Hodges and Lehmann).",
        words={0, 1, 2, 6},
    )
    for change in changes:
        table.kinds.append(change.kind)
        table.rows.append([
            f"{change.server} ({change.kind})", change.load, change.figure, format_figure(change.before.estimate),
            format_figure(change.after.estimate), format_interval(change.ratio, ".2f"), change.verdict,
        ])  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a result file")
    parser.add_argument("after", type=Path, help="another, measured later")
    arguments = parser.parse_args()
    try:
        before, after = Measured(read_result(arguments.before)), Measured(read_result(arguments.after))
    except ResultError as error:
        sys.exit(f"compare: {error}")
    changes = list_changes(before, after)
    if not changes:
        sys.exit("compare: the two files have no server and load in common; measure the same ones")
    console = Console(highlight=False)
    print_table(make_table(changes), console)
    for difference in list_differences(before.result, after.result):
        console.print(f"differs: {difference}", markup=False, soft_wrap=True)
    overlap = [change.before.overlaps(change.after) for change in changes if change.figure == "requests/s"]
    console.print(f"requests/s: the intervals of before and after overlap in {sum(overlap)} of {len(overlap)} rows")
    counts = {verdict: sum(change.verdict == verdict for change in changes) for verdict in ("better", "worse")}
    console.print(f"{counts['better']} better, {counts['worse']} worse, {len(changes)} figures compared")


if __name__ == "__main__":
    main()
