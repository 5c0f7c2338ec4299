"""From timed runs to a crossover: intervals, the fit t = a + b · rows, and what an infinitely fast device would bring.

Pure arithmetic on a result file's cells; nothing here knows a device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from figures.intervals import Interval, median_interval
from figures.result_file import RESULTS_DIR, ResultError, read_result

GPU_PATH = RESULTS_DIR / "gpu.json"


@dataclass(frozen=True)
class TimedCell:
    """One network, rows a run and variant: seconds a run, one value a round."""

    model: str
    rows: int
    variant: str
    device: str  # "cpu" or "cuda"
    is_bound: bool  # a bound that no request sees: the data never leave the device
    is_whole: bool  # all cores of the machine, a process each: `seconds` is what a run takes of the whole machine
    seconds: tuple[float, ...]

    @property
    def time(self) -> Interval:
        return median_interval(self.seconds)

    @property
    def rows_per_s(self) -> float:
        return self.rows / self.time.estimate


def read_crossover(path: Path = GPU_PATH) -> dict[str, Any]:
    """Return the content of a crossover's file; ResultError if it is none."""
    result = read_result(path)
    if "cells" not in result:
        raise ResultError(f"{path}: not a file of gpu_crossover.py")
    return result


def make_timed_cells(result: dict[str, Any]) -> list[TimedCell]:
    """Return the cells of a file."""
    return [
        TimedCell(
            cell["model"], cell["rows"], cell["variant"], cell["device"], cell["is_bound"], cell["is_whole"],
            tuple(part["elapsed_s"] / part["calls"] for part in cell["rounds"]),
        )
        for cell in result["cells"]
    ]  # fmt: skip


def find_best(cells: Sequence[TimedCell], model: str, rows: int, device: str, whole: bool = False) -> TimedCell | None:
    """Return the fastest variant of a device that a request would see; with `whole` of the machine's throughput."""
    own = [
        cell
        for cell in cells
        if (cell.model, cell.rows, cell.device) == (model, rows, device)
        and not cell.is_bound
        and (whole or not cell.is_whole)
    ]
    return min(own, key=lambda cell: cell.time.estimate, default=None)


@dataclass(frozen=True)
class Crossover:
    """Between which numbers of rows the GPU begins to win; `above` None: it never did."""

    model: str
    below: int | None  # the largest number of rows below `above` at which it did not win; None: it won at the smallest
    above: int | None  # the smallest number of rows from which on it always won


def find_crossover(cells: Sequence[TimedCell], model: str, whole: bool = False) -> Crossover | None:
    """Return from how many rows on the best GPU variant beats the best CPU variant beyond their intervals.

    None if no number of rows was measured on both.
    """
    wins = {}
    for rows in sorted({cell.rows for cell in cells if cell.model == model}):
        gpu, cpu = (find_best(cells, model, rows, device, whole) for device in ("cuda", "cpu"))
        if gpu and cpu:
            wins[rows] = gpu.time.high < cpu.time.low
    if not wins:
        return None
    above = None
    for rows in reversed(wins):
        if not wins[rows]:
            break
        above = rows
    below = max((rows for rows in wins if above is None or rows < above), default=None)
    return Crossover(model, below, above)


@dataclass(frozen=True)
class Fit:
    """t = a + b · rows, fitted on every second number of rows."""

    a_s: float
    b_s: float
    held_out_error: float  # the largest relative error at the others; nan without any

    def time_s(self, rows: float) -> float:
        return self.a_s + self.b_s * rows


def fit_time(cells: Sequence[TimedCell], model: str, variant: str) -> Fit | None:
    """Fit one variant's time; relative errors count alike at all sizes. None with fewer than three sizes."""
    own = sorted((cell for cell in cells if (cell.model, cell.variant) == (model, variant)), key=lambda cell: cell.rows)
    if len(own) < 3:
        return None
    rows = np.array([cell.rows for cell in own], dtype=float)
    times_s = np.array([cell.time.estimate for cell in own])
    used = np.arange(len(own)) % 2 == 0
    design = np.column_stack([np.ones(len(own)), rows]) / times_s[:, None]
    (a_s, b_s), *_ = np.linalg.lstsq(design[used], np.ones(int(used.sum())), rcond=None)
    if a_s < 0:
        a_s, b_s = 0.0, 1 / float(np.mean(rows[used] / times_s[used]))
    if b_s < 0:
        a_s, b_s = 1 / float(np.mean(1 / times_s[used])), 0.0
    errors = np.abs(a_s + b_s * rows - times_s)[~used] / times_s[~used]
    return Fit(float(a_s), float(b_s), float(errors.max()) if len(errors) else float("nan"))


def find_fitted_crossover(cpu: Fit, gpu: Fit) -> float | None:
    """Return the number of rows at which two fits meet; None if the GPU's line never falls below the CPU's."""
    if gpu.a_s <= cpu.a_s:
        return 1.0 if gpu.time_s(1) <= cpu.time_s(1) else None
    return (gpu.a_s - cpu.a_s) / (cpu.b_s - gpu.b_s) if cpu.b_s > gpu.b_s else None


def bound_speedup(server_s: float, model_s: float) -> float:
    """Return how many times faster a server gets if its model costs nothing (Amdahl's law)."""
    if not 0 <= model_s < server_s:
        raise ValueError("the model is a part of what the server takes")
    return server_s / (server_s - model_s)


def rows_per_dollar(rows_per_s: float, price_per_hour: float) -> float:
    return rows_per_s * 3600 / price_per_hour


def encode_cell(cell: TimedCell, rounds: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """Return a cell as JSON-able values; `rounds` are (calls, elapsed seconds)."""
    return {
        "model": cell.model,
        "rows": cell.rows,
        "variant": cell.variant,
        "device": cell.device,
        "is_bound": cell.is_bound,
        "is_whole": cell.is_whole,
        "rounds": [{"calls": calls, "elapsed_s": elapsed_s} for calls, elapsed_s in rounds],
    }
