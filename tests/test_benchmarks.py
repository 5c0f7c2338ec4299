"""The benchmark tells the truth about servers whose truth is known, and leaves nothing behind."""

import contextlib
import itertools
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import psutil
import pytest

import latency_test
import verify
from benchmark_all import list_failures, start_and_verify
from conftest import FRAMEWORKS
from endpoints.base import ServerError, load_endpoints
from figures.cells import Cell
from figures.measured import Measured
from figures.result_file import read_result
from helpers import DEADLINE_S, REPOSITORY_DIR, TESTS_DIR, call_main, load_script, run, wait_until
from machine.free_ports import find_free_ports
from servers import process as server_process
from servers.process import ServerProcess
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
    (house / "benchmarks" / "endpoints" / "endpoint_toy.py").write_text(toy)
    for manner in BAD_MANNERS:
        bad_toy = toy.replace('name = "toy"', f'name = "{manner}"').replace('"right"', f'"{manner}"')
        (house / "benchmarks" / "endpoints" / f"endpoint_{manner}.py").write_text(bad_toy)
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
        for process in psutil.process_iter(["cwd", "status"])
        if process.info["cwd"] == str(house / "tests") and process.info["status"] != psutil.STATUS_ZOMBIE
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


def cells_of(result: dict, name: str) -> list[Cell]:
    return Measured(result).closed(name)


def test_a_fifth_server_is_one_new_file(house, good_run):
    done, result = good_run
    assert done.returncode == 0, done.stdout + done.stderr
    assert max(result["endpoints"]["toy"]["max_abs_difference"].values()) <= 1e-9
    for cell in cells_of(result, "toy"):
        assert len(cell.latencies_s) > 0
        assert (cell.failed, cell.wrong) == (0, 0)
    assert "| *toy (local)* |" in (house / "toy.md").read_text()


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
    assert cells_of(result, "unequal") == []


def test_a_server_that_does_not_start_is_reported_with_its_own_last_words(bad_run):
    _, result = bad_run
    assert "toy: the model is missing; make one" in result["endpoints"]["crashing"]["failure"]
    assert cells_of(result, "crashing") == []


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


@pytest.mark.parametrize(
    ("moment", "number"),
    [("starting", 2), ("starting", 9), ("measuring", 15), ("measuring", 9)],
)
def test_a_killed_benchmark_leaves_no_server_and_no_result(house, number, moment):
    argv = command(house, "--endpoints", "toy", "null", "--settle-seconds", "0", "--seconds", "600")
    results = house / "benchmarks" / "results"
    before = set(results.iterdir())
    log_path = house / "log"
    with log_path.open("wb") as log:
        environment = {**os.environ, "TOY_FOLDER": str(house / "tests")}
        process = subprocess.Popen(
            argv, env=environment, cwd=house, stdout=log, stderr=log, start_new_session=True
        )  # a lifted session that is killed stays lifted
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
    monkeypatch.setattr(verify, "load_endpoints", lambda with_peers: {"toy": Toy})
    good = call_main(verify, "--endpoints", "toy")
    monkeypatch.setenv("TOY_MANNER", "unequal")
    bad = call_main(verify, "--endpoints", "toy")
    assert good.returncode == 0
    assert "toy (local): equal, max |Δp| version 1 0.0e+00, version 2 0.0e+00" in good.stdout
    assert bad.returncode == 1
    assert "toy (local): BROKEN, max |Δp| version 1 1.0e-02, version 2 1.0e-02" in bad.stdout
    assert "0 of 1 servers" in bad.stdout


def test_latency_test_of_a_server_that_does_not_run_says_how_to_start_it(monkeypatch):
    monkeypatch.setattr(latency_test, "load_endpoints", lambda with_peers: {"toy": Toy})
    monkeypatch.setattr(Toy, "default_ports", find_free_ports(["rest"]))
    with pytest.raises(ServerError, match="start it in another terminal: cd tests && ") as caught:
        call_main(latency_test, "--endpoint", "toy", "--running")
    assert "\n" not in str(caught.value)


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
