"""The load generator against servers whose truth is known: it reports what they do, to the nanosecond.

In `scripted` the clock, the poller and the sockets are the test's own. Two tests at the end use real ones.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys

import httptools
import numpy as np
import psutil
import pytest

from client import http_connection
from client.connection import begin_connecting
from client.http_connection import HttpConnection
from client.load_generator import LoadGenerator, constant_arrivals, make_exchanges, poisson_arrivals
from figures.cells import Cell
from figures.measured import Measured
from figures.result_file import Window, encode_window
from figures.verdicts import Doubt, list_warnings
from figures.words import describe_warnings
from helpers import DEADLINE_S, TESTS_DIR
from machine.environment import split_cpus
from machine.load import MachineLoad
from scripted import (
    CLOSE,
    EXPECTED,
    MS,
    ROWS,
    BusyScene,
    Chunked,
    Closing,
    Cut,
    Dropping,
    Dying,
    Erring,
    Garbage,
    Interim,
    Scene,
    ScriptedEndpoint,
    Segmented,
    Serial,
    Server,
    Silent,
    Stalling,
    Switching,
    Truncating,
    Unframed,
    Wrong,
    closed,
    encode_reply,
    opened,
    stall_end_ns,
)  # fmt: skip

EVERY = 4
SERVER_CPUS, CLIENT_CPUS = split_cpus()


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
    [cell] = Measured(make_result(window, load)).cells("truth")
    return cell


def latencies_ns(window: Window) -> list[int]:
    return np.round(window.latencies_s * 1e9).astype(np.int64).tolist()


def nanoseconds(times_s: np.ndarray) -> list[int]:
    return np.round(times_s * 1e9).astype(np.int64).tolist()


# A stall of 100 ms in every second, asked at random times: a tenth of the requests is due in a stall and
# waits for its end, 0 to 100 ms alike. So P(latency > x) = 0.1 (1 - x / 100 ms): p95 50 ms, p99 90 ms.


def test_the_open_loop_shows_a_planted_stall_at_its_true_size():
    due_s = poisson_arrivals(300, 30.0, seed=1)
    window = opened(Stalling(), 8, due_s)
    truth = [stall_end_ns(due_ns, 100 * MS, 1000 * MS) - due_ns for due_ns in nanoseconds(due_s)]
    assert sorted(latencies_ns(window)) == sorted(truth)
    assert 0.045 < np.percentile(window.latencies_s, 95) < 0.055
    assert 0.088 < np.percentile(window.latencies_s, 99) < 0.092


def test_the_closed_loop_hides_the_same_stall():
    window = closed(Stalling(delay_ns=MS), 1, 6.0)
    assert latencies_ns(window).count(101 * MS) == 6  # one request met each stall,
    assert latencies_ns(window).count(MS) == len(window.latencies_s) - 6
    assert np.percentile(window.latencies_s, 99) == 0.001  # and p99 does not tell


def test_a_constant_delay_is_measured_in_both_loops():
    loop = closed(Server(delay_ns=20 * MS), 1, 1.0)
    rate = opened(Server(delay_ns=20 * MS), 32, poisson_arrivals(200, 2.0, seed=2))
    for window, count in ((loop, 50), (rate, 400)):
        assert latencies_ns(window) == [20 * MS] * count
        assert not window.errors


@pytest.mark.parametrize("connections", [1, 8])
def test_a_closed_loops_rate_is_connections_over_delay(connections):
    window = closed(Server(delay_ns=20 * MS), connections, 1.5)
    assert window.elapsed_s == 1.5
    assert window.rate == pytest.approx(connections / 0.02)


def test_littles_law_holds_in_the_closed_loop():
    window = closed(Serial(delay_ns=2 * MS), 8, 1.0)
    under_way = len(window.latencies_s) * window.latencies_s.mean() / window.elapsed_s  # Operations Research 9, 1961
    assert under_way == pytest.approx(8, abs=0.1)  # fewer in the last round


def test_the_open_loop_offers_the_rate_it_says():
    window = opened(Server(delay_ns=10 * MS), 32, constant_arrivals(400, 2.0))
    assert window.offered_rate == pytest.approx(400)
    assert window.elapsed_s == 2.01
    assert len(window.latencies_s) == len(window.lateness_s) == 800
    assert not window.lateness_s.any()


def test_a_client_that_is_held_up_is_late_and_the_latency_counts_it():
    scene = Scene(Server(delay_ns=10 * MS))
    with scene.load(2) as load:
        scene.wakes_ns = [105 * MS]  # the client's core was busy with something else until then
        window = load.run_open(constant_arrivals(10, 0.1))
    assert window.lateness_s == [0.005]
    assert latencies_ns(window) == [15 * MS]


@pytest.mark.parametrize(("rate", "least", "most"), [(100, 0.95, 1.0), (5_000, 0.2, 0.8), (30_000, 0.0, 0.05)])
def test_an_open_loop_tells_how_long_its_client_had_nothing_to_do(rate, least, most):
    """A request costs it two looks at the clock of 50 us and part of a turn: it can ask some 8,000 a second."""
    with BusyScene(Server(delay_ns=MS)).load(64) as load:
        window = load.run_open(constant_arrivals(rate, 0.2))
    assert len(window.latencies_s) == rate * 0.2
    assert least <= window.client_idle_s / window.elapsed_s <= most
    assert (window.rate > 0.9 * rate) == (rate < 8_000)


def test_poisson_arrivals_have_exponential_gaps_and_the_rate_asked_for():
    gaps_s = np.diff(poisson_arrivals(1000, 50.0, seed=3))
    assert gaps_s.mean() == pytest.approx(1e-3, rel=0.02)
    assert gaps_s.std() == pytest.approx(1e-3, rel=0.03)
    assert np.exp(-1) == pytest.approx((gaps_s > 1e-3).mean(), abs=0.01)


def test_errors_are_counted_at_their_rate_and_not_timed():
    window = closed(Erring(MS, every=EVERY), 4, 1.0)
    asked = len(window.latencies_s) + window.errors.total()
    assert window.errors == {"status 503": asked // EVERY}
    assert set(latencies_ns(window)) == {MS}


def test_wrong_answers_are_counted_at_their_rate_and_not_timed():
    window = closed(Wrong(MS, every=EVERY), 4, 1.0)
    assert not window.errors
    assert window.wrong == (window.wrong + len(window.latencies_s)) // EVERY > 100
    assert set(latencies_ns(window)) == {MS}


@pytest.mark.parametrize("server_class", [Dropping, Truncating])
def test_dropped_connections_are_counted_at_their_rate_and_opened_again(server_class):
    loop = closed(server_class(MS, every=EVERY), 4, 1.0)
    rate = opened(server_class(MS, every=EVERY), 8, constant_arrivals(400, 0.5))
    for window in (loop, rate):
        asked = len(window.latencies_s) + window.errors.total()
        assert window.errors == {"connection closed": asked // EVERY}
        assert set(latencies_ns(window)) == {MS}


def test_a_rate_above_the_servers_capacity_shows_as_such():
    due_s = constant_arrivals(300, 3.0)
    window = opened(Serial(delay_ns=5 * MS), 64, due_s)
    due_ns = np.array(nanoseconds(due_s))
    truth_ns = due_ns[0] + 5 * MS * np.arange(1, 901) - due_ns  # one every 5 ms, from the first on
    assert latencies_ns(window) == truth_ns.tolist()
    assert window.rate == pytest.approx(200, rel=0.01)
    assert not make_cell(window, "open").keeps_up


def test_a_rate_below_the_servers_capacity_is_kept_up_with():
    window = opened(Serial(delay_ns=5 * MS), 64, poisson_arrivals(60, 3.0, seed=5))
    assert make_cell(window, "open").keeps_up
    assert window.rate == pytest.approx(window.offered_rate, rel=0.01)


def test_waiting_for_a_free_connection_is_part_of_the_latency():
    """Two connections, 20 ms each: 100 a second. At 200 offered, the n-th request waits half of n / 200 s."""
    window = opened(Server(delay_ns=20 * MS), 2, constant_arrivals(200, 1.0))
    sent_ns = [20 * MS * (number // 2) + 5 * MS * (1 + number % 2) for number in range(200)]
    due_ns = [5 * MS * (1 + number) for number in range(200)]
    assert latencies_ns(window) == [sent - due + 20 * MS for sent, due in zip(sent_ns, due_ns, strict=True)]
    assert nanoseconds(window.lateness_s) == [sent - due for sent, due in zip(sent_ns, due_ns, strict=True)]
    assert not make_cell(window, "open").keeps_up


def test_chunked_replies_are_read_to_their_end():
    window = closed(Chunked(MS), 2, 0.5)
    assert (window.errors.total(), window.wrong) == (0, 0)
    assert latencies_ns(window) == [MS] * 1000


def test_a_reply_in_many_segments_counts_to_its_last_byte():
    window = closed(Segmented(4 * MS), 2, 1.0)
    assert (window.errors.total(), window.wrong) == (0, 0)
    assert set(latencies_ns(window)) == {9 * 4 * MS}


def test_a_server_that_closes_after_each_reply_is_timed_and_named():
    window = closed(Closing(MS, connect_ns=MS), 2, 0.5)
    assert set(window.errors) == {"server closes after each reply"}
    assert window.errors.total() == len(window.latencies_s) == 500
    assert set(latencies_ns(window)) == {MS}  # without the time to connect
    assert window.wrong == 0


def test_a_reply_that_ends_with_its_connection_is_timed_to_that_end_and_the_closing_named():
    window = closed(Unframed(MS), 4, 1.0)
    assert set(latencies_ns(window)) == {2 * MS}
    assert window.errors == {"server closes after each reply": len(window.latencies_s)}


def test_a_reply_that_is_cut_short_of_its_length_is_a_failure():
    window = closed(Cut(MS), 4, 1.0)
    assert not len(window.latencies_s)
    assert set(window.errors) == {"connection closed"}


def test_interim_replies_are_no_answers():
    window = closed(Interim(MS), 4, 1.0)
    assert set(latencies_ns(window)) == {MS}
    assert len(window.latencies_s) == 4000
    assert not window.errors


def test_a_reply_that_switches_to_another_protocol_is_a_failure():
    window = closed(Switching(MS), 2, 0.1)
    assert window.errors == {"switches to another protocol": 200}
    assert len(window.latencies_s) == 0


def test_what_is_not_http_is_a_failure():
    window = closed(Garbage(MS), 2, 0.1)
    assert window.errors == {"not HTTP": 200}
    assert len(window.latencies_s) == 0


def test_a_server_that_never_replies_ends_the_closed_loop_after_the_timeout():
    window = closed(Silent(), 3, 0.1, reply_timeout_s=1.0)
    assert window.errors == {"no reply in 1 s": 3}
    assert (window.rate, len(window.latencies_s), window.elapsed_s) == (0, 0, 1.0)


def test_requests_that_could_not_be_sent_count_as_failed():
    window = opened(Silent(), 2, constant_arrivals(100, 0.1), reply_timeout_s=1.0)
    assert window.errors == {"no reply in 1 s": 2, "not sent: no connection was free": 8}
    assert len(window.lateness_s) == 2
    assert not make_cell(window, "open").keeps_up


def test_after_a_timeout_the_connections_are_opened_again():
    with Scene(Server(delay_ns=1600 * MS)).load(2, reply_timeout_s=1.0) as load:
        assert load.run_closed(0.1).errors == {"no reply in 1 s": 2}
        load.reply_timeout_s = 30.0
        window = load.run_closed(0.1)
    assert not window.errors
    assert latencies_ns(window) == [1600 * MS] * 2  # the late replies of the first run were not taken for these


@pytest.mark.parametrize("refuses_late", [False, True])
@pytest.mark.parametrize("load", ["closed", "open"])
def test_a_server_that_dies_ends_the_run_with_its_requests_as_failures(load, refuses_late):
    server = Dying(MS, every=100, refuses_late=refuses_late)
    if load == "closed":
        window = closed(server, 4, 60.0)
    else:
        window = opened(server, 4, constant_arrivals(500, 60.0))
        assert window.errors["not sent: no connection was free"] > 29_000
    assert window.elapsed_s < 1
    assert window.errors["reconnect: ConnectionRefusedError"] == 4
    assert window.errors["connection closed"] == 4
    assert len(window.latencies_s) == 99 if load == "open" else 96 <= len(window.latencies_s) <= 99


# A minimum of requests: a slow server's window lasts longer.


def test_a_window_goes_on_until_the_minimum_of_requests_is_answered():
    with Scene(Server(delay_ns=20 * MS)).load(1) as load:
        window = load.run_closed(0.1, min_requests=20)
        assert (len(window.latencies_s), window.elapsed_s) == (20, 0.4)
    with Scene(Server(delay_ns=20 * MS)).load(4) as load:
        window = load.run_closed(0.01, min_requests=10)
        # Its 9th answer is the first of the third round, and lets that connection ask once more.
        assert (len(window.latencies_s), window.elapsed_s) == (13, 0.08)


def test_a_minimum_that_is_reached_in_time_changes_nothing():
    without = closed(Server(delay_ns=20 * MS), 2, 0.1)
    with Scene(Server(delay_ns=20 * MS)).load(2) as load:
        window = load.run_closed(0.1, min_requests=8, limit_s=5.0)
    assert latencies_ns(window) == latencies_ns(without) == [20 * MS] * 10
    assert window.elapsed_s == without.elapsed_s == 0.1


@pytest.mark.parametrize(("limit_s", "answers"), [(None, 4), (0.5, 2), (0.2, 1), (0.05, 1)])
def test_a_window_ends_at_its_limit_though_the_minimum_is_not_reached(limit_s, answers):
    with Scene(Server(delay_ns=300 * MS)).load(1) as load:
        window = load.run_closed(0.1, min_requests=10, limit_s=limit_s)  # the default is ten times as long
    assert latencies_ns(window) == answers * [300 * MS]
    assert window.elapsed_s == answers * 0.3


def test_failures_do_not_count_for_the_minimum():
    class Failing(Server):
        def reply(self, now_ns, body):
            return [(now_ns + 10 * MS, encode_reply(b"", status=b"503 Service Unavailable"))]

    with Scene(Failing()).load(1) as load:
        window = load.run_closed(0.1, min_requests=5)
    assert (window.errors, window.elapsed_s) == ({"status 503": 100}, 1.0)


def test_the_time_to_connect_again_counts_while_the_minimum_is_not_reached():
    with Scene(Closing(MS, connect_ns=MS)).load(1) as load:
        window = load.run_closed(0.01, min_requests=10)
    assert (len(window.latencies_s), window.elapsed_s) == (10, 0.019)  # a reply every 2 ms, the first after 1 ms


# A reply whose bytes are those of one that was found right is not parsed again. No figure may show that.


@pytest.fixture
def parsers(monkeypatch):
    """A list that grows with each parser that the client makes."""
    made = []

    def make(protocol):
        made.append(httptools.HttpResponseParser(protocol))
        return made[-1]

    monkeypatch.setattr(http_connection, "HttpResponseParser", make)
    return made


def list_figures(window: Window) -> dict:
    """All that a window tells of the server."""
    figures = encode_window(window)
    del figures["client_cpu_s"], figures["client_idle_s"]
    return figures | {"latencies_ns": latencies_ns(window)}


SERVERS = {
    "right": lambda: Server(20 * MS), "serial": lambda: Serial(2 * MS), "stalling": lambda: Stalling(MS),
    "erring": lambda: Erring(MS), "wrong": lambda: Wrong(MS), "dropping": lambda: Dropping(MS),
    "truncating": lambda: Truncating(MS), "dying": lambda: Dying(MS, every=100), "chunked": lambda: Chunked(MS),
    "segmented": lambda: Segmented(MS), "closing": lambda: Closing(MS), "silent": Silent,
    "garbage": lambda: Garbage(MS),
}  # fmt: skip


@pytest.mark.parametrize("name", SERVERS)
@pytest.mark.parametrize("loop", ["closed", "open"])
def test_what_is_known_of_right_replies_changes_no_figure(name, loop, parsers):
    def run(load: LoadGenerator) -> dict:
        parsers.clear()
        window = load.run_closed(1.0) if loop == "closed" else scene.run_open(load, poisson_arrivals(300, 2.0, seed=7))
        return list_figures(window)

    scene = Scene(SERVERS[name]())
    with scene.load(4, 1.0) as load:
        parsed = run(load)
        assert len(parsers) >= len(parsed["latencies_ns"])
    scene = Scene(SERVERS[name]())
    with scene.knowing_load(4, 1.0) as load:
        assert run(load) == parsed
        if name in ("right", "serial", "stalling"):
            assert not parsers


def receive_all(pieces: list[bytes], right_replies: dict[int, bytes]) -> list[tuple]:
    """What a connection says of a reply that comes in `pieces`.

    After each piece: what went wrong, and whether the reply is complete. At the end: its status, whether the connection
    is kept, and its body.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        connection = HttpConnection(0, connect=lambda port: ours)
        connection.right_replies = right_replies
        connection.begin_opening()
        connection.greet()
        connection.send(0, b"question")
        said: list[tuple] = []
        for piece in pieces:
            theirs.sendall(piece)
            said.append((connection.receive(), connection.complete))
            if connection.complete:
                break
        if connection.is_right:
            assert pieces == [right_replies[0]]
            return [*said, (200, True, RIGHT_BODY)]
        return [*said, (connection.status, connection.keep_alive, connection.body)]


RIGHT_BODY = b'{"answers": [[0.01, 0.99]]}'


def test_a_reply_is_known_only_if_every_byte_is_the_same_and_comes_first():
    right = encode_reply(RIGHT_BODY)
    known = {0: right}
    assert receive_all([right], known) == receive_all([right], {}) == [(None, True), (200, True, RIGHT_BODY)]
    places = range(len(right))
    changed = [right[:place] + other + right[place + 1 :] for place in places for other in (b"0", b"C", b" ", b"\n")]
    replies = [
        *([reply] for reply in changed),
        *([right[:place], right[place:]] for place in places if place),
        *([right[:place], right] for place in places if place),
        [right + right],
        [right + b"H"],
        [encode_reply(RIGHT_BODY, b"Connection: close\r\n")],
        [encode_reply(RIGHT_BODY, status=b"503 Service Unavailable")],
    ]
    for pieces in replies:
        assert receive_all(pieces, known) == receive_all(pieces, {}), pieces


def test_a_reply_is_remembered_only_if_it_is_right_and_keeps_the_connection():
    class AllWrong(Server):
        def reply(self, now_ns, body):
            return [(now_ns + MS, encode_reply(b'{"answers": [[2.0, 3.0]]}'))]

    for server in (AllWrong(), Closing(MS), Chunked(MS), Segmented(MS)):
        with Scene(server).load(2) as load:
            for _ in range(3):
                load.run_closed(0.2)
            assert not load._right_replies, server
    with Scene(Server(MS)).load(2) as load:
        load.run_closed(0.2)
        load.run_closed(0.2)
        assert len(load._right_replies) == len(ROWS)


@pytest.mark.parametrize("method", ["on_body", "on_message_complete"])
def test_ctrl_c_while_a_reply_is_parsed_ends_the_run(method, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(HttpConnection, method, interrupt)
    with pytest.raises(KeyboardInterrupt):
        closed(Server(MS), 2, 1.0)


def test_the_size_of_the_last_reply_is_told_whether_or_not_it_was_parsed():
    with Scene(Server(MS)).load(1) as load:
        for turn in range(1, 200):
            window = load.run_closed(0.001)  # one request
            x = (turn - 1) % len(ROWS) + 1
            assert window.reply_bytes == len(json.dumps({"answers": [[x / 100, 1 - x / 100]]}))


# Connections


def test_connections_are_opened_all_at_once_and_a_slow_one_is_told():
    scene = Scene(Server(delay_ns=MS, connect_ns=1200 * MS))
    with scene.load(64) as load:
        assert scene.now_ns == 1200 * MS  # one after the other they would take 64 times that
        window = load.run_closed(0.01)
    assert window.connect_s == 1.2
    assert set(latencies_ns(window)) == {MS}
    warnings = list_warnings(Measured(make_result(window, "closed")))
    [warning] = [found for found in warnings if found.doubt is Doubt.SLOW_CONNECT]  # the client's CPU time is real
    assert "(1.2 s)" in describe_warnings([warning])[0]


def test_while_a_connection_opens_the_others_go_on_asking():
    class DroppingTheTenth(Dropping):
        @property
        def is_bad_turn(self):
            return self.asked == 10

    server = DroppingTheTenth(MS)
    with Scene(server).load(2) as load:
        server.connect_ns = 200 * MS  # from now on: those that are opened again
        window = load.run_closed(0.1)
    assert window.errors == {"connection closed": 1}
    assert latencies_ns(window) == [MS] * (4 + 100)  # of the connection that was dropped after 4 ms, and of the other
    assert window.elapsed_s == 0.1


def test_a_window_ends_in_time_though_a_connection_is_still_opening_and_counts_that_time():
    server = Closing(MS)
    scene = Scene(server)
    with scene.load(2) as load:
        server.connect_ns = 20_000 * MS
        window = load.run_closed(0.5)
        assert (len(window.latencies_s), window.elapsed_s, window.rate) == (2, 0.5, 4)
        assert scene.now_ns == 500 * MS
        server.connect_ns = 0
        assert len(load.run_closed(0.5).latencies_s) == 1000


def test_a_request_that_is_given_up_while_another_connection_opens_ends_with_the_window():
    class SilentOnce(Server):
        """Never answers its first request, and closes the second's connection."""

        def reply(self, now_ns, body):
            return [] if self.asked == 1 else [(now_ns + MS, CLOSE)]

    server = SilentOnce()
    scene = Scene(server)
    with scene.load(2, reply_timeout_s=1.0) as load:
        server.connect_ns = 20_000 * MS
        window = load.run_closed(3.0)
    assert window.errors == {"connection closed": 1, "no reply in 1 s": 1}
    assert window.elapsed_s == 3.0


def test_connections_that_do_not_open_in_time_are_an_error_and_are_opened_again():
    server = Server(MS)
    scene = Scene(server)
    with scene.load(2, reply_timeout_s=1.0) as load:
        for connection in load.connections:
            connection.close()
        server.connect_ns = 2000 * MS
        with pytest.raises(TimeoutError, match="2 connections not open within 1 s"):
            load.run_closed(0.5)
        server.connect_ns = 0
        assert len(load.run_closed(0.5).latencies_s) == 1000


def test_nobody_listening_is_an_error_at_the_start():
    with pytest.raises(ConnectionRefusedError):
        Scene(Server(listens=False)).load(2)


# The same on real sockets and the real clock. Nothing here can fail because the machine is slow: a delay is never
# undercut and a capacity never exceeded, and counts are counts.


@contextlib.contextmanager
def serve(manner: str, delay_s: float):
    """Start truth_server.py; give a function that makes a load generator of so many connections for it."""
    command = [sys.executable, "truth_server.py", manner, "--delay-s", str(delay_s)]
    process = subprocess.Popen(command, cwd=TESTS_DIR, stdout=subprocess.PIPE, text=True)
    try:
        endpoint = ScriptedEndpoint({"rest": int(process.stdout.readline())})
        exchanges = make_exchanges(endpoint, "1", ROWS, EXPECTED)
        yield lambda connections: LoadGenerator(endpoint, exchanges, connections)
    finally:
        process.kill()
        process.communicate()


def test_on_real_sockets_a_closed_loop_measures_a_real_delay():
    with serve("constant", 0.02) as connect, connect(8) as load:
        window = load.run_closed(0.5)
    assert (window.errors.total(), window.wrong) == (0, 0)
    assert window.latencies_s.min() >= 0.0199
    assert 0 < window.rate <= 8 / 0.0199


def test_on_real_sockets_an_open_loop_counts_what_is_dropped_and_connects_again():
    with serve("dropping", 0.0) as connect, connect(8) as load:
        window = load.run_open(constant_arrivals(400, 0.5))
    assert window.errors == {"connection closed": 200 // EVERY}
    assert len(window.latencies_s) == 200 - 200 // EVERY
    assert len(window.lateness_s) == 200
    assert window.lateness_s.min() >= 0


def test_a_server_that_takes_no_connection_until_all_have_asked_gets_them_all():
    """One that was opened after the other would wait for ever: the listen backlog has room for two."""
    with socket.create_server(("127.0.0.1", 0), backlog=1) as listener:
        endpoint = ScriptedEndpoint({"rest": listener.getsockname()[1]})
        process = subprocess.Popen(
            [sys.executable, "truth_server.py", "constant", "--descriptor", str(listener.fileno())],
            cwd=TESTS_DIR, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[listener.fileno()],
        )  # fmt: skip
        begun = []

        def connect(port: int) -> socket.socket:
            begun.append(begin_connecting(port))
            if len(begun) == 64:
                process.stdin.write("accept\n")
                process.stdin.flush()
            return begun[-1]

        try:
            exchanges = make_exchanges(endpoint, "1", ROWS, EXPECTED)
            with LoadGenerator(endpoint, exchanges, 64, connect=connect, reply_timeout_s=DEADLINE_S) as load:
                window = load.run_closed(0.1)
        finally:
            process.kill()
            process.communicate()
    assert not window.errors
    assert len(window.latencies_s) >= 64


# What other programs take is seen on the real machine only.


@pytest.fixture
def own_core():
    """The client's own core, as in the benchmark; afterwards the tests may use all again."""
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if CLIENT_CPUS is not None:
        os.sched_setaffinity(0, CLIENT_CPUS)
    yield
    if before is not None:
        os.sched_setaffinity(0, before)


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


@pytest.mark.timing
def test_foreign_load_on_the_clients_core_is_warned_of(own_core):
    cpus = (SERVER_CPUS | CLIENT_CPUS) if SERVER_CPUS is not None else None
    due_s = poisson_arrivals(500, 1.5, seed=6)
    with (
        busy_process(CLIENT_CPUS),
        serve("constant", 0.002) as connect,
        connect(16) as load,
        MachineLoad(lambda: 0.0, cpus) as machine,
    ):
        window = load.run_open(due_s)
    result = make_result(window, "open", machine.foreign_share)
    doubts = [warning.doubt for warning in list_warnings(Measured(result))]
    assert Doubt.FOREIGN_LOAD in doubts, machine.foreign_share


@pytest.mark.timing
def test_foreign_load_is_what_is_neither_the_clients_nor_the_servers(own_core):
    """Two watch the same second: to one the busy process is the server, to the other it is foreign."""
    cpus = (SERVER_CPUS | CLIENT_CPUS) if SERVER_CPUS is not None else None
    cores = len(cpus) if cpus else psutil.cpu_count()
    with busy_process(CLIENT_CPUS) as busy, serve("constant", 0.002) as connect, connect(4) as load:
        before_s = cpu_s(busy)
        with MachineLoad(lambda: 0.0, cpus) as as_foreign, MachineLoad(lambda: cpu_s(busy), cpus) as as_server:
            window = load.run_closed(1.5)
        busy_share = (cpu_s(busy) - before_s) / (cores * 1.5)
    assert busy_share > 0.05
    assert as_foreign.foreign_share - as_server.foreign_share == pytest.approx(busy_share, rel=0.2)
    assert as_foreign.foreign_share < 1 - 0.9 * window.client_cpu_s / (cores * 1.5)
