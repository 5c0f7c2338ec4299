"""The report answers its questions from a result file alone, and a real browser shows it whole."""

import copy
import importlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import websocket

from drawing.conclusion import conclude
from drawing.page import write_report
from figures.measured import Measured
from figures.result_file import SCHEMA_VERSION, Window, encode_window, write_result
from figures.verdicts import list_verdicts, list_warnings
from figures.words import describe_verdict, describe_warnings
from helpers import DEADLINE_S, call_main, wait_until

pytestmark = pytest.mark.slow

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CONNECTIONS, SIZES, ROUNDS = [1, 4, 16, 64], [1, 32, 1024], 8
EVIL = '<script>alert(1)</script> & "quoted" $x_1$'
# name: (kind, protocol, service time in s at one connection, requests/s at most, memory in MB)
SERVERS = {
    "null": ("floor", "REST", 0.00018, 9000.0, 40),
    "null-grpc": ("floor", "gRPC", 0.00030, 6000.0, 52),
    "bentoml": ("native", "REST", 0.00260, 520.0, 310),
    "onnx": ("local", "REST", 0.00035, 4200.0, 95),
    "onnx-grpc": ("local", "gRPC", 0.00048, 3100.0, 118),
    "tfserving": ("docker", "REST", 0.00110, 1500.0, 640),
    "tfserving-grpc": ("docker", "gRPC", 0.00095, 1530.0, 640),
}
FASTEST = "onnx (local)"
SHARES = [0.2, 0.5, 0.8, 0.95, 1.2]  # of a server's most requests/s; it keeps up with 0.8 and breaks above
OBJECTIVE_P99_S = 0.05


def make_result(rounds: int = ROUNDS, sweep: bool = True, seed: int = 0) -> dict:
    """Return a result of seven servers of known speed and one that did not start."""
    random = np.random.default_rng(seed)
    endpoints, windows, rates = {}, [], {}
    for name, (kind, protocol, service_s, most, memory_mb) in SERVERS.items():
        endpoints[name] = {
            "kind": kind, "protocol": protocol, "command": f"python serve_{name}.py --port 12345",
            "settings": {"workers": "1", "threads": "1 intra-op, 1 inter-op", "batching": "off"},
            "starts": [{"listens_s": 900 * service_s + x, "ready_s": 1200 * service_s + 2 * x} for x in (0.1, 0.14)],
        }  # fmt: skip
        if kind != "floor":
            endpoints[name]["max_abs_difference"] = {"1": 1.2e-7, "2": 9.1e-8}
        rates[name] = [float(f"{share * most:.2g}") for share in SHARES] if sweep else []
        for number in range(1, rounds + 1):
            drift = random.normal(1, 0.02)
            for connections, rows in [*((count, 1) for count in CONNECTIONS), *((1, size) for size in SIZES[1:])]:
                size_s = service_s * (1 + 0.002 * rows)
                rate = min(most, connections / size_s) * drift / (1 + 0.002 * rows)
                mean_s = connections / rate
                latencies_s = mean_s * (0.8 + 0.2 * random.lognormal(-0.5, 1, max(int(rate / 4), 30)))
                windows.append(make_window(name, "closed", number, rows, connections, latencies_s, rate, memory_mb))
            for nominal in rates[name]:
                load = nominal / most
                answered = min(nominal, most) * random.normal(1, 0.004)
                wait_s = service_s / max(1 - load, 0.05) if load < 0.9 else 0.2 * load
                latencies_s = service_s + random.exponential(wait_s, int(answered))
                windows.append(make_window(name, "open", number, 1, 64, latencies_s, answered, memory_mb, nominal))
    endpoints["torchserve"] = {
        "kind": "native", "protocol": "REST", "command": "python serve.py", "settings": {"workers": "2"}, "starts": [],
        "max_abs_difference": {}, "failure": f"torchserve: ended with exit code 1 before it served: {EVIL}",
    }  # fmt: skip
    next(w for w in windows if w["endpoint"] == "bentoml" and w["connections"] == 64)["errors"] = {"status 503": 3}
    next(w for w in windows if w["endpoint"] == "tfserving" and w["connections"] == 4)["foreign_share"] = 0.31
    return {
        "schema_version": SCHEMA_VERSION,
        "environment": {
            "utc": "2026-01-31T12:00:00+00:00", "command": "python benchmark_all.py --profile quick",
            "git_commit": "abc1234", "git_dirty": True, "cpu": "A Processor 9000 @ 3.00GHz", "cores": 2,
            "memory_bytes": 8 << 30, "governor": "performance", "load_average_1min": 0.21, "system": "Linux 6.1.0",
            "python": "3.11.7", "packages": {"torch": "2.13.0", "onnxruntime": "1.31.1", "bentoml": "1.4.39"},
        },
        "settings": {
            "profile": "quick", "version": "1", "connections": CONNECTIONS, "precision": 0.1, "open_connections": 64,
            "rows_per_request": SIZES, "rounds": rounds, "seconds": 1.0, "warmup_seconds": 0.3,
            "objective_p99_s": OBJECTIVE_P99_S, "server_cpus": [0], "client_cpus": [1],
        },
        "endpoints": endpoints,
        "windows": windows,
    }  # fmt: skip


def make_window(name, load, number, rows, connections, latencies_s, rate, memory_mb, nominal=0.0) -> dict:
    window = Window(
        connections, elapsed_s=len(latencies_s) / rate, latencies_s=latencies_s, offered_rate=nominal,
        client_cpu_s=0.6 if load == "closed" else 0.99, client_idle_s=0.4 if load == "open" else 0.0,
        request_bytes=180 + 90 * rows, reply_bytes=30 + 40 * rows,
        lateness_s=np.full(20, 4e-5) if nominal else np.empty(0),
    )  # fmt: skip
    return encode_window(
        window, endpoint=name, load=load, round=number, rows_per_request=rows, nominal_rate=nominal,
        server_cpu_s=0.95 * window.elapsed_s, server_rss_bytes=memory_mb * 10**6, foreign_share=0.02,
    )  # fmt: skip


class Browser:
    """Chromium without a window, asked over the DevTools protocol; its profile is new and its own."""

    def __init__(self, profile: Path):
        options = (
            "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
            "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars "
            "--remote-debugging-port=0"
        ).split()
        self.process = subprocess.Popen(
            [CHROMIUM, *options, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.events: list[dict] = []
        self.number = 0
        port_file = profile / "DevToolsActivePort"
        wait_until(
            lambda: port_file.exists() and len(port_file.read_text().split()) == 2,
            f"{CHROMIUM} opened no DevTools port",
            while_alive=self.process,
        )
        port, path = port_file.read_text().split()
        self.socket = websocket.create_connection(
            f"ws://127.0.0.1:{port}{path}", timeout=DEADLINE_S, suppress_origin=True
        )
        self.session = None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def close(self) -> None:
        try:
            self.session = None
            self.ask("Browser.close")
            self.process.wait(DEADLINE_S)
        finally:
            self.process.kill()
            self.process.wait()

    def ask(self, method: str, **parameters) -> dict:
        """Send one command and return its reply; events that arrive meanwhile are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        self.socket.send(json.dumps(message | ({"sessionId": self.session} if self.session else {})))
        while (reply := json.loads(self.socket.recv())).get("id") != self.number:
            self.events.append(reply)
        assert "error" not in reply, reply
        return reply["result"]

    def open(self, path: Path, width: int, theme: str = "light", media: str = "") -> None:
        """Load a page and wait until it is whole."""
        self.events.clear()
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        features = [{"name": "prefers-color-scheme", "value": theme}]
        self.ask("Emulation.setEmulatedMedia", media=media, features=features)
        self.ask("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(json.loads(self.socket.recv()))

    def evaluate(self, expression: str):
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"]["value"]

    def complaints(self) -> list:
        """What the page logged or threw, and what it asked of anybody."""
        self.evaluate("1")
        bad = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Page.javascriptDialogOpening")
        found = [event for event in self.events if event["method"] in bad]
        asked = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return found + [url for url in asked[1:] if not url.startswith("data:")]


class Page(HTMLParser):
    """The page's text by section, its plots, its table rows, and whatever would ask something of the network."""

    def __init__(self, path: Path):
        super().__init__()
        self.sections: dict[str, str] = {}
        self.svgs: list[str] = []
        self.row_heads: dict[str, list[str]] = {}
        self.tags: list[str] = []
        self.references: list[str] = []
        self.section, self.in_svg, self.in_head_cell = "", False, False
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        self.references += [values[key] for key in ("src", "href", "xlink:href", "action") if values.get(key)]
        if tag == "section":
            self.section = values["id"]
        if tag == "svg":
            assert values["role"] == "img"
            assert len(values["aria-labelledby"].split()) == 2
            self.in_svg = True
            self.svgs.append("")
        self.in_head_cell = tag == "th" and values.get("scope") == "row"

    def handle_endtag(self, tag):
        self.in_svg = self.in_svg and tag != "svg"
        self.in_head_cell = False

    def handle_data(self, data):
        self.sections[self.section] = self.sections.get(self.section, "") + data
        if self.in_svg:
            self.svgs[-1] += data
        if self.in_head_cell:
            self.row_heads.setdefault(self.section, []).append(data)


@pytest.fixture(scope="module")
def script():
    """report.py, imported only by the tests that run: matplotlib takes seconds."""
    return importlib.import_module("report")


@pytest.fixture(scope="module")
def report(script, tmp_path_factory):
    """The path of report.html, made by the command from a result file."""
    path = tmp_path_factory.mktemp("results") / "20260131T120000Z.json"
    write_result(make_result(), path)
    done = call_main(script, path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return path.with_suffix("") / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium on PATH: apt-get install chromium")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def answer(page: Path, number: int) -> str:
    """The text of one answer's card, tags removed."""
    card = re.findall(r"<article.*?</article>", page.read_text(), flags=re.DOTALL)[number]
    return re.sub(r"<[^>]*>", " ", card)


def test_the_report_and_its_plots_lie_in_a_folder_beside_the_file(report):
    assert report.is_file()
    names = {path.stem for path in report.parent.glob("*.png")}
    assert {"latency_distribution", "latency_against_rate", "throughput", "time_per_row", "cost", "cold_start"} <= names
    for path in report.parent.glob("*.png"):
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert int.from_bytes(data[16:20], "big") >= 800  # pixels wide


def test_the_five_questions_are_answered_as_the_planted_truth_has_it(report):
    assert re.search(rf"one user at a time.*?{re.escape(FASTEST)}: p50 0\.3\d ms", answer(report, 0), re.DOTALL)
    assert f"{FASTEST} keeps up with 3,400 requests/s" in answer(report, 1)
    breaking = answer(report, 2)
    for name, rates in {"onnx (local)": "3,400–4,000", "tfserving (docker)": "1,200–1,400"}.items():
        assert f"{name} {rates}" in breaking
    cost = answer(report, 3)
    assert "local: least CPU onnx, 0.2" in cost
    assert "least memory onnx, 95 MB" in cost
    assert re.search(r"tfserving \(docker\)\s+not seen\s+not seen", cost)
    sure = answer(report, 4)
    measured = Measured(make_result())
    verdicts = list_verdicts(measured)
    assert len(verdicts) == 4  # onnx and onnx-grpc, tfserving and tfserving-grpc, each at 1 and at 64
    for verdict in verdicts:
        assert describe_verdict(measured, verdict) in sure
    assert "Of 4 comparisons of neighbours of one kind" in sure
    assert "ratios to the floor are known within" in sure
    assert "torchserve (native)" in sure


def test_the_report_concludes_before_it_answers(report):
    text = Page(report).sections["answers"]
    sentences = conclude(Measured(make_result()))
    assert any("so take onnx" in sentence for sentence in sentences)
    for sentence in sentences:
        assert text.index(sentence) < text.index("Which server for one user")


def test_a_difference_smaller_than_the_floor_is_called_one(report):
    assert "onnx (local) and onnx-grpc (local) are 0.1" in answer(report, 0)
    assert "of the floor: do not build on that difference" in answer(report, 0)


def test_equal_servers_are_not_ranked(script, tmp_path):
    result = make_result()
    rename = {"onnx": "onnx", "onnx-grpc": "twin"}
    result["endpoints"] = {new: result["endpoints"][old] for old, new in rename.items()}
    windows = [window for window in result["windows"] if window["endpoint"] == "onnx"]
    result["windows"] = windows + [copy.deepcopy(window) | {"endpoint": "twin"} for window in windows]
    page = write_report(Measured(result), tmp_path)
    assert "with no significant difference from twin (local)" in answer(page, 0)
    assert "cannot be told apart from twin (local)" in answer(page, 1)


def test_every_plot_and_table_names_the_floor_as_floor(report):
    page = Page(report)
    assert len(page.svgs) == 7
    assert all("null (floor)" in svg and "null-grpc (floor)" in svg for svg in page.svgs)
    assert all("onnx (local)" in svg for svg in page.svgs)
    heads = page.row_heads["tables"]
    assert heads.count("null (floor)") >= 4
    assert "null" not in heads
    drawn = re.findall(r"<tr( class=\"floor\")?><th scope=\"row\" class=\"words\">([^<]*)", report.read_text())
    assert {name for mark, name in drawn if mark} == {
        name for _, name in drawn if re.search(r"\((floor|local)\)", name)
    }


def test_the_twelve_points_of_the_method_are_there_with_this_runs_facts(report):
    text = Page(report).sections["method"]
    points = (
        "Correct first", "Same work", "Cores", "The floor", "Two kinds of load", "Saturation",
        "Enough samples", "Warm and cold", "Cost", "Profile", "Environment", "Raw data",
    )  # fmt: skip
    places = [text.index(point) for point in points]
    assert places == sorted(places)
    for fact in (
        "1e-07",
        "core 0",
        "core 1",
        "50 ms",
        "8 interleaved rounds",
        "0.3 s",
        "quick",
        "abc1234 with changes",
    ):
        assert fact in text


def test_every_warning_is_in_the_report(report):
    text = Page(report).sections["warnings"]
    warnings = describe_warnings(list_warnings(Measured(make_result())))
    assert len(warnings) >= 3
    for warning in warnings:
        assert warning in text


def test_text_from_the_file_stays_text(report):
    page = Page(report)
    assert "script" not in page.tags
    assert EVIL in page.sections["warnings"]


def test_names_with_markup_survive_every_plot(script, tmp_path):
    result = json.loads(json.dumps(make_result()).replace('"onnx"', json.dumps(EVIL)))
    page = Page(write_report(Measured(result), tmp_path))
    assert "script" not in page.tags
    assert all(f"{EVIL} (local)" in svg for svg in page.svgs)


def test_nothing_is_asked_of_the_network(report):
    assert all(reference.startswith(("#", "data:")) for reference in Page(report).references)
    assert not re.search(r"https?://|@import|url\((?!#)", report.read_text())


def test_the_same_result_makes_the_same_page(script, report, tmp_path):
    assert write_report(Measured(make_result()), tmp_path).read_text() == report.read_text()


@pytest.mark.parametrize("case", ["one round", "no sweep", "one connection", "nothing measured", "cut off"])
def test_a_meagre_result_still_makes_a_report(script, case, tmp_path, recwarn):
    result = make_result(rounds=1 if case == "one round" else 6, sweep=case != "no sweep")
    if case == "one connection":
        result["settings"] |= {"connections": [4], "rows_per_request": [1]}
        result["windows"] = [w for w in result["windows"] if w["connections"] == 4 and w["rows_per_request"] == 1]
    if case == "nothing measured":
        result["windows"] = []
        result["endpoints"] = {"torchserve": result["endpoints"]["torchserve"]}
    if case == "cut off":
        result["endpoints"]["bentoml"]["failure"] = "bentoml: stopped answering"
        result["windows"] = [
            w for w in result["windows"] if w["endpoint"] != "bentoml" or (w["load"], w["connections"]) == ("closed", 1)
        ]
    page = write_report(Measured(result), tmp_path)
    text = page.read_text()
    assert not re.search(r"\b(nan|inf|None)\b", text)
    assert ("too few rounds" in text) == (case == "one round")
    assert ("is not known" in answer(page, 2)) == (case in ("no sweep", "one connection", "nothing measured"))
    assert not [str(warning.message) for warning in recwarn]


def test_a_file_that_is_no_result_is_one_line(script, tmp_path):
    done = call_main(script, tmp_path / "missing.json")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "missing.json: no such file" in done.stderr


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 800, 1400])
def test_the_browser_shows_it_without_complaint_or_overflow(report, browser, width, theme):
    browser.open(report, width, theme)
    assert browser.complaints() == []
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    overflowing = """[...document.querySelectorAll("main *")]
        .filter(e => !e.closest(".box") && e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML)"""
    assert browser.evaluate(overflowing) == []
    sizes = browser.evaluate(
        '[...document.querySelectorAll("figure svg")].map(e => [e.clientWidth, e.clientHeight, e.getBBox().width])'
    )
    assert len(sizes) == 7
    assert all(wide >= min(width - 60, 460) and high > 100 and drawn > 300 for wide, high, drawn in sizes)


CONTRASTS = """(() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const luminance = colour => {
    canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => { const [x, y] = [luminance(a), luminance(b)].sort(); return (y + 0.05) / (x + 0.05); };
  const behind = e => { for (; e; e = e.parentElement) {
    const colour = getComputedStyle(e).backgroundColor; if (colour != "rgba(0, 0, 0, 0)") return colour; }
    return "white"; };
  const texts = [...document.querySelectorAll("h1,h2,h3,p,li,th,td,caption,a,code,summary")].filter(e => e.textContent)
    .map(e => [contrast(getComputedStyle(e).color, behind(e)), e.textContent.slice(0, 40)]);
  const labels = [...document.querySelectorAll("svg text")]
    .map(e => [contrast(getComputedStyle(e).fill, behind(e)), e.textContent]);
  const strokes = [...document.querySelectorAll("svg path[style*=series], svg path[style*=floor]")]
    .map(e => getComputedStyle(e)).map(s => s.stroke == "none" ? s.fill : s.stroke).filter(c => c.startsWith("rgb"))
    .map(c => [contrast(c, behind(document.querySelector("figure"))), c]);
  const least = list => list.reduce((a, b) => a[0] <= b[0] ? a : b);
  return {texts: least(texts), labels: least(labels), strokes: least(strokes), page: behind(document.body)};
})()"""


@pytest.mark.parametrize("theme", ["light", "dark", "print"])
def test_text_and_lines_stand_out_in_light_in_dark_and_in_print(report, browser, theme):
    """WCAG 2.1: contrast 4.5 for text (1.4.3; 3 for the bold titles in a series' colour), 3 for lines (1.4.11)."""
    browser.open(report, 1000, "dark" if theme == "print" else theme, "print" if theme == "print" else "")
    found = browser.evaluate(CONTRASTS)
    assert found["texts"][0] >= 4.5, found
    assert found["labels"][0] >= 4.5, found
    assert found["strokes"][0] >= 3, found
    is_dark = int(re.findall(r"\d+", found["page"] if found["page"] != "white" else "255")[0]) < 128
    assert is_dark == (theme == "dark")
