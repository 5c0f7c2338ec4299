"""latency_test.py against latencies whose truth is known."""

import re
import select
import signal
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
from rich.console import Console
from scipy.signal import lfilter

import latency_test
from endpoints.endpoint_null import NullEndpoint
from helpers import DEADLINE_S, REPOSITORY_DIR, call_main
from latency_test import (
    find_interval,
    format_histogram,
    format_parts,
    format_percentiles,
    format_thirds,
    judge_steadiness,
    measure_parts,
    split_by_time,
)
from scripted import (
    MS,
    Closing,
    Dropping,
    Dying,
    Erring,
    Garbage,
    Scene,
    ScriptedEndpoint,
    Segmented,
    Server,
    exchanges,
)


def parts_of(server: Server, count: int = 40) -> latency_test.Parts:
    scene = Scene(server)
    return measure_parts(
        ScriptedEndpoint(), exchanges(), count, clock=scene.clock, poller=scene.poller, connect=scene.connect
    )


def steady(random: np.random.Generator, count: int = 60_000) -> np.ndarray:
    return random.lognormal(np.log(2e-4), 0.3, count)


def test_a_steady_server_is_called_steady_and_a_drift_is_not():
    random = np.random.default_rng(1)
    assert judge_steadiness(steady(random))[0] is True
    drifting = steady(random) * np.linspace(1, 1.15, 60_000)
    verdict, words = judge_steadiness(drifting)
    assert verdict is False
    assert words.startswith("not steady: p50 of the thirds is 0.2")


def test_a_tail_that_grows_is_not_steady_though_the_median_is():
    random = np.random.default_rng(2)
    latencies_s = steady(random)
    slow = (random.random(60_000) < 0.02) & (np.arange(60_000) > 40_000)
    latencies_s[slow] *= 10
    verdict, words = judge_steadiness(latencies_s)
    assert verdict is False
    assert words.startswith("not steady: p99")


def test_steady_servers_are_hardly_ever_called_unsteady():
    random = np.random.default_rng(3)
    wide = [judge_steadiness(random.lognormal(-8, 1.0, 3000))[0] for _ in range(300)]  # of few requests and wide
    assert wide.count(False) <= 9  # one in a hundred, with the luck of 300


def test_a_difference_that_nobody_cares_for_is_steady():
    latencies_s = steady(np.random.default_rng(4), 300_000) * np.repeat([1.0, 1.01, 1.02], 100_000)
    assert judge_steadiness(latencies_s)[0] is True


def test_too_few_requests_give_no_verdict():
    assert judge_steadiness(np.full(50, 0.1))[0] is None
    assert judge_steadiness(np.array([0.1]))[0] is None
    assert format_thirds(np.array([0.1]))[-1] == "steady? too few requests to say; measure longer"


def test_equal_latencies_are_steady():
    assert judge_steadiness(np.full(3000, 1e-3))[0] is True


def test_thirds_are_thirds_of_the_time():
    latencies_s = np.concatenate([np.full(1000, 0.001), np.full(100, 0.01), np.full(10, 0.1)])
    assert [len(third) for third in split_by_time(latencies_s, 3)] == pytest.approx([1000, 100, 10], abs=1)


@pytest.mark.parametrize("percent", [50, 99])
def test_intervals_cover_the_truth_though_requests_in_a_row_are_alike(percent):
    """Latencies whose level wanders (an AR(1) process): intervals for independent ones would cover half as often."""
    random = np.random.default_rng(5)
    count, memory, covered = 6000, 0.98, []
    truth = np.exp(np.hypot(0.2, 0.2) * {50: 0.0, 99: 2.3263}[percent])  # P(Z < 2.3263) = 0.99
    for _ in range(200):
        steps = random.normal(0, 0.2 * np.sqrt(1 - memory**2), count)
        levels, _ = lfilter([1], [1, -memory], steps, zi=[memory * random.normal(0, 0.2)])
        interval = find_interval(np.exp(levels + random.normal(0, 0.2, count)), percent)
        covered.append(interval.low <= truth <= interval.high)
    assert np.mean(covered) >= {50: 0.9, 99: 0.8}[percent]


def test_a_percentile_is_given_from_ten_observations_beyond_it():
    for percent, count in ((50, 20), (90, 100), (95, 200), (99, 1000), (99.9, 10_000)):
        assert find_interval(np.linspace(1, 2, count), percent) is not None
        assert find_interval(np.linspace(1, 2, count - 1), percent) is None


def test_percentiles_are_numpys():
    latencies_s = steady(np.random.default_rng(6))
    for percent, line in zip((50, 90, 95, 99, 99.9), format_percentiles(latencies_s), strict=False):
        assert float(line.split()[1]) == pytest.approx(np.percentile(latencies_s, percent) * 1000, abs=5.1e-4)


def test_the_histogram_counts_every_request_once():
    latencies_s = steady(np.random.default_rng(7))
    assert sum(int(line.split()[-1].replace(",", "")) for line in format_histogram(latencies_s)) == len(latencies_s)


def test_the_wait_is_the_servers_delay_and_the_connection_is_told_apart():
    parts = parts_of(Server(delay_ns=20 * MS, connect_ns=3 * MS))
    assert parts.wait_s == [0.02] * 40
    assert parts.send_s == parts.receive_s == [0.0] * 40
    assert parts.connect_s == [0.003] * 40
    assert parts.fresh_s == [0.02] * 40
    shares = [line.split()[-1] for line in format_parts(parts) if line.endswith("%")]
    assert shares == ["0.0%", "100.0%", "0.0%", "100.0%"]


def test_a_reply_that_comes_slowly_shows_as_receiving():
    parts = parts_of(Segmented(3 * MS), count=20)
    assert parts.receive_s == pytest.approx([9 * 0.003] * 20)
    assert parts.wait_s == [0.0] * 20


def test_a_listener_that_is_slow_to_take_connections_is_not_the_servers_answer():
    """The kernel connects before the program accepts: connect is the network's, the wait for it is in the request."""
    is_asked = threading.Event()
    now_ns = 0  # moves only when the server accepts

    class Poller:
        """Polls as select.poll does; says when a reply is waited for."""

        def register(self, polled: socket.socket, events: int) -> None:
            self.events = events
            self.polling = select.poll()
            self.polling.register(polled, events)

        def poll(self, timeout_ms: float) -> list:
            if self.events == select.POLLIN:
                is_asked.set()
            return self.polling.poll(timeout_ms)

    def accept_late(listener: socket.socket) -> None:
        nonlocal now_ns
        is_asked.wait(DEADLINE_S)  # so the client is connected
        for _ in range(2):
            now_ns += 1_000 * MS
            connection, _ = listener.accept()
            with connection:
                connection.recv(10_000)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept_late, args=(listener,), daemon=True)
        thread.start()
        endpoint = NullEndpoint({"rest": listener.getsockname()[1]})
        parts = measure_parts(endpoint, exchanges(), count=1, poller=Poller, clock=lambda: now_ns)
        thread.join(DEADLINE_S)
    assert parts.failed == 0
    assert parts.connect_s == [0]
    assert parts.fresh_s[0] >= 1


@pytest.mark.parametrize(
    ("server", "failed"), [(Erring(MS), 20), (Dropping(MS), 20), (Closing(MS), 0), (Garbage(MS), 80)]
)
def test_failures_of_the_pass_are_counted_and_not_timed(server, failed):
    parts = parts_of(server)
    assert parts.failed == failed
    assert len(parts.wait_s) + len(parts.connect_s) + parts.failed == 80
    assert format_parts(parts)


def test_the_stretches_between_which_the_progress_bar_moves_add_up():
    with Scene(Erring(MS)).load(1) as load:
        window = latency_test.measure(load, 5.0, Console(quiet=True))
    assert window.elapsed_s == pytest.approx(5.0, abs=0.002)
    assert window.errors == {"status 503": (len(window.latencies_s) + window.errors.total()) // 4}
    assert set(window.latencies_s) == {0.001}


def test_a_server_that_dies_leaves_what_came_before():
    with Scene(Dying(MS, every=3000)).load(1) as load:
        window = latency_test.measure(load, 60.0, Console(quiet=True))
    assert len(window.latencies_s) == 2999
    assert window.errors["connection closed"] == 1
    assert window.errors["reconnect: ConnectionRefusedError"] >= 1


@pytest.mark.parametrize("name", ["null", "null-grpc"])
def test_one_run_tells_everything_within_80_columns(name):
    done = call_main(latency_test, "--endpoint", name, "--seconds", "1", "--warmup-seconds", "0.1", columns=80)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    for start in ("p50", "p99.9", "mean", "first", "middle", "last", "send", "wait", "receive", "beside it, connect"):
        assert any(line.startswith(start) for line in lines), f"{start}\n{done.stdout}"
    assert any(line.startswith(("steady", "not steady")) for line in lines)
    assert lines[-1].startswith(f"{name}: ")
    assert re.search(r"right answers in \d+\.\d s at 1 connection, 0 failed, 0 wrong", lines[-1])


def test_ctrl_c_is_one_line_and_stops_the_server():
    process = subprocess.Popen(
        [sys.executable, "-u", REPOSITORY_DIR / "benchmarks" / "latency_test.py", "--seconds", "3600"]
        + ["--endpoint", "null"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert "measuring for 3600 s" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=DEADLINE_S)[1]
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 1
    assert errors == "latency_test: interrupted; the server is stopped\n"
