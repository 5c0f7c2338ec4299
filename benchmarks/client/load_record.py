"""What a Locust run observed, to the microsecond: filled by load_test.py, merged from its workers, printed, saved.

Locust's own statistics keep failed requests among the response times and print whole milliseconds.
Imports nothing of the load generator, which must not run in a process that gevent has patched.
"""

import csv
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from figures.cells import SAMPLES_BEYOND_PERCENTILE

PERCENTILES = (50, 90, 99, 99.9)
MOST_SLICES = 16
EXACT_BELOW_US = 10_000  # longer latencies are kept to one part in a thousand, so that a record stays small


@dataclass
class LoadRecord:
    """Right answers by time of sending and by latency; failed requests and wrong answers. Times are of the wall clock.

    A record is bounded: when a run outgrows MOST_SLICES slices, they are joined two by two.
    """

    width_s: int = 1  # length of a slice, a power of two
    slices: dict[int, Counter[int]] = field(default_factory=dict)  # time // width_s -> {latency in us: right answers}
    users: dict[int, list[int]] = field(default_factory=dict)  # time // width_s -> [fewest, most] users at once
    errors: Counter[str] = field(default_factory=Counter)  # failed requests by reason
    wrong: int = 0  # replies with status 200 that break the parity contract
    first_s: float = float("inf")  # the first request was sent
    last_s: float = 0.0  # the last reply was complete
    cpu_s: float = 0.0  # of the processes that simulate users

    @property
    def count(self) -> int:
        """Right answers."""
        return sum(counts.total() for counts in self.slices.values())

    @property
    def elapsed_s(self) -> float:
        return max(self.last_s - self.first_s, 0.0)

    @property
    def rate(self) -> float:
        """Right answers per second."""
        return self.count / self.elapsed_s if self.elapsed_s else 0.0

    @property
    def latencies_s(self) -> np.ndarray:
        """Latencies of right answers, ascending, (n,)."""
        return _to_latencies(self.slices.values())

    def note_answer(self, sent_s: float, latency_s: float) -> None:
        """Count a right answer."""
        latency_us = round(latency_s * 1e6)
        if latency_us >= EXACT_BELOW_US:
            step = 10 ** (len(str(latency_us)) - 4)
            latency_us = latency_us // step * step
        key = int(sent_s) // self.width_s
        if key not in self.slices:
            self.slices[key] = Counter()
            self._join_slices(key)
            key = int(sent_s) // self.width_s
        self.slices[key][latency_us] += 1
        self.note_time(sent_s, latency_s)

    def note_time(self, sent_s: float, latency_s: float) -> None:
        """Widen the observed stretch by a request, right or not."""
        self.first_s = min(self.first_s, sent_s)
        self.last_s = max(self.last_s, sent_s + latency_s)

    def note_users(self, now_s: float, count: int) -> None:
        """Remember how many users there were."""
        key = int(now_s) // self.width_s
        self._widen_users(self.users, key, [count, count])
        self._join_slices(key)

    def merge(self, data: dict[str, Any]) -> None:
        """Add a worker's record, as its `to_dict` returned it."""
        other = LoadRecord.from_dict(data)
        while other.width_s < self.width_s:
            other._double_width()
        while self.width_s < other.width_s:
            self._double_width()
        for key, counts in other.slices.items():
            self.slices.setdefault(key, Counter()).update(counts)
        for key, bounds in other.users.items():
            self._widen_users(self.users, key, bounds)
        self.errors.update(other.errors)
        self.wrong += other.wrong
        self.first_s = min(self.first_s, other.first_s)
        self.last_s = max(self.last_s, other.last_s)
        self.cpu_s += other.cpu_s
        for key in other.slices:
            self._join_slices(key)

    def to_dict(self) -> dict[str, Any]:
        """Return its values, for msgpack and JSON; `asdict` would break the counters."""
        return dict(vars(self))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "LoadRecord":
        """Return the record that `to_dict` gave, also after JSON has made words of its numbers."""
        return cls(**{
            **data,
            "slices": {
                int(key): Counter({int(us): number for us, number in counts.items()})
                for key, counts in data["slices"].items()
            },
            "users": {int(key): counts for key, counts in data["users"].items()},
            "errors": Counter(data["errors"]),
        })  # fmt: skip

    def list_rows(self) -> list[dict[str, Any]]:
        """Return a row of figures for each slice and one for the run: latencies in ms, None if too few answered."""
        rows = []
        for key, counts in sorted(self.slices.items()):
            begin_s = max(key * self.width_s, self.first_s)
            end_s = min((key + 1) * self.width_s, self.last_s)
            users = self.users.get(key) or self.users.get(key + 1) or [0, 0]  # a short first slice may have no sample
            rows.append(_figures(begin_s - self.first_s, end_s - self.first_s, users, _to_latencies([counts])))
        most = max((counts[1] for counts in self.users.values()), default=0)
        fewest = min((counts[0] for counts in self.users.values()), default=0)
        return [*rows, _figures(0.0, self.elapsed_s, [fewest, most], self.latencies_s)]

    def print(self, name: str, console: Console) -> None:
        """Print the slices, the reasons of failures, and the line that sums the run up."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        heads = ["seconds", "users", "right answers/s", *(f"p{percent:g} ms" for percent in PERCENTILES)]
        for head in heads:
            table.add_column(head, justify="right")
        rows = self.list_rows()
        for row in rows[:-1]:
            figures = [row[f"p{percent:g}_ms"] for percent in PERCENTILES]
            table.add_row(
                f"{row['from_s']:.1f}–{row['to_s']:.1f}", _range(row), f"{row['right_per_s']:,.0f}",
                *("too few" if figure is None else f"{figure:.3f}" for figure in figures),
            )  # fmt: skip
        console.print(table)
        for reason, count in self.errors.most_common():
            console.print(f"failed: {count:,} × {reason}", markup=False, soft_wrap=True)
        whole = rows[-1]
        percentiles = ", ".join(
            f"p{percent:g} {whole[f'p{percent:g}_ms']:.3f} ms"
            for percent in PERCENTILES
            if whole[f"p{percent:g}_ms"] is not None
        )
        console.print(
            f"{name}: {self.count:,} right answers in {self.elapsed_s:.1f} s with up to {whole['users_most']} users, "
            f"{self.rate:,.0f} per second, {percentiles or 'too few for a percentile'}, "
            f"{self.errors.total():,} failed, {self.wrong:,} wrong",
            soft_wrap=True,
        )

    def save(self, prefix: str) -> list[str]:
        """Write PREFIX_percentiles.csv, the rows, and PREFIX_record.json, the record; return their names."""
        paths = [f"{prefix}_percentiles.csv", f"{prefix}_record.json"]
        rows = self.list_rows()
        with Path(paths[0]).open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[-1])
            writer.writeheader()
            writer.writerows(rows)
        Path(paths[1]).write_text(json.dumps(self.to_dict()) + "\n")
        return paths

    def _join_slices(self, key: int) -> None:
        """Double the width until slice `key` and all others span at most MOST_SLICES."""
        keys = [*self.slices, *self.users, key]
        low, high = min(keys), max(keys)
        while high - low >= MOST_SLICES:
            self._double_width()
            low, high = low // 2, high // 2

    def _double_width(self) -> None:
        slices: dict[int, Counter[int]] = {}
        for key, counts in self.slices.items():
            slices.setdefault(key // 2, Counter()).update(counts)
        users: dict[int, list[int]] = {}
        for key, bounds in self.users.items():
            self._widen_users(users, key // 2, bounds)
        self.width_s, self.slices, self.users = 2 * self.width_s, slices, users

    @staticmethod
    def _widen_users(users: dict[int, list[int]], key: int, bounds: list[int]) -> None:
        fewest, most = users.get(key, bounds)
        users[key] = [min(fewest, bounds[0]), max(most, bounds[1])]


def _to_latencies(slices: Iterable[Counter[int]]) -> np.ndarray:
    counts: Counter[int] = Counter()
    for part in slices:
        counts.update(part)
    return np.sort(np.repeat(list(counts.keys()), list(counts.values()))) / 1e6 if counts else np.empty(0)


def _range(row: dict[str, Any]) -> str:
    fewest, most = row["users_fewest"], row["users_most"]
    return str(most) if fewest == most else f"{fewest}–{most}"


def _figures(from_s: float, to_s: float, users: list[int], latencies_s: np.ndarray) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "from_s": round(from_s, 3),
        "to_s": round(to_s, 3),
        "users_fewest": users[0],
        "users_most": users[1],
        "right_answers": len(latencies_s),
        "right_per_s": round(len(latencies_s) / (to_s - from_s), 1) if to_s > from_s else 0.0,
    }
    for percent in PERCENTILES:
        enough = len(latencies_s) * (1 - percent / 100) >= SAMPLES_BEYOND_PERCENTILE
        figures[f"p{percent:g}_ms"] = round(float(np.percentile(latencies_s, percent)) * 1000, 3) if enough else None
    return figures
