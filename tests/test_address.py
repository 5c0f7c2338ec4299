"""--address: what answers somewhere is asked, checked and measured as a server is that was started here."""

import http.client
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

import benchmark_all
import latency_test
from client.ask import ask
from client.load_generator import LoadGenerator, make_exchanges
from endpoints.base import ServerError, load_endpoints
from endpoints.reference import TOLERANCE, load_expected, load_test_rows
from helpers import call_main, run_python

PREFIX = "/onnx"


@pytest.fixture(scope="module")
def gateway(onnx_server):
    """The address of a gateway that tells servers apart by the beginning of the path, and the Host headers it saw."""
    hosts = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        disable_nagle_algorithm = True  # a reply in two parts would wait 40 ms for an acknowledgement

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            hosts.append(self.headers["Host"])
            if not self.path.startswith(PREFIX):
                self.reply(404, b"no server of this name")
                return
            behind = http.client.HTTPConnection("127.0.0.1", onnx_server.endpoint.port)
            behind.request("POST", self.path.removeprefix(PREFIX), body, {"Content-Type": self.headers["Content-Type"]})
            reply = behind.getresponse()
            self.reply(reply.status, reply.read())
            behind.close()

        def reply(self, status, content):
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128  # with the usual 5, one of 64 connections that come at once is not answered

        def handle_error(self, *_):  # a client that hangs up is no news
            pass

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_address[1]}{PREFIX}", hosts
        server.shutdown()


def test_a_server_is_asked_at_its_address_with_the_prefix_and_the_hosts_name(gateway):
    address, hosts = gateway
    endpoint = load_endpoints()["onnx"].at(address)
    rows, _ = load_test_rows()
    assert np.abs(ask(endpoint, rows, "1") - load_expected("1")).max() <= TOLERANCE
    hosts.clear()
    exchanges = make_exchanges(endpoint, "1", rows, load_expected("1"))
    with LoadGenerator(endpoint, exchanges, connections=2) as load:
        window = load.run_closed(0.05, 10, 30.0)
    assert len(window.latencies_s) >= 10 and not window.errors and not window.wrong
    assert set(hosts) == {address.removeprefix("http://").removesuffix(PREFIX)}


@pytest.mark.slow
def test_the_benchmark_writes_a_result_of_what_answers_there(gateway, tmp_path):
    address, _ = gateway
    path = tmp_path / "result.json"
    done = run_python(
        "benchmarks/benchmark_all.py", "--address", f"onnx-tuned={address}", "--output", path, "--rounds", "1",
        "--seconds", "0.2", "--settle-seconds", "0", "--connections", "1", "--rows", "1", "--rates", "20",
        "--no-report",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(path.read_text())
    about = result["endpoints"]["onnx-tuned"]
    assert (about["kind"], about["is_seen"], about["settings"]) == ("cluster", False, {"address": address})
    assert max(about["max_abs_difference"].values()) <= TOLERANCE
    assert "onnx-tuned (cluster)" in done.stdout and "not seen" in done.stdout
    assert not result["settings"]["goes_first"]


def test_one_servers_latency_is_measured_at_an_address(gateway):
    address, _ = gateway
    done = call_main(
        latency_test, "--endpoint", "onnx", "--address", address, "--seconds", "0.2", "--warmup-seconds", "0"
    )
    assert done.returncode == 0, done.stderr
    assert "0 failed, 0 wrong" in done.stdout


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("localhost:8090", "is no address; write http://"),
        ("https://localhost", "is no address; write http://"),
        ("http://localhost:0", "is no address"),
        ("http://localhost:70000", "is no address"),
        ("http://localhost/a?b", "is no address"),
    ],
)
def test_an_address_is_written_in_one_way(address, words):
    with pytest.raises(ServerError, match=words):
        load_endpoints()["onnx"].at(address)


def test_an_address_has_its_parts():
    endpoint = load_endpoints()["onnx"].at("http://gateway.model-serving/onnx/")
    assert (endpoint.host, endpoint.port, endpoint.prefix) == ("gateway.model-serving", 80, "/onnx")
    grpc = load_endpoints()["tfserving-grpc"].at("http://10.0.0.5:8090")
    assert (grpc.host, grpc.port, grpc.prefix) == ("10.0.0.5", 8090, "")
    with pytest.raises(ServerError, match="gRPC has no paths"):
        load_endpoints()["tfserving-grpc"].at("http://10.0.0.5:8090/tfserving")
    with pytest.raises(ServerError, match=r"^onnx: nowhere\.invalid: "):
        load_endpoints()["onnx"].at("http://nowhere.invalid").find_address()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--address", "onxx=http://localhost"], "--address: no server called onxx"),
        (["--address", "onnx"], "--address: onnx: '' is no address"),
        (["--address", "onnx=http://localhost", "--containers"], "--address names the servers"),
        (["--address", "onnx=http://localhost", "--endpoints", "onnx"], "--address names the servers"),
    ],
)
def test_what_does_not_go_with_an_address_is_refused(arguments, words):
    done = call_main(benchmark_all, *arguments)
    assert done.returncode == 2 and words in done.stderr


def test_where_nobody_answers_the_address_is_named():
    done = run_python("benchmarks/latency_test.py", "--endpoint", "onnx", "--address", "http://127.0.0.1:9/onnx")
    assert done.returncode == 1
    assert "latency_test: onnx: nobody answers at http://127.0.0.1:9/onnx" in done.stderr
    assert "Traceback" not in done.stderr
