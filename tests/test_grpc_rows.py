"""The rows over gRPC: real servers give right answers, load on them is counted rightly, and the client is cheap."""

import ast
import contextlib
import json
import os
import select
import sys
import time

import grpc
import numpy as np
import pytest

from bad_requests import GOOD_ROW
from client import grpc_connection
from client.ask import ask
from client.grpc_connection import LAST_STREAM, GrpcConnection
from client.load_generator import LoadGenerator, constant_arrivals, make_exchanges
from endpoints.base import Endpoint, Request, ServerError, load_endpoints
from endpoints.reference import TOLERANCE, load_expected, load_test_rows
from helpers import DEADLINE_S, REPOSITORY_DIR, TESTS_DIR, run_python, start
from machine.free_ports import find_free_ports
from servers.parity import max_abs_difference
from servers.process import ServerProcess

ROWS = load_test_rows()[0]


class Toy(Endpoint):
    """What a fifth server needs where it speaks gRPC."""

    name = "toy-grpc"
    kind = "local"
    protocol = "gRPC"
    folder = TESTS_DIR
    default_ports = {"grpc": 9101}
    manner = "right"

    def command(self):
        return [sys.executable, "toy_grpc_server.py", str(self.ports["grpc"]), self.manner]

    def request(self, rows, version):
        return Request("/toy/Predict", json.dumps({"rows": rows, "version": version}).encode())

    def decode(self, reply):
        return np.array(json.loads(reply)["answers"])


@contextlib.contextmanager
def running_toy(manner: str):
    toy = Toy.on_free_ports()
    toy.manner = manner
    with ServerProcess(toy):
        yield toy


@pytest.fixture(scope="module")
def toy():
    with running_toy("right") as toy:
        yield toy


@pytest.fixture(scope="module")
def erring_toy():
    with running_toy("erring") as toy:
        yield toy


@pytest.fixture(scope="module")
def null_grpc():
    with start("null-grpc") as server:
        yield server.endpoint


@pytest.fixture(params=["tfserving", "torchserve", "onnx"])
def real(request):
    """The gRPC endpoint of a real server that runs already; its REST endpoint uses the same process."""
    server = request.getfixturevalue(f"{request.param}_server")
    name = "onnx-grpc-tuned" if request.param == "onnx" else f"{request.param}-grpc"  # it answers alike untuned
    return load_endpoints()[name](server.endpoint.ports)


def load(endpoint: Endpoint, connections: int = 1, batch: int = 1, rows: list = ROWS, expected=None) -> LoadGenerator:
    expected = load_expected("1") if expected is None else expected
    return LoadGenerator(endpoint, make_exchanges(endpoint, "1", rows, expected, batch), connections)


# Large messages


def test_a_message_far_beyond_every_window_goes_and_comes_whole(toy):
    message = os.urandom(5_000_000)
    assert grpc_connection.send(toy.port, Request("/toy/Echo", message)) == (200, message)


def test_the_server_is_allowed_more_before_its_window_ends(toy, monkeypatch):
    monkeypatch.setattr(grpc_connection, "CONNECTION_WINDOW_BYTES", 70_000)
    connection = GrpcConnection(toy.port)
    connection.open()
    request = GrpcConnection.encode(toy.port, Request("/toy/Echo", bytes(60_000)))
    for number in range(20):  # 1.2 MB through a window of 70 kB
        connection.send(number, request)
        while not connection.complete:
            assert select.select([connection.socket], [], [], DEADLINE_S)[0], "the server waits for its window"
            assert connection.receive() is None
        assert len(connection.body) == 60_000
    connection.close()


# Load


def test_right_answers_over_grpc_are_timed_closed_and_open(toy):
    with load(toy, connections=4) as generator:
        closed, opened = generator.run_closed(0.3), generator.run_open(constant_arrivals(200, 0.5))
    for window in (closed, opened):
        assert (window.errors, window.wrong) == ({}, 0)
    assert len(closed.latencies_s) > 0
    assert len(opened.latencies_s) == 100
    assert closed.request_bytes == len(generator.exchanges[0].request)


def test_grpc_errors_are_counted_one_by_one_by_their_number_and_not_timed(erring_toy):
    """The toy fails every fourth request, and a window's requests follow each other: a quarter of them, to the one."""
    with load(erring_toy, connections=4) as generator:
        sockets = [connection.socket for connection in generator.connections]
        while not generator.run_closed(0.1).errors:
            pass
        window = generator.run_closed(0.3)
        assert [connection.socket for connection in generator.connections] == sockets  # an error costs no connection
    failed, answered = window.errors.total(), len(window.latencies_s)
    assert set(window.errors) <= {"grpc-status 3"}
    assert abs(failed - (answered + failed) / 4) < 1
    assert answered > 0


def test_an_error_is_reported_with_the_servers_own_words(erring_toy):
    with pytest.raises(ServerError, match="grpc-status 3 .*one of four, 100 % sure"):
        for _ in range(310):
            ask(erring_toy, ROWS[:1], "1")


def test_wrong_answers_over_grpc_are_counted_and_not_timed():
    with running_toy("wrong") as toy, load(toy, connections=4) as generator:
        while not generator.run_closed(0.1).wrong:
            pass
        window = generator.run_closed(0.1)
    assert window.wrong > 0
    assert (window.errors, len(window.latencies_s)) == ({}, 0)


def test_stream_numbers_that_run_out_cost_a_connection_and_no_error(toy):
    with load(toy) as generator:
        connection = generator.connections[0]
        connection._next_stream = LAST_STREAM - 4
        first = connection.socket
        while connection.socket is first:
            window = generator.run_closed(0.1)
            assert (window.errors, window.wrong) == ({}, 0)
    assert connection._next_stream < 1_000_000


def test_a_server_that_is_not_there_is_an_oserror_and_one_of_http1_a_reason(null_server):
    with pytest.raises(OSError, match="refused"):
        load(Toy(find_free_ports(["grpc"])))
    with pytest.raises(ConnectionError, match="not HTTP/2|connection closed"):
        grpc_connection.send(null_server.endpoint.port, Request("/a/B", b""))


# The rows


def test_every_server_that_has_grpc_has_a_row_over_each_protocol():
    classes = load_endpoints()
    over_grpc = {name for name, value in classes.items() if value.protocol == "gRPC"}
    assert over_grpc == {
        "null-grpc",
        "onnx-grpc-tuned",
        "tfserving-grpc",
        "tfserving-grpc-tuned",
        "torchserve-grpc",
        "torchserve-grpc-tuned",
    }
    for name in over_grpc - {"null-grpc"}:
        rest = classes[name.replace("-grpc", "")]
        assert (rest.protocol, rest().timed_port, classes[name]().timed_port) == ("REST", "rest", "grpc")
        assert rest.variant == classes[name].variant
        assert rest().command() == classes[name]().command()
        assert rest().port != classes[name]().port


@pytest.mark.parametrize("version", ["1", "2"])
def test_grpc_rows_give_the_references_answers(real, version):
    assert max_abs_difference(real, version) <= TOLERANCE


def test_a_thousand_rows_go_in_one_call(real):
    many = (ROWS * 9)[:1024]
    expected = np.tile(load_expected("1"), (9, 1))[:1024]
    assert np.abs(ask(real, many, "1") - expected).max() <= TOLERANCE
    with load(real, batch=1024, rows=many, expected=expected) as generator:
        window = generator.run_closed(0.3)
    assert (window.errors, window.wrong) == ({}, 0)
    assert len(window.latencies_s) > 0


def test_real_servers_answer_under_load_without_an_error(real):
    with load(real, connections=4) as generator:
        window = generator.run_closed(0.5)
    assert (window.errors, window.wrong) == ({}, 0)
    assert len(window.latencies_s) > 0


def test_the_answer_is_the_one_that_grpcio_gets(real):
    for version in ("1", "2"):
        request = real.request(ROWS[:3], version)
        with grpc.insecure_channel(f"127.0.0.1:{real.port}") as channel:
            theirs = channel.unary_unary(request.path)(request.body, timeout=DEADLINE_S)
        status, ours = grpc_connection.send(real.port, request)
        assert status == 200
        assert np.array_equal(real.decode(ours), real.decode(theirs))


def test_a_version_that_is_not_there_is_a_grpc_error_with_the_number_that_grpcio_gets(real):
    request = real.request(ROWS[:1], "99")
    with grpc.insecure_channel(f"127.0.0.1:{real.port}") as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(request.path)(request.body, timeout=DEADLINE_S)
    status, message = grpc_connection.send(real.port, request)
    assert status == f"grpc-status {caught.value.code().value[0]}"
    assert message.decode() == caught.value.details()
    with load(real) as generator:
        generator.exchanges[0].request = GrpcConnection.encode(real.port, request)
        window = generator.run_closed(0.5)
    assert set(window.errors) == {status}


def test_what_is_no_answer_is_a_value_error(real):
    for reply_bytes in (b"", b"\xff\xff", b"[[0.5, 0.5]]"):
        with pytest.raises(ValueError):
            real.decode(reply_bytes)


def test_torchserves_refusal_with_status_ok_is_no_answer(torchserve_server):
    endpoint = load_endpoints()["torchserve-grpc"](torchserve_server.endpoint.ports)
    status, body = grpc_connection.send(endpoint.port, endpoint.request([GOOD_ROW[:4]], "1"))
    assert status == 200
    with pytest.raises(ValueError, match="not a list of probability pairs: .*4 features"):
        endpoint.decode(body)


# The floor


def test_the_grpc_floor_has_the_stack_and_the_answer_of_the_local_server(null_grpc, tfserving_server):
    local_server = REPOSITORY_DIR / "tfserving" / "local"
    tree = ast.parse((local_server / "grpc_api.py").read_text())
    [options] = [
        ast.literal_eval(statement.value)
        for statement in tree.body
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "OPTIONS"
    ]
    from endpoints import null_grpc_server

    assert options == null_grpc_server.GRPC_OPTIONS
    assert "uvloop.run(" in (local_server / "server.py").read_text()
    real = load_endpoints()["tfserving-grpc"](tfserving_server.endpoint.ports)
    status, answer = grpc_connection.send(real.port, real.request(ROWS[:1], "1"))
    status, constant = grpc_connection.send(null_grpc.port, null_grpc.request(ROWS[:1], "1"))
    assert len(constant) == len(answer)
    assert null_grpc.request(ROWS[:1], "1") == real.request(ROWS[:1], "1")
    assert np.array_equal(ask(null_grpc, ROWS[:1], "1"), ask(null_grpc, ROWS, "2"))


def test_the_grpc_floor_takes_a_large_message(null_grpc):
    status, _ = grpc_connection.send(null_grpc.port, Request("/any/Method", bytes(8_000_000)))
    assert status == 200


def test_a_taken_port_of_the_grpc_floor_is_one_line(null_grpc):
    result = run_python(
        "-m", "endpoints.null_grpc_server", "--port", str(null_grpc.port), cwd=REPOSITORY_DIR / "benchmarks"
    )
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert "is in use" in result.stderr


def time_grpcio(endpoint: Endpoint, count: int) -> tuple[float, float]:
    """Return p50 in seconds and CPU seconds per call of grpcio's own client on one channel."""
    request = endpoint.request(ROWS[:1], "1")
    with grpc.insecure_channel(f"127.0.0.1:{endpoint.port}") as channel:
        call = channel.unary_unary(request.path)
        call(request.body, timeout=DEADLINE_S)
        cpu_before_s = time.process_time()
        times_s = []
        for _ in range(count):
            before_s = time.perf_counter()
            call(request.body)
            times_s.append(time.perf_counter() - before_s)
        return float(np.median(times_s)), (time.process_time() - cpu_before_s) / count


@pytest.mark.timing
def test_the_client_is_clearly_cheaper_than_grpcios(null_grpc):
    ours, theirs = [], []
    for _ in range(5):
        with load(null_grpc) as generator:
            generator.run_closed(0.05)
            window = generator.run_closed(0.3)
        ours.append((np.median(window.latencies_s), window.client_cpu_s / len(window.latencies_s)))
        theirs.append(time_grpcio(null_grpc, 500))
    (our_p50_s, our_cpu_s), (their_p50_s, their_cpu_s) = np.min(ours, axis=0), np.min(theirs, axis=0)
    assert our_cpu_s < 0.6 * their_cpu_s
    assert our_p50_s < their_p50_s


def test_benchmark_code_does_not_import_tensorflow_or_grpcio():
    code = (
        "import sys; sys.path.insert(0, 'benchmarks'); import benchmark_all\n"
        "from endpoints.base import load_endpoints\n"
        "for name, value in load_endpoints().items():\n"
        "    if value.protocol == 'gRPC': value().request([[1.0] * 5], '1')\n"
        "print(sorted({'tensorflow', 'grpc'} & set(sys.modules)))"
    )
    assert run_python("-c", code, check=True).stdout == "[]\n"
