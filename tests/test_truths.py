"""The measuring client against servers whose truth is known: what it reports is what they do.

Bounds are those of the truth where load on the machine can only push one way (a delay is never
undercut, a capacity never exceeded), and generous the other way.
"""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import load_generator
import numpy as np
import psutil
import pytest
from endpoint import Endpoint
from environment import split_cpus
from load_generator import LoadGenerator, Window, constant_arrivals, make_exchanges, poisson_arrivals
from machine_load import MachineLoad
from results import Cell, encode_window, list_warnings, select

pytestmark = pytest.mark.slow

TESTS_DIR = Path(__file__).resolve().parent
ROWS = [[float(first), 0.0, 0.0, 0.0, 0.0] for first in range(1, 99)]
EXPECTED = np.array([[row[0] / 100, 1 - row[0] / 100] for row in ROWS])  # (98, 2)
EVERY = 4
SERVER_CPUS, CLIENT_CPUS = split_cpus()
STARTED_CPUS = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


class Truth(Endpoint):
    name = "truth"
    kind = "local"
    folder = TESTS_DIR
    default_ports = {"rest": 0}
    rows_key = "rows"

    def path(self, version):
        return f"/truth/{version}"

    def decode(self, reply):
        return np.array(json.loads(reply)["answers"])


@pytest.fixture(autouse=True)
def own_core():
    """The client's own core, as in the benchmark; afterwards the tests may use all again."""
    if CLIENT_CPUS is not None:
        os.sched_setaffinity(0, CLIENT_CPUS)
    yield
    if STARTED_CPUS is not None:
        os.sched_setaffinity(0, STARTED_CPUS)


@contextlib.contextmanager
def serve(manner: str, **options):
    """Start a truth_server; give a function that makes a load generator of so many connections for it."""
    command = [sys.executable, "truth_server.py", manner]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    if SERVER_CPUS is not None:
        command += ["--cpu", str(min(SERVER_CPUS))]
    process = subprocess.Popen(command, cwd=TESTS_DIR, stdout=subprocess.PIPE, text=True)
    try:
        endpoint = Truth({"rest": int(process.stdout.readline())})
        exchanges = make_exchanges(endpoint, "1", ROWS, EXPECTED)
        yield lambda connections: LoadGenerator(endpoint, exchanges, connections)
    finally:
        process.kill()
        process.communicate()


def closed(manner: str, connections: int, duration_s: float, **options) -> Window:
    with serve(manner, **options) as connect, connect(connections) as load:
        return load.run_closed(duration_s)


def opened(manner: str, connections: int, due_s: np.ndarray, **options) -> Window:
    with serve(manner, **options) as connect, connect(connections) as load:
        return load.run_open(due_s)


def make_result(window: Window, load: str, foreign_share: float = 0.0) -> dict:
    """A result file's content with this one window in it."""
    about = {
        "endpoint": "truth", "load": load, "round": 1, "rows_per_request": 1, "nominal_rate": window.offered_rate,
        "server_cpu_s": 0.0, "server_rss_bytes": 0, "foreign_share": foreign_share,
    }  # fmt: skip
    return {
        "settings": {"server_cpus": [0], "connections": [window.connections], "objective_p99_s": 0.1},
        "endpoints": {"truth": {"kind": "local"}},
        "windows": [encode_window(window, **about)],
    }


def make_cell(window: Window, load: str) -> Cell:
    return select(make_result(window, load), "truth", load)


def percentile_ms(window: Window, percent: float) -> float:
    return float(np.percentile(window.latencies_s, percent)) * 1000


def share_failed(window: Window) -> float:
    failed = window.errors.total() + window.wrong
    return failed / (failed + len(window.latencies_s))


# A stall of 100 ms in every second, asked at random times: a tenth of the requests is due in a stall and
# waits for its end, 0 to 100 ms alike. So P(latency > x) = 0.1 (1 - x / 100 ms): p95 50 ms, p99 90 ms.


def test_the_open_loop_shows_a_planted_stall_at_its_true_size():
    window = opened("stalling", 8, poisson_arrivals(300, 6.0, seed=1), delay_s=0.1, period_s=1.0)
    assert not window.errors
    assert 40 < percentile_ms(window, 95) < 90
    assert 80 < percentile_ms(window, 99) < 160
    assert percentile_ms(window, 50) < 20


def test_the_closed_loop_hides_the_same_stall():
    window = closed("stalling", 1, 6.0, delay_s=0.1, period_s=1.0)
    assert window.latencies_s.max() > 0.09  # it met the stalls,
    assert 4 <= (window.latencies_s > 0.09).sum() <= 8  # one request each,
    assert percentile_ms(window, 99) < 10  # and p99 does not tell


def test_a_constant_delay_is_measured_in_both_loops():
    loop = closed("constant", 1, 1.0, delay_s=0.02)
    rate = opened("constant", 32, poisson_arrivals(200, 2.0, seed=2), delay_s=0.02)
    for window in (loop, rate):
        assert window.latencies_s.min() > 0.0199
        assert 20 <= percentile_ms(window, 50) < 24
        assert not window.errors


@pytest.mark.parametrize("connections", [1, 8])
def test_a_closed_loops_rate_is_connections_over_delay(connections):
    window = closed("constant", connections, 1.5, delay_s=0.02)
    truth = connections / 0.02
    assert 0.8 * truth < window.rate <= 1.01 * truth


def test_littles_law_holds_in_the_closed_loop():
    window = closed("serial", 8, 1.0, delay_s=0.002)
    under_way = window.rate * window.latencies_s.mean()  # Little, Operations Research 9, 1961
    assert abs(under_way - 8) < 0.5


def test_the_open_loop_offers_the_rate_it_says():
    window = opened("constant", 32, constant_arrivals(400, 2.0), delay_s=0.01)
    assert window.offered_rate == pytest.approx(400)
    assert window.rate == pytest.approx(400, rel=0.05)
    assert len(window.latencies_s) == len(window.lateness_s) == 800
    assert np.median(window.lateness_s) < 0.001
    assert window.lateness_s.min() >= 0


def test_poisson_arrivals_have_exponential_gaps_and_the_rate_asked_for():
    gaps_s = np.diff(poisson_arrivals(1000, 50.0, seed=3))
    assert gaps_s.mean() == pytest.approx(1e-3, rel=0.02)
    assert gaps_s.std() == pytest.approx(1e-3, rel=0.03)
    assert np.exp(-1) == pytest.approx((gaps_s > 1e-3).mean(), abs=0.01)


def test_errors_are_counted_at_their_rate_and_not_timed():
    window = closed("erring", 3, 0.5, every=EVERY)
    assert set(window.errors) == {"status 503"}
    assert share_failed(window) == pytest.approx(1 / EVERY, abs=0.01)
    assert len(window.latencies_s) > 100


def test_wrong_answers_are_counted_at_their_rate_and_not_timed():
    window = closed("wrong", 3, 0.5, every=EVERY)
    assert not window.errors
    assert share_failed(window) == pytest.approx(1 / EVERY, abs=0.01)
    assert window.wrong > 30


@pytest.mark.parametrize("manner", ["dropping", "truncating"])
def test_dropped_connections_are_counted_at_their_rate_and_opened_anew(manner):
    for window in (closed(manner, 3, 0.5, every=EVERY), opened(manner, 8, constant_arrivals(400, 0.5), every=EVERY)):
        assert set(window.errors) == {"connection closed"}
        assert share_failed(window) == pytest.approx(1 / EVERY, abs=0.02)
        assert len(window.latencies_s) > 100


def test_a_rate_above_the_servers_capacity_shows_as_such():
    window = opened("serial", 64, poisson_arrivals(300, 3.0, seed=4), delay_s=0.005)
    cell = make_cell(window, "open")
    assert 120 < window.rate <= 201  # 1 / 5 ms
    assert not cell.keeps_up
    first, _, last = np.array_split(window.latencies_s, 3)  # in order of the replies
    assert np.median(last) > 2 * np.median(first)
    assert len(window.latencies_s) == 900  # all were answered in the end, so a failure did not hide it


def test_a_rate_below_the_servers_capacity_is_kept_up_with():
    window = opened("serial", 64, poisson_arrivals(60, 3.0, seed=5), delay_s=0.005)
    assert make_cell(window, "open").keeps_up
    assert window.rate == pytest.approx(window.offered_rate, rel=0.05)


def test_waiting_for_a_free_connection_is_part_of_the_latency():
    """Two connections, 20 ms each: 100 a second. At 200 offered, the n-th request waits n / 200 s more or less."""
    window = opened("constant", 2, constant_arrivals(200, 1.0), delay_s=0.02)
    assert window.latencies_s[-1] > 0.9
    assert window.lateness_s[-1] > 0.8
    assert not make_cell(window, "open").keeps_up


def test_chunked_replies_are_read_to_their_end():
    window = closed("chunked", 2, 0.5)
    assert (window.errors.total(), window.wrong) == (0, 0)
    assert len(window.latencies_s) > 100


def test_a_reply_in_many_segments_counts_to_its_last_byte():
    window = closed("segmented", 2, 1.0, delay_s=0.004)
    assert (window.errors.total(), window.wrong) == (0, 0)
    assert window.latencies_s.min() > 9 * 0.004 - 0.001  # the clocks of server and client agree to well below 1 ms
    assert percentile_ms(window, 50) < 50


def test_a_server_that_closes_after_each_reply_is_timed_and_named():
    window = closed("closing", 2, 0.5)
    assert set(window.errors) == {"server closes after each reply"}
    assert window.errors.total() == len(window.latencies_s) > 50
    assert window.wrong == 0


def test_what_is_not_http_is_a_failure():
    window = closed("garbage", 2, 0.2)
    assert set(window.errors) == {"not HTTP"}
    assert len(window.latencies_s) == 0


def test_a_server_that_never_replies_ends_the_closed_loop_after_the_timeout(monkeypatch):
    monkeypatch.setattr(load_generator, "REPLY_TIMEOUT_S", 1.0)
    window = closed("silent", 3, 0.1)
    assert window.errors == {"no reply in 1 s": 3}
    assert (window.rate, len(window.latencies_s)) == (0, 0)


def test_requests_that_could_not_be_sent_count_as_failed(monkeypatch):
    monkeypatch.setattr(load_generator, "REPLY_TIMEOUT_S", 1.0)
    window = opened("silent", 2, constant_arrivals(100, 0.1))
    assert window.errors == {"no reply in 1 s": 2, "not sent: no connection was free": 8}
    assert len(window.lateness_s) == 2
    assert not make_cell(window, "open").keeps_up


def test_after_a_timeout_the_connections_are_opened_anew(monkeypatch):
    monkeypatch.setattr(load_generator, "REPLY_TIMEOUT_S", 1.0)
    with serve("constant", delay_s=1.6) as connect, connect(2) as load:
        assert load.run_closed(0.1).errors == {"no reply in 1 s": 2}
        monkeypatch.setattr(load_generator, "REPLY_TIMEOUT_S", 30.0)
        window = load.run_closed(0.1)
    assert not window.errors
    assert len(window.latencies_s) == 2
    assert window.latencies_s.min() > 1.59  # the late replies of the first run were not taken for these


@pytest.mark.parametrize("load", ["closed", "open"])
def test_a_server_that_dies_ends_the_run_with_its_requests_as_failures(load):
    if load == "closed":
        window = closed("dying", 4, 60.0, every=100)
    else:
        window = opened("dying", 4, constant_arrivals(500, 60.0), every=100)
        assert window.errors["not sent: no connection was free"] > 29_000
    assert window.elapsed_s < 30
    assert window.errors["reconnect: ConnectionRefusedError"] == 4
    assert 90 <= len(window.latencies_s) <= 99


@contextlib.contextmanager
def busy_process(cpus: set[int] | None):
    """A process that uses all it gets of the given cores."""
    code = "print('busy', flush=True)\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        if cpus is not None:
            os.sched_setaffinity(process.pid, cpus)
        process.stdout.readline()
        yield psutil.Process(process.pid)
    finally:
        process.kill()
        process.communicate()


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def test_foreign_load_on_the_clients_core_is_warned_of():
    cpus = (SERVER_CPUS | CLIENT_CPUS) if SERVER_CPUS is not None else None
    due_s = poisson_arrivals(500, 1.5, seed=6)
    with (
        busy_process(CLIENT_CPUS),
        serve("constant", delay_s=0.002) as connect,
        connect(16) as load,
        MachineLoad(lambda: 0.0, cpus) as machine,
    ):
        window = load.run_open(due_s)
    result = make_result(window, "open", machine.foreign_share)
    assert any("other programs used" in warning for warning in list_warnings(result)), machine.foreign_share


def test_foreign_load_is_what_is_neither_the_clients_nor_the_servers():
    """Two watch the same second: to one the busy process is the server, to the other it is foreign."""
    cpus = (SERVER_CPUS | CLIENT_CPUS) if SERVER_CPUS is not None else None
    cores = len(cpus) if cpus else psutil.cpu_count()
    with busy_process(CLIENT_CPUS) as busy, serve("constant", delay_s=0.002) as connect, connect(4) as load:
        before_s = cpu_s(busy)
        with MachineLoad(lambda: 0.0, cpus) as as_foreign, MachineLoad(lambda: cpu_s(busy), cpus) as as_server:
            window = load.run_closed(1.5)
        busy_share = (cpu_s(busy) - before_s) / (cores * 1.5)
    assert busy_share > 0.05
    assert as_foreign.foreign_share - as_server.foreign_share == pytest.approx(busy_share, rel=0.2)
    assert as_foreign.foreign_share < 1 - 0.9 * window.client_cpu_s / (cores * 1.5)
