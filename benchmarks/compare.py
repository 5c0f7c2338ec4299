"""Compare two result files: what a change did to each server, with 95 % intervals.

    python compare.py BEFORE.json AFTER.json

For every server and load that is in both files: requests per second and median latency, after as a
multiple of before. Where the interval holds 1, no difference is shown. Measure both on the same
machine; the floor's rows say whether the machine itself changed. Writes nothing.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from intervals import Interval, mean_interval, ratio_interval
from measured import format_count
from results import Cell, ResultError, list_cells, read_result
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Change:
    """One figure of one endpoint under one load, after as a multiple of before."""

    endpoint: str
    load: str
    figure: str
    before: float
    after: float
    overlaps: bool  # whether the intervals of before and after, each from its own rounds, overlap
    ratio: Interval
    more_is_better: bool

    @property
    def verdict(self) -> str:
        if self.ratio.low <= 1 <= self.ratio.high:
            return "no significant difference"
        return "better" if (self.ratio.estimate > 1) == self.more_is_better else "worse"


def list_changes(before: dict, after: dict) -> list[Change]:
    """Return the changes of every closed-loop cell that both results hold."""
    changes = []
    for name in before["endpoints"]:
        if name not in after["endpoints"]:
            continue
        cells = {(c.connections, c.rows_per_request): c for c in list_cells(before, name, "closed")}
        for new in list_cells(after, name, "closed"):
            old = cells.get((new.connections, new.rows_per_request))
            if old is None or not len(old.latencies_s) or not len(new.latencies_s):
                continue
            load = f"{format_count(new.connections, 'connection')}, {format_count(new.rows_per_request, 'row')}"
            rates = ratio_interval(new.rates, old.rates)
            medians = ratio_interval(_medians(new), _medians(old))
            changes.append(
                Change(
                    name,
                    load,
                    "requests/s",
                    old.rate.estimate,
                    new.rate.estimate,
                    old.rate.overlaps(new.rate),
                    rates,
                    more_is_better=True,
                )  # fmt: skip
            )
            changes.append(
                Change(
                    name,
                    load,
                    "p50 ms",
                    float(np.median(old.latencies_s)) * 1000,
                    float(np.median(new.latencies_s)) * 1000,
                    mean_interval(_medians(old)).overlaps(mean_interval(_medians(new))),
                    medians,
                    more_is_better=False,
                )  # fmt: skip
            )
    return changes


def list_machine_differences(before: dict, after: dict) -> list[str]:
    """Return in what the two environments and settings differ, a sentence each."""
    differences = []
    for part, keys in (
        ("environment", ("cpu", "cores", "system", "python", "packages")),
        ("settings", ("profile", "version", "seconds", "server_cpus", "client_cpus")),
    ):
        for key in keys:
            if before[part].get(key) != after[part].get(key):
                differences.append(f"{key}: {before[part].get(key)} before, {after[part].get(key)} after")
    return differences


def format_figure(value: float) -> str:
    """Three significant digits, and all of those before the decimal point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _medians(cell: Cell) -> list[float]:
    return [float(np.median(part)) for part in cell.rounds_s if len(part)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a result file")
    parser.add_argument("after", type=Path, help="another, measured later")
    arguments = parser.parse_args()
    try:
        before, after = read_result(arguments.before), read_result(arguments.after)
    except ResultError as error:
        sys.exit(f"compare: {error}")
    changes = list_changes(before, after)
    if not changes:
        sys.exit("compare: the two files have no server and load in common; measure the same ones")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, justify in (
        ("server", "left"), ("load", "left"), ("figure", "left"), ("before", "right"), ("after", "right"),
        ("after / before", "right"), ("verdict", "left"),
    ):  # fmt: skip
        table.add_column(title, justify=justify)
    for change in changes:
        table.add_row(
            change.endpoint, change.load, change.figure, format_figure(change.before), format_figure(change.after),
            f"{change.ratio.estimate:.2f} ({change.ratio.low:.2f}–{change.ratio.high:.2f})", change.verdict,
        )  # fmt: skip
    console.print(table)
    for difference in list_machine_differences(before, after):
        console.print(f"differs: {difference}", markup=False)
    overlap = [change.overlaps for change in changes if change.figure == "requests/s"]
    console.print(f"requests/s: the intervals of before and after overlap in {sum(overlap)} of {len(overlap)} rows")
    counts = {verdict: sum(change.verdict == verdict for change in changes) for verdict in ("better", "worse")}
    console.print(f"{counts['better']} better, {counts['worse']} worse, {len(changes)} figures compared")


if __name__ == "__main__":
    main()
