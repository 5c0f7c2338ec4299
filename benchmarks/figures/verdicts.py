"""Draw conclusions from a result: which of two servers is faster, which rows are less certain than they look."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from figures.cells import Cell
from figures.intervals import Interval, invert
from figures.measured import Measured

LATE_SENDING_S = 1e-3  # p99 of sending late; above it an open-loop row does not show the server
FOREIGN_LOAD_SHARE = 0.1  # of the cores, used by programs that are neither client nor server
SLOW_CONNECT_S = 1.0  # a kernel whose first attempt was dropped asks again after a second


@dataclass(frozen=True)
class Verdict:
    """Two servers of one kind, neighbours in the ranking at a number of connections."""

    connections: int
    faster: str  # by the median round
    slower: str
    ratio: Interval  # of their requests per second, round by round

    @property
    def is_decided(self) -> bool:
        """Whether the difference is significant: the whole interval lies on one side of 1."""
        return self.ratio.low > 1 or self.ratio.high < 1


class Doubt(Enum):
    """Why rows are less certain than they look; `words.py` has the sentences."""

    INTERRUPTED = "interrupted"
    SHARED_CORES = "shared cores"
    NOT_IN_FULL = "not in full"
    WIDE = "wide"
    BUSY_CLIENT = "busy client"
    LATE_SENDING = "late sending"
    SLOW_CONNECT = "slow connect"
    FOREIGN_LOAD = "foreign load"
    FAILED = "failed"


@dataclass(frozen=True)
class RowWarning:
    """One doubt about one row, or about the whole run if there is no cell."""

    doubt: Doubt
    server: str = ""
    cell: Cell | None = None
    detail: str = ""  # what happened to a server that is not measured in full


def list_verdicts(measured: Measured) -> list[Verdict]:
    """Return a verdict for each two neighbours of one kind, at the fewest and at the most connections."""
    connections = measured.settings["connections"]
    verdicts = []
    for count in dict.fromkeys((connections[0], connections[-1])):
        for kind in measured.kinds:
            ranking = measured.ranking(count, kind)
            for faster, slower in zip(ranking, ranking[1:], strict=False):
                ratio = measured.ratio(faster, slower, count)
                if ratio is not None and ratio.high < 1:  # in the rounds that only these two share
                    verdicts.append(Verdict(count, slower, faster, invert(ratio)))
                elif ratio is not None:
                    verdicts.append(Verdict(count, faster, slower, ratio))
    return verdicts


def list_ties(measured: Measured, first: str, connections: int) -> list[str]:
    """Return the servers of the kind of `first`, the fastest of it, that are not significantly slower."""
    ties = []
    for name in measured.ranking(connections, measured.kind(first)):
        ratio = measured.ratio(first, name, connections) if name != first else None
        if ratio is not None and ratio.low <= 1 <= ratio.high:
            ties.append(name)
    return ties


def list_warnings(measured: Measured) -> list[RowWarning]:
    """Return every doubt about the run and its rows."""
    warnings = []
    if not measured.result.get("complete", True):
        warnings.append(RowWarning(Doubt.INTERRUPTED))
    if measured.settings["server_cpus"] is None:
        warnings.append(RowWarning(Doubt.SHARED_CORES))
    for name, server in measured.servers.items():
        if server.get("failure"):
            warnings.append(RowWarning(Doubt.NOT_IN_FULL, name, detail=server["failure"]))
    for name in measured.names:
        for cell in measured.closed(name):
            warnings += [RowWarning(doubt, name, cell) for doubt in _doubts_of_closed(measured, name, cell)]
        for cell in measured.open(name):
            warnings += [RowWarning(doubt, name, cell) for doubt in _doubts_of_open(cell)]
    return warnings


def _doubts_of_closed(measured: Measured, name: str, cell: Cell) -> Iterator[Doubt]:
    if cell.is_client_the_limit:
        yield Doubt.BUSY_CLIENT
    if cell.failed or cell.wrong:
        yield Doubt.FAILED
    interval = measured.floor_ratio(name, cell.connections) or cell.rate
    precision = measured.settings.get("precision")
    if cell.rows_per_request == 1 and precision and not measured.is_floor(name) and interval.half_width > precision:
        yield Doubt.WIDE
    yield from _doubts_of_any(cell)


def _doubts_of_open(cell: Cell) -> Iterator[Doubt]:
    if cell.keeps_up and cell.late_p99_s > LATE_SENDING_S:
        yield Doubt.LATE_SENDING
    if cell.wrong or (cell.failed and cell.keeps_up):
        yield Doubt.FAILED
    yield from _doubts_of_any(cell)


def _doubts_of_any(cell: Cell) -> Iterator[Doubt]:
    if cell.connect_s > SLOW_CONNECT_S:
        yield Doubt.SLOW_CONNECT
    if cell.disturbed_share > FOREIGN_LOAD_SHARE:
        yield Doubt.FOREIGN_LOAD
