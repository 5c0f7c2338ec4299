"""Locust's figures are to the microsecond, its workers add up to what the server saw, its shapes ramp and end."""

import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import psutil
import pytest

from client.load_record import LoadRecord
from helpers import DEADLINE_S, REPOSITORY_DIR, TESTS_DIR, run_python, wait_until
from machine.free_ports import find_free_ports

DELAYS_MS = (2.2, 2.7)  # of delayed_server.py
GOOD_ANSWERS = 231  # of the toy, before it turns bad; the first shows that it is ready

pytestmark = pytest.mark.slow


@pytest.fixture
def house(tmp_path):
    """A copy of benchmarks/ and data/ with two more endpoints: toy, and delayed, whose delay is known."""
    shutil.copytree(REPOSITORY_DIR / "data", tmp_path / "data")
    shutil.copytree(REPOSITORY_DIR / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns("2*"))
    (tmp_path / "tests").mkdir()
    for name in ("toy_server.py", "delayed_server.py"):
        shutil.copy2(TESTS_DIR / name, tmp_path / "tests")
    toy = (TESTS_DIR / "toy_endpoint.py").read_text()
    (tmp_path / "benchmarks" / "endpoints" / "endpoint_toy.py").write_text(toy)
    delayed = toy.replace("toy_server.py", "delayed_server.py").replace('name = "toy"', 'name = "delayed"')
    (tmp_path / "benchmarks" / "endpoints" / "endpoint_delayed.py").write_text(delayed)
    yield tmp_path
    assert not processes_of(tmp_path)


def environment(house, manner: str = "right") -> dict:
    return {"TOY_MANNER": manner, "TOY_FOLDER": str(house / "tests"), "COLUMNS": "200"}


def run(house, script: str, *arguments: str, manner: str = "right") -> subprocess.CompletedProcess:
    return run_python(house / "benchmarks" / script, *arguments, cwd=house, env=environment(house, manner))


def start_locust(house, *arguments: str) -> subprocess.Popen:
    with (house / "log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "locust", "-f", house / "benchmarks" / "load_test.py", *arguments],
            env={**os.environ, **environment(house)}, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=house,
        )  # fmt: skip


def processes_of(house) -> list[psutil.Process]:
    """Servers, Locust and its workers that were started from this house and still run."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd", "status"]):
        words = [process.info["cwd"] or "", *(process.info["cmdline"] or [])]
        if any(word.startswith(str(house)) for word in words) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def read_record(house) -> LoadRecord:
    return LoadRecord.from_dict(json.loads((house / "out_record.json").read_text()))


def read_rows(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def count_in_table(printed: str) -> int:
    """The requests of Locust's own table; its CSV file lacks those of the last second."""
    return int(re.search(r"^ +Aggregated +(\d+) ", printed, re.MULTILINE)[1])


def count_answered(house) -> int:
    return (house / "tests" / "answered").stat().st_size


@pytest.fixture
def delayed_port(house):
    """The port of a running delayed server that has answered nothing yet."""
    port = find_free_ports(["rest"])["rest"]
    process = subprocess.Popen([sys.executable, "delayed_server.py", str(port)], cwd=house / "tests")
    try:
        wait_until(lambda: accepts(port), "the delayed server does not listen", while_alive=process)
        yield port
    finally:
        process.kill()
        process.wait()


def test_without_arguments_worth_a_word_it_starts_the_server_runs_bounded_and_prints(house):
    done = run(house, "load_test.py", "--endpoint", "delayed", "--users", "2", "--seconds", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("delayed: ")
    assert "0 failed, 0 wrong" in done.stdout.splitlines()[-1]
    assert "POST     delayed /toy/1" in done.stderr


@pytest.mark.timing
def test_times_below_a_millisecond_are_kept_where_locust_alone_says_zero_or_one(house):
    done = run(house, "load_test.py", "--endpoint", "null", "--users", "1", "--seconds", "3", "--csv", "out")
    assert done.returncode == 0, done.stderr
    ours = read_rows(house / "out_percentiles.csv")[-1]
    locusts = read_rows(house / "out_stats.csv")[-1]
    assert locusts["Name"] == "Aggregated"
    assert 0.02 < float(ours["p50_ms"]) < 5
    assert any(float(ours[key]) % 1 for key in ("p50_ms", "p90_ms", "p99_ms"))
    assert locusts["50%"].isdigit(), "Locust's own CSV has become finer: say so in the README"
    assert abs(float(locusts["Median Response Time"]) / float(ours["p50_ms"]) - 1) < 0.2  # without the last second
    assert count_in_table(done.stderr) == int(ours["right_answers"])


@pytest.mark.timing
def test_percentiles_are_those_of_a_server_whose_delays_are_known(house):
    done = run(house, "load_test.py", "--endpoint", "delayed", "--users", "1", "--seconds", "4", "--csv", "out")
    assert done.returncode == 0, done.stderr
    record = read_record(house)
    low_ms, high_ms = np.percentile(record.latencies_s, (25, 75)) * 1000
    assert low_ms >= DELAYS_MS[0]
    assert high_ms >= DELAYS_MS[1]
    assert low_ms < DELAYS_MS[0] + 1.5
    assert abs((high_ms - low_ms) - (DELAYS_MS[1] - DELAYS_MS[0])) < 0.25  # what HTTP costs cancels out
    assert count_answered(house) == record.count + 1  # the one that showed the server to be ready


def test_two_worker_processes_add_up_to_what_the_server_counted(house):
    done = run(
        house, "load_test.py", "--endpoint", "delayed", "--users", "4", "--seconds", "4",
        "--processes", "2", "--csv", "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 workers connected" in done.stderr
    record = read_record(house)
    assert record.count > 500
    assert count_answered(house) == record.count + 1
    assert count_in_table(done.stderr) == record.count
    assert np.percentile(record.latencies_s, 25) * 1000 >= DELAYS_MS[0]


def test_a_master_and_two_workers_add_up_to_what_the_server_counted(house, delayed_port):
    port = str(find_free_ports(["master"])["master"])
    master = start_locust(
        house, "--master", "--master-bind-host", "127.0.0.1", "--master-bind-port", port, "--expect-workers", "2",
        "--headless", "--only-summary", "--users", "4", "--spawn-rate", "4", "--run-time", "4s", "--csv", "out",
        "--endpoint", "delayed", "--host", f"http://127.0.0.1:{delayed_port}",
    )  # fmt: skip
    workers = [start_locust(house, "--worker", "--master-port", port) for _ in range(2)]
    try:
        codes = [process.wait(DEADLINE_S) for process in (master, *workers)]
    finally:
        for process in (master, *workers):
            process.kill()
            process.wait()
    assert codes == [0, 0, 0], (house / "log").read_text()
    record = read_record(house)
    assert record.count > 500
    assert count_answered(house) == record.count
    assert record.cpu_s > 0


@pytest.mark.parametrize("workers", [[], ["--processes", "2"]])
def test_wrong_answers_fail_the_run_and_are_not_timed(house, workers):
    done = run(
        house, "load_test.py", "--endpoint", "toy", "--users", "2", "--seconds", "3", "--csv", "out", *workers,
        manner="wrong",
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    record = read_record(house)
    assert record.count == GOOD_ANSWERS - 1
    assert record.wrong > 0
    assert not record.errors
    assert f"0 failed, {record.wrong:,} wrong" in done.stdout


def test_failed_requests_are_counted_by_reason_and_not_timed(house):
    done = run(
        house, "load_test.py", "--endpoint", "toy", "--users", "2", "--seconds", "3", "--csv", "out", manner="erring"
    )
    assert done.returncode == 1
    record = read_record(house)
    assert set(record.errors) == {"status 503"}
    turned = record.count + record.errors.total() - (GOOD_ANSWERS - 1)
    assert abs(record.errors.total() - turned / 4) < 1  # every fourth
    assert "× status 503" in done.stdout


def test_a_run_without_one_answer_fails(house):
    port = find_free_ports(["nobody"])["nobody"]
    process = start_locust(
        house, "--headless", "--users", "1", "--run-time", "2s", "--endpoint", "toy",
        "--host", f"http://127.0.0.1:{port}",
    )  # fmt: skip
    assert process.wait(DEADLINE_S) == 1
    assert "ConnectionRefusedError" in (house / "log").read_text()


TICKS = """
import json, load_test
for name, shape_class in load_test.SHAPES.items():
    shape, counts = shape_class(40, 20.0), []
    for tenth in range(0, 201):
        shape.get_run_time = lambda: tenth / 10
        step = shape.tick()
        counts.append(step and step[0])
    print(json.dumps([name, counts]))
"""


def test_a_worker_builds_locusts_own_parser_once(house):
    """Locust 2.47 builds it for each option, and a worker that is busy with that for 3 s is taken for lost."""
    code = "import load_test, locust.argument_parser as p; assert p.default_args_dict() is p.default_args_dict()"
    run_python("-c", code, cwd=house / "benchmarks", check=True)


def test_shapes_stay_within_the_users_and_end_by_themselves(house):
    done = run_python("-c", TICKS, cwd=house / "benchmarks", env=environment(house))
    shapes = dict(json.loads(line) for line in done.stdout.splitlines())
    assert set(shapes) == {"ramp", "spike", "soak"}, done.stderr
    for counts in shapes.values():
        assert counts[-1] is None
        assert None not in counts[:-1]
        assert (min(counts[:-1]), max(counts[:-1])) in ((1, 40), (4, 40))
    ramp, spike, soak = (np.array(shapes[name][:-1]) for name in ("ramp", "spike", "soak"))
    assert (np.diff(ramp) >= 0).all()
    assert len(set(ramp)) == 40
    assert (ramp[150:] == 40).all()
    assert ramp[75] == 20
    assert (np.flatnonzero(spike == 40) == np.arange(80, 120)).all()
    assert (np.delete(spike, np.arange(80, 120)) == 4).all()
    assert (soak[20:] == 40).all()


def test_a_ramp_really_ramps_and_no_stopped_user_loses_a_request(house):
    done = run(
        house, "load_test.py", "--endpoint", "delayed", "--users", "6", "--seconds", "8", "--shape", "ramp",
        "--csv", "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    users = [int(row["User Count"]) for row in read_rows(house / "out_stats_history.csv")]
    rising = [count for count in users if count]
    assert rising == sorted(rising)
    assert rising[0] <= 2
    assert rising[-1] == 6
    assert len(set(rising)) >= 4
    rows = read_rows(house / "out_percentiles.csv")
    assert (int(rows[-1]["users_fewest"]), int(rows[-1]["users_most"])) == (1, 6)
    slices = [row for row in rows[:-1] if float(row["to_s"]) - float(row["from_s"]) > 0.5]  # the end may cut one short
    rates = {int(row["users_most"]): float(row["right_per_s"]) for row in slices}
    assert rates[6] > 2 * rates[min(rates)]  # the delay is slept: more users, more answers
    assert count_answered(house) == read_record(house).count + 1


def test_a_spike_comes_and_goes_with_two_workers_too(house):
    done = run(
        house, "load_test.py", "--endpoint", "delayed", "--users", "10", "--seconds", "15", "--shape", "spike",
        "--csv", "out", "--processes", "2",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    users = [int(row["User Count"]) for row in read_rows(house / "out_stats_history.csv")]
    busy = [count for count in users if count]
    assert busy[0] == busy[-1] == 1
    assert max(busy) == 10
    record = read_record(house)
    assert count_answered(house) == record.count + 1


@pytest.mark.parametrize(
    ("number", "options"),
    [
        (signal.SIGINT, ""),
        (signal.SIGINT, "--processes 2"),
        (signal.SIGTERM, "--shape soak"),
        (signal.SIGTERM, "--shape soak --processes 2"),
        (signal.SIGKILL, ""),
        (signal.SIGKILL, "--shape soak --processes 2"),
    ],
)
def test_a_stopped_run_leaves_nothing_behind_and_prints_what_it_measured(house, number, options):
    with (house / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, house / "benchmarks" / "load_test.py", "--endpoint", "toy", "--seconds", "60",
             *options.split()],
            env={**os.environ, **environment(house)}, cwd=house, stdout=log, stderr=log,
        )  # fmt: skip
    log_text = (house / "log").read_text
    try:
        wait_until(lambda: "All users spawned" in log_text(), log_text, while_alive=process)
        before = len(processes_of(house))
        process.send_signal(number)
        assert process.wait(DEADLINE_S) != 0
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not processes_of(house), lambda: f"left: {processes_of(house)}")
    assert before == (5 if "--processes" in options else 3)  # this program, the server, Locust, its workers
    assert "right answers in" in log_text(), "what was measured until then is not printed"
    assert "Traceback" not in log_text()


def test_the_web_page_starts_users_and_shows_times_below_a_millisecond(house, delayed_port):
    port = find_free_ports(["web"])["web"]
    process = start_locust(
        house, "--endpoint", "delayed", "--host", f"http://127.0.0.1:{delayed_port}",
        "--web-host", "127.0.0.1", "--web-port", str(port),
    )  # fmt: skip
    page = f"http://127.0.0.1:{port}"

    def stats() -> dict:
        return json.load(urllib.request.urlopen(f"{page}/stats/requests", timeout=DEADLINE_S))

    try:
        wait_until(lambda: accepts(port), (house / "log").read_text, while_alive=process)
        assert b"<html" in urllib.request.urlopen(page, timeout=DEADLINE_S).read()
        form = urllib.parse.urlencode({"user_count": 2, "spawn_rate": 2}).encode()
        assert json.load(urllib.request.urlopen(f"{page}/swarm", form, timeout=DEADLINE_S))["success"]
        wait_until(lambda: stats()["stats"][-1]["num_requests"] > 200, "no requests")
        median_ms = stats()["stats"][-1]["median_response_time"]
        assert DELAYS_MS[0] <= median_ms < 10
        assert median_ms % 1
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 0
    finally:
        process.kill()
        process.wait()
    assert count_answered(house) == int((house / "log").read_text().split("delayed: ")[1].split()[0].replace(",", ""))


@pytest.mark.timing
def test_both_clients_agree_on_a_server_that_sets_the_pace(house):
    done = run(house, "cross_check.py", "--endpoint", "delayed", "--connections", "1", "2", "--seconds", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(("generator ", "Locust "))]
    assert [(row[0], row[1]) for row in rows] == [(name, n) for n in "12" for name in ("generator", "Locust")]
    for generator, locust in zip(rows[::2], rows[1::2], strict=True):
        connections = int(generator[1])
        for row in (generator, locust):
            rate, p50_ms, in_flight = float(row[2].replace(",", "")), float(row[3]), float(row[6])
            assert p50_ms >= DELAYS_MS[0]
            assert rate <= connections * 2000 / sum(DELAYS_MS)
            assert in_flight <= connections * 1.01
        assert float(generator[6]) > 0.9 * connections
        assert abs(float(locust[3]) / float(generator[3]) - 1) < 0.5
        assert float(locust[5]) > float(generator[5])  # Locust's request costs more of the client's core
    for connections in (1, 2):
        assert f"at {connections}: Locust's p50 is " in done.stdout


def test_the_cross_check_fails_for_wrong_answers(house):
    done = run(house, "cross_check.py", "--endpoint", "toy", "--connections", "1", "--seconds", "2", manner="wrong")
    assert done.returncode == 1
