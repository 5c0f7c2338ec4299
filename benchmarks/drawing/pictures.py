"""The pictures of the root README, made from a result file: requests per second, and the report's first screen.

Each is there for a light and for a dark page. The chart is drawn by matplotlib and is the same to the byte whenever
and wherever it is drawn. The screen is the report in Chromium; its file records its source.
"""

import hashlib
import io
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.typing import RcKeyType
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from drawing.page import render_page
from drawing.plots import bar_lengths, make_styles
from drawing.tables import KIND_ORDER
from drawing.theme import DARK, LIGHT, RC
from endpoints.base import REPOSITORY_DIR
from figures.measured import Measured
from figures.result_file import ResultError
from figures.words import format_count

PICTURES_DIR = REPOSITORY_DIR / "pictures"
THEMES: Mapping[str, Mapping[str, str]] = {"light": LIGHT, "dark": DARK}
SCREEN = (1400, 900)  # pixels
MADE_FROM = "Made-From"  # the key of the PNG's text
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
BROWSER_TIMEOUT_S = 180
KIND_WORDS = {
    "native": "the framework's own server",
    "docker": "the server in its image",
    "local": "this repository's own server",
    "peer": "a server that others wrote",
}


def draw_requests(measured: Measured) -> Figure | None:
    """Requests per second at the most connections with their intervals, by kind; rows that stand in are hatched."""
    connections = measured.settings["connections"][-1]
    kinds = [kind for kind in KIND_ORDER if kind in measured.kinds]
    cells = measured.cells_at(connections)
    names = [name for kind in kinds for name in cells if measured.kind(name) == kind]
    names.sort(key=lambda name: (kinds.index(measured.kind(name)), -cells[name].rate.estimate))
    if not names:
        return None
    styles = make_styles(measured)
    figure = Figure(figsize=(8.6, 1.35 + 0.29 * (len(names) + len(kinds) - 1)), layout="constrained")
    axes = figure.subplots()
    place, places, last = 0.0, [], ""
    for name in names:
        kind, cell = measured.kind(name), cells[name]
        place += 1.0 if kind == last or not last else 1.8
        last = kind
        places.append(place)
        is_local = kind != "native"
        axes.barh(
            place, cell.rate.estimate, height=0.68, color=styles[name].colour, hatch="////" if is_local else "",
            alpha=0.75 if is_local else 1.0,
        )  # fmt: skip
        axes.errorbar(
            [cell.rate.estimate], [place], xerr=bar_lengths([cell.rate]), color=LIGHT["ink"], capsize=3, elinewidth=1.2
        )
        end = cell.rate.high if cell.rate.is_closed else cell.rate.estimate
        mark = "≥ " if cell.is_client_the_limit else ""
        axes.annotate(
            f"{mark}{cell.rate.estimate:,.0f}", (end, place), xytext=(7, 0), textcoords="offset points", va="center",
            fontsize=9,
        )  # fmt: skip
    axes.set_yticks(places, list(names))
    axes.invert_yaxis()
    axes.set_xlim(0, max(cells[name].rate.high if cells[name].rate.is_closed else cells[name].rate.estimate
                         for name in names) * 1.12)  # fmt: skip
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel(f"requests per second on one core, {format_count(connections, 'connection')}; with 95 % intervals")
    handles = [
        Patch(facecolor=LIGHT["muted"], hatch="" if kind == "native" else "////", alpha=1 if kind == "native" else 0.75,
              edgecolor=LIGHT["surface"], label=f"{kind}: {KIND_WORDS[kind]}")
        for kind in kinds
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=len(kinds))
    return figure


def render_chart(measured: Measured, theme: str) -> str:
    """Return the chart as an SVG file's text in the colours of a theme; ResultError if nothing was measured."""
    settings: dict[RcKeyType, Any] = {**RC, "svg.fonttype": "path", "svg.hashsalt": "requests", "font.size": 10}
    with matplotlib.rc_context(settings):
        figure = draw_requests(measured)
        if figure is None:
            raise ResultError("nothing was measured that could be drawn")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    for name, value in LIGHT.items():
        text = text.replace(value, THEMES[theme][name])
    return text


def fingerprint(measured: Measured, theme: str) -> str:
    """Return the source of the first screen: a digest of the page without its plots, which lie further down."""
    return hashlib.sha256(render_page(measured, [], theme).encode()).hexdigest()


def read_fingerprint(path: Path) -> str | None:
    """Return the source that is recorded in a picture of the first screen."""
    with Image.open(path) as image:
        made_from = image.info.get(MADE_FROM)
    return str(made_from) if made_from else None


def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, CHROMIUMS)), None)


def take_screen(measured: Measured, theme: str, path: Path, chromium: str) -> None:
    """Write the report's first screen as a PNG file of 256 colours; ResultError if the browser fails."""
    with tempfile.TemporaryDirectory() as folder:
        page, shot = Path(folder) / "report.html", Path(folder) / "screen.png"
        page.write_text(render_page(measured, [], theme), encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        options += ["--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"]
        width, height = SCREEN
        options += [f"--user-data-dir={folder}/profile", f"--window-size={width},{height}", f"--screenshot={shot}"]
        try:
            subprocess.run([chromium, *options, page.as_uri()], capture_output=True, timeout=BROWSER_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise ResultError(f"{chromium} took over {BROWSER_TIMEOUT_S} s") from None
        if not shot.exists():
            raise ResultError(f"{chromium} made no picture")
        about = PngInfo()
        about.add_text(MADE_FROM, fingerprint(measured, theme))
        with Image.open(shot) as image:
            image.convert("RGB").quantize(256).save(path, pnginfo=about, optimize=True)


def write_pictures(measured: Measured) -> list[str]:
    """Write the pictures that are not fresh; return a sentence for each file that was written or could not be."""
    PICTURES_DIR.mkdir(exist_ok=True)
    said = []
    for theme in THEMES:
        chart = PICTURES_DIR / f"requests-{theme}.svg"
        text = render_chart(measured, theme)
        if not chart.exists() or chart.read_text() != text:
            chart.write_text(text)
            said.append(f"wrote {chart.relative_to(REPOSITORY_DIR)}")
        screen = PICTURES_DIR / f"report-{theme}.png"
        if screen.exists() and read_fingerprint(screen) == fingerprint(measured, theme):
            continue
        chromium = find_chromium()
        if chromium is None:
            said.append(f"{screen.name} is old, and no Chromium is on PATH: apt-get install chromium")
            continue
        take_screen(measured, theme, screen, chromium)
        said.append(f"wrote {screen.relative_to(REPOSITORY_DIR)}")
    return said
