"""The benchmark tells the truth about servers whose truth is known, and leaves nothing behind."""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import compare
import latency_test
import numpy as np
import psutil
import pytest
import server_process
import verify
from benchmark_all import list_failures, start_and_verify
from conftest import FRAMEWORKS
from endpoint import load_endpoints
from free_ports import find_free_ports
from helpers import DEADLINE_S, REPOSITORY_DIR, TESTS_DIR, call_main, load_script, run, wait_until
from load_generator import Window
from results import (
    README_BEGIN,
    README_END,
    Knee,
    ResultError,
    encode_window,
    find_knee,
    format_markdown,
    list_warnings,
    read_result,
    select,
    update_readme,
    write_result,
)
from server_process import ServerError, ServerProcess
from toy_endpoint import Toy

LATE_S = 0.05  # of the toy that is late
BAD_MANNERS = ("wrong", "erring", "dropping", "unequal", "crashing")
TIMED_MANNERS = ("wrong", "erring", "dropping")  # these pass the check
QUICK = [
    "--rounds", "1", "--seconds", "0.2", "--warmup-seconds", "0.05", "--settle-seconds", "0", "--no-report",
    "--connections", "1", "4", "--rows", "1", "--rates", "50",
]  # fmt: skip


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A copy of benchmarks/ and data/ to which endpoint_toy.py is added, and as much for each bad manner of the toy."""
    house = tmp_path_factory.mktemp("house")
    shutil.copytree(REPOSITORY_DIR / "data", house / "data")
    shutil.copytree(REPOSITORY_DIR / "benchmarks", house / "benchmarks", ignore=shutil.ignore_patterns("2*"))
    (house / "tests").mkdir()
    shutil.copy2(TESTS_DIR / "toy_server.py", house / "tests")
    toy = (TESTS_DIR / "toy_endpoint.py").read_text()
    (house / "benchmarks" / "endpoint_toy.py").write_text(toy)
    for manner in BAD_MANNERS:
        bad_toy = toy.replace('name = "toy"', f'name = "{manner}"').replace('"right"', f'"{manner}"')
        (house / "benchmarks" / f"endpoint_{manner}.py").write_text(bad_toy)
    return house


def command(house: Path, *arguments: str | Path) -> list[str | Path]:
    return [sys.executable, house / "benchmarks" / "benchmark_all.py", *arguments]


def benchmark(house: Path, *endpoints: str, **environment: str) -> tuple[subprocess.CompletedProcess, dict]:
    """Benchmark the endpoints quickly; return the process and the result."""
    output = house / f"{endpoints[-1]}.json"
    argv = command(house, *QUICK, "--output", output, "--endpoints", *endpoints)
    done = run(*argv, cwd=house, env={"TOY_FOLDER": str(house / "tests"), "COLUMNS": "200", **environment})
    assert not toy_processes(house)
    return done, read_result(output)


def toy_processes(house: Path) -> list[psutil.Process]:
    """The toy servers of this house that run."""
    return [
        process
        for process in psutil.process_iter(["cwd"])
        if process.info["cwd"] == str(house / "tests") and process.status() != psutil.STATUS_ZOMBIE
    ]


@pytest.fixture(scope="module")
def good_run(house):
    """The benchmark of the floor and of a fifth server that answers rightly, and late once it is verified."""
    return benchmark(house, "null", "toy", TOY_MANNER="late")


@pytest.fixture(scope="module")
def bad_run(house):
    """The benchmark of a server for each bad manner, and of a good one."""
    return benchmark(house, *BAD_MANNERS, "toy")


def part_of(result: dict, name: str) -> dict:
    """Return the result as if `name` had been measured alone."""
    windows = [window for window in result["windows"] if window["endpoint"] == name]
    return {**result, "endpoints": {name: result["endpoints"][name]}, "windows": windows}


def cells_of(result: dict, name: str) -> list:
    return [select(result, name, connections=connections) for connections in (1, 4)]


def test_a_fifth_server_is_one_new_file(house, good_run):
    done, result = good_run
    assert done.returncode == 0, done.stdout + done.stderr
    assert max(result["endpoints"]["toy"]["max_abs_difference"].values()) <= 1e-9
    for cell in cells_of(result, "toy"):
        assert len(cell.latencies_s) > 0
        assert (cell.failed, cell.wrong) == (0, 0)
    assert "| toy | local |" in (house / "toy.md").read_text()


def test_the_null_server_is_the_floor_of_the_table(good_run):
    """A server that is known to take 50 ms is above it; nothing is asked of this machine's speed."""
    _, result = good_run
    for floor, toy in zip(cells_of(result, "null"), cells_of(result, "toy"), strict=True):
        assert 0 < np.median(floor.latencies_s) < np.median(toy.latencies_s)
        assert toy.latencies_s.min() >= LATE_S * 0.99  # times lose half a percent in the file


def test_a_run_with_a_bad_server_fails_and_the_good_one_is_measured_all_the_same(bad_run):
    done, result = bad_run
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert [name for name in result["endpoints"] if not list_failures(part_of(result, name))] == ["toy"]
    for failure in list_failures(result):
        assert f"FAILED: {failure}" in done.stdout
    for cell in cells_of(result, "toy"):
        assert len(cell.latencies_s) > 0
        assert (cell.failed, cell.wrong) == (0, 0)


def test_wrong_answers_during_the_timing_are_counted_and_not_timed(bad_run):
    done, result = bad_run
    for cell in cells_of(result, "wrong"):
        assert cell.wrong > 0
        assert (cell.failed, len(cell.latencies_s)) == (0, 0)
    assert re.search(r"0 failed, [\d,]+ wrong", done.stdout)


@pytest.mark.parametrize(("name", "reason"), [("erring", "status 503"), ("dropping", "connection closed")])
def test_failures_are_counted_one_by_one_and_not_timed(bad_run, name, reason):
    """The toy fails every fourth request, and a window's requests follow each other: a quarter of them, to the one."""
    _, result = bad_run
    for window in part_of(result, name)["windows"]:
        answered = sum(count for _, count in window["latency_us_counts"])
        failed = sum(window["errors"].values())
        assert set(window["errors"]) <= {reason}
        assert window["wrong"] == 0
        assert abs(failed - (answered + failed) / 4) < 1
    assert sum(cell.failed for cell in cells_of(result, name)) > 0


def test_a_server_that_breaks_parity_is_not_timed(bad_run):
    done, result = bad_run
    assert "unequal: breaks the parity contract, so it is not timed" in done.stdout
    assert max(result["endpoints"]["unequal"]["max_abs_difference"].values()) == pytest.approx(0.01)
    assert cells_of(result, "unequal") == [None, None]


def test_a_server_that_does_not_start_is_reported_with_its_own_last_words(bad_run):
    _, result = bad_run
    assert "toy: the model is missing; make one" in result["endpoints"]["crashing"]["failure"]
    assert cells_of(result, "crashing") == [None, None]


class Impatient(ServerProcess):
    """Gives a server that listens five tries to answer rightly; how long it took to come so far does not count."""

    def wait_until_correct(self):
        wait_until(self._listens, self.log, while_alive=self.process)
        self._started_s, self.endpoint.start_timeout_s = 0, 5
        looks = itertools.count()  # a second passes between two looks at the clock
        clock = SimpleNamespace(perf_counter=lambda: next(looks), sleep=lambda _: None)
        with mock.patch.object(server_process, "time", clock):
            super().wait_until_correct()


@pytest.mark.parametrize(
    ("manner", "reason"),
    [("silent", "wrong answer, off by 1.0e-02"), ("garbled", "no probabilities in its answer")],
)
def test_a_server_that_never_answers_rightly_is_reported_with_what_it_answers(monkeypatch, manner, reason):
    monkeypatch.setenv("TOY_MANNER", manner)
    with contextlib.ExitStack() as stack:
        server, about = start_and_verify(lambda: Impatient(Toy.on_free_ports()), 1, stack)
    assert server is None
    assert about["failure"].startswith("toy: no correct prediction within 5 s")
    assert reason in about["failure"]


def test_a_server_that_ignores_sigterm_and_its_child_are_ended_all_the_same(monkeypatch):
    monkeypatch.setenv("TOY_MANNER", "deaf")
    monkeypatch.setattr(server_process, "STOP_TIMEOUT_S", 0.5)
    with ServerProcess(Toy.on_free_ports()) as server:
        processes = server.processes()
    assert len(processes) == 2
    wait_until(lambda: not any(process.is_running() for process in processes), "the toy or its child still runs")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("moment", ["starting", "measuring"])
def test_a_killed_benchmark_leaves_no_server_and_no_result(house, number, moment):
    argv = command(house, "--endpoints", "toy", "null", "--settle-seconds", "0", "--seconds", "600")
    results = house / "benchmarks" / "results"
    before = set(results.iterdir())
    log_path = house / "log"
    with log_path.open("wb") as log:
        environment = {**os.environ, "TOY_FOLDER": str(house / "tests")}
        process = subprocess.Popen(argv, env=environment, cwd=house, stdout=log, stderr=log)
    try:
        wait_until(lambda: toy_processes(house), log_path.read_text, while_alive=process)
        if moment == "measuring":
            wait_until(lambda: "no model" in log_path.read_text(), log_path.read_text, while_alive=process)
        process.send_signal(number)
        assert process.wait(DEADLINE_S) != 0
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not toy_processes(house), "the toy server was left running")
    assert set(results.iterdir()) == before
    assert "Traceback" not in log_path.read_text()


def test_a_taken_port_is_one_line_that_names_it():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        null = ServerProcess(load_endpoints()["null"]({"rest": port}))
        with pytest.raises(ServerError, match=f"null: 127.0.0.1:{port} .* in use"), null:
            pass


def test_verify_prints_the_difference_and_succeeds_only_on_equal_answers(monkeypatch):
    monkeypatch.setattr(verify, "load_endpoints", lambda: {"toy": Toy})
    good = call_main(verify, "--endpoints", "toy")
    monkeypatch.setenv("TOY_MANNER", "unequal")
    bad = call_main(verify, "--endpoints", "toy")
    assert good.returncode == 0
    assert "toy (local): equal, max |Δp| version 1 0.0e+00, version 2 0.0e+00" in good.stdout
    assert bad.returncode == 1
    assert "toy (local): BROKEN, max |Δp| version 1 1.0e-02, version 2 1.0e-02" in bad.stdout
    assert "0 of 1 servers" in bad.stdout


def test_latency_test_of_a_server_that_does_not_run_says_how_to_start_it(monkeypatch):
    monkeypatch.setattr(latency_test, "load_endpoints", lambda: {"toy": Toy})
    monkeypatch.setattr(Toy, "default_ports", find_free_ports(["rest"]))
    with pytest.raises(ServerError, match="start it in another terminal: cd tests && ") as caught:
        call_main(latency_test, "--endpoint", "toy", "--running")
    assert "\n" not in str(caught.value)


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
    cell = select(read_result(tmp_path / "r.json"), "toy", connections=1)
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
    result = make_result(*late, *behind, *strong)
    assert find_knee(result, "late") == Knee(200.0, 300.0, "p99 90 ms", 200.0, 300.0)
    assert find_knee(result, "behind") == Knee(100.0, 200.0, "answered 160/s", 100.0, 200.0)
    assert find_knee(result, "strong") == Knee(200.0, None, "held at every rate offered", 200.0)


def test_a_busy_client_foreign_load_and_failures_are_warned_of():
    quiet = {**make_window(np.full(1000, 0.001)), "errors": {}, "wrong": 0}
    assert list_warnings(make_result(quiet)) == []
    for change, words in (
        ({"client_cpu_s": 9.9}, "lower bound"),
        ({"foreign_share": 0.4}, "other programs used the cores"),
        ({"errors": {"status 503": 3}}, "3 failed, 0 wrong"),
    ):
        (warning,) = list_warnings(make_result({**quiet, **change}))
        assert words in warning


def test_compare_tells_a_change_from_noise(tmp_path):
    generator = np.random.default_rng(0)

    def measure(scale: float, path):
        windows = [
            {**make_window(np.full(int(10_000 / scale * generator.normal(1, 0.02)), 0.001 * scale), n), "errors": {}}
            for n in range(1, 6)
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
    assert "no significant difference" in compare_with("same")


def test_a_percentile_is_withheld_where_the_sample_is_too_small():
    cell = select(make_result(make_window(np.linspace(0.001, 0.002, 999))), "toy", connections=1)
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


def test_the_readme_shows_the_sample_result_and_nothing_typed_by_hand():
    readme = (REPOSITORY_DIR / "README.md").read_text()
    sample = read_result(REPOSITORY_DIR / "benchmarks" / "results" / "sample.json")
    assert update_readme(readme, sample) == readme, "run make readme"
    assert set(sample["endpoints"]) <= set(load_endpoints())


def test_only_the_marked_part_of_the_readme_is_replaced():
    result = make_result(make_window(np.full(100, 0.001)))
    readme = f"before\n{README_BEGIN}\nold\n{README_END}\nafter\n"
    assert update_readme(readme, result) == f"before\n{README_BEGIN}\n{format_markdown(result)}{README_END}\nafter\n"
    with pytest.raises(ResultError, match="marks"):
        update_readme("no marks", result)


def test_the_doctor_knows_every_servers_ports(monkeypatch):
    doctor = load_script(REPOSITORY_DIR / "doctor.py")
    monkeypatch.setattr(doctor, "is_taken", lambda port: False)
    printed = call_main(doctor).stdout
    for name, endpoint_class in load_endpoints().items():
        if endpoint_class.folder.name not in FRAMEWORKS or endpoint_class.protocol != "REST":
            continue
        if endpoint_class.variant == "tuned":  # on the same ports as the default
            continue
        line = next(line for line in printed.splitlines() if f"ports of {name} " in line)
        assert {str(port) for port in endpoint_class.default_ports.values()} <= set(line.replace(",", " ").split())


def test_results_are_json_that_anything_reads():
    assert json.loads((REPOSITORY_DIR / "benchmarks" / "results" / "sample.json").read_text())["schema_version"] == 2
