"""Draw the looks of an A/B test: each difference with its interval, and the limits they are compared with."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from drawing.theme import FIGURE_WIDTH_IN, LIGHT, PNG_DPI, RC
from rollout.decision import Judgement, Plan

NAMES = {"accuracy": "accuracy, points", "brier": "Brier score", "latency": "latency, ratio"}
BETTER = {"accuracy": "up is better", "brier": "down is better", "latency": "down is better"}
# Of a number or an array, into the unit of NAMES; the Brier score stays as it is.
CHANGES: dict[str, Callable[[Any], Any]] = {"accuracy": lambda value: value * 100, "latency": np.exp}


def draw(plan: Plan, judgements: Sequence[Judgement], title: str, path: Path) -> None:
    """Write a PNG: version 2 against version 1 in each metric, over the users who had come by each look.

    An interval that leaves the panel is wider than it: the scale follows the narrower ones of the later looks.
    """
    users = plan.users[: len(judgements)]
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(FIGURE_WIDTH_IN, 6.4), layout="constrained", facecolor=LIGHT["surface"])
        for axes, metric in zip(figure.subplots(3, 1, sharex=True), NAMES, strict=True):
            change = CHANGES.get(metric, lambda value: value)
            middle, low, high = (
                change(np.array([getattr(one, part)[metric] for one in judgements], dtype=float))
                for part in ("estimates", "lows", "highs")
            )
            axes.axhline(change(0.0), color=LIGHT["muted"], linewidth=1, label="no difference")
            limit = {"accuracy": -plan.margin * 100, "latency": 1 + plan.latency_margin}.get(metric)
            if limit is not None:
                axes.axhline(
                    limit, color=LIGHT["alarm"], linewidth=1.2, linestyle=(0, (4, 2)), label="most harm allowed"
                )
            bars = np.array([middle - np.maximum(low, -1e6), np.minimum(high, 1e6) - middle])
            axes.errorbar(
                users, middle, yerr=bars, fmt="o", color=LIGHT["series0"], capsize=3, elinewidth=1.3,
                label="version 2 against 1, interval valid at every look",
            )  # fmt: skip
            narrow = np.sort(np.concatenate([middle - low, high - middle]))[: len(middle)]
            reach = 2.2 * narrow[np.isfinite(narrow)].max(initial=1e-3)
            known = [change(0.0), *middle, *([] if limit is None else [limit])]
            axes.set_ylim(min(known) - reach, max(known) + reach)
            axes.set_ylabel(NAMES[metric])
            axes.set_title(BETTER[metric], loc="right", fontsize=8, color=LIGHT["muted"])
        axes.set_xlim(0, plan.users[-1] * 1.04)
        axes.set_xlabel(f"users so far, of {plan.users[-1]:,} planned")
        figure.suptitle(title, x=0.01, ha="left", fontsize=9.5, wrap=True)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=PNG_DPI)
