"""The root README's pictures are those that sample.json makes, and each is there for a light and for a dark page."""

import re
from xml.etree import ElementTree

import pytest
from PIL import Image

from drawing import pictures
from drawing.pictures import (
    PICTURES_DIR,
    SCREEN,
    THEMES,
    find_chromium,
    fingerprint,
    read_fingerprint,
    render_chart,
    write_pictures,
)
from drawing.theme import DARK, LIGHT
from figures.measured import Measured
from figures.result_file import SAMPLE_PATH, ResultError, read_result
from planted_results import Planted, make_result

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def sample():
    return Measured(read_result(SAMPLE_PATH))


@pytest.fixture(scope="module")
def charts(sample):
    return {theme: render_chart(sample, theme) for theme in THEMES}


@pytest.mark.parametrize("theme", THEMES)
def test_the_pictures_are_fresh(sample, charts, theme):
    assert (PICTURES_DIR / f"requests-{theme}.svg").read_text() == charts[theme], "run make readme"
    screen = PICTURES_DIR / f"report-{theme}.png"
    assert read_fingerprint(screen) == fingerprint(sample, theme), "run make readme (it needs Chromium)"
    with Image.open(screen) as image:
        assert image.size == SCREEN


def test_the_chart_shows_every_server_but_the_floor_in_the_colours_of_its_theme(sample, charts):
    comments = re.findall(r"<!-- (.*?) -->", charts["light"])
    for name in sample.names:
        shown = any(comment == name for comment in comments)
        assert shown == (
            not sample.is_floor(name) and sample.cell(name, sample.settings["connections"][-1]) is not None
        )
    assert any("local: this repository" in comment for comment in comments)
    light, dark = (set(re.findall(r"#[0-9a-f]{6}", charts[theme])) for theme in ("light", "dark"))
    assert light <= set(LIGHT.values()) | {"#000000", "#ffffff"}
    assert dark <= set(DARK.values()) | {"#000000", "#ffffff"}
    assert light != dark


def test_the_chart_is_an_svg_that_asks_nothing_of_anybody(charts):
    text = charts["dark"]
    assert ElementTree.fromstring(text).tag == f"{SVG}svg"
    assert not re.search(r"""(?:href|src)=["'](?!#)""", text)


def test_another_result_makes_another_chart_and_an_empty_one_none():
    one, other = (Measured(make_result({"a": Planted(flat_out=rate)})) for rate in (1000, 2000))
    assert render_chart(one, "light") != render_chart(other, "light")
    assert render_chart(one, "light") == render_chart(one, "light")
    with pytest.raises(ResultError, match="nothing was measured"):
        render_chart(Measured(make_result({"null": Planted("floor")})), "light")


def test_the_pictures_are_written_once(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "PICTURES_DIR", tmp_path / "pictures")
    monkeypatch.setattr(pictures, "REPOSITORY_DIR", tmp_path)
    monkeypatch.setattr(pictures, "CHROMIUMS", ())
    measured = Measured(make_result({"a": Planted()}))
    said = write_pictures(measured)
    assert "wrote pictures/requests-light.svg" in said
    assert any("no Chromium is on PATH: apt-get install chromium" in text for text in said)
    assert not [text for text in write_pictures(measured) if text.startswith("wrote")]


@pytest.mark.slow
def test_the_screen_is_taken_in_a_browser(tmp_path, monkeypatch):
    if find_chromium() is None:
        pytest.skip("no Chromium on PATH: apt-get install chromium")
    monkeypatch.setattr(pictures, "PICTURES_DIR", tmp_path / "pictures")
    monkeypatch.setattr(pictures, "REPOSITORY_DIR", tmp_path)
    said = write_pictures(Measured(make_result({"a": Planted()})))
    assert "wrote pictures/report-dark.png" in said
    brightness = {}
    for theme in THEMES:
        with Image.open(tmp_path / "pictures" / f"report-{theme}.png") as image:
            assert image.size == SCREEN
            brightness[theme] = image.convert("L").resize((1, 1)).getpixel((0, 0))
    assert brightness["dark"] < 80 < 180 < brightness["light"]
