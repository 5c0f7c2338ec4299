"""The benchmark tells the truth about servers whose truth is known, and leaves nothing behind."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import psutil
import pytest
from conftest import REPOSITORY_DIR
from endpoint import load_endpoints
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

TESTS_DIR = REPOSITORY_DIR / "tests"
FRAMEWORK_FOLDERS = ("torchserve", "tfserving", "bentoml", "onnx")
QUICK = [
    "--rounds", "1", "--seconds", "0.5", "--warmup-seconds", "0.1", "--settle-seconds", "0",
    "--connections", "1", "4", "--rows", "1", "--rates", "50",
]  # fmt: skip
END_TIMEOUT_S = 30.0


@pytest.fixture
def house(tmp_path):
    """A copy of benchmarks/ and data/ to which one file, endpoint_toy.py, is added."""
    shutil.copytree(REPOSITORY_DIR / "data", tmp_path / "data")
    shutil.copytree(REPOSITORY_DIR / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns("2*"))
    (tmp_path / "tests").mkdir()
    shutil.copy2(TESTS_DIR / "toy_server.py", tmp_path / "tests")
    shutil.copy2(TESTS_DIR / "toy_endpoint.py", tmp_path / "benchmarks" / "endpoint_toy.py")
    return tmp_path


def command(house, script: str, *arguments: str, manner: str = "right") -> tuple[list[str], dict]:
    environment = {**os.environ, "TOY_MANNER": manner, "TOY_FOLDER": str(house / "tests"), "COLUMNS": "200"}
    return [sys.executable, str(house / "benchmarks" / script), *arguments], environment


def run(house, script: str, *arguments: str, manner: str = "right") -> subprocess.CompletedProcess:
    argv, environment = command(house, script, *arguments, manner=manner)
    return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120, cwd=house)


def benchmark(house, manner: str, *endpoints: str) -> tuple[subprocess.CompletedProcess, dict]:
    output = house / "result.json"
    done = run(
        house,
        "benchmark_all.py",
        *QUICK,
        "--no-report",
        "--output",
        str(output),
        "--endpoints",
        *endpoints,
        manner=manner,
    )
    return done, read_result(output)


def toy_processes(house) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        if process.info["cwd"] == str(house / "tests") and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def wait_until(condition, what: str) -> None:
    deadline_s = time.monotonic() + END_TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.02)


def test_a_fifth_server_is_one_new_file(house):
    done, result = benchmark(house, "right", "null", "toy")
    assert done.returncode == 0, done.stdout + done.stderr
    assert max(result["endpoints"]["toy"]["max_abs_difference"].values()) <= 1e-9
    for connections in (1, 4):
        cell = select(result, "toy", connections=connections)
        assert len(cell.latencies_s) > 50
        assert (cell.failed, cell.wrong) == (0, 0)
    assert "| toy | local |" in (house / "result.md").read_text()
    assert not toy_processes(house)


def test_the_null_server_is_the_floor_of_the_table(house):
    _, result = benchmark(house, "right", "toy", "null")
    floor, toy = (select(result, name, connections=1).percentile_s(50).estimate for name in ("null", "toy"))
    assert 0 < floor < toy


def test_wrong_answers_during_the_timing_are_counted_and_fail_the_run(house):
    done, result = benchmark(house, "wrong", "toy")
    cells = [select(result, "toy", connections=connections) for connections in (1, 4)]
    assert done.returncode == 1
    assert sum(cell.wrong for cell in cells) > 50
    assert "wrong" in done.stdout


def test_errors_are_counted_at_their_known_rate_and_not_timed(house):
    done, result = benchmark(house, "erring", "toy")
    cell = select(result, "toy", connections=4)
    assert done.returncode == 1
    assert all(set(window["errors"]) == {"status 503"} for window in result["windows"])
    share = cell.failed / (cell.failed + len(cell.latencies_s))
    assert abs(share - 0.25) < 0.03


def test_dropped_connections_are_counted_and_opened_anew(house):
    done, result = benchmark(house, "dropping", "toy")
    cell = select(result, "toy", connections=4)
    assert done.returncode == 1
    assert abs(cell.failed / (cell.failed + len(cell.latencies_s)) - 0.25) < 0.03


def test_a_server_that_breaks_parity_is_not_timed_and_the_others_go_on(house):
    done, result = benchmark(house, "silent", "null", "toy")
    assert done.returncode == 1
    assert "wrong answer, off by 1.0e-02" in done.stdout
    assert select(result, "toy", connections=1) is None
    assert len(select(result, "null", connections=1).latencies_s) > 50


def test_a_server_that_answers_something_else_is_reported_and_the_others_go_on(house):
    done, result = benchmark(house, "garbled", "null", "toy")
    assert done.returncode == 1
    assert "no probabilities in its answer" in result["endpoints"]["toy"]["failure"]
    assert len(select(result, "null", connections=1).latencies_s) > 50
    assert "Traceback" not in done.stderr


def test_a_server_that_does_not_start_is_reported_with_its_own_last_words(house):
    done, result = benchmark(house, "crashing", "null", "toy")
    assert done.returncode == 1
    assert "toy: the model is missing; make one" in result["endpoints"]["toy"]["failure"]
    assert select(result, "null", connections=1) is not None


def test_a_server_that_ignores_sigterm_and_its_child_are_ended_all_the_same(house):
    code = (
        "import server_process; server_process.STOP_TIMEOUT_S = 1\n"
        "from endpoint import load_endpoints\n"
        "toy = load_endpoints()['toy'].on_free_ports()\n"
        "with server_process.ServerProcess(toy) as server: print(len(server.processes()))"
    )
    _, environment = command(house, "verify.py", manner="deaf")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=house / "benchmarks", env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == ["2"], done.stderr
    assert not toy_processes(house)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("moment", ["starting", "measuring"])
def test_a_killed_benchmark_leaves_no_server_and_no_result(house, number, moment):
    argv, environment = command(house, "benchmark_all.py", "--endpoints", "toy", "null", "--seconds", "30")
    results = house / "benchmarks" / "results"
    before = set(results.iterdir())
    log = (house / "log").open("wb")
    process = subprocess.Popen(argv, env=environment, cwd=house, stdout=log, stderr=log)
    try:
        wait_until(lambda: toy_processes(house), "the toy server was not started")
        if moment == "measuring":
            wait_until(lambda: "no model" in (house / "log").read_text(), "the null server was not ready")
        process.send_signal(number)
        assert process.wait(END_TIMEOUT_S) != 0
    finally:
        process.kill()
    wait_until(lambda: not toy_processes(house), "the toy server was left running")
    assert set(results.iterdir()) == before
    assert "Traceback" not in (house / "log").read_text()


def test_a_taken_port_is_one_line_that_names_it():
    endpoint_class = load_endpoints()["null"]
    from server_process import ServerError, ServerProcess

    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with (
            pytest.raises(ServerError, match=f"null: 127.0.0.1:{port} .* in use"),
            ServerProcess(endpoint_class({"rest": port})),
        ):
            pass


def test_verify_prints_the_difference_and_succeeds_only_on_equal_answers(house):
    good = run(house, "verify.py", "--endpoints", "toy")
    bad = run(house, "verify.py", "--endpoints", "toy", manner="silent")
    assert good.returncode == 0
    assert "toy (local): equal, max |Δp| version 1 0.0e+00, version 2 0.0e+00" in good.stdout
    assert bad.returncode == 1
    assert "0 of 1 servers" in bad.stdout


def test_latency_test_prints_percentiles_of_one_server(house):
    done = run(house, "latency_test.py", "--endpoint", "toy", "--seconds", "1", "--warmup-seconds", "0.1")
    assert done.returncode == 0, done.stderr
    assert "p50" in done.stdout
    assert "0 failed, 0 wrong" in done.stdout


def test_latency_test_of_a_server_that_does_not_run_says_how_to_start_it(house):
    done = run(house, "latency_test.py", "--endpoint", "toy", "--running")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "start it in another terminal: cd tests && " in done.stderr


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
    script = REPOSITORY_DIR / "benchmarks" / "compare.py"
    environment = {**os.environ, "COLUMNS": "200"}

    def compare(other: str) -> str:
        argv = [sys.executable, script, tmp_path / "a.json", tmp_path / f"{other}.json"]
        return subprocess.run(argv, capture_output=True, text=True, check=True, env=environment).stdout

    assert "0 better, 0 worse, 2 figures compared" in compare("same")
    assert "0 better, 2 worse, 2 figures compared" in compare("slower")
    assert "no significant difference" in compare("same")


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


def test_the_doctor_knows_every_servers_ports():
    done = subprocess.run(
        [sys.executable, REPOSITORY_DIR / "doctor.py"], capture_output=True, text=True, check=True
    ).stdout
    for name, endpoint_class in load_endpoints().items():
        if endpoint_class.folder.name not in FRAMEWORK_FOLDERS or endpoint_class.protocol != "REST":
            continue
        if endpoint_class.variant == "tuned":  # on the same ports as the default
            continue
        line = next(line for line in done.splitlines() if f"ports of {name} " in line)
        if line.startswith("ok"):
            assert {str(port) for port in endpoint_class.default_ports.values()} <= set(line.replace(",", " ").split())


def test_results_are_json_that_anything_reads():
    assert json.loads((REPOSITORY_DIR / "benchmarks" / "results" / "sample.json").read_text())["schema_version"] == 2
