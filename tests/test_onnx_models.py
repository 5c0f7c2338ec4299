"""onnx/server.py with models of every kind, by JSON, binary tensors and gRPC: right answers, and right refusals."""

import collections
import concurrent.futures
import http.client
import itertools
import json
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import pytest

import damaged_requests
import onnx_corpus
import toy_onnx_models
from damaged_requests import pack, unpack, write_message, write_request
from helpers import DEADLINE_S, REPOSITORY_DIR, get, load_together, post, start, wait_until, write_onnx_settings
from onnx_corpus import Case, has_json_numbers, same
from servers.process import ServerProcess
from toy_onnx_models import DATATYPES, Arrays, Toy

ONNX_DIR = REPOSITORY_DIR / "onnx"
FORMS = ("json", "binary", "grpc")
WAYS = ("json", "nested", "binary", "raw", "contents")  # the last two are gRPC's
CLIENTS = 16


def serve(repository: Path, *options: str, config: str | Path = "tuned.toml") -> ServerProcess:
    server = start("onnx")
    server.endpoint.extra_options = ["--config", str(config), "--model-repository", str(repository), *options]
    return server


def write_models(folder: Path, models: dict[str, bytes]) -> Path:
    """Write a repository of these models, and of my_model, by which a server is known to be ready."""
    shutil.copytree(ONNX_DIR / "models" / "my_model", folder / "my_model")
    for name, content in models.items():
        path = folder / name / "1" / "model.onnx"
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    return folder


# Models that others made


@pytest.fixture(scope="module")
def corpus() -> list[Case]:
    cases = onnx_corpus.collect(onnx_corpus.SAMPLE_MODULES, most=12)
    chosen = random.Random(1).sample(cases, 60)
    rare = [case for case in cases if any(array.dtype.kind == "O" for array in [*case.inputs.values()])][:6]
    return list({case.name: case for case in [*chosen, *rare]}.values())


@pytest.fixture(scope="module")
def corpus_server(corpus, tmp_path_factory) -> Iterator[ServerProcess]:
    folder = write_models(tmp_path_factory.mktemp("corpus"), {case.name: case.model for case in corpus})
    config = write_onnx_settings(folder / "large.toml", max_body_bytes=64_000_000)
    with serve(folder, config=config) as server:
        yield server


@pytest.fixture(scope="module")
def clients(corpus_server) -> dict[str, Callable[[Case], list[np.ndarray]]]:
    return make_clients(corpus_server)


def make_clients(server: ServerProcess) -> dict[str, Callable[[Case], list[np.ndarray]]]:
    """Return by form what asks a server for the outputs of a case, as tritonclient reads them."""
    import tritonclient.grpc
    import tritonclient.http

    ports = server.endpoint.ports
    rest = tritonclient.http.InferenceServerClient(f"127.0.0.1:{ports['rest']}", concurrency=20)
    grpc = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{ports['grpc']}")

    def ask(package, client, case: Case, **how) -> list[np.ndarray]:
        tensors = []
        for name, array in case.inputs.items():
            tensor = package.InferInput(name, list(array.shape), DATATYPES[str(array.dtype)])
            data = np.vectorize(str.encode, otypes=[object])(array) if array.dtype == object else array
            tensor.set_data_from_numpy(data if data.ndim or not how else data.reshape([]), **how)
            tensors.append(tensor)
        names = [each["name"] for each in rest.get_model_metadata(case.name)["outputs"]]
        wanted = [tritonclient.http.InferRequestedOutput(name, **how) for name in names] if how else None
        result = client.infer(case.name, tensors, outputs=wanted)
        return [result.as_numpy(name) for name in names]

    return {
        "json": lambda case: ask(tritonclient.http, rest, case, binary_data=False),
        "binary": lambda case: ask(tritonclient.http, rest, case, binary_data=True),
        "grpc": lambda case: ask(tritonclient.grpc, grpc, case),
    }


def count_right(cases: list[Case], ask: Callable[[Case], list[np.ndarray]]) -> dict[str, str]:
    """Return what is wrong, by the case's name."""
    wrong = {}
    for case in cases:
        try:
            given = ask(case)
        except Exception as error:  # noqa: BLE001 - what is wrong is told together
            wrong[case.name] = str(error)
            continue
        for mine, theirs in zip(given, case.outputs, strict=True):
            theirs = np.asarray(theirs)
            values = [value.decode() if isinstance(value, bytes) else value for value in mine.ravel()]
            mine = np.array(values, theirs.dtype).reshape(mine.shape)
            if not same(mine, theirs, 1e-3 if theirs.dtype == np.float16 else 1e-5):
                wrong[case.name] = f"{mine!r:.200} is not {theirs!r:.200}"
    return wrong


@pytest.mark.parametrize("form", FORMS)
def test_a_sample_of_onnxs_own_tests_is_answered_as_onnx_runtime_does(corpus, clients, form):
    cases = corpus
    if form == "json":
        cases = [case for case in corpus if has_json_numbers([*case.inputs.values(), *case.outputs])]
    assert len(cases) >= 50
    assert count_right(cases, clients[form]) == {}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_onnxs_own_tests_are_answered_as_onnx_runtime_does(whole_corpus, form, capsys):
    cases, clients = whole_corpus
    if form == "json":
        cases = [case for case in cases if has_json_numbers([*case.inputs.values(), *case.outputs])]
    wrong = count_right(cases, clients[form])
    with capsys.disabled():
        print(f"\n{form}: {len(cases) - len(wrong)} of {len(cases)} right", *wrong.items(), sep="\n  ")
    assert len(cases) > 1300
    assert len(wrong) <= 0.02 * len(cases)


@pytest.fixture(scope="module")
def whole_corpus(tmp_path_factory):
    cases = onnx_corpus.collect(onnx_corpus.list_node_modules())
    folder = write_models(tmp_path_factory.mktemp("whole"), {case.name: case.model for case in cases})
    config = write_onnx_settings(folder / "large.toml", max_body_bytes=64_000_000)
    with serve(folder, config=config) as server:
        yield cases, make_clients(server)


# Models made here: the clients


class AskError(Exception):
    """A request that was refused: an HTTP status or a name of gRPC's, and the message."""


class Asker:
    """Asks a server in every way that the protocol knows, each thread on connections of its own."""

    def __init__(self, server: ServerProcess):
        import grpc
        from tritonclient.grpc import service_pb2, service_pb2_grpc

        self.port = server.endpoint.ports["rest"]
        self.channel = grpc.insecure_channel(f"127.0.0.1:{server.endpoint.ports['grpc']}")
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)
        self.messages = service_pb2
        self.error = grpc.RpcError
        self.own = threading.local()

    def send(self, path: str, body: bytes, length: object = None) -> tuple[int, dict[str, str], bytes]:
        """POST on this thread's connection; return status, headers and body."""
        if not hasattr(self.own, "connection"):
            self.own.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)
        elif time.monotonic() > self.own.used_s + 30:  # the server closes idle ones after 75 s
            self.own.connection.close()  # and it opens again by itself
        self.own.used_s = time.monotonic()
        headers = {"Content-Type": "application/json"}
        headers |= {} if length is None else {"Inference-Header-Content-Length": str(length)}
        self.own.connection.request("POST", path, body, headers)
        reply = self.own.connection.getresponse()
        return reply.status, dict(reply.getheaders()), reply.read()

    def infer(self, name: str, asked: dict, tail: bytes = b"", version: str = "") -> tuple[dict, Arrays]:
        """Return the JSON of the reply and its outputs, in order; AskError where it is refused."""
        path = f"/v2/models/{name}/versions/{version}/infer" if version else f"/v2/models/{name}/infer"
        body = json.dumps(asked).encode()
        return read_reply(*self.send(path, body + tail, len(body) if tail else None))

    def ask(self, way: str, name: str, arrays: Arrays, version: str = "") -> Arrays:
        """Return the outputs, in order; AskError where it is refused."""
        if way in ("raw", "contents"):
            asked = write_message(name, arrays, way == "raw")
            asked.model_version = version
            return self.call(asked)
        asked, tail = write_request(arrays, set(arrays) if way == "binary" else set())
        if way == "nested":
            for each, array in zip(asked["inputs"], arrays.values(), strict=True):
                each["data"] = array.tolist() if array.ndim else [array.item()]
        if way == "binary":
            asked["parameters"] = {"binary_data_output": True}
        return self.infer(name, asked, tail, version)[1]

    def call(self, asked: Any) -> Arrays:
        """The same for a message of gRPC."""
        try:
            reply = self.stub.ModelInfer(asked, timeout=DEADLINE_S)
        except self.error as error:
            raise AskError(error.code().name, error.details()) from None
        assert len(reply.outputs) == len(reply.raw_output_contents)
        return {
            output.name: unpack(data, output.datatype, list(output.shape))
            for output, data in zip(reply.outputs, reply.raw_output_contents, strict=True)
        }


def read_reply(status: int, headers: dict[str, str], body: bytes) -> tuple[dict, Arrays]:
    """Return the JSON and the outputs of a reply; AskError where it is a refusal in JSON."""
    length = int(headers.get("inference-header-content-length", len(body)))
    reply, tail = json.loads(body[:length]), body[length:]
    if status != 200:
        assert reply.keys() == {"error"}, reply
        raise AskError(status, reply["error"])
    outputs = {}
    for each in reply["outputs"]:
        size = each.get("parameters", {}).get("binary_data_size")
        if size is None:
            values = np.array(each["data"], damaged_requests.TYPES[each["datatype"]])
            outputs[each["name"]] = values.reshape(each["shape"])
        else:
            outputs[each["name"]] = unpack(tail[:size], each["datatype"], each["shape"])
            tail = tail[size:]
    assert not tail
    return reply, outputs


def find_difference(given: Arrays, expected: Arrays) -> str:
    """Return what differs: names, their order, types, shapes or values."""
    if list(given) != list(expected):
        return f"outputs {list(given)} are not {list(expected)}"
    for name, array in expected.items():
        array, mine = np.asarray(array), given[name]
        if mine.dtype != array.dtype or not same(mine, array, 1e-3 if array.dtype == np.float16 else 1e-5):
            return f"{name}: {mine!r:.200} is not {array!r:.200}"
    return ""


@pytest.fixture(scope="module")
def toys() -> dict[str, Toy]:
    return toy_onnx_models.make_toys()


@pytest.fixture(scope="module")
def toy_server(toys, tmp_path_factory) -> Iterator[ServerProcess]:
    """A server of all toys, beside which lie models that it cannot serve; batching is on."""
    models = {name: toy.model for name, toy in toys.items()}
    models |= {"chain": toy_onnx_models.make_chain(length=96), "looped": toy_onnx_models.make_looped()}
    models |= {name: model for name, (model, _) in toy_onnx_models.make_unservable().items()} | ODD_FILES
    folder = write_models(tmp_path_factory.mktemp("toys"), models)
    for version, kind in DEPENDENT_VERSIONS.items():  # behind /predict, too
        (folder / "my_model" / version).mkdir()
        (folder / "my_model" / version / "model.onnx").write_bytes(toy_onnx_models.make_rows(kind))
    (folder / "my_model" / "default").write_text("2")
    for name, features in ODD_FEATURES.items():
        (folder / name / "1").mkdir(parents=True)
        model = toy_onnx_models.make_rows("same", properties={"features": features})
        (folder / name / "1" / "model.onnx").write_bytes(model)
    (folder / "folder" / "1" / "model.onnx").mkdir(parents=True)
    with serve(folder, config=write_onnx_settings(folder / "quick.toml", poll_s=0.1)) as server:
        yield server


ODD_FILES = {"junk": b"junk" * 9, "empty": b"", "truncated": toy_onnx_models.make_two_inputs()[:-30]}
ODD_FEATURES = {
    f"features_{number}": text
    for number, text in enumerate(
        ["mean radius,mean texture", "5", "null", "[1, 2, 3, 4, 5]", '["a"]', '{"0": "a"}', "[[]]", ""]
    )
}
DEPENDENT_VERSIONS = {"7": "centred", "8": "peaked", "9": "averaged", "10": "choosy"}


@pytest.fixture(scope="module")
def asker(toy_server) -> Asker:
    return Asker(toy_server)


def list_index(server: ServerProcess) -> dict[tuple[str, str], dict]:
    return {(entry["name"], entry["version"]): entry for entry in post(server, "/v2/repository/index", b"{}")[1]}


# Models made here: values and shapes


@pytest.mark.parametrize("way", WAYS)
def test_every_toy_is_answered_rightly(toys, asker, way):
    random = np.random.default_rng(1)
    for name, toy in toys.items():
        for _ in range(3):
            arrays = toy.make_inputs(random)
            if way == "contents" and any(array.dtype == np.float16 for array in arrays.values()):
                continue
            assert find_difference(asker.ask(way, name, arrays), toy.answer(**arrays)) == "", name


@pytest.mark.parametrize("way", WAYS)
def test_an_empty_batch_is_answered_with_none(toys, asker, way):
    for name, toy in toys.items():
        if name == "outer" or not any("n" in shape for _, shape in toy.inputs.values()):
            continue
        arrays = {
            key: np.zeros([0 if size == "n" else 2 if isinstance(size, str) else size for size in shape], kind)
            for key, (kind, shape) in toy.inputs.items()
            if way != "contents" or np.dtype(kind) != np.float16
        }
        if name in ("averaged", "peaked", "total", "centred"):  # ONNX Runtime's own answer, but never a failure
            assert "y" in asker.ask(way, name, arrays)
        elif arrays:
            for key, array in asker.ask(way, name, arrays).items():
                assert array.shape[0] == 0, (name, key)


@pytest.mark.parametrize(("name", "labels"), [("labels", "INT64"), ("names", "BYTES")])
def test_a_classifier_tells_labels_and_scores_as_tensors(asker, name, labels):
    assert get(asker.port, f"/v2/models/{name}") == (
        200,
        {
            "name": name,
            "versions": ["1"],
            "platform": "onnxruntime_onnx",
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}],
            "outputs": [
                {"name": "label", "datatype": labels, "shape": [-1]},
                {"name": "probabilities", "datatype": "FP32", "shape": [-1, -1]},
            ],
        },
    )
    chosen = toy_onnx_models.INT_LABELS if name == "labels" else toy_onnx_models.STRING_LABELS
    rows = np.array([[3, 0], [-3, 0], [0, 3]], np.float32)
    for way in WAYS:
        answer = asker.ask(way, name, {"x": rows})
        assert answer["label"].tolist() == chosen
        # Columns are in the labels' sorted order: the chosen label's is the greatest.
        assert answer["probabilities"].argmax(1).tolist() == [sorted(chosen).index(label) for label in chosen]


def list_extremes(kind: str, is_json: bool) -> np.ndarray:
    """Return values at the ends of a type."""
    dtype = np.dtype(kind)
    if dtype.kind == "O":
        return np.array([["", "a\0b", "\0"], ["Größe 汉 😀", "x" * 70_000, '"\\\n\t\x7f']], object)
    if dtype.kind == "b":
        return np.array([[True, False, True]])
    if dtype.kind in "iu":
        bounds = np.iinfo(dtype)
        return np.array([[bounds.min, bounds.max], [bounds.min + 1, bounds.max - 1]], dtype)
    bounds = np.finfo(dtype)
    values = [bounds.max, bounds.min, bounds.tiny, bounds.smallest_subnormal, -0.0, 0.1, bounds.eps]
    return np.array([values if is_json else [*values, np.nan, np.inf, -np.inf]], dtype)


@pytest.mark.parametrize("way", WAYS)
def test_every_datatype_keeps_its_extremes_bit_by_bit(asker, way):
    for kind, datatype in DATATYPES.items():
        if (way, datatype) == ("contents", "FP16"):
            continue
        array = list_extremes(kind, way in ("json", "nested"))
        given = asker.ask(way, f"same_{datatype.lower()}", {"x": array})["y"]
        assert (given.dtype, given.shape) == (array.dtype, array.shape)
        assert pack(given) == pack(array), datatype


@pytest.mark.parametrize(
    ("datatype", "value", "words"),
    [
        ("BOOL", "1", "Expected `bool`, got `int`"), ("BOOL", '"true"', "Expected `bool`, got `str`"),
        ("INT8", "128", "Expected `int` <= 127"), ("INT8", "-129", "Expected `int` >= -128"),
        ("INT16", "32768", "<= 32767"), ("INT32", "2147483648", "<= 2147483647"),
        ("INT64", str(2**63), "does not fit INT64"), ("INT64", str(-(2**63) - 1), ">= -9223372036854775808"),
        ("UINT8", "256", "<= 255"), ("UINT8", "-1", ">= 0"), ("UINT16", "65536", "<= 65535"),
        ("UINT32", "4294967296", "<= 4294967295"), ("UINT64", str(2**64), "does not fit UINT64"),
        ("UINT64", "-1", ">= 0"),
        ("INT32", "1.5", "Expected `int`, got `float`"), ("INT32", "true", "Expected `int`, got `bool`"),
        ("FP16", "65520", "finite in float16"), ("FP32", "3.5e38", "finite in float32"),
        ("FP64", "1e309", "out of range"),
        ("FP32", "NaN", "JSON has no NaN"), ("FP64", "-Infinity", "JSON has no NaN and no Infinity"),
        ("FP32", '"1.5"', "Expected `float`, got `str`"), ("FP64", "null", "got `null`"),
        ("BYTES", "3", "Expected `str`, got `int`"), ("BYTES", r'"\ud800"', "malformed JSON"),
    ],
)  # fmt: skip
def test_an_element_that_its_type_does_not_hold_is_refused(asker, datatype, value, words):
    tensor = f'{{"name": "x", "shape": [1, 1], "datatype": "{datatype}", "data": [{value}]}}'
    body = f'{{"inputs": [{tensor}]}}'.encode()
    status, _, reply = asker.send(f"/v2/models/same_{datatype.lower()}/infer", body)
    assert status == 400
    assert words in json.loads(reply)["error"]


def test_the_largest_number_is_taken_as_programs_print_it(asker):
    """3.4028235e38, the shortest text that is read as float32's largest, is a little more than it."""
    for name, datatype, text in (("rows", "FP32", "3.4028235e38"), ("same_fp32", "FP32", "3.4028235e38"),
                                 ("same_fp32", "FP32", "-3.4028235e38"), ("same_fp16", "FP16", "65510")):  # fmt: skip
        tensor = f'{{"name": "x", "shape": [1, 3], "datatype": "{datatype}", "data": [{text}, 0, 1]}}'
        status, headers, reply = asker.send(f"/v2/models/{name}/infer", f'{{"inputs": [{tensor}]}}'.encode())
        given = read_reply(status, headers, reply)[1]["y"]
        assert abs(given[0, 0]) == np.finfo(given.dtype).max
    status, _, reply = asker.send("/predict/7", b'{"data": [[3.4028235e38, 0, 0, 0, 0]]}')
    assert (status, json.loads(reply)) == (200, {"predictions": [[0.0] * 5]})


@pytest.mark.parametrize("way", ["binary", "raw"])
def test_requests_that_differ_in_their_values_only_get_their_own_answers(toys, asker, way):
    """From the second one on they are not parsed: all but their values is known."""
    random = np.random.default_rng(3)
    for _ in range(3):
        for count in (1, 2, 30, 1):
            for name in ("rows", "same_fp32"):
                arrays = {"x": random.normal(size=(count, 3)).astype(np.float32)}
                assert find_difference(asker.ask(way, name, arrays), toys[name].answer(**arrays)) == "", (name, count)


def test_a_message_that_goes_on_behind_known_values_is_read_to_its_end(asker):
    """It is as long as another known one, and begins as a known one."""
    call = asker.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    one, two = (write_message("rows", {"x": rows[:count]}, raw=True).SerializeToString() for count in (1, 2))
    for message in (one, two, one, two):
        call(message, timeout=DEADLINE_S)
    reply = asker.messages.ModelInferResponse.FromString(call(one + b"\x1a\x0a" + b"i" * 10, timeout=DEADLINE_S))
    assert reply.id == "i" * 10
    assert reply.raw_output_contents[0] == rows[:1].tobytes()
    stream = asker.channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
    first, second = stream(iter([b"\xff", one]), timeout=DEADLINE_S)
    assert b"no ModelInferRequest" in first
    assert rows[:1].tobytes() in second
    for message in (one + b"\xff" * 12, b"\xff", one[:-1]):
        with pytest.raises(asker.error) as refused:
            call(message, timeout=DEADLINE_S)
        assert (refused.value.code().name, refused.value.details()) == (
            "INVALID_ARGUMENT",
            "the message is no ModelInferRequest",
        )


@pytest.mark.parametrize(
    ("datatype", "field", "values", "words"),
    [
        ("INT8", "int_contents", [128], "does not fit INT8"),
        ("UINT16", "uint_contents", [65536], "does not fit UINT16"),
        ("FP16", "fp32_contents", [1.0], "FP16 comes in raw_input_contents only"),
        ("INT32", "int64_contents", [1], "INT32 stands in int_contents, not in int64_contents"),
        ("BYTES", "bytes_contents", [b"\xff"], "not UTF-8"), ("FP32", "fp32_contents", [], "0 values do not fill"),
    ],
)  # fmt: skip
def test_contents_that_are_not_the_types_are_refused(asker, datatype, field, values, words):
    asked = asker.messages.ModelInferRequest(model_name=f"same_{datatype.lower()}")
    tensor = asked.inputs.add(name="x", shape=[1, 1], datatype=datatype)
    getattr(tensor.contents, field).extend(values)
    with pytest.raises(AskError, match=words) as refused:
        asker.call(asked)
    assert refused.value.args[0] == "INVALID_ARGUMENT"


@pytest.mark.parametrize(
    ("name", "shape", "data", "words"),
    [
        ("fixed", [3, 3], [1] * 9, "expected [2, 3], got [3, 3]"), ("fixed", [6], [1] * 6, "expected [2, 3], got [6]"),
        ("negative", [2, 5], [1] * 10, "expected [n, 4], got [2, 5]"), ("negative", [-1, 4], [1] * 4, "got [-1, 4]"),
        ("same_int8", [-1, -1], [1], "expected [n, n], got [-1, -1]"),
        ("same_bytes", [2, 1], [["a"], ["b", "c"]], "differ in length"),
        ("same_bytes", [2, 2], [["a"], ["b", "c", "d"]], "differ in length"),
        ("same_int8", [2, 2], [[1], [2, 3]], "differ in length"), ("same_int8", [2, 2], [[1, 2, 3, 4]], "do not fill"),
        ("same_int8", [2, 2], [1, 2, 3], "3 values do not fill the shape [2, 2]"),
        ("same_int8", [2, 2], [[[1], [2]], [[3], [4]]], "Expected `int`, got `array`"),
        ("same_int8", [0, 2**70], [], "expected [n, n], got"), ("same_int8", [0, 2**62], [], "too large"),
        ("same_int8", [2**40, 2**40], [1], "1 values do not fill"), ("any_rank", [1] * 65, [1], "64 is the most"),
        ("any_rank", [1] * 3000, [[1]], "64 is the most"), ("any_rank", [0, 2**40], [], "too large"),
    ],
)  # fmt: skip
def test_a_shape_that_the_model_or_the_data_does_not_have_is_refused(toys, asker, name, shape, data, words):
    datatype = DATATYPES[str(np.dtype(toys[name].inputs["x"][0]))]
    asked = {"inputs": [{"name": "x", "shape": shape, "datatype": datatype, "data": data}]}
    with pytest.raises(AskError) as refused:
        asker.infer(name, asked)
    assert refused.value.args[0] == 400
    assert words in refused.value.args[1]


def test_a_size_of_thousands_of_digits_is_refused(asker):
    """Python itself does not print such a number, nor therefore a message with it."""
    tensor = {"name": "x", "shape": [10**4000] * 2, "datatype": "FP32", "parameters": {"binary_data_size": 4}}
    with pytest.raises(AskError, match=r"inputs\[0\].shape: expected \[n, n\], got"):
        asker.infer("same_fp32", {"inputs": [tensor]}, b"\0" * 4)
    with pytest.raises(AskError, match=r"inputs\[0\].shape: expected sizes from 0 on, got"):
        asker.infer("any_rank", {"inputs": [tensor]}, b"\0" * 4)


@pytest.mark.parametrize("way", WAYS)
def test_a_tensor_without_a_rank_takes_every_one(asker, way):
    for rank in range(6):
        array = np.arange(2**rank, dtype=np.float32).reshape([2] * rank)
        assert find_difference(asker.ask(way, "any_rank", {"x": array}), {"y": -array}) == ""
    assert get(asker.port, "/v2/models/any_rank")[1]["inputs"] == [{"name": "x", "datatype": "FP32", "shape": []}]


def test_metadata_tells_fixed_and_free_sizes(asker):
    shapes = {
        name: get(asker.port, f"/v2/models/{name}")[1]["inputs"] for name in ("fixed", "pool", "scalar", "constant")
    }
    assert {name: [each["shape"] for each in inputs] for name, inputs in shapes.items()} == {
        "fixed": [[2, 3]],
        "pool": [[-1, 3, -1, -1]],
        "scalar": [[]],
        "constant": [],
    }


def test_outputs_are_sent_in_the_order_that_is_asked_for(toys, asker):
    arrays = toys["two"].make_inputs(np.random.default_rng(2))
    expected = toys["two"].answer(**arrays)
    for names in (["sum"], ["difference"], ["difference", "sum"], ["sum", "difference"], []):
        for binary in (set(), {"a"}, {"b"}, {"a", "b"}):
            wanted = [
                {"name": name, "parameters": {"binary_data": bool(place % 2)}} for place, name in enumerate(names)
            ]
            asked, tail = write_request(arrays, binary, outputs=wanted, id="a ü", parameters={"unknown": [1]}, more=1)
            asked["inputs"].reverse()  # the order of inputs means nothing but for the bytes behind
            if len(binary) == 2:
                tail = pack(arrays["b"]) + pack(arrays["a"])
            reply, outputs = asker.infer("two", asked, tail)
            assert find_difference(outputs, {name: expected[name] for name in names or expected}) == ""
            assert reply["id"] == "a ü"
        message = write_message("two", arrays, raw=True)
        for name in names:
            message.outputs.add(name=name)
        assert find_difference(asker.call(message), {name: expected[name] for name in names or expected}) == ""
    reply, _ = asker.infer("two", write_request(arrays, set())[0])
    assert "id" not in reply
    assert (reply["model_name"], reply["model_version"]) == ("two", "1")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"outputs": [{"name": "y"}]}, "'y' is unknown; there is 'sum', 'difference'"),
        ({"outputs": [{"name": "sum"}, {"name": "sum"}]}, "'sum' is named twice"),
        ({"inputs": []}, "expected exactly 'a', 'b', got none"),
        ({"outputs": [{"name": "sum", "parameters": {"classification": 1}}]}, "classification extension is not"),
        ({"outputs": [{"name": "sum", "parameters": {"shared_memory_region": "r"}}]}, "shared memory is not supported"),
    ],
)
def test_what_the_model_or_the_server_has_not_is_refused(toys, asker, change, words):
    asked, _ = write_request(toys["two"].make_inputs(np.random.default_rng(3)), set())
    with pytest.raises(AskError, match=words) as refused:
        asker.infer("two", asked | change)
    assert refused.value.args[0] == 400


def test_a_model_without_inputs_answers_a_request_without_any(asker):
    assert asker.infer("constant", {})[1]["y"].tolist() == [0, 1, 2]
    with pytest.raises(AskError, match="expected exactly none, got 'x'"):
        asker.ask("json", "constant", {"x": np.zeros(1, np.float32)})


def test_a_long_reason_is_cut_for_grpc_and_keeps_its_status(asker):
    message = asker.messages.ModelInferRequest(model_name="same_int8")
    message.inputs.add(name="ü" * 100_000, datatype="INT8", shape=[1, 1])
    with pytest.raises(AskError, match="expected exactly 'x', got 'üü") as refused:
        asker.call(message)
    assert refused.value.args[0] == "INVALID_ARGUMENT"


# The repository


def lines_about(server: ServerProcess, name: str) -> list[str]:
    return [line for line in server.log().splitlines() if line.startswith(f"server: {name} version")]


def test_odd_models_beside_good_ones_are_one_line_each(toy_server, asker):
    reasons = {name: reason for name, (_, reason) in toy_onnx_models.make_unservable().items()}
    reasons |= dict.fromkeys(ODD_FILES, "ONNX Runtime cannot load it")
    index = list_index(toy_server)
    for name, reason in reasons.items():
        assert index[name, "1"]["state"] == "UNAVAILABLE"
        assert reason in index[name, "1"]["reason"]
        assert len(lines_about(toy_server, name)) == 1
        assert get(toy_server, f"/v2/models/{name}/ready")[0] == 404
    assert ("folder", "1") not in index
    rows = np.ones((1, 5), np.float32)
    for name in ODD_FEATURES:
        assert index[name, "1"]["state"] == "READY"
        assert find_difference(asker.ask("json", name, {"x": rows}), {"y": rows}) == ""
        asked, _ = write_request({"x": rows}, set())
        asked["inputs"][0]["data"][2] = "bad"
        with pytest.raises(AskError, match="Expected `float`, got `str`"):
            asker.infer(name, asked)


class Following:
    """A server that looks at its repository ten times a second; each test has models of its own there."""

    def __init__(self, server: ServerProcess, folder: Path):
        self.server = server
        self.folder = folder
        self.asker = Asker(server)

    def put(self, name: str, *files: tuple[str, bytes], version: str = "1") -> Path:
        """Write files into a version's folder, in place."""
        folder = self.folder / name / version
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in files:
            (folder / file).write_bytes(content)
        return folder

    def state(self, name: str, version: str = "1") -> str:
        return list_index(self.server).get((name, version), {"state": "absent"})["state"]

    def wait_for(self, name: str, state: str, version: str = "1") -> None:
        wait_until(lambda: self.state(name, version) == state, lambda: f"{name} {state}: {self.server.log()}")

    def answer(self, name: str) -> list[float]:
        """Return what a model of rows says to zeros, its weights; nothing while two ways to ask are answered apart."""
        zeros = {"x": np.zeros((1, 5), np.float32)}
        answers = [self.asker.ask(way, name, zeros)["y"][0].tolist() for way in ("raw", "binary", "json")]
        return answers[0] if answers.count(answers[0]) == len(answers) else []

    def answer_if_ready(self, name: str) -> list[float]:
        return self.answer(name) if self.state(name) == "READY" else []

    def assert_still(self) -> None:
        """A model that is added now is served: by then all that came before has been looked at."""
        number = next(NUMBERS)
        self.put(f"later_{number}", ("model.onnx", toy_onnx_models.make_rows("same")))
        self.wait_for(f"later_{number}", "READY")


NUMBERS = itertools.count()
WEIGHTS = {value: np.full(5, value, np.float32).tobytes() for value in (1, 2, 3)}
EXTERNAL = toy_onnx_models.make_external()


@pytest.fixture(scope="module")
def following(tmp_path_factory) -> Iterator[Following]:
    folder = tmp_path_factory.mktemp("following")
    config = write_onnx_settings(folder / "quick.toml", poll_s=0.1)
    with serve(write_models(folder / "models", {}), config=config) as server:
        yield Following(server, folder / "models")


def test_weights_that_arrive_after_their_graph_are_served_then(following):
    folder = following.put("late", ("model.onnx", EXTERNAL))
    following.wait_for("late", "UNAVAILABLE")
    reason = list_index(following.server)["late", "1"]["reason"]
    assert "keeps weights in model.onnx.data, which is not in its version's folder" in reason
    following.assert_still()
    (folder / "model.onnx.data").write_bytes(WEIGHTS[1])
    following.wait_for("late", "READY")
    assert following.answer("late") == [1] * 5


def test_new_weights_give_new_answers_and_cut_ones_change_nothing(following):
    folder = following.put("renewed", ("model.onnx", EXTERNAL), ("model.onnx.data", WEIGHTS[1]))
    following.wait_for("renewed", "READY")
    (folder / "writing").write_bytes(WEIGHTS[2])
    (folder / "writing").replace(folder / "model.onnx.data")
    wait_until(lambda: following.answer("renewed") == [2] * 5, "the new weights answer")
    with (folder / "model.onnx.data").open("r+b") as file:
        file.truncate(7)
    wait_until(lambda: "renewed version 1 stays as it was" in following.server.log(), "it is told")
    assert following.answer("renewed") == [2] * 5
    (folder / "model.onnx").write_bytes(EXTERNAL[:20])
    following.assert_still()
    assert following.answer("renewed") == [2] * 5
    following.put("renewed", ("model.onnx", EXTERNAL), ("model.onnx.data", WEIGHTS[3]))
    wait_until(lambda: following.answer("renewed") == [3] * 5, "whole again, the newest weights answer")


def test_weights_in_a_folder_below_count_and_a_file_in_their_place_is_tried_again(following):
    graph = toy_onnx_models.make_external("parts/weights.bin")
    folder = following.put("below", ("model.onnx", graph))
    (folder / "parts" / "weights.bin").mkdir(parents=True)  # so it cannot be read: root may read everything else
    following.wait_for("below", "UNAVAILABLE")
    following.assert_still()
    (folder / "parts" / "weights.bin").rmdir()
    (folder / "parts" / "weights.bin").write_bytes(WEIGHTS[2])
    following.wait_for("below", "READY")
    assert following.answer("below") == [2] * 5
    assert len(lines_about(following.server, "below")) == 1


def test_a_link_that_leads_nowhere_is_told_and_tried_again(following):
    target = following.folder.parent / "elsewhere.data"
    folder = following.put("linked", ("model.onnx", EXTERNAL))
    (folder / "model.onnx.data").symlink_to(target)
    following.wait_for("linked", "UNAVAILABLE")
    assert "No such file" in list_index(following.server)["linked", "1"]["reason"]
    target.write_bytes(WEIGHTS[3])
    following.wait_for("linked", "READY")
    target.unlink()
    following.assert_still()
    assert following.answer("linked") == [3] * 5


def test_weights_outside_of_the_version_are_never_read(following):
    (following.folder.parent / "outside.data").write_bytes(WEIGHTS[1])
    for name, location in (
        ("up", "../../../outside.data"),
        ("absolute", str(following.folder.parent / "outside.data")),
    ):
        following.put(name, ("model.onnx", toy_onnx_models.make_external(location)))
        following.wait_for(name, "UNAVAILABLE")
        reason = list_index(following.server)[name, "1"]["reason"]
        assert "is not in its version's folder" in reason
        assert "/" not in reason


def test_a_file_that_is_rewritten_with_its_old_size_and_time_gives_new_answers(following):
    """As by `cp --preserve` and by unpacking archives whose files all have one time."""
    folder = following.put("kept_time", ("model.onnx", EXTERNAL), ("model.onnx.data", WEIGHTS[1]))
    for file in folder.iterdir():
        os.utime(file, (0, 0))
    wait_until(lambda: following.answer_if_ready("kept_time") == [1] * 5, following.server.log)
    following.assert_still()
    (folder / "model.onnx.data").write_bytes(WEIGHTS[2])
    os.utime(folder / "model.onnx.data", (0, 0))
    wait_until(lambda: following.answer("kept_time") == [2] * 5, following.server.log)


def test_links_in_a_circle_and_pipes_hold_up_nothing(following):
    loop = following.folder / "in_a_circle"
    loop.symlink_to(loop.name)
    try:
        following.assert_still()  # a model that is added is served
    finally:
        loop.unlink()
    folder = following.put("circled", ("model.onnx", EXTERNAL))
    (folder / "model.onnx.data").symlink_to("model.onnx.data")
    following.wait_for("circled", "UNAVAILABLE")
    assert "Too many levels" in list_index(following.server)["circled", "1"]["reason"]
    (folder / "model.onnx.data").unlink()
    os.mkfifo(folder / "model.onnx.data")
    os.mkfifo(folder.parent / "default")
    following.assert_still()
    (folder / "model.onnx.data").unlink()
    following.put("circled", ("model.onnx.data", WEIGHTS[3]))
    following.wait_for("circled", "READY")
    assert following.answer("circled") == [3] * 5
    wait_until(lambda: "names 'something unreadable'" in following.server.log(), following.server.log)


def test_a_folder_that_may_not_be_looked_into_hides_no_model(tmp_path_factory):
    if os.geteuid():
        pytest.skip("only root can stop being root for a moment")
    (repository,) = load_together(REPOSITORY_DIR / "onnx", "repository")
    with tempfile.TemporaryDirectory() as base:
        Path(base).chmod(0o755)
        model = Path(base, "good", "1", "model.onnx")
        model.parent.mkdir(parents=True)
        model.write_bytes(b"")
        Path(base, "good", "lost+found").mkdir(mode=0o700)
        os.seteuid(65534)
        try:
            assert list(repository.Repository(Path(base), None).list_versions()) == [("good", "1")]
        finally:
            os.seteuid(0)


def test_an_escaped_name_is_never_taken_for_another(following):
    following.put("a%", ("model.onnx", toy_onnx_models.make_rows("same")))
    following.put("a%25", ("model.onnx", toy_onnx_models.make_rows("same")))
    following.wait_for("a%", "READY")
    following.wait_for("a%25", "READY")
    for path, name in (("/v2/models/a%25", "a%"), ("/v2/models/a%2525", "a%25"), ("/v2/models/%61%25", "a%")):
        assert get(following.server, path)[1]["name"] == name, path
    assert get(following.server, "HTTP://localhost/v2/models/a%25")[1]["name"] == "a%"  # RFC 3986, 3.1


def test_odd_models_that_are_dropped_in_do_not_end_the_watch(following):
    models = {"two": toy_onnx_models.make_two_inputs(), "none": toy_onnx_models.make_constant(), **ODD_FILES}
    models |= {name: model for name, (model, _) in toy_onnx_models.make_unservable().items()}
    for name, features in ODD_FEATURES.items():
        models[name] = toy_onnx_models.make_rows("same", properties={"features": features})
    for name, model in models.items():
        following.put(name, ("model.onnx", model))
    (following.folder / "folder" / "1" / "model.onnx").mkdir(parents=True)
    for name in (b"not utf-8 \xff", b"two\nlines"):
        folder = bytes(following.folder) + b"/" + name + b"/1"
        Path(folder.decode(errors="surrogateescape")).mkdir(parents=True)
        shutil.copy(following.folder / "two" / "1" / "model.onnx", folder + b"/model.onnx")
    odd_file = bytes(following.put("notes", ("model.onnx", models["two"]))) + b"/\xff.txt"
    Path(odd_file.decode(errors="surrogateescape")).write_text("x")
    following.assert_still()
    served = {name for name, _ in list_index(following.server) if following.state(name) == "READY"}
    assert served >= {"two", "none", "notes", *ODD_FEATURES}
    for name in models:
        assert len(lines_about(following.server, name)) <= 1
    assert following.server.log().count("cannot be printed") == 2
    assert "Traceback" not in following.server.log()


def test_a_repository_that_cannot_be_read_for_a_moment_changes_nothing(following):
    folder, away = following.folder, following.folder.with_name("away")
    elsewhere = folder.with_name("kept")
    elsewhere.mkdir()

    def link_kept(target: Path) -> None:
        """Replace the link in one step, for a server that looks at any moment."""
        (folder / ".link").symlink_to(target)
        (folder / ".link").replace(folder / "kept")

    link_kept(elsewhere)
    following.put("kept", ("model.onnx", toy_onnx_models.make_rows("same")))
    following.wait_for("kept", "READY")
    before = list_index(following.server)

    def is_told(times: int) -> bool:
        return following.server.log().count("the model repository cannot be read, all stays as it is") == times

    folder.rename(away)
    wait_until(lambda: is_told(1), "a look that failed")
    assert list_index(following.server) == before
    away.rename(folder)
    following.put("kept", ("model.onnx", toy_onnx_models.make_rows("centred")))
    wait_until(
        lambda: following.asker.ask("json", "kept", {"x": np.ones((1, 5), np.float32)})["y"].sum() == 0, "renewed"
    )
    folder.rename(away)
    folder.symlink_to(folder.with_name("nowhere"))
    wait_until(lambda: is_told(2), "a look that failed")
    assert {key for key, entry in list_index(following.server).items() if entry["state"] == "READY"} >= {
        key for key, entry in before.items() if entry["state"] == "READY"
    }
    folder.unlink()
    away.rename(folder)
    link_kept(folder / "nowhere")
    following.assert_still()
    assert following.state("kept") == "READY"
    link_kept(elsewhere)
    folder.rename(away)
    folder.mkdir()
    wait_until(lambda: list_index(following.server) == {}, "an empty folder unloads")
    assert get(following.server, "/v2/health/live")[0] == 200
    folder.rmdir()
    away.rename(folder)
    following.wait_for("kept", "READY")


# Under load


def ask_together(count: int, ask: Callable[[int], str]) -> list[str]:
    """Return what was wrong with `count` requests by 16 clients."""
    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        return [wrong for wrong in pool.map(ask, range(count)) if wrong]


def predict(asker: Asker, version: str, rows: np.ndarray) -> Arrays:
    status, _, reply = asker.send(f"/predict/{version}", json.dumps({"data": rows.tolist()}).encode())
    reply = json.loads(reply)
    if status != 200:
        raise AskError(status, reply["error"])
    return {"y": np.array(reply["predictions"], np.float32)}


@pytest.mark.parametrize("version", ["7", "8"])
def test_rows_that_depend_on_each_other_are_never_mixed(toys, asker, version):
    toy = toys[DEPENDENT_VERSIONS[version]]

    def ask(number: int) -> str:
        rows = np.full((1 + number % 3, 5), number, np.float32) + np.arange(1 + number % 3, dtype=np.float32)[:, None]
        way = ("predict", "json", "binary", "raw")[number % 4]
        given = predict(asker, version, rows) if way == "predict" else asker.ask(way, "my_model", {"x": rows}, version)
        return find_difference(given, toy.answer(rows))

    assert ask_together(320, ask) == []


def test_a_model_that_does_not_answer_row_by_row_has_no_predict(toys, asker):
    for path in ("/predict/9", "/predict/10"):
        status, _, reply = asker.send(path, b'{"data": [[1, 2, 3, 4, 5]]}')
        if path == "/predict/9":
            assert status == 404
            assert "is not a model of rows" in json.loads(reply)["error"]

    def ask(number: int) -> str:
        rows = np.full((1 + number % 3, 5), number, np.float32)
        return find_difference(asker.ask("json", "my_model", {"x": rows}, "9"), toys["averaged"].answer(rows))

    assert ask_together(100, ask) == []


def test_a_row_that_is_left_out_fails_its_own_request_only(toys, asker):
    """Only a run among others shows it: the trial's rows all have an answer."""

    def ask(number: int) -> str:
        value = 200 if number % 5 == 0 else number % 50
        rows = np.full((1, 5), value, np.float32)
        try:
            return find_difference(predict(asker, "10", rows), {"y": rows})
        except AskError as error:
            return "" if value == 200 and error.args[0] == 400 and "1 rows with 0" in error.args[1] else str(error)

    assert ask_together(200, ask) == []


@pytest.fixture(scope="module")
def load_model() -> Callable:
    """A function that loads a model as the server does, with these values of the module's constants."""
    models, settings = load_together(ONNX_DIR, "models", "settings")
    tuned = settings.read_settings(ONNX_DIR / "tuned.toml")

    def load(content: bytes, **constants: float) -> Any:
        with mock.patch.multiple(models, **{"TRIAL_LIMIT_S": models.TRIAL_LIMIT_S} | constants):
            return models.Model("toy", "1", {"model.onnx": content}, tuned)

    return load


@pytest.mark.parametrize("is_slow", [False, True])
def test_the_trial_finds_out_whose_rows_are_independent(load_model, is_slow):
    constants = {"TRIAL_LONG_S": 0.0} if is_slow else {}
    found = {kind: load_model(toy_onnx_models.make_rows(kind), **constants) for kind in DEPENDENT_VERSIONS.values()}
    assert [kind for kind, model in found.items() if model.batcher.max_rows] == ["choosy"]
    assert load_model(toy_onnx_models.make_rows("same"), **constants).batcher.max_rows == 1024
    assert load_model(toy_onnx_models.make_two_inputs(), **constants).batcher.max_rows == 1024


def test_a_model_whose_loop_never_ends_does_not_hold_up_the_start(load_model):
    model = load_model(toy_onnx_models.make_endless(), TRIAL_LIMIT_S=0.1)
    assert (model.batcher.max_rows, model.batcher.quick_size) == (0, 0)


def read_statistics(asker: Asker, name: str, version: str = "") -> dict:
    path = f"/v2/models/{name}/versions/{version}/stats" if version else f"/v2/models/{name}/stats"
    (found,) = [each for each in get(asker.port, path)[1]["model_stats"] if version in ("", each["version"])]
    return found


def test_independent_rows_share_runs_and_dependent_ones_do_not(toy_server, asker):
    def count(version: str) -> tuple[int, int]:
        found = read_statistics(asker, "my_model", version)
        return found["inference_count"], found["execution_count"]

    before = {version: count(version) for version in ("1", "7")}
    process = psutil.Process(toy_server.pid)
    clients = [http.client.HTTPConnection("127.0.0.1", asker.port, timeout=DEADLINE_S) for _ in range(16)]
    rows = iter(np.random.default_rng(5).random((160, 5)).astype(np.float32))
    for client in clients:
        client.connect()
    for _ in range(10):
        process.suspend()  # so that all come to it at once
        try:
            for number, client in enumerate(clients):
                client.request("POST", f"/predict/{'17'[number % 2]}", json.dumps({"data": [next(rows).tolist()]}))
        finally:
            process.resume()
        for client in clients:
            reply = client.getresponse()
            assert (reply.status, len(json.loads(reply.read())["predictions"])) == (200, 1)
    for client in clients:
        client.close()
    (rows_1, runs_1), (rows_7, runs_7) = ((b - a for a, b in zip(before[v], count(v), strict=True)) for v in ("1", "7"))
    assert (rows_1, rows_7, runs_7) == (80, 80, 80)
    assert runs_1 < rows_1


def count_wrong_of_a_mixture(toys: dict[str, Toy], asker: Asker, count: int, seed: int) -> list[str]:
    """Ask models of all shapes and types at once, in all forms; return what was wrong."""
    names = [name for name in toys if name != "choosy"]
    assert len(names) >= 20

    def ask(number: int) -> str:
        random = np.random.default_rng([seed, number])
        name, way = names[random.integers(len(names))], WAYS[random.integers(len(WAYS))]
        arrays = toys[name].make_inputs(random, most=2 + number % 9)
        if any(array.dtype == np.float16 for array in arrays.values()) and way == "contents":
            way = "raw"
        try:
            difference = find_difference(asker.ask(way, name, arrays), toys[name].answer(**arrays))
        except AskError as error:
            difference = str(error)
        return difference and f"{number}: {name}, {way}: {difference}"

    return ask_together(count, ask)


def test_all_kinds_of_models_asked_at_once_get_their_own_answers(toys, asker):
    assert count_wrong_of_a_mixture(toys, asker, 1500, seed=1) == []


@pytest.mark.slow
def test_all_kinds_of_models_asked_at_once_for_long_get_their_own_answers(toys, asker):
    assert count_wrong_of_a_mixture(toys, asker, 10_000, seed=2) == []


# Wrong requests


def shapes_of(arrays: Arrays) -> dict[str, tuple]:
    return {name: np.shape(array) for name, array in arrays.items()}


def send_damaged(asker: Asker, toy: Toy, name: str, chance: random.Random, arrays: Arrays) -> str:
    """Send a damaged request over REST; return its status, after the checks that hold for each."""
    binary = {key for key in arrays if chance.random() < 0.5}
    body, length, tail = damaged_requests.damage_rest(chance, *write_request(arrays, binary))
    status, headers, reply = asker.send(f"/v2/models/{name}/infer", body + tail, length)
    told = f"{name}: {body + tail!r:.1500}, header length {length}: {status} {reply!r:.300}"
    if status != 200:
        assert 400 <= status < 500, told
        error = json.loads(reply)
        assert list(error) == ["error"], told
        assert isinstance(error["error"], str), told
        assert error["error"], told
        return str(status)
    _, given = read_reply(status, headers, reply)
    whole = body + tail
    end = len(whole) if length is None else int(str(length))
    asked = json.loads(whole[:end].decode(errors="replace"))  # what is ignored need not be UTF-8
    with np.errstate(all="ignore"):
        expected = toy.answer(**damaged_requests.read_request(asked, whole[end:]))
    wanted = [each["name"] for each in asked.get("outputs") or []] or list(expected)
    assert shapes_of(given) == shapes_of({key: expected[key] for key in wanted}), told
    return "200"


def call_damaged(asker: Asker, toy: Toy, name: str, chance: random.Random, arrays: Arrays) -> str:
    """The same over gRPC."""
    raw = chance.random() < 0.5 or any(array.dtype == np.float16 for array in arrays.values())
    asked = write_message(name, arrays, raw)
    damaged_requests.damage_message(chance, asked)
    try:
        given = asker.call(asked)
    except AskError as error:
        assert error.args[0] == "INVALID_ARGUMENT", f"{asked}: {error}"
        assert error.args[1], asked
        return error.args[0]
    with np.errstate(all="ignore"):
        expected = toy.answer(**damaged_requests.read_message(asked))
    wanted = [each.name for each in asked.outputs] or list(expected)
    assert shapes_of(given) == shapes_of({key: expected[key] for key in wanted}), asked
    return "OK"


def damage_all(toys: dict[str, Toy], server: ServerProcess, asker: Asker, count: int, seed: int) -> collections.Counter:
    """Send `count` damaged requests, a right one after every fourth; return how many had which status."""
    names = [name for name in toys if name != "choosy"]
    chance, numbers = random.Random(seed), np.random.default_rng(seed)
    statuses: collections.Counter = collections.Counter()
    for number in range(count):
        name = names[number % len(names)]
        arrays = toys[name].make_inputs(numbers, most=3)
        over = send_damaged if chance.random() < 0.7 else call_damaged
        statuses[over(asker, toys[name], name, chance, arrays)] += 1
        if number % 4 == 0:
            way = "json" if over is send_damaged else "raw"
            assert find_difference(asker.ask(way, name, arrays), toys[name].answer(**arrays)) == ""
    assert server.process.poll() is None
    assert "Traceback" not in server.log()
    return statuses


def test_wrong_requests_are_refused_and_change_nothing(toys, toy_server, asker):
    statuses = damage_all(toys, toy_server, asker, 1000, seed=1)
    assert statuses["400"] > 400
    assert statuses["INVALID_ARGUMENT"] > 150


@pytest.mark.slow
def test_many_wrong_requests_are_refused_and_change_nothing(toys, toy_server, asker, capsys):
    statuses = damage_all(toys, toy_server, asker, 20_000, seed=2)
    with capsys.disabled():
        print(f"\n20,000 damaged requests: {dict(statuses)}")


# NVIDIA's client


def make_tensors(package: Any, arrays: Arrays, **how: Any) -> list:
    tensors = []
    for name, array in arrays.items():
        tensor = package.InferInput(name, list(array.shape), DATATYPES[str(array.dtype)])
        tensor.set_data_from_numpy(array, **how)
        tensors.append(tensor)
    return tensors


@pytest.fixture
def triton(toy_server):
    """Both of NVIDIA's packages, each with a client of the toys' server."""
    import tritonclient.grpc
    import tritonclient.http

    ports = toy_server.endpoint.ports
    with (
        tritonclient.http.InferenceServerClient(f"127.0.0.1:{ports['rest']}", concurrency=4) as rest,
        tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{ports['grpc']}") as grpc,
    ):
        yield {"http": (tritonclient.http, rest), "grpc": (tritonclient.grpc, grpc)}


TWO = {name: np.arange(6, dtype=np.float32).reshape(2, 3) * scale for name, scale in (("a", 1), ("b", 10))}


def assert_two(result: Any) -> None:
    assert np.array_equal(result.as_numpy("sum"), TWO["a"] + TWO["b"])
    assert np.array_equal(result.as_numpy("difference"), TWO["a"] - TWO["b"])


@pytest.mark.parametrize("over", ["http", "grpc"])
def test_tritonclient_asks_metadata_index_statistics_and_inference(triton, over):
    package, client = triton[over]
    as_json = {} if over == "http" else {"as_json": True}
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("two")
    assert not client.is_model_ready("two", "2")
    assert not client.is_model_ready("sequence")
    assert client.get_server_metadata(**as_json)["name"] == "onnxruntime"
    described = client.get_model_metadata("two", **as_json)
    assert [each["name"] for each in described["inputs"]] == ["a", "b"]
    assert [each["name"] for each in described["outputs"]] == ["sum", "difference"]
    index = client.get_model_repository_index(**as_json)
    index = index if over == "http" else index["models"]
    assert {(each["name"], each["state"]) for each in index} >= {("two", "READY"), ("sequence", "UNAVAILABLE")}
    assert_two(client.infer("two", make_tensors(package, TWO), request_id="9", priority=1, timeout=10**7))
    found = client.get_inference_statistics("two", **as_json)["model_stats"]
    assert [(each["name"], each["version"]) for each in found] == [("two", "1")]
    assert int(found[0]["inference_count"]) >= 2


def test_tritonclient_asks_without_waiting(triton):
    package, client = triton["http"]
    for asked in [client.async_infer("two", make_tensors(package, TWO)) for _ in range(8)]:
        assert_two(asked.get_result())
    package, client = triton["grpc"]
    answers: list = []
    for _ in range(8):
        client.async_infer("two", make_tensors(package, TWO), lambda result, error: answers.append(error or result))
    wait_until(lambda: len(answers) == 8, "all answers")
    for answer in answers:
        assert_two(answer)


def test_tritonclient_streams_requests_and_an_error_does_not_end_the_stream(triton):
    package, client = triton["grpc"]
    answers: list = []
    client.start_stream(lambda result, error: answers.append((result, error)))
    for name in ("two", "two", "nobody", "two"):
        client.async_stream_infer(name, make_tensors(package, TWO), request_id=f"{name} asked")
    wait_until(lambda: len(answers) == 4, "all answers")
    client.stop_stream()
    assert [error is None for _, error in answers] == [True, True, False, True]
    assert "'nobody' is not served" in str(answers[2][1])
    for result, error in answers:
        if error is None:
            assert_two(result)
            assert result.get_response().id == "two asked"


@pytest.mark.parametrize("over", ["http", "grpc"])
def test_tritonclient_asks_from_an_event_loop(toy_server, over):
    import asyncio
    import importlib

    package = importlib.import_module(f"tritonclient.{over}.aio")
    port = toy_server.endpoint.ports["rest" if over == "http" else "grpc"]

    async def ask() -> list:
        async with package.InferenceServerClient(f"127.0.0.1:{port}") as client:
            assert await client.is_model_ready("two")
            return await asyncio.gather(*(client.infer("two", make_tensors(package, TWO)) for _ in range(8)))

    for result in asyncio.run(ask()):
        assert_two(result)


@pytest.mark.parametrize("over", ["http", "grpc"])
def test_tritonclient_is_refused_by_name_what_is_not_supported(triton, over):
    package, client = triton[over]
    tensors = make_tensors(package, TWO)

    def assert_refused(words: str, call: Callable, *arguments: Any, **named: Any) -> Any:
        with pytest.raises(Exception, match=words) as refused:
            call(*arguments, **named)
        assert type(refused.value).__name__ == "InferenceServerException"
        return refused.value

    shared = package.InferInput("a", [2, 3], "FP32")
    shared.set_shared_memory("region", 24)
    assert_refused("shared memory is not supported", client.infer, "two", [shared, tensors[1]])
    output = package.InferRequestedOutput("sum")
    output.set_shared_memory("region", 24)
    assert_refused("shared memory is not supported", client.infer, "two", tensors, outputs=[output])
    output = package.InferRequestedOutput("sum", class_count=1)
    assert_refused("classification extension is not supported", client.infer, "two", tensors, outputs=[output])
    calls = {
        "model configurations are": (client.get_model_config, "two"),
        "loading is": (client.load_model, "two"),
        "unloading is": (client.unload_model, "two"),
        "shared memory is": (client.register_system_shared_memory, "region", "/region", 24),
        "tracing is": (client.get_trace_settings,),
        "log settings are": (client.get_log_settings,),
    }
    for words, call in calls.items():
        if over == "grpc":
            assert "UNIMPLEMENTED" in assert_refused(f"{words} not supported", *call).status()
        else:
            assert assert_refused(r"no such path|is not served", *call).status() == "404"
    assert_refused("'nobody' is not served", client.get_model_metadata, "nobody")
    assert_two(client.infer("two", tensors))


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
@pytest.mark.parametrize("over", ["http", "grpc"])
def test_tritonclient_compresses_its_requests(triton, over, algorithm):
    package, client = triton[over]
    how = {"request_compression_algorithm" if over == "http" else "compression_algorithm": algorithm}
    for options in ({}, {"binary_data": False}) if over == "http" else ({},):
        assert_two(client.infer("two", make_tensors(package, TWO, **options), **how))


# Statistics and slow models


def test_statistics_count_inferences_executions_and_failures(toys, asker):
    def over_grpc() -> dict:
        (found,) = asker.stub.ModelStatistics(asker.messages.ModelStatisticsRequest(name="pool")).model_stats
        from google.protobuf.json_format import MessageToDict

        return MessageToDict(found, preserving_proto_field_name=True)

    def numbers(found: dict) -> tuple[int, ...]:
        parts = found.get("inference_stats", {})
        counts = [int(parts.get(part, {}).get("count", 0)) for part in ("success", "fail", "compute_infer")]
        return int(found.get("inference_count", 0)), int(found.get("execution_count", 0)), *counts

    before = numbers(read_statistics(asker, "pool"))
    started_ms = time.time() * 1e3
    arrays = {"x": np.ones((2, 3, 4, 4), np.float32)}
    for way in WAYS:  # one by one: each has its own run, of two rows
        asker.ask(way, "pool", arrays)
    for way in WAYS[:3]:
        with pytest.raises(AskError):
            asker.ask(way, "pool", {"x": np.ones((2, 4, 4, 4), np.float32)})
    asked = write_message("pool", {"x": np.ones((1, 1), np.float32)}, raw=True)
    with pytest.raises(AskError):
        asker.call(asked)
    found = read_statistics(asker, "pool")
    assert tuple(b - a for a, b in zip(before, numbers(found), strict=True)) == (10, 5, 5, 4, 5)
    assert started_ms - 1 <= found["last_inference"] <= time.time() * 1e3
    assert all(part["ns"] > 0 for part in found["inference_stats"].values())
    assert numbers(over_grpc()) == numbers(found)
    assert get(asker.port, "/v2/models/stats")[1]["model_stats"]
    assert get(asker.port, "/v2/models/nobody/stats")[0] == 404


def count_beside(slow: Callable[[], None], small: Callable[[], None], slow_runs: int) -> int:
    """Return how many small requests are answered while `slow_runs` slow ones are.

    Each slow one has to take 0.1 s or more: long enough for many small ones on a busy machine, too.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(lambda: [slow() for _ in range(slow_runs)])
        answered = 0
        while not running.done():
            small()
            answered += 1
        running.result()
    return answered


def test_a_slow_model_does_not_hold_up_a_small_one(asker):
    """If it did, there would be one small answer for each slow one."""
    wide = {"x": np.arange(1024, dtype=np.float32)[None]}
    for way in ("binary", "raw"):
        answered = count_beside(
            lambda way=way: asker.ask(way, "chain", wide), lambda: predict(asker, "1", np.ones((1, 5), np.float32)), 6
        )
        assert answered > 30, way


def test_a_large_request_over_grpc_does_not_hold_up_a_small_one(asker):
    """If it did, a small one would wait as long as reading, running and writing take."""
    message = write_message("same_bytes", {"x": np.full((1, 200_000), "", object)}, raw=True)
    row, shares = np.ones((1, 5), np.float32), []

    def time_of(ask: Callable[[], Any]) -> float:
        started_s = time.perf_counter()
        ask()
        return time.perf_counter() - started_s

    for _ in range(3):
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            large = pool.submit(time_of, lambda: asker.stub.ModelInfer(message, timeout=DEADLINE_S))
            longest_s = 0.0
            while not large.done():
                longest_s = max(longest_s, time_of(lambda: predict(asker, "1", row)))
            shares.append(longest_s / large.result())
        if shares[-1] < 0.3:  # 0.6 and more if it did, 0.1 and less as it is
            return
    raise AssertionError(shares)


def test_a_model_that_is_slow_for_some_values_does_not_hold_up_a_small_one_for_long(asker):
    """The trial counts to 0 or 1: only its requests show that it can take long."""
    long = {"count": np.array(100_000)}
    for _ in range(3):
        asker.ask("json", "looped", long)
    answered = count_beside(
        lambda: asker.ask("json", "looped", long), lambda: predict(asker, "1", np.ones((1, 5), np.float32)), 6
    )
    assert answered > 30
