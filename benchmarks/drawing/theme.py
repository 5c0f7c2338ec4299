"""Colours, markers and matplotlib settings of every plot, and the light and the dark palette of the page."""

from typing import Any

from matplotlib.typing import RcKeyType

# Every colour is drawn as its light value and becomes var(--name) in the page, so both themes share one SVG.
# The series hues are Okabe and Ito's ("Color universal design", 2008), darkened or lightened to reach a
# contrast of 3 against the page; marker and dash tell series apart without any colour.
LIGHT = {
    "ink": "#1b1f24", "muted": "#59626e", "line": "#d5dae1", "page": "#f4f6f8", "surface": "#fefefe",
    "accent": "#0b5cad", "alarm": "#b3261e",
    "series0": "#0072b2", "series1": "#c84c00", "series2": "#00805d", "series3": "#a83f86",
    "series4": "#8a6500", "series5": "#17799b", "series6": "#7a4fbf", "floor": "#6c7681",
}  # fmt: skip
DARK = {
    "ink": "#e7ebf0", "muted": "#a6b0bc", "line": "#39414c", "page": "#0f1318", "surface": "#171c23",
    "accent": "#7cbcff", "alarm": "#ff8f85",
    "series0": "#56b4e9", "series1": "#ff8b45", "series2": "#2ecc9f", "series3": "#ee8dcb",
    "series4": "#e3c03a", "series5": "#6fd3f0", "series6": "#b79cff", "floor": "#9aa5b1",
}  # fmt: skip
MARKERS = "os^DvPX"
FIGURE_WIDTH_IN = 5.8
PNG_DPI = 160
RC: dict[RcKeyType, Any] = {
    "font.family": "DejaVu Sans", "font.size": 9, "svg.fonttype": "none", "text.parse_math": False,
    "text.color": LIGHT["ink"], "axes.labelcolor": LIGHT["ink"], "axes.edgecolor": LIGHT["muted"],
    "xtick.color": LIGHT["muted"], "ytick.color": LIGHT["muted"], "xtick.labelcolor": LIGHT["ink"],
    "ytick.labelcolor": LIGHT["ink"], "grid.color": LIGHT["line"], "grid.linewidth": 0.7,
    "axes.facecolor": "none", "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 8.5, "lines.linewidth": 1.6,
    "lines.markersize": 5, "hatch.color": LIGHT["surface"], "hatch.linewidth": 1.2,
}  # fmt: skip
