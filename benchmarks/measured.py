"""A result with every cell computed once, and the words in which its figures are written."""

import math

import numpy as np
from intervals import Interval
from results import Cell, Knee, find_knee, is_seen, list_cells, list_verdicts, list_warnings, make_tables


class Measured:
    """A result with every cell computed once."""

    def __init__(self, result: dict):
        self.result = result
        self.settings = result["settings"]
        self.names = list(result["endpoints"])
        self.closed = {name: list_cells(result, name, "closed") for name in self.names}
        self.open = {
            name: sorted(list_cells(result, name, "open"), key=lambda cell: cell.offered_rate) for name in self.names
        }
        self.knees = {name: knee for name in self.names if (knee := find_knee(result, name)) is not None}
        self.tables = make_tables(result)
        self.verdicts = list_verdicts(result)
        self.warnings = list_warnings(result)

    def label(self, name: str) -> str:
        """The server's name with its kind: a row of another kind is never shown without it."""
        return f"{name} ({self.result['endpoints'][name]['kind']})"

    def is_floor(self, name: str) -> bool:
        return self.result["endpoints"][name]["kind"] == "floor"

    def is_hidden(self, name: str) -> bool:
        """Whether the server's CPU and memory could not be seen from here."""
        return not is_seen(self.result["endpoints"][name])

    def closed_cells(self, connections: int | None = None, rows: int | None = 1) -> dict[str, list[Cell]]:
        """The cells that hold latencies, by server: at `connections` (None: all), `rows` a request (None: all)."""
        found = {
            name: [
                cell
                for cell in cells
                if connections in (None, cell.connections)
                and rows in (None, cell.rows_per_request)
                and len(cell.latencies_s)
            ]
            for name, cells in self.closed.items()
        }
        return {name: cells for name, cells in found.items() if cells}

    def ranking(self, connections: int) -> list[tuple[str, Cell]]:
        """Servers with a model, the highest closed-loop rate first."""
        cells = self.closed_cells(connections)
        pairs = [(name, cells[name][0]) for name in cells if not self.is_floor(name)]
        return sorted(pairs, key=lambda pair: -pair[1].rate.estimate)

    def floor(self, like: str, connections: int) -> tuple[str, Cell] | None:
        """The floor of the same protocol as the server `like`, else any."""
        cells = self.closed_cells(connections)
        protocol = protocol_of(self.result["endpoints"][like])
        floors = [name for name in cells if self.is_floor(name)]
        floors.sort(key=lambda name: protocol_of(self.result["endpoints"][name]) != protocol)
        return (floors[0], cells[floors[0]][0]) if floors else None


def measured_costs(measured: Measured) -> dict[str, tuple[Interval, float] | None]:
    """Return (CPU s per 1,000 rows at the most connections, peak MB over all loads) of each measured server.

    None for a container: its processes are the engine's and not in the tree that was seen.
    """
    costs = {}
    for name, cells in measured.closed_cells(measured.settings["connections"][-1]).items():
        everything = measured.closed[name] + measured.open[name]
        cost = (cells[0].server_cpu_s_per_1000, max(cell.rss_bytes for cell in everything) / 1e6)
        costs[name] = None if measured.is_hidden(name) else cost
    return costs


def protocol_of(about: dict) -> str:
    return about.get("protocol", "REST")


def start_medians_s(starts: list[dict]) -> tuple[float, float]:
    return tuple(float(np.median([start[key] for start in starts])) for key in ("listens_s", "ready_s"))


def scale(interval: Interval, factor: float) -> Interval:
    return Interval(interval.estimate * factor, interval.low * factor, interval.high * factor)


def is_closed(interval: Interval) -> bool:
    return math.isfinite(interval.high)


def describe_knee(knee: Knee) -> str:
    held = f"keeps up with {knee.sustained_rate:,.0f}/s" if knee.sustained_rate else "keeps up with no rate offered"
    return (
        f"{held} and breaks at {knee.broken_rate:,.0f}/s ({knee.reason})"
        if knee.broken_rate
        else f"{held} ({knee.reason})"
    )


def format_count(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' * (number != 1)}"


def format_ms(interval: Interval | None) -> str:
    return "too few" if interval is None else f"{interval.estimate * 1e3:.2f} ms"


def format_interval_ms(interval: Interval | None) -> str:
    return "too few" if interval is None else _with_range(scale(interval, 1e3), ".2f")


def format_interval_s(interval: Interval, digits: int = 3) -> str:
    return _with_range(interval, f".{digits}f")


def format_rate(interval: Interval) -> str:
    return f"{interval.estimate:,.0f}/s"


def format_interval_rate(interval: Interval) -> str:
    return _with_range(interval, ",.0f")


def _with_range(interval: Interval, form: str) -> str:
    if not is_closed(interval):
        return f"{interval.estimate:{form}}"
    return f"{interval.estimate:{form}} ({interval.low:{form}}–{interval.high:{form}})"
