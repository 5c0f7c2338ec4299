"""onnx/server.py beyond right answers: settings, batching, the binary tensors, metrics, reload, workers, limits."""

import collections
import concurrent.futures
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest

from bad_requests import GOOD_ROW
from client.ask import ask, send
from client.load_generator import LoadGenerator, make_exchanges
from endpoints.base import Request, ServerError, load_endpoints
from endpoints.open_inference import decode_reply, encode_request
from endpoints.reference import TOLERANCE, load_expected, load_test_rows
from figures.intervals import median_interval
from helpers import (
    DEADLINE_S,
    REPOSITORY_DIR,
    call_main,
    get,
    load_script,
    load_together,
    post,
    run_python,
    start,
    wait_until,
    write_onnx_settings,
)
from machine.environment import split_cpus
from machine.priority import lifted_priority
from servers.process import ServerProcess

ONNX_DIR = REPOSITORY_DIR / "onnx"
GOOD_BODY = {"data": [GOOD_ROW]}


def running(*options: str | Path, config: str | Path = "tuned.toml") -> ServerProcess:
    """Return server.py with these options, not yet started; inside its `with` block it answers."""
    server = start("onnx")
    server.endpoint.extra_options = ["--config", str(config), *map(str, options)]
    return server


@pytest.fixture(scope="module")
def tuned_server():
    with running() as server:
        yield server


@pytest.fixture(scope="module")
def limited_server(tmp_path_factory):
    """A server that takes few connections, and does not wait long for a body."""
    path = tmp_path_factory.mktemp("limited") / "limited.toml"
    with running(config=write_onnx_settings(path, body_timeout_s=0.3, max_connections=5)) as server:
        yield server


def read_model(version: str) -> bytes:
    return (ONNX_DIR / "models" / "my_model" / version / "model.onnx").read_bytes()


@dataclass
class Following:
    """A server that looks at its repository ten times a second, and that repository."""

    server: ServerProcess
    folder: Path  # of my_model, with version 1
    read_before: int = 0  # characters of the log that were there before this test

    def log(self) -> str:
        """Return what the server has printed during this test."""
        return self.server.log()[self.read_before :]

    def entries(self) -> dict[str, dict]:
        """Return the repository's index, by version."""
        return {entry["version"]: entry for entry in post(self.server, "/v2/repository/index", b"{}")[1]}

    def publish(self, version: str, content: bytes) -> None:
        """Put a version in its place as a whole: written elsewhere, then moved."""
        folder = self.folder / f"writing-{version}"
        folder.mkdir()
        (folder / "model.onnx").write_bytes(content)
        final = self.folder / version
        if final.exists():
            (folder / "model.onnx").replace(final / "model.onnx")
            folder.rmdir()
        else:
            folder.rename(final)


@pytest.fixture(scope="module")
def following_server(tmp_path_factory) -> Iterator[Following]:
    repository = tmp_path_factory.mktemp("repository")
    config = write_onnx_settings(repository / "quick.toml", poll_s=0.1)
    shutil.copytree(ONNX_DIR / "models" / "my_model" / "1", repository / "my_model" / "1")
    with running("--model-repository", repository, config=config) as server:
        yield Following(server, repository / "my_model")


@pytest.fixture
def following(following_server) -> Following:
    """The server that follows its repository, in which version 1 is again the only one."""
    following_server.publish("1", read_model("1"))
    for path in following_server.folder.iterdir():
        if path.name == "default":
            path.unlink()
        elif path.name != "1":
            shutil.rmtree(path)

    def is_reset() -> bool:
        entries = following_server.entries()
        return set(entries) == {"1"} and entries["1"]["state"] == "READY"

    wait_until(is_reset, "version 1 is the only one")
    following_server.read_before = len(following_server.server.log())
    return following_server


# Settings


@pytest.fixture(scope="module")
def onnx_script():
    """The module server."""
    return load_together(ONNX_DIR, "server")[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch_row = 3", "unknown key batch_row"),
        ("device = 'tpu'", "expected cpu, cuda or auto"),
        ("workers = 0", "workers is 0, expected 1 or more"),
        ("metrics = 1", "metrics is 1, expected bool"),
        ("= 3", "Invalid statement"),
    ],
)
def test_a_bad_settings_file_is_reported(tmp_path, onnx_script, text, words):
    lines = (ONNX_DIR / "tuned.toml").read_text().splitlines()
    key = text.partition(" ")[0]
    kept = [line for line in lines if not line.startswith(f"{key} ")]
    path = tmp_path / "bad.toml"
    path.write_text("\n".join([*kept, text]))
    ended = call_main(onnx_script, "--config", path)
    assert ended.returncode == 2
    assert words in ended.stderr.splitlines()[-1]


def test_both_settings_files_have_the_same_keys():
    keys = [re.findall(r"^(\w+) =", (ONNX_DIR / name).read_text(), re.M) for name in ("default.toml", "tuned.toml")]
    assert keys[0] == keys[1]


# Batching


def test_requests_that_share_a_run_get_their_own_answers(tuned_server):
    rows, _ = load_test_rows()
    expected = {version: load_expected(version) for version in ("1", "2")}

    def ask_for(number: int) -> float:
        version, start, count = "12"[number % 2], number % len(rows), 1 + number % 3
        wanted = expected[version][start : start + count]
        return np.abs(ask(tuned_server.endpoint, rows[start : start + count], version) - wanted).max()

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        assert max(pool.map(ask_for, range(600))) <= TOLERANCE


def test_a_bad_row_fails_its_own_request_only(tuned_server):
    body = json.dumps({"data": [[1e39, *GOOD_ROW[1:]]]}).encode()

    def ask_for(number: int) -> int:
        if number % 3:
            return send(tuned_server.endpoint.port, tuned_server.endpoint.request([GOOD_ROW], "1"))[0]
        status, reply = send(tuned_server.endpoint.port, Request("/predict/1", body))
        assert b"finite in float32" in reply
        assert b"row 0, mean radius" in reply
        return status

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        statuses = list(pool.map(ask_for, range(300)))
    assert [status != 200 for status in statuses] == [number % 3 == 0 for number in range(300)]


@pytest.mark.timing
def test_tuned_is_twice_and_a_half_as_fast_as_fastapi_with_pydantic(tmp_path):
    endpoint_class = load_endpoints()["onnx-tuned"]
    rows, _ = load_test_rows()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("one core: client and server cannot be kept apart")

    class FastApi(endpoint_class):
        folder = Path(__file__).parent

        def command(self) -> list[str]:
            return ["python", "fastapi_server.py", str(self.port)]

        versions = {"1": "1"}

    rates: dict[str, list[float]] = {}
    os.sched_setaffinity(0, {cores[1]})
    try:
        with contextlib.ExitStack() as stack:
            servers = [
                stack.enter_context(ServerProcess(each.on_free_ports(), {cores[0]}))
                for each in (endpoint_class, FastApi)
            ]
            for _ in range(4):  # the first warms up
                for server in servers:
                    exchanges = make_exchanges(server.endpoint, "1", rows, load_expected("1"), 1)
                    with LoadGenerator(server.endpoint, exchanges, 16) as load:
                        window = load.run_closed(0.7)
                    assert not window.errors
                    assert not window.wrong
                    rates.setdefault(type(server.endpoint).__name__, []).append(window.rate)
    finally:
        os.sched_setaffinity(0, set(cores))
    ours, theirs = (values[1:] for values in rates.values())
    ratio = np.median([a / b for a, b in zip(ours, theirs, strict=True)])
    assert ratio >= 2.5, rates


class JsonInference(load_endpoints()["onnx-infer-tuned"]):
    """The tuned server over the Open Inference Protocol, tensors in JSON."""

    def request(self, rows: list[list[float]], version: str | None) -> Request:
        return Request(self.path(version), encode_request(rows))

    def decode(self, reply: bytes) -> np.ndarray:
        return decode_reply(reply)


@pytest.mark.timing
@pytest.mark.parametrize("connections", [16, 64])
def test_the_protocol_is_nearly_as_fast_as_predict(connections, capsys):
    classes = load_endpoints()
    expected, rows = load_expected("1"), load_test_rows()[0]
    asked = {"predict": classes["onnx-tuned"], "json": JsonInference, "bytes": classes["onnx-infer-tuned"]}
    rates: dict[str, list[float]] = {name: [] for name in asked}
    server_cpus, client_cpus = split_cpus()
    with contextlib.ExitStack() as stack:
        goes_first = stack.enter_context(lifted_priority())
        server = stack.enter_context(ServerProcess(asked["predict"].on_free_ports(), server_cpus, goes_first))
        if client_cpus is not None:
            stack.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
            os.sched_setaffinity(0, client_cpus)
        for number in range(21):  # the first warms up
            for name, endpoint_class in asked.items():
                endpoint = endpoint_class(server.endpoint.ports)
                with LoadGenerator(endpoint, make_exchanges(endpoint, "1", rows, expected), connections) as load:
                    window = load.run_closed(0.2)
                assert not window.errors
                assert not window.wrong
                if number:
                    rates[name].append(window.rate)
    ratios = {name: median_interval(np.divide(rates[name], rates["predict"])) for name in ("json", "bytes")}
    with capsys.disabled():
        print(f"\n{connections} connections, against /predict: {ratios}")
    assert ratios["json"].high >= 0.75
    assert ratios["bytes"].high >= 0.8


# The Open Inference Protocol, by a client that others wrote


@pytest.fixture(scope="module")
def tritonclient():
    """The package, imported when it is needed."""
    import tritonclient.http

    return tritonclient


@pytest.fixture
def client(tuned_server, tritonclient):
    with tritonclient.http.InferenceServerClient(f"127.0.0.1:{tuned_server.endpoint.port}") as client:
        yield client


def test_tritonclient_finds_server_and_model(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("my_model")
    assert client.is_model_ready("my_model", "1")
    assert not client.is_model_ready("my_model", "9")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data", "statistics"]
    assert client.get_model_metadata("my_model")["versions"] == ["1", "2"]


@pytest.mark.parametrize("binary_input", [True, False])
@pytest.mark.parametrize("output", ["binary", "json", "not named"])
@pytest.mark.parametrize("count", [1, 114, 5000])
def test_tritonclient_gets_the_right_answers(client, tritonclient, binary_input, output, count):
    rows = np.resize(np.array(load_test_rows()[0], np.float32), (count, 5))
    tensor = tritonclient.http.InferInput("input", list(rows.shape), "FP32")
    tensor.set_data_from_numpy(rows, binary_data=binary_input)
    outputs = [tritonclient.http.InferRequestedOutput("output", binary_data=output == "binary")]
    wanted = None if output == "not named" else outputs
    result = client.infer("my_model", [tensor], model_version="1", outputs=wanted, request_id="7")
    assert result.get_response()["id"] == "7"
    expected = np.resize(load_expected("1"), (count, 2))
    assert np.abs(result.as_numpy("output") - expected).max() <= TOLERANCE


def test_tritonclient_finds_the_repository_index(client):
    index = client.get_model_repository_index()
    served = {(entry["name"], entry["version"]) for entry in index if entry["state"] == "READY"}
    assert served == {(name, version) for name in ("my_model", "my_model_sklearn") for version in "12"}


@pytest.mark.parametrize("datatype", ["BOOL", "FP64", "FP16", "INT32", "UINT8", "BYTES"])
def test_tritonclient_is_told_of_a_datatype_that_the_model_does_not_take(client, tritonclient, datatype):
    tensor = tritonclient.http.InferInput("input", [1, 5], datatype)
    kind = {"BOOL": bool, "FP64": np.float64, "FP16": np.float16, "INT32": np.int32, "UINT8": np.uint8}
    rows = np.ones((1, 5), kind.get(datatype, object))
    if datatype == "BYTES":
        rows[:] = b"1"
    tensor.set_data_from_numpy(rows)
    with pytest.raises(tritonclient.utils.InferenceServerException, match=f"expected 'FP32', got '{datatype}'"):
        client.infer("my_model", [tensor])


def test_a_row_without_a_finite_answer_is_refused_and_the_others_are_not(tuned_server):
    """Two features near float32's end, of opposite sign: infinity minus infinity inside the network."""
    port, huge = tuned_server.endpoint.port, [3e38, -3e38, 3e38, -3e38, 3e38]
    body = json.dumps({"data": [GOOD_ROW, huge]}).encode()

    def ask_for(number: int) -> tuple[int, bytes]:
        return send(port, Request("/predict/1", body) if number % 3 else tuned_server.endpoint.request([GOOD_ROW], "1"))

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for number, (status, reply) in enumerate(pool.map(ask_for, range(90))):
            assert status == (400 if number % 3 else 200)
            assert number % 3 == 0 or b"row 1: the model has no finite answer" in reply
    tensor = {"name": "input", "shape": [2, 5], "datatype": "FP32", "data": [GOOD_ROW, huge]}
    status, reply = send(port, Request("/v2/models/my_model/infer", json.dumps({"inputs": [tensor]}).encode()))
    assert (status, b"row 1: the model has no finite answer" in reply) == (400, True)


def binary_request(port: int, header: dict, tail: bytes, length: str | None = None) -> tuple[int, dict]:
    body = json.dumps(header).encode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
    length = str(len(body)) if length is None else length
    headers = {"Inference-Header-Content-Length": length, "Content-Type": "application/octet-stream"}
    connection.request("POST", "/v2/models/my_model/infer", body + tail, headers)
    reply = connection.getresponse()
    return reply.status, json.loads(reply.read())


@pytest.mark.parametrize(
    ("size", "tail", "length", "words"),
    [
        (20, b"\0" * 16, None, "16 bytes are left"),
        (16, b"\0" * 16, None, "16 bytes, but the shape [1, 5] takes 20"),
        (16, b"\0" * 20, None, "16 bytes, but the shape [1, 5] takes 20"),
        (20, b"\0" * 24, None, "4 bytes follow the JSON"),
        (None, b"\0" * 20, None, "neither data nor"),
        (20, b"\0" * 20, "99999", "but the body has"),
        (20, b"\0" * 20, "-1", "expected a number"),
        (20, np.full(5, np.nan, np.float32).tobytes(), None, "no finite answer"),
        (-20, b"", None, "binary_data_size is -20"),
        (None, b"", None, "neither data nor"),
    ],
)
def test_a_bad_binary_tensor_is_told(tuned_server, size, tail, length, words):
    parameters = {} if size is None else {"parameters": {"binary_data_size": size}}
    header = {"inputs": [{"name": "input", "shape": [1, 5], "datatype": "FP32", **parameters}]}
    status, reply = binary_request(tuned_server.endpoint.port, header, tail, length)
    assert status == 400
    assert words in reply["error"]


# Pages


def test_metrics_count_each_version_and_status(tuned_server):
    def read_metrics() -> dict[str, float]:
        text = get(tuned_server, "/metrics")[1]
        return {name: float(value) for name, value in re.findall(r"^(onnx_server\S+) (\S+)$", text, re.M)}

    ask(tuned_server.endpoint, [GOOD_ROW], "1")
    before = read_metrics()
    for _ in range(605):  # more than are counted together
        ask(tuned_server.endpoint, [GOOD_ROW], "1")
    assert post(tuned_server, "/predict/1", b"{")[0] == 400
    after = read_metrics()
    added = {name: value - before.get(name, 0) for name, value in after.items()}
    assert added['onnx_server_requests_total{model="my_model",status="200",version="1"}'] == 605
    assert added['onnx_server_requests_total{model="my_model",status="400",version="1"}'] == 1
    assert added.get('onnx_server_requests_total{model="my_model",status="200",version="2"}', 0) == 0
    assert added['onnx_server_request_latency_seconds_count{model="my_model",version="1"}'] == 605
    assert added['onnx_server_request_latency_seconds_bucket{le="+Inf",model="my_model",version="1"}'] == 605
    assert added['onnx_server_request_latency_seconds_sum{model="my_model",version="1"}'] > 0
    assert after['onnx_server_model_loaded{model="my_model",version="1"}'] == 1


def test_values_observed_together_are_counted_as_one_by_one():
    from prometheus_client import CollectorRegistry

    metrics = load_script(ONNX_DIR / "metrics.py")
    bounds = metrics.LATENCY_BUCKETS_S
    values = [*bounds, *(bound * 1.01 for bound in bounds), *(bound * 0.99 for bound in bounds), 0.0, 5.0]
    registries = [CollectorRegistry(), CollectorRegistry()]
    histograms = [metrics.BulkHistogram("h", "h", ["of"], buckets=bounds, registry=registry) for registry in registries]
    together, one_by_one = (histogram.labels("x") for histogram in histograms)
    together.observe_all(values)
    for value in values:
        one_by_one.observe(value)
    for sample, expected in zip(*(next(iter(registry.collect())).samples for registry in registries), strict=True):
        if not sample.name.endswith("_created"):
            assert (sample.name, sample.labels) == (expected.name, expected.labels)
            assert sample.value == pytest.approx(expected.value)


def test_the_openapi_description_tells_every_path_that_is_served(tuned_server):
    description = get(tuned_server, "/openapi.json")[1]
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            body = json.dumps(content["example"]).encode() if content else b""
            status, _ = send(tuned_server.endpoint.port, Request(path, body, method=method.upper()))
            assert status == 200, path
    assert "/predict/2" in description["paths"]
    status, page = get(tuned_server, "/docs")
    assert status == 200
    assert "/predict/2" in page
    assert "http://" not in page.replace("/openapi.json", "")


# Reload


def test_a_new_version_is_served_and_an_old_one_goes_without_a_failed_request(following):
    rows, _ = load_test_rows()
    body = json.dumps({"data": rows[:1]})
    expected = {version: load_expected(version)[0] for version in ("1", "2")}
    stop = threading.Event()
    seen: list[list[str]] = [[] for _ in range(8)]  # per client: the version that answered, or what was wrong

    def ask_newest(port: int, answers: list[str]) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
        with contextlib.closing(connection):
            while not stop.is_set():
                connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
                reply = connection.getresponse()
                content = reply.read()
                answer = np.array(json.loads(content)["predictions"][0] if reply.status == 200 else np.nan)
                right = [version for version in "12" if np.abs(answer - expected[version]).max() <= TOLERANCE]
                answers.append(right[0] if len(right) == 1 else f"{reply.status} {content}")

    def all_see(version: str) -> bool:
        return all(answers and answers[-1] == version for answers in seen)

    def count() -> int:
        return sum(map(len, seen))

    with concurrent.futures.ThreadPoolExecutor(8) as clients:
        try:
            asking = [clients.submit(ask_newest, following.server.endpoint.port, answers) for answers in seen]
            wait_until(lambda: count() >= 300, "300 answers")
            following.publish("2", read_model("2"))
            wait_until(lambda: all_see("2"), "version 2 answers")
            before = count()
            wait_until(lambda: count() >= max(700, before + 100), "answers by version 2")
            shutil.rmtree(following.folder / "2")
            wait_until(lambda: all_see("1"), "version 1 answers again")
            before = count()
            wait_until(lambda: count() >= max(1000, before + 100), "answers by version 1")
        finally:
            stop.set()
        for future in asking:
            future.result()
    for answers in seen:
        assert set(answers) == {"1", "2"}, set(answers)
        assert "".join(answers).strip("1").strip("2") == "", "versions changed more than once each way"


def assert_for_a_client(message: str, folder: Path) -> None:
    """A client learns neither where the server's files are nor what its operator types."""
    assert not any(part in message for part in (str(folder), str(REPOSITORY_DIR), "/models/", "python "))


def test_a_corrupt_version_never_replaces_a_good_one(following):
    server = following.server
    for version, content in (("3", read_model("1")[:-100]), ("4", b""), ("1", b"junk")):
        following.publish(version, content)
        wait_until(lambda v=version: f"my_model version {v} " in following.log(), f"version {version} is reported")
        assert np.abs(ask(server.endpoint, [GOOD_ROW], "1").sum() - 1) < 1e-6
    status, reply = post(server, "/predict/3", b"{}")
    assert status == 404
    assert "is there and not served: ONNX Runtime cannot load it" in reply["error"]
    assert_for_a_client(reply["error"], following.folder)
    assert get(server, "/v2/models/my_model")[1]["versions"] == ["1"]
    assert f"{following.folder / '3'}" in following.log(), "the operator learns the path"
    assert "version 1 stays as it was" in following.log()
    assert following.log().count("version 3 is left out") == 1, "reported once, not at every look"


def test_the_default_version_is_the_one_that_the_file_default_names(following):
    server, default = following.server, following.folder / "default"
    tensor = {"name": "input", "shape": [1, 5], "datatype": "FP32", "data": GOOD_ROW}

    def choose(content: str) -> None:
        temporary = following.folder / "default.writing"
        temporary.write_text(content)
        temporary.replace(default)

    def answers() -> str:
        return post(server, "/v2/models/my_model/infer", {"inputs": [tensor]})[1]["model_version"]

    def assert_default(version: str) -> None:
        wait_until(lambda: answers() == version, f"version {version} is the default")
        without = send(server.endpoint.port, server.endpoint.request([GOOD_ROW], None))
        assert without == send(server.endpoint.port, server.endpoint.request([GOOD_ROW], version))

    choose("1\n")
    following.publish("2", read_model("2"))
    wait_until(lambda: "my_model 1, 2 (default 1)" in following.log(), "both versions are reported")
    assert_default("1")
    choose("2")
    assert_default("2")
    for junk in ("", "9", "two"):
        choose(junk)
        wait_until(lambda junk=junk: f"names {junk!r}, not one of 1, 2; 2 stays" in following.log(), "it is reported")
        assert answers() == "2"
    choose("1")
    assert_default("1")
    default.unlink()
    assert_default("2")  # the newest


def test_without_a_version_left_the_server_is_not_ready_and_lives(following):
    server = following.server
    assert get(server, "/v2/health/ready") == (200, {"ready": True})
    shutil.rmtree(following.folder / "1")
    wait_until(lambda: get(server, "/v2/health/ready")[0] == 503, "it is not ready")
    assert "no version of my_model" in get(server, "/v2/health/ready")[1]["error"]
    assert get(server, "/v2/health/live")[0] == 200
    following.publish("2", read_model("2"))
    wait_until(lambda: get(server, "/v2/health/ready")[0] == 200, "it is ready again")


def test_the_repository_index_lists_a_version_that_cannot_be_loaded(following):
    following.publish("7", b"junk")
    wait_until(lambda: "7" in following.entries(), "version 7 is listed")
    entries = following.entries()
    assert (entries["1"]["state"], entries["7"]["state"]) == ("READY", "UNAVAILABLE")
    assert "cannot load it" in entries["7"]["reason"]
    assert_for_a_client(entries["7"]["reason"], following.folder)
    status, reply = post(following.server, "/v2/repository/index", b'{"ready": true}')
    assert (status, [entry["version"] for entry in reply]) == (200, ["1"])


# Workers


def test_workers_share_the_port_and_one_that_is_killed_is_replaced():
    with running("--workers", "2") as server:
        wait_until(lambda: server.log().count("serving on") == 2, "both workers serve")
        workers = psutil.Process(server.pid).children()
        assert len(workers) == 2
        os.kill(workers[0].pid, signal.SIGKILL)
        wait_until(lambda: server.log().count("serving on") == 3, "a third worker serves")
        pids = {child.pid for child in psutil.Process(server.pid).children()}
        assert len(pids) == 2
        assert workers[1].pid in pids
        for _ in range(40):  # a connection each: the kernel spreads them
            ask(server.endpoint, [GOOD_ROW], "1")

        def counted() -> float:
            text = get(server, "/metrics")[1]
            return sum(map(float, re.findall(r'^onnx_server_requests_total{.*status="200".*} (\S+)$', text, re.M)))

        wait_until(lambda: counted() >= 40, "the workers have counted, a quarter of a second later")
        pids |= {server.pid}
    assert not any(map(psutil.pid_exists, pids))


@pytest.mark.slow
def test_a_worker_that_is_killed_under_load_loses_at_most_what_was_under_way(capsys):
    """Eight clients, 2,000 requests, a connection each; the other worker goes on."""
    rows, _ = load_test_rows()
    expected = load_expected("1")
    with running("--workers", "2") as server:
        victim = psutil.Process(server.pid).children()[0]

        def ask_for(number: int) -> str:
            if number == 500:
                victim.kill()
            try:
                answer = ask(server.endpoint, rows[number % len(rows) :][:1], "1")
            except (OSError, http.client.HTTPException, ServerError):
                return "lost"
            return "right" if np.abs(answer - expected[number % len(rows)]).max() <= TOLERANCE else "wrong"

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            outcomes = collections.Counter(pool.map(ask_for, range(2000)))
    with capsys.disabled():
        print(f"\nonnx, two workers, one killed: of 2000 {dict(outcomes)}")
    assert outcomes["wrong"] == 0
    assert outcomes["lost"] <= 16, outcomes  # eight under way, and those that the kernel had queued for the worker


def test_cuda_gives_the_reference_answers_or_is_refused():
    """With a GPU and CUDA the server uses them; without it does not start, and says why."""
    try:
        with running("--device", "cuda") as server:
            assert "(CUDAExecutionProvider)" in server.log()
            rows, _ = load_test_rows()
            for version in ("1", "2"):
                answers = [ask(server.endpoint, [row], version)[0] for row in rows]
                for given in (answers, ask(server.endpoint, rows, version)):
                    assert np.abs(np.array(given) - load_expected(version)).max() <= TOLERANCE
    except ServerError as error:
        assert shutil.which("nvidia-smi") is None, error
        assert "CUDA was requested" in str(error)


def test_workers_end_when_their_supervisor_is_killed():
    with running("--workers", "2") as server:
        workers = psutil.Process(server.pid).children()
        os.kill(server.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(workers, timeout=DEADLINE_S)
        assert not alive


def test_a_taken_port_stops_the_workers_before_they_start(tuned_server):
    ended = run_python("server.py", "--workers", "2", "--port", str(tuned_server.endpoint.port), cwd=ONNX_DIR)
    assert ended.returncode == 1
    assert "is in use" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


# Limits


def test_a_body_that_does_not_come_is_refused_and_the_connection_closed(limited_server):
    with socket.create_connection(("127.0.0.1", limited_server.endpoint.port), timeout=DEADLINE_S) as slow:
        slow.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
        reply = b""
        while part := slow.recv(4096):
            reply += part
    assert reply.startswith(b"HTTP/1.1 408")


def test_connections_beyond_the_limit_get_503_and_the_others_go_on(limited_server):
    port, body = limited_server.endpoint.port, json.dumps(GOOD_BODY).encode()
    head = b"POST /predict/1 HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with contextlib.ExitStack() as stack:
        held = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S)) for _ in range(8)
        ]
        statuses = []
        for connection in held:
            connection.sendall(head % len(body) + body)
            statuses.append(connection.recv(4096)[9:12])
        assert b"503" in statuses
        for connection in held[:6]:
            connection.close()
        wait_until(lambda: post(port, "/predict/1", GOOD_BODY)[0] == 200, "it answers again")
