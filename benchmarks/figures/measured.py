"""A result with every cell computed once: what all tables, plots, verdicts and answers are made from."""

from functools import cached_property
from statistics import median
from typing import Any

from figures.cells import Cell, Knee, find_knee, make_cells, paired_ratio
from figures.intervals import Interval
from figures.result_file import ResultError


class Measured:
    """A result file's content by server and load. `result` is what `read_result` returns, or as much of it as there is.

    Servers are named as in the file. `kind` says what a row is (endpoints.base.KINDS): rows of different
    kinds are not rivals, so a server is never shown without its kind.
    """

    def __init__(self, result: dict[str, Any]):
        missing = [key for key in ("settings", "endpoints", "windows") if key not in result]
        if missing:
            raise ResultError(f"no {' and no '.join(missing)} in this file: benchmark_all.py did not write it")
        self.result = result
        self.settings: dict[str, Any] = result["settings"]
        self.environment: dict[str, Any] = result.get("environment", {})
        self.servers: dict[str, dict[str, Any]] = result["endpoints"]
        self.names = list(self.servers)
        self._cells = make_cells(result["windows"])
        self._ratios: dict[tuple[str, str, int], Interval | None] = {}

    def closed(self, name: str) -> list[Cell]:
        """The closed-loop cells of a server, ascending by connections and rows a request."""
        return self._cells.get((name, "closed"), [])

    def open(self, name: str) -> list[Cell]:
        """The open-loop cells of a server, ascending by offered rate."""
        return self._cells.get((name, "open"), [])

    def cells(self, name: str) -> list[Cell]:
        return self.closed(name) + self.open(name)

    def cell(self, name: str, connections: int, rows: int = 1) -> Cell | None:
        """The closed-loop cell of a server, if it holds a right answer."""
        for cell in self.closed(name):
            if (cell.connections, cell.rows_per_request) == (connections, rows) and len(cell.latencies_s):
                return cell
        return None

    def cells_at(self, connections: int, rows: int = 1) -> dict[str, Cell]:
        """The closed-loop cell of each server that has one."""
        found = {name: self.cell(name, connections, rows) for name in self.names}
        return {name: cell for name, cell in found.items() if cell is not None}

    def kind(self, name: str) -> str:
        return str(self.servers[name]["kind"])

    def protocol(self, name: str) -> str:
        return str(self.servers[name].get("protocol", "REST"))

    def label(self, name: str) -> str:
        """The server's name with its kind."""
        return f"{name} ({self.kind(name)})"

    def is_floor(self, name: str) -> bool:
        return self.kind(name) == "floor"

    def is_seen(self, name: str) -> bool:
        """Whether CPU and memory of the server's processes were seen: a container's may be another system's."""
        return bool(self.servers[name].get("is_seen", self.kind(name) != "docker"))

    def max_abs_difference(self, name: str) -> float | None:
        """max |p - expected| over both versions; None for a server without a model, or one that did not answer."""
        differences = self.servers[name].get("max_abs_difference") or {}
        return max(differences.values()) if differences else None

    def start_medians_s(self, name: str) -> tuple[float, float] | None:
        """Seconds from the spawn until the port took a connection, and until the first right answer; None unknown."""
        starts = self.servers[name].get("starts")
        if not starts:
            return None
        listens_s, ready_s = (float(median(start[key] for start in starts)) for key in ("listens_s", "ready_s"))
        return listens_s, ready_s

    def default_of(self, name: str) -> str | None:
        """The default set-up of a tuned server, None if it was not measured."""
        default = name.removesuffix("-tuned")
        return default if self.servers[name].get("variant") == "tuned" and default in self.servers else None

    def floor_of(self, name: str) -> str | None:
        """The floor of the server's protocol, None if it was not measured."""
        floors = [floor for floor in self.names if self.is_floor(floor) and self.protocol(floor) == self.protocol(name)]
        return floors[0] if floors else None

    def ratio(self, name: str, other: str, connections: int) -> Interval | None:
        """How many times the requests per second of `other`, round by round; None if one of them was not measured."""
        key = name, other, connections
        if key not in self._ratios:
            cell, base = self.cell(name, connections), self.cell(other, connections)
            self._ratios[key] = paired_ratio(cell, base) if cell and base else None
        return self._ratios[key]

    def floor_ratio(self, name: str, connections: int) -> Interval | None:
        """The share of its floor's requests per second that a server reaches; None if unknown."""
        floor = self.floor_of(name)
        return self.ratio(name, floor, connections) if floor and floor != name else None

    def is_floor_limited(self, name: str, connections: int) -> bool:
        """Whether the floor of the server's protocol is as fast as the client, and so itself a lower bound."""
        floor = self.floor_of(name)
        cell = self.cell(floor, connections) if floor else None
        return cell is not None and cell.is_client_the_limit

    def ranking(self, connections: int, kind: str | None = None) -> list[str]:
        """Servers with a model (of one kind), the most requests per second first.

        The more others a server is faster than, in the rounds that it shares with each, the earlier it comes
        (Copeland's rule); then by its rate. So it agrees with the verdicts on neighbours, which use these ratios, too.
        """
        cells = self.cells_at(connections)
        names = [name for name in cells if not self.is_floor(name) and kind in (None, self.kind(name))]

        def beats(name: str, other: str) -> bool:
            ratio = self.ratio(name, other, connections)
            return ratio is not None and ratio.estimate > 1

        def place(name: str) -> tuple[int, float]:
            return sum(beats(name, other) for other in names if other != name), cells[name].rate.estimate

        return sorted(names, key=place, reverse=True)

    @cached_property
    def kinds(self) -> list[str]:
        """The kinds of servers with a model, in the order of the file."""
        return list(dict.fromkeys(self.kind(name) for name in self.names if not self.is_floor(name)))

    @cached_property
    def knees(self) -> dict[str, Knee]:
        """Where each server that was swept breaks."""
        found = {name: find_knee(self.open(name), self.settings["objective_p99_s"]) for name in self.names}
        return {name: knee for name, knee in found.items() if knee is not None}

    def before_knee(self, name: str) -> Cell | None:
        """The cell of the last rate that a server kept up with."""
        rate = self.knees[name].sustained_rate
        return next((cell for cell in self.open(name) if cell.nominal_rate == rate), None)

    @cached_property
    def costs(self) -> dict[str, tuple[Interval, float] | None]:
        """(CPU s per 1,000 rows at the most connections, peak MB over all loads) of each measured server.

        None if the server's processes were not seen.
        """
        costs: dict[str, tuple[Interval, float] | None] = {}
        for name, cell in self.cells_at(self.settings["connections"][-1]).items():
            peak_mb = max(each.rss_bytes for each in self.cells(name)) / 1e6
            costs[name] = (cell.server_cpu_s_per_1000, peak_mb) if self.is_seen(name) else None
        return costs


def list_wide_rows(measured: Measured, precision: float) -> set[tuple[str, int]]:
    """Return the (server, connections) whose rate is not yet known well enough, and those they are compared with.

    Known well enough: the intervals of the ratios to its floor and to its default set-up, or of its rate if there are
    neither, are within `precision` of the estimate on both sides.
    """
    wide = set()
    for name in measured.names:
        if measured.is_floor(name) or measured.servers[name].get("failure"):
            continue
        others = [other for other in (measured.floor_of(name), measured.default_of(name)) if other]
        for cell in measured.closed(name):
            if cell.rows_per_request > 1 or not len(cell.latencies_s):
                continue
            ratios = {other: ratio for other in others if (ratio := measured.ratio(name, other, cell.connections))}
            for other, interval in (ratios or {name: cell.rate}).items():
                if interval.half_width > precision:
                    wide |= {(name, cell.connections), (other, cell.connections)}
    return wide
