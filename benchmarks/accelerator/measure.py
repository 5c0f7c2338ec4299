"""Time every variant of one network at one number of rows: answers first, then rounds in turn."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from accelerator.crossover import TimedCell, encode_cell
from accelerator.variants import (
    Variant,
    WrongAnswer,
    check_answers,
    make_inputs,
    open_plain,
    processes_of,
    time_round,
)

TRIES = 3  # of a run, before it is left out for its length

Round = Callable[[float], tuple[int, float]]


def measure_cell(
    name: str, model: bytes, rows: int, variants: Sequence[Variant], seconds: float, rounds: int, limit_s: float
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the timed cells, and a sentence for each variant that was not timed: wrong answers, or too long a run.

    In each round every variant runs for `seconds`, one after the other, so that a slow stretch of the machine hits all
    alike. A variant whose run takes longer than `limit_s` is left out.
    """
    inputs = make_inputs(rows)
    reference = open_plain(model, "cpu", 1, True)
    timed: dict[str, tuple[Variant, Round, list[tuple[int, float]]]] = {}
    refused = []
    with ExitStack() as stack:
        for variant in variants:
            run = variant.open(model, rows)
            try:
                check_answers(run, reference, inputs)
            except WrongAnswer as error:
                refused.append(f"{name}, {rows:,} rows, {variant.name}: not timed, {error}")
                continue
            elapsed_s = min(time_round(run, inputs, 0.0)[1] for _ in range(TRIES))  # of one run
            if elapsed_s > limit_s:
                refused.append(f"{name}, {rows:,} rows, {variant.name}: not timed, a run takes {elapsed_s:.2f} s")
                continue
            if variant.processes > 1:
                timed[variant.name] = variant, stack.enter_context(processes_of(model, rows, variant.processes)), []
            else:
                timed[variant.name] = variant, partial(time_round, run, inputs), []
        for _ in range(rounds):
            for _, run_round, found in timed.values():
                found.append(run_round(seconds))
    cells = []
    for variant, _, found in timed.values():
        per_run = tuple(elapsed_s / calls for calls, elapsed_s in found)
        cell = TimedCell(name, rows, variant.name, variant.device, variant.is_bound, variant.processes > 1, per_run)
        cells.append(encode_cell(cell, found))
    return cells, refused
