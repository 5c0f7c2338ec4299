"""The ONNX server's replies beside those of the real NVIDIA Triton, which serves the same model, field by field.

Whatever differs is named here, and in onnx/REFERENCE.md: all else is the same, to the byte where it is an answer.
"""

import http.client
import json
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from endpoints.base import load_endpoints
from helpers import DEADLINE_S, start
from machine.free_ports import find_free_ports
from servers.process import ServerProcess

pytestmark = pytest.mark.slow

MODEL = "/v2/models/my_model"
INFER = f"{MODEL}/infer"
ROW = [13.82, 24.49, 0.1162, 0.1357, 0.2275]
TENSOR = {"name": "input", "shape": [1, 5], "datatype": "FP32", "data": ROW}
BYTES = struct.pack("<5f", *ROW)


def ask_for(**changes: Any) -> bytes:
    """Return a request for one row; None takes a key away."""
    asked = {"inputs": [TENSOR], **changes}
    return json.dumps({key: value for key, value in asked.items() if value is not None}).encode()


def ask_with(**changes: Any) -> bytes:
    """Return a request whose tensor is changed; None takes a key away."""
    tensor = {**TENSOR, **changes}
    return ask_for(inputs=[{key: value for key, value in tensor.items() if value is not None}])


def ask_in_bytes(**more: Any) -> tuple[bytes, int]:
    """Return a request with its tensor behind the JSON, and how long that is."""
    described = {**TENSOR, "parameters": {"binary_data_size": len(BYTES)}}
    del described["data"]
    asked = json.dumps({"inputs": [described], **more}).encode()
    return asked + BYTES, len(asked)


ANSWERED = {  # what both answer, with the same bytes
    "one row": ask_for(),
    "an id": ask_for(id="a \u00fc"),
    "an empty id": ask_for(id=""),
    "an output": ask_for(outputs=[{"name": "output"}]),
    "own parameters": ask_for(parameters={"mine": 1}),
    "an unknown key": ask_for(mine=1),
    "two rows, nested": ask_with(shape=[2, 5], data=[ROW, ROW]),
    "an answer in bytes": ask_for(parameters={"binary_data_output": True}),
    "one output in bytes": ask_for(outputs=[{"name": "output", "parameters": {"binary_data": True}}]),
    "bytes": ask_in_bytes(),
    "bytes both ways": ask_in_bytes(id="7", parameters={"binary_data_output": True}),
}
REFUSED = {  # what both refuse, in words of their own: Triton's status, where it is not 400
    "an output that is not there": (ask_for(outputs=[{"name": "nobody"}]), 400),
    "an id that is no string": (ask_for(id=7), 500),
    "no inputs": (ask_for(inputs=[]), 400),
    "nothing": (b"{}", 500),
    "no bytes": (b"", 400),
    "half of JSON": (b"{", 500),
    "a list": (b"[]", 500),
    "another datatype": (ask_with(datatype="FP64"), 400),
    "another width": (ask_with(shape=[1, 4], data=ROW[:4]), 400),
    "too few values": (ask_with(data=ROW[:4]), 500),
    "one dimension": (ask_with(shape=[5]), 400),
    "a negative size": (ask_with(shape=[-1, 5]), 500),
    "another name": (ask_with(name="other"), 400),
    "one input twice": (ask_for(inputs=[TENSOR, TENSOR]), 400),
    "words": (ask_with(data=["a"] * 5), 500),
    "truth values": (ask_with(data=[True] * 5), 500),
    "numbers as words": (ask_with(data=["1"] * 5), 500),
    "no data": (ask_with(data=None), 400),
    "no shape": (ask_with(shape=None), 500),
    "no datatype": (ask_with(datatype=None), 500),
}
SAME_STATUS = [  # by method and path
    ("GET", "/v2", 200), ("GET", "/v2/health/live", 200), ("GET", "/v2/health/ready", 200),
    ("GET", MODEL, 200), ("GET", f"{MODEL}/versions/1", 200), ("GET", f"{MODEL}/ready", 200),
    ("GET", f"{MODEL}/versions/2/ready", 200), ("GET", f"{MODEL}/stats", 200), ("GET", "/v2/models/stats", 200),
    ("GET", "/v2/models/nobody", 404), ("GET", f"{MODEL}/versions/9", 404), ("GET", "/v2/nothing", 404),
    ("GET", INFER, 405), ("POST", MODEL, 405), ("POST", "/v2/models/nobody/infer", 404),
    ("POST", f"{MODEL}/versions/9/infer", 404), ("POST", f"{MODEL}/versions/x/infer", 404),
]  # fmt: skip


@pytest.fixture(scope="module")
def triton() -> Iterator[ServerProcess]:
    endpoint = load_endpoints(with_peers=True)["triton"].on_free_ports()
    if not endpoint.is_installed():
        pytest.skip("triton is not installed: make peers")
    (grpc_port,) = find_free_ports(["grpc"]).values()
    endpoint.extra_options = [f"--grpc-port={grpc_port}"]
    endpoint.start_timeout_s = DEADLINE_S
    with ServerProcess(endpoint) as server:
        server.endpoint.ports = {**server.endpoint.ports, "grpc": grpc_port}
        yield server


@pytest.fixture(scope="module")
def ours() -> Iterator[ServerProcess]:
    with start("onnx-tuned") as server:
        yield server


def send(server: ServerProcess, method: str, path: str, body: Any = None) -> tuple[int, dict[str, str], bytes]:
    """Return status, the headers that tell how the body is to be read, and the body."""
    headers = {"Content-Type": "application/json"}
    if isinstance(body, tuple):
        body, length = body
        headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(length)}
    connection = http.client.HTTPConnection("127.0.0.1", server.endpoint.ports["rest"], timeout=DEADLINE_S)
    connection.request(method, path, body, headers)
    reply = connection.getresponse()
    content = reply.read()
    told = ("content-type", "inference-header-content-length", "content-length")
    return reply.status, {name.lower(): value for name, value in reply.getheaders() if name.lower() in told}, content


@pytest.mark.parametrize("case", ANSWERED)
def test_an_answer_is_the_same_to_the_byte(triton, ours, case):
    for path in (INFER, f"{MODEL}/versions/1/infer"):
        mine, theirs = (send(server, "POST", path, ANSWERED[case]) for server in (ours, triton))
        assert mine == theirs
        assert mine[0] == 200


@pytest.mark.parametrize("case", REFUSED)
def test_what_triton_refuses_is_refused_with_400(triton, ours, case):
    body, status = REFUSED[case]
    theirs, mine = send(triton, "POST", INFER, body), send(ours, "POST", INFER, body)
    assert (mine[0], theirs[0]) == (400, status)
    assert list(json.loads(mine[2])) == list(json.loads(theirs[2])) == ["error"]


@pytest.mark.parametrize(("method", "path", "status"), SAME_STATUS)
def test_a_path_has_the_same_status(triton, ours, method, path, status):
    body = ask_for() if method == "POST" else None
    assert [send(server, method, path, body)[0] for server in (ours, triton)] == [status, status]


def read(server: ServerProcess, path: str, method: str = "GET") -> Any:
    status, _, body = send(server, method, path, b"{}" if method == "POST" else None)
    assert status == 200
    return json.loads(body)


def test_the_metadata_differs_in_the_platform_and_in_the_versions_of_one(triton, ours):
    for path in (MODEL, f"{MODEL}/versions/1"):
        mine, theirs = read(ours, path), read(triton, path)
        assert (mine.pop("platform"), theirs.pop("platform")) == ("onnxruntime_onnx", "python")
        if path.endswith("/1"):  # the protocol: the versions that may be asked for
            assert (mine.pop("versions"), theirs.pop("versions")) == (["1", "2"], ["1"])
        assert mine == theirs
    mine, theirs = read(ours, "/v2"), read(triton, "/v2")
    assert list(mine) == list(theirs)
    assert set(mine["extensions"]) < set(theirs["extensions"])
    mine, theirs = (read(server, "/v2/repository/index", "POST") for server in (ours, triton))
    assert [each for each in mine if each["name"] == "my_model"] == theirs


def test_the_statistics_have_what_is_measured_of_tritons(triton, ours):
    for server in (ours, triton):
        for _ in range(3):
            send(server, "POST", f"{MODEL}/versions/1/infer", ask_for())
    mine, theirs = (read(server, f"{MODEL}/versions/1/stats")["model_stats"] for server in (ours, triton))
    assert [len(mine), len(theirs)] == [1, 1]
    assert set(theirs[0]) - set(mine[0]) == {"batch_stats", "memory_usage", "response_stats"} & set(theirs[0])
    assert set(theirs[0]["inference_stats"]) - set(mine[0]["inference_stats"]) == {
        "queue", "compute_input", "compute_output", "cache_hit", "cache_miss",
    }  # fmt: skip
    for part in mine[0]["inference_stats"].values():
        assert list(part) == ["count", "ns"]


def test_what_is_answered_otherwise_is_answered_as_the_readme_says(triton, ours):
    """The protocol's texts allow both, or leave it open."""

    def both(method: str, path: str, body: Any = None) -> list:
        return [send(server, method, path, body) for server in (ours, triton)]

    mine, theirs = both("GET", "/v2/health/ready")
    assert (json.loads(mine[2]), theirs[2]) == ({"ready": True}, b"")
    mine, theirs = both("GET", "/v2/models/nobody/ready")
    assert (mine[0], theirs[0]) == (404, 400)
    mine, theirs = both("POST", INFER, ask_for(outputs=[{"name": "output", "parameters": {"classification": 1}}]))
    assert (mine[0], theirs[0]) == (400, 200)
    mine, theirs = both("POST", INFER, ask_for(id=None).replace(b"{", b'{"id": null, ', 1))
    assert (mine[0], theirs[0]) == (200, 500)
    mine, theirs = both("POST", INFER, ask_with(shape=[0, 5], data=[]))
    assert (mine[0], theirs[0]) == (200, 400)
    mine, theirs = both("POST", INFER, ask_with(data=[1e300] * 5))
    assert (mine[0], theirs[0]) == (400, 200)
    assert b"NaN" in theirs[2]  # no JSON
    for path in (f"{MODEL}/config", "/v2/trace/setting", "/v2/logging", "/v2/systemsharedmemory/status"):
        mine, theirs = both("GET", path)
        assert (mine[0], theirs[0]) == (404, 200), path


def test_grpc_answers_are_the_same(triton, ours):
    import grpc
    from tritonclient.grpc import service_pb2 as messages
    from tritonclient.grpc import service_pb2_grpc

    stubs = [
        service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(f"127.0.0.1:{server.endpoint.ports['grpc']}"))
        for server in (ours, triton)
    ]

    def both(method: str, request: Any) -> list:
        """Return each reply, or the name of its status."""
        replies: list = []
        for stub in stubs:
            try:
                replies.append(getattr(stub, method)(request, timeout=DEADLINE_S))
            except grpc.RpcError as error:
                replies.append(error.code().name)
        return replies

    def asked(**fields: Any) -> Any:
        request = messages.ModelInferRequest(model_name="my_model", **fields)
        request.inputs.add(name="input", datatype="FP32", shape=[1, 5])
        request.raw_input_contents.append(BYTES)
        return request

    for request in (
        asked(), asked(id="7"), asked(model_version="1"), asked(outputs=[{"name": "output"}]),
    ):  # fmt: skip
        mine, theirs = both("ModelInfer", request)
        assert mine == theirs
    contents = messages.ModelInferRequest(model_name="my_model")
    contents.inputs.add(name="input", datatype="FP32", shape=[1, 5]).contents.fp32_contents.extend(ROW)
    mine, theirs = both("ModelInfer", contents)
    assert mine == theirs
    for method, request in (
        ("ServerLive", messages.ServerLiveRequest()), ("ServerReady", messages.ServerReadyRequest()),
        ("ModelReady", messages.ModelReadyRequest(name="my_model", version="2")),
        ("ModelReady", messages.ModelReadyRequest(name="nobody")),
        ("ModelMetadata", messages.ModelMetadataRequest(name="nobody")),
        ("ModelInfer", messages.ModelInferRequest(model_name="nobody")),
        ("ModelInfer", messages.ModelInferRequest(model_name="my_model")),
        ("ModelInfer", asked(outputs=[{"name": "nobody"}])),
    ):  # fmt: skip
        mine, theirs = both(method, request)
        assert mine == theirs, (method, request)
    mine, theirs = both("ModelMetadata", messages.ModelMetadataRequest(name="my_model"))
    mine.platform = theirs.platform
    assert mine == theirs
