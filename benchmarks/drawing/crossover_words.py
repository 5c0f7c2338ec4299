"""What a GPU brings, in words and tables: bound, crossover, fit, rows per dollar."""

from pathlib import Path
from typing import Any

from accelerator.crossover import (
    GPU_PATH,
    TimedCell,
    bound_speedup,
    find_best,
    find_crossover,
    find_fitted_crossover,
    fit_time,
    make_timed_cells,
    read_crossover,
    rows_per_dollar,
)
from figures.intervals import percentile_interval
from figures.measured import Measured
from figures.result_file import ResultError
from figures.words import format_count, format_interval

OURS = "ours"
SERVER = "onnx-tuned"
NOT_MEASURED = "gpu_crossover.py was not run on a GPU: none was available."


def describe_bound(measured: Measured, path: Path = GPU_PATH) -> str:
    """How much faster an infinitely fast device would make the ONNX server, by rows a request; from both files."""
    try:
        result = read_crossover(path)
    except ResultError:
        return "How much an infinitely fast GPU would bring is not known: gpu_crossover.py --device cpu measures it."
    if result["environment"].get("cpu") != measured.environment.get("cpu"):
        return (
            "How much an infinitely fast GPU would bring is not known: the model was timed on another processor than "
            "the server, and gpu_crossover.py --device cpu times it here."
        )
    cells = make_timed_cells(result)
    parts = []
    for cell in measured.closed(SERVER) if SERVER in measured.servers else []:
        best = find_best(cells, OURS, cell.rows_per_request, "cpu")
        if cell.connections == 1 and best and len(cell.latencies_s):
            server_s = percentile_interval(cell.rounds_s, 50).estimate
            if best.time.estimate < server_s:
                bound = bound_speedup(server_s, best.time.estimate)
                parts.append(f"{bound:.2f} × at {cell.rows_per_request:,}")
    if not parts:
        return "How much an infinitely fast GPU would bring is not known for the rows that were measured."
    return (
        f"An infinitely fast GPU makes {SERVER} faster by at most {', '.join(parts)} rows a request (Amdahl's law: the "
        "rest of the time is the server's, not the model's)."
    )


def describe_crossover(path: Path = GPU_PATH) -> str:
    """From how many rows on a GPU wins, for each network; or that none was measured."""
    try:
        result = read_crossover(path)
    except ResultError:
        return NOT_MEASURED
    if not result.get("gpu"):
        return NOT_MEASURED
    cells = make_timed_cells(result)
    return f"On {result['gpu']} against {result['environment']['cpu']}: " + "; ".join(
        _describe_one(cells, model) for model in dict.fromkeys(cell.model for cell in cells)
    ) + "."  # fmt: skip


def _describe_one(cells: list[TimedCell], model: str) -> str:
    found = find_crossover(cells, model)
    if found is None:
        return f"{model}: not measured on both"
    if found.above is None:
        return f"{model}: the GPU never won, up to {found.below:,} rows"
    if found.below is None:
        return f"{model}: the GPU won from {found.above:,} rows, the fewest, on"
    return f"{model}: the GPU wins from between {found.below:,} and {found.above:,} rows on"


def list_lines(result: dict[str, Any], measured: Measured | None, price_gpu: float, price_cpu: float) -> list[str]:
    """The lines that gpu_crossover.py prints of a file."""
    cells = make_timed_cells(result)
    lines = []
    for model in dict.fromkeys(cell.model for cell in cells):
        for rows in sorted({cell.rows for cell in cells if cell.model == model}):
            parts = []
            for cell in cells:
                if (cell.model, cell.rows) == (model, rows):
                    bound = " (a bound)" if cell.is_bound else ""
                    parts.append(f"{cell.variant}{bound} {format_interval(cell.time.scale(1e6), ',.1f')} µs")
            lines.append(f"{model}, {format_count(rows, 'row')}: " + "; ".join(parts))
        for variant in dict.fromkeys(cell.variant for cell in cells if cell.model == model):
            fit = fit_time(cells, model, variant)
            if fit:
                lines.append(
                    f"{model}, {variant}: {fit.a_s * 1e6:.1f} µs + {fit.b_s * 1e6:.3f} µs a row, held-out sizes within "
                    f"{fit.held_out_error:.0%}"
                )
        lines += _describe_fitted(cells, model)
        lines += _describe_money(cells, model, price_gpu, price_cpu)
    lines += result.get("refused", [])
    if measured is not None:
        lines.append(describe_bound(measured))
    lines.append(describe_crossover() if result.get("gpu") else NOT_MEASURED)
    return lines


def _describe_fitted(cells: list[TimedCell], model: str) -> list[str]:
    cpu = fit_time(cells, model, "cpu-1")
    lines = []
    for variant in ("gpu-run", "gpu-bound", "gpu-graph"):
        gpu = fit_time(cells, model, variant)
        if cpu and gpu:
            meets = find_fitted_crossover(cpu, gpu)
            where = f"meets cpu-1 at {meets:,.0f} rows" if meets else "never meets cpu-1"
            lines.append(f"{model}, {variant}: by the fits {where}")
    return lines


def _describe_money(cells: list[TimedCell], model: str, price_gpu: float, price_cpu: float) -> list[str]:
    sizes = sorted({cell.rows for cell in cells if cell.model == model})
    parts = []
    for device, price in (("cpu", price_cpu), ("cuda", price_gpu)):
        best = find_best(cells, model, sizes[-1], device, whole=True)
        if best:
            parts.append(f"{best.variant} {rows_per_dollar(best.rows_per_s, price):,.3g}")
    return [f"{model}, {sizes[-1]:,} rows, rows for a dollar: {', '.join(parts)}"] if parts else []
