"""The figures of a result: percentiles, knees, verdicts, warnings, tables and comparisons, from planted windows."""

import copy
import io
import json
from collections import Counter

import numpy as np
import pytest
from rich.console import Console

import compare
import results
from drawing.readme import replace_part
from drawing.tables import print_result
from endpoints.base import load_endpoints
from figures.cells import Knee
from figures.measured import Measured, list_wide_rows
from figures.result_file import ResultError, Window, encode_window, find_newest_result, read_result, write_result
from figures.verdicts import Doubt, list_ties, list_verdicts, list_warnings
from figures.words import describe_knee, describe_reason, describe_verdicts, describe_warnings
from helpers import REPOSITORY_DIR, call_main


def make_window(latencies_s: np.ndarray, round_number: int = 1, endpoint: str = "toy", **about) -> dict:
    window = Window(1, elapsed_s=10.0, latencies_s=latencies_s, errors=Counter({"status 503": 2}), wrong=1)
    defaults = {
        "endpoint": endpoint, "load": "closed", "round": round_number, "rows_per_request": 1, "nominal_rate": 0.0,
        "server_cpu_s": 0.5, "server_rss_bytes": 1000, "foreign_share": 0.0,
    }  # fmt: skip
    return {**encode_window(window), **defaults, **about}


def make_result(*windows: dict) -> dict:
    return {
        "schema_version": 2,
        "environment": {
            "utc": "2026-01-01T00:00:00+00:00", "cpu": "a", "cores": 2, "system": "Linux", "python": "3.11",
            "load_average_1min": 0.0, "git_commit": "abc", "git_dirty": False, "command": "c", "packages": {},
        },
        "settings": {
            "profile": "quick", "version": "1", "rows_per_request": [1], "connections": [1], "rounds": 1,
            "seconds": 10.0, "warmup_seconds": 0.0, "objective_p99_s": 0.05, "server_cpus": [0], "client_cpus": [1],
        },
        "endpoints": {
            name: {
                "kind": "local", "protocol": "REST", "settings": {}, "starts": [{"listens_s": 0.1, "ready_s": 0.5}],
                "max_abs_difference": {"1": 2e-8},
            }
            for name in dict.fromkeys(window["endpoint"] for window in windows)
        },
        "windows": list(windows),
    }  # fmt: skip


def test_percentiles_from_a_file_are_numpys_to_the_microsecond(tmp_path):
    latencies_s = np.random.default_rng(0).lognormal(-8, 1, 5000)
    write_result(make_result(make_window(latencies_s)), tmp_path / "r.json")
    [cell] = Measured(read_result(tmp_path / "r.json")).closed("toy")
    for percent in (50, 90, 99):
        truth = np.percentile(latencies_s, percent)
        assert abs(cell.percentile_s(percent).estimate - truth) <= max(1e-6, truth / 200)
    assert cell.rates == [500.0]
    assert (cell.failed, cell.wrong) == (2, 1)


def test_a_knee_is_where_the_rate_or_the_objective_breaks():
    def sweep(name: str, p99s_s: dict[float, float], answered: float = 1.0) -> list[dict]:
        windows = []
        for rate, p99_s in p99s_s.items():
            latencies_s = np.full(int(rate * 10 * (answered if rate == max(p99s_s) else 1)), p99_s)
            window = make_window(latencies_s, endpoint=name, load="open", nominal_rate=rate, offered_rate=rate)
            windows.append({**window, "errors": {}, "wrong": 0})
        return windows

    late = sweep("late", {100.0: 0.01, 200.0: 0.02, 300.0: 0.09})
    behind = sweep("behind", {100.0: 0.01, 200.0: 0.01}, answered=0.8)
    strong = sweep("strong", {100.0: 0.01, 200.0: 0.01})
    knees = Measured(make_result(*late, *behind, *strong)).knees
    assert knees["late"] == Knee(200.0, 300.0, "p99 90 ms", 200.0, 300.0)
    assert knees["behind"] == Knee(100.0, 200.0, "answered 160/s", 100.0, 200.0)
    assert knees["strong"] == Knee(200.0, None, "", 200.0)
    assert knees["late"].is_beyond(knees["behind"])
    assert not knees["behind"].is_beyond(knees["late"])
    assert not knees["late"].is_beyond(knees["strong"])  # it was not offered what would break it


def test_a_rate_that_the_client_could_not_ask_breaks_no_server():
    def sweep(client_idle_s: float, **about) -> dict[str, Knee]:
        facts = {"load": "open", "client_cpu_s": 10.0, "errors": {}, "wrong": 0}
        held, short = (
            {**make_window(np.full(answered, 0.001), nominal_rate=rate, offered_rate=rate), **facts}
            for rate, answered in ((100.0, 1000), (200.0, 1500))
        )
        return Measured(make_result(held, {**short, "client_idle_s": client_idle_s, **about})).knees

    knee = sweep(0.1)["toy"]
    assert (knee.sustained_rate, knee.broken_rate, knee.client_limit_rate) == (100.0, None, 200.0)
    assert not knee.is_open
    assert describe_knee(knee) == "keeps up with 100/s, the most it was offered: the client cannot ask 200/s"
    assert describe_reason(knee) == "client's limit at 200"
    for server in (sweep(5.0)["toy"], sweep(0.1, wrong=1)["toy"]):  # the client had time; the server failed
        assert (server.broken_rate, server.client_limit_rate) == (200.0, None)


def test_a_busy_client_foreign_load_and_failures_are_warned_of():
    quiet = {**make_window(np.full(1000, 0.001)), "errors": {}, "wrong": 0}
    assert list_warnings(Measured(make_result(quiet))) == []
    for change, doubt, words in (
        ({"client_cpu_s": 9.9}, Doubt.BUSY_CLIENT, "as fast as the client"),
        ({"foreign_share": 0.4}, Doubt.FOREIGN_LOAD, "toy, 1 connection (40%)"),
        ({"errors": {"status 503": 3}}, Doubt.FAILED, "3 failed, 0 wrong"),
    ):
        [warning] = list_warnings(Measured(make_result({**quiet, **change})))
        assert (warning.doubt, warning.server) == (doubt, "toy")
        assert words in describe_warnings([warning])[0]


def make_rounds(name: str, rates: list[float], connections: int = 1, first: int = 1) -> list[dict]:
    """One window a round that answered so many requests in a second."""
    windows = []
    for number, rate in enumerate(rates, first):
        window = Window(connections, elapsed_s=1.0, latencies_s=np.full(round(rate), 1 / rate))
        facts = {"load": "closed", "rows_per_request": 1, "nominal_rate": 0.0, "server_cpu_s": 0.5}
        windows.append(
            encode_window(
                window, endpoint=name, round=number, server_rss_bytes=1000, foreign_share=0.0, **facts
            )
        )  # fmt: skip
    return windows


def make_rivals(*groups: list[dict], connections: tuple[int, ...] = (1,), **kinds: str) -> Measured:
    result = make_result(*(window for group in groups for window in group))
    result["settings"] |= {"connections": list(connections), "precision": 0.1}
    for name, kind in kinds.items():
        result["endpoints"][name]["kind"] = kind
    return Measured(result)


def test_a_verdict_is_data_and_holds_from_1_000_connections_on():
    fast, slow = make_rounds("fast", [1000.0] * 12, 1200), make_rounds("slow", [500.0] * 12, 1200)
    measured = make_rivals(fast, slow, connections=(1200,))
    [verdict] = list_verdicts(measured)
    assert (verdict.connections, verdict.faster, verdict.slower, verdict.ratio.estimate) == (1200, "fast", "slow", 2)
    assert verdict.is_decided
    assert describe_verdicts(measured, [verdict]) == [
        "1,200 connections: fast (local) is faster than slow (local), 2.00× (2.00×–2.00×)"
    ]


def test_a_server_that_lost_a_round_is_compared_in_the_rounds_that_both_have():
    """The machine slows down from round to round; paired by place, the one that lost its first round would lose."""
    drift = [2000.0 / (1 + number / 4) for number in range(12)]
    better, worse = [1.2 * rate for rate in drift], drift
    measured = make_rivals(make_rounds("better", better[3:], first=4), make_rounds("worse", worse))
    assert list_ties(measured, "better", 1) == []
    ratio = measured.ratio("better", "worse", 1)
    assert ratio is not None
    assert ratio.estimate == pytest.approx(1.2, rel=0.01)


def test_servers_of_different_kinds_get_no_verdict():
    rates = {"a": 1000.0, "b": 800.0, "c": 500.0}
    groups = [make_rounds(name, [rate] * 12) for name, rate in rates.items()]
    measured = make_rivals(*groups, a="local", b="native", c="local")
    assert [(verdict.faster, verdict.slower) for verdict in list_verdicts(measured)] == [("a", "c")]


def test_a_row_is_wide_until_its_ratio_to_the_floor_is_known():
    noisy = [1000.0 + 100 * (number % 7) for number in range(20)]
    measured = make_rivals(
        make_rounds("null", [4 * rate for rate in noisy]), make_rounds("steady", noisy),
        make_rounds("shaky", [1000.0, 2000.0] * 10), null="floor",
    )  # fmt: skip
    assert list_wide_rows(measured, 0.1) == {("shaky", 1), ("null", 1)}
    assert [(warning.doubt, warning.server) for warning in list_warnings(measured)] == [(Doubt.WIDE, "shaky")]


def test_the_first_of_a_ranking_is_faster_by_the_verdicts_too():
    """A third server stopped after six rounds, in which b was lucky; in all that a and b share, a is faster."""
    measured = make_rivals(
        make_rounds("a", [1000.0] * 40), make_rounds("b", [1100.0] * 6 + [800.0] * 34), make_rounds("c", [500.0] * 6),
        a="local", b="local", c="local",
    )  # fmt: skip
    assert measured.ranking(1) == ["a", "b", "c"]
    assert [(verdict.faster, verdict.slower) for verdict in list_verdicts(measured)] == [("a", "b"), ("b", "c")]
    assert list_ties(measured, "a", 1) == []


def test_a_row_is_wide_until_its_ratio_to_its_default_is_known():
    """Each is known against the floor, and by opposite moves of the two not against the other."""
    floor, move = np.full(40, 4000.0), np.resize([0.94, 1.08], 40)
    measured = make_rivals(
        make_rounds("null", list(floor)), make_rounds("toy", list(1000 * move)),
        make_rounds("toy-tuned", list(2000 / move)), null="floor",
    )  # fmt: skip
    assert list_wide_rows(measured, 0.1) == set()
    measured.servers["toy-tuned"]["variant"] = "tuned"
    assert list_wide_rows(measured, 0.1) == {("toy", 1), ("toy-tuned", 1)}


@pytest.fixture(scope="module")
def sample():
    return Measured(read_result(results.SAMPLE_PATH))


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_figure_is_cut_at_any_width_of_the_terminal(sample, width):
    console = Console(width=width, force_terminal=True, record=True, file=io.StringIO(), highlight=False)
    print_result(sample, console)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)
    rows = [line for line in lines if line.startswith("torchserve-grpc-tuned")]
    figures = [figure for line in rows for figure in line.split("  ")[1:] if "(" in figure]
    assert all(figure.count("(") == figure.count(")") for figure in figures)
    assert len(figures) >= 5


def test_a_log_gets_each_table_whole_and_nothing_cut(sample, tmp_path):
    path = tmp_path / "log"
    with path.open("w") as file:
        print_result(sample, Console(file=file, highlight=False))
    text = path.read_text()
    assert "(continued)" not in text
    assert "…" not in text


def test_the_newest_result_is_this_machines_and_never_the_sample(tmp_path, monkeypatch):
    monkeypatch.setattr("figures.result_file.RESULTS_DIR", tmp_path)
    monkeypatch.setattr("figures.result_file.SAMPLE_PATH", tmp_path / "sample.json")
    here, result = {"cpu": "a", "cores": 2}, make_result(make_window(np.full(100, 0.001)))
    write_result(result, tmp_path / "sample.json")
    with pytest.raises(ResultError, match="no result of this machine yet"):
        find_newest_result(here)
    write_result(result, tmp_path / "before.json")
    elsewhere = {**result, "environment": {**result["environment"], "cpu": "b"}}
    write_result(elsewhere, tmp_path / "elsewhere.json")
    (tmp_path / "ab-2.json").write_text('{"schema_version": 1}')
    (tmp_path / "broken.json").write_text("{")
    assert find_newest_result(here) == tmp_path / "before.json"


def test_an_interrupted_run_says_so():
    result = {**make_result(make_window(np.full(100, 0.001))), "complete": False}
    assert "the run was interrupted" in describe_warnings(list_warnings(Measured(result)))[0]


def test_compare_tells_a_change_from_noise(tmp_path):
    generator = np.random.default_rng(0)

    def measure(scale: float, path):
        windows = [
            {**make_window(np.full(int(10_000 / scale * generator.normal(1, 0.02)), 0.001 * scale), n), "errors": {}}
            for n in range(1, 13)
        ]
        write_result(make_result(*windows), path)

    for name, scale in (("a", 1.0), ("same", 1.0), ("slower", 1.5)):
        measure(scale, tmp_path / f"{name}.json")

    def compare_with(other: str) -> str:
        done = call_main(compare, tmp_path / "a.json", tmp_path / f"{other}.json")
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "0 better, 0 worse, 2 figures compared" in compare_with("same")
    assert "0 better, 2 worse, 2 figures compared" in compare_with("slower")
    assert "no difference" in compare_with("same")


def test_compare_tells_what_else_differs_and_not_the_ports():
    before = make_result(make_window(np.full(100, 0.001)))
    before["endpoints"]["toy"]["command"] = "serve --port 20001 --grpc-port=20002"
    after = copy.deepcopy(before)
    after["endpoints"]["toy"]["command"] = "serve --port 20003 --grpc-port=20004"
    assert compare.list_differences(before, after) == []
    after["endpoints"]["toy"] |= {"command": "serve --port 20003 --threads 2", "kind": "docker"}
    before["settings"]["goes_first"], after["settings"]["goes_first"] = True, False
    kind = before["endpoints"]["toy"]["kind"]
    assert compare.list_differences(before, after) == [
        "goes_first: True before, False after",
        f"toy's kind: {kind} before, docker after",
        "toy's command: serve --port … --grpc-port=… before, serve --port … --threads 2 after",
    ]


def test_a_percentile_is_withheld_where_the_sample_is_too_small():
    [cell] = Measured(make_result(make_window(np.linspace(0.001, 0.002, 999)))).closed("toy")
    assert cell.percentile_s(99) is None
    assert cell.percentile_s(95) is not None


def test_reading_what_is_not_a_result_is_one_line(tmp_path):
    for content, words in (
        (None, "no such file"),
        ("{", "not JSON"),
        ("[]", "schema version"),
        ("{}", "schema version"),
    ):
        path = tmp_path / "r.json"
        if content is not None:
            path.write_text(content)
        with pytest.raises(ResultError, match=words) as caught:
            read_result(path)
        assert "\n" not in str(caught.value)


def test_a_result_that_cannot_be_written_leaves_the_old_one_whole(tmp_path):
    path = tmp_path / "r.json"
    write_result({"schema_version": 2}, path)
    with pytest.raises(TypeError):
        write_result({"schema_version": object()}, path)
    assert read_result(path) == {"schema_version": 2}
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.json"]


def test_a_readme_shows_its_result_and_nothing_typed_by_hand():
    for part in results.PARTS:
        readme = part.readme.read_text()
        assert part.update(readme) == readme, f"{part.readme}: run make readme"
        assert set(read_result(part.source)["endpoints"]) <= set(load_endpoints(with_peers=True))


def test_only_the_marked_part_of_a_readme_is_replaced():
    assert replace_part("before\n<a>\nold\n<b>\nafter\n", "<a>", "<b>", "new\n") == "before\n<a>\nnew\n<b>\nafter\n"
    with pytest.raises(ResultError, match="marks"):
        replace_part("no marks", "<a>", "<b>", "new\n")


def test_results_are_json_that_anything_reads():
    assert json.loads((REPOSITORY_DIR / "benchmarks" / "results" / "sample.json").read_text())["schema_version"] == 2
