"""The local server as a stand-in for tensorflow_model_server: any SavedModel, versions, damage, flags, its end."""

import base64
import contextlib
import importlib.metadata
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import grpc_connection
import numpy as np
import psutil
import pytest
from bad_requests import GOOD_ROW
from endpoint import REPOSITORY_DIR, Request
from free_ports import find_free_ports
from predict_messages import METHOD, import_messages
from reference import TOLERANCE, load_expected, load_test_rows
from server_process import send

FOLDER = REPOSITORY_DIR / "tfserving"
MODELS = FOLDER / "models" / "my_model"
KERAS_2 = REPOSITORY_DIR / "tests" / "keras2"
DEADLINE_S = 180.0
MAX_MESSAGE_BYTES = 1_000_000  # of the gRPC side of the server under test

TOY_MODELS = """
import sys
from pathlib import Path
from quiet_tensorflow import tf

target = Path(sys.argv[1])

# Two inputs of rank 1 and 2, two outputs; strings and bytes; integers; a graph that fails.
class Toys(tf.Module):
    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, "x"), tf.TensorSpec([None, 2], tf.float64, "y")])
    def mixed(self, x, y):
        return {"a": x + 1, "b": y * 2}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "text")])
    def texts(self, text):
        return {"upper": tf.strings.upper(text), "raw_bytes": text}

    @tf.function(input_signature=[tf.TensorSpec([None, None], tf.int64, "n")])
    def integers(self, n):
        return {"sum": tf.reduce_sum(n, axis=1), "even": tf.reduce_all(n % 2 == 0, axis=1)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, "x")])
    def whole(self, x):
        return {"mean": tf.reduce_mean(x)}

    # As many products of matrices as asked for: a graph that takes its time.
    @tf.function(input_signature=[tf.TensorSpec([None], tf.int32, "n")])
    def work(self, n):
        _, square = tf.while_loop(
            lambda i, square: i < n[0], lambda i, square: (i + 1, tf.matmul(square, square)), (0, tf.eye(300)))
        return {"trace": tf.linalg.trace(square)[tf.newaxis]}

    # The same for any number of rows, which cost no more than one.
    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, "x")])
    def heavy(self, x):
        tf.debugging.assert_less(x, 1e6)
        _, square = tf.while_loop(
            lambda i, square: i < 150, lambda i, square: (i + 1, tf.matmul(square, square)), (0, tf.eye(300)))
        return {"y": 2 * x + tf.linalg.trace(square) - 300}

toys = Toys()
tf.saved_model.save(toys, str(target / "toys" / "007"), {
    "serving_default": toys.mixed, "texts": toys.texts, "integers": toys.integers, "whole": toys.whole})
tf.saved_model.save(toys, str(target / "slow" / "1"), {"serving_default": toys.work})
tf.saved_model.save(toys, str(target / "heavy" / "1"), {"serving_default": toys.heavy})

# A file of words as an asset, and the table that is filled from it when the model is loaded.
class Words(tf.Module):
    def __init__(self, path):
        self.path = tf.saved_model.Asset(path)
        self.table = tf.lookup.StaticHashTable(tf.lookup.TextFileInitializer(
            self.path, tf.string, tf.lookup.TextFileIndex.WHOLE_LINE,
            tf.int64, tf.lookup.TextFileIndex.LINE_NUMBER), -1)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "word")])
    def number(self, word):
        return {"number": self.table.lookup(word)}

(target / "words.txt").write_text("benign\\nmalignant\\n")
words = Words(str(target / "words.txt"))
tf.saved_model.save(words, str(target / "words" / "1"), {"serving_default": words.number})
(target / "words.txt").unlink()  # the SavedModel has its own copy

# TensorFlow 1's way: a session, variables by name, signatures made by hand.
with tf.Graph().as_default(), tf.compat.v1.Session() as session:
    x = tf.compat.v1.placeholder(tf.float32, [None], "x")
    half = tf.compat.v1.get_variable("half", initializer=0.5)
    y = x * half + 2
    session.run(tf.compat.v1.global_variables_initializer())
    tf.compat.v1.saved_model.simple_save(session, str(target / "half_plus_two" / "123"), {"x": x}, {"y": y})

# The older verbs: signatures that take serialized tf.Examples.
with tf.Graph().as_default(), tf.compat.v1.Session() as session:
    v1 = tf.compat.v1
    serialized = v1.placeholder(tf.string, [None], "serialized")
    one = tf.io.FixedLenFeature([1], tf.float32, default_value=[0.0])
    parsed = v1.io.parse_example(serialized, {"x": one, "bias": one})
    score = parsed["x"] + parsed["bias"]
    classes = tf.tile([["yes", "no"]], [tf.shape(score)[0], 1])
    builder = v1.saved_model.Builder(str(target / "verbs" / "1"))
    builder.add_meta_graph_and_variables(session, ["serve"], {
        "serving_default": v1.saved_model.classification_signature_def(
            serialized, classes, tf.concat([score, 1 - score], 1)),
        "value": v1.saved_model.regression_signature_def(serialized, score),
    })
    builder.save()

# Keras's own export of a network.
import keras
keras.utils.set_random_seed(1)
network = keras.Sequential([keras.Input((3,), name="x"), keras.layers.Dense(2)])
network.export(str(target / "keras3" / "1"), verbose=False)
(target / "keras.txt").write_text(repr(network(tf.constant([[1.0, 2.0, 3.0]])).numpy().tolist()))
print("written")
"""


def python(*arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=FOLDER,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, list[str]]:
    """Return the exit code and the lines of output of a process that is expected to end."""
    output, _ = process.communicate(timeout=DEADLINE_S)
    return process.returncode, output.splitlines()


def post(port: int, path: str, body: dict) -> tuple[int, dict]:
    status, reply = send(port, Request(f"/v1/models/{path}", json.dumps(body).encode()))
    return status, json.loads(reply)


def predict_request(model: str, alias: str, value: float | int) -> bytes:
    """A PredictRequest for one number, in DT_FLOAT or DT_INT32."""
    request = import_messages().PredictRequest()
    request.model_spec.name = model
    tensor = request.inputs[alias]
    tensor.tensor_shape.dim.add(size=1)
    if isinstance(value, float):
        tensor.dtype = 1
        tensor.float_val.append(value)
    else:
        tensor.dtype = 3
        tensor.int_val.append(value)
    return request.SerializeToString()


def statuses(port: int, model: str) -> dict[str, dict]:
    status, reply = send(port, Request(f"/v1/models/{model}", b"", method="GET"))
    assert status == 200, reply
    return {entry["version"]: entry for entry in json.loads(reply)["model_version_status"]}


@pytest.fixture(scope="module")
def toy_models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy_models")
    code, lines = finish(python("-c", f"import sys; sys.path.insert(0, {str(FOLDER)!r})\n{TOY_MODELS}", folder))
    assert (code, lines[-1:]) == (0, ["written"]), lines
    return folder


@pytest.fixture(scope="module")
def only_damaged(tmp_path_factory):
    """A server in the background, started with no version that can be loaded."""
    folder = tmp_path_factory.mktemp("only_damaged")
    (folder / "1").mkdir()
    (folder / "1" / "saved_model.pb").write_bytes(b"no graph")
    port = find_free_ports(["grpc"])["grpc"]
    process = python("local_server.py", f"--port={port}", "--model_name=m", f"--model_base_path={folder}")
    yield process
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def server(only_damaged, toy_models, tmp_path_factory):
    """(process, ports, log) of a local server with damaged, toy and real models."""
    folder = tmp_path_factory.mktemp("models")
    for version in ("1", "2", "3", "4", "5"):
        if version != "4":
            shutil.copytree(MODELS / "1", folder / "my_model" / version)
    (folder / "my_model" / "2" / "saved_model.pb").write_bytes(b"no graph")
    data = folder / "my_model" / "3" / "variables" / "variables.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:100])
    (folder / "my_model" / "4").mkdir()
    (folder / "my_model" / "5" / "assets.extra" / "tf_serving_warmup_requests").write_bytes(b"no records" * 10)
    (folder / "my_model" / "not-a-version").mkdir()
    config = folder / "models.config"
    config.write_text(
        "model_config_list {\n"
        f'  config {{ name: "my_model" base_path: "{folder}/my_model" model_platform: "tensorflow"\n'
        '    model_version_policy { all {} } version_labels { key: "gone" value: 2 } }\n'
        f'  config {{ name: "toys" base_path: "{toy_models}/toys" }}\n'
        f'  config {{ name: "half_plus_two" base_path: "{toy_models}/half_plus_two" }}\n'
        f'  config {{ name: "verbs" base_path: "{toy_models}/verbs" }}\n'
        f'  config {{ name: "slow" base_path: "{toy_models}/slow" }}\n'
        f'  config {{ name: "words" base_path: "{toy_models}/words" }}\n'
        f'  config {{ name: "keras2" base_path: "{KERAS_2}" }}\n'
        f'  config {{ name: "keras3" base_path: "{toy_models}/keras3" }}\n'
        f'  config {{ name: "latest" base_path: "{MODELS}" }}\n'
        f'  config {{ name: "specific" base_path: "{MODELS}"\n'
        "    model_version_policy { specific { versions: 1 versions: 7 } } }\n"
        "}\n"
    )
    ports = find_free_ports(["rest", "grpc"])
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [
                FOLDER / "local_server.py",
                *("--port", str(ports["grpc"]), f"--rest_api_port={ports['rest']}", f"--model_config_file={config}"),
                "--allow_version_labels_for_unavailable_models",
                *("--max_num_load_retries=0", f"--monitoring_config_file={FOLDER / 'monitoring.config'}"),
                *("--rest_api_timeout_in_ms=100", "--rest_api_num_threads=2"),
                f"--grpc_socket_path={folder / 'socket'}",
                f"--grpc_channel_arguments=grpc.max_receive_message_length={MAX_MESSAGE_BYTES}",
            ],
            env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline_s = time.monotonic() + DEADLINE_S
        while " ready at " not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline_s, log.read_text()
            time.sleep(0.05)
        yield process, ports, log
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def port(server) -> int:
    return server[1]["rest"]


# Any SavedModel.


def test_several_inputs_and_outputs_are_named_in_rows_and_columns(port):
    rows = {"instances": [{"x": 1, "y": [1, 2]}, {"x": 0.1, "y": [0.5, -1]}]}
    expected = [{"a": 2.0, "b": [2.0, 4.0]}, {"a": 1.1, "b": [1.0, -2.0]}]
    assert post(port, "toys:predict", rows) == (200, {"predictions": expected})
    columns = {"inputs": {"x": [1], "y": [[1, 2]]}, "signature_name": "serving_default"}
    assert post(port, "toys:predict", columns) == (200, {"outputs": {"a": [2.0], "b": [[2.0, 4.0]]}})


def test_values_that_are_no_numbers_go_in_and_out_as_tokens(port):
    body = b'{"inputs": {"x": [NaN, Infinity, -Infinity, 0.1], "y": [[0.1, NaN]]}}'
    status, reply = send(port, Request("/v1/models/toys:predict", body))
    assert status == 200
    values = reply.decode().split()
    assert values[values.index('"a":') + 1 :][:6] == ["[", "NaN,", "Infinity,", "-Infinity,", "1.1", "],"]
    assert values[values.index('"b":') + 1 :][:7] == ["[", "[", "0.2,", "NaN", "]", "]", "}"]


def test_strings_go_in_plain_or_as_base64_and_bytes_come_out_as_base64(port):
    body = {"signature_name": "texts", "instances": ["abc", {"b64": base64.b64encode(b"\xc3\xa4x").decode()}]}
    status, reply = post(port, "toys:predict", body)
    assert status == 200
    assert [row["upper"] for row in reply["predictions"]] == ["ABC", "äX"]
    assert [base64.b64decode(row["raw_bytes"]["b64"]) for row in reply["predictions"]] == [b"abc", b"\xc3\xa4x"]


def test_integers_and_booleans_keep_their_type(port):
    body = {"signature_name": "integers", "instances": [[2**53 + 2, 4], [2**53 + 1, -4]]}
    expected = [{"even": True, "sum": 2**53 + 6}, {"even": False, "sum": 2**53 - 3}]
    assert post(port, "toys:predict", body) == (200, {"predictions": expected})
    status, reply = post(port, "toys:predict", {"signature_name": "integers", "instances": [[1.0]]})
    assert (status, "Type: Number is not of expected type: int64" in reply["error"]) == (400, True)


def test_an_output_without_rows_needs_the_columnar_format(port):
    body = {"signature_name": "whole", "inputs": [1, 2, 6]}
    assert post(port, "toys:predict", body) == (200, {"outputs": 3.0})
    status, reply = post(port, "toys:predict", {"signature_name": "whole", "instances": [1, 2, 6]})
    assert (status, reply["error"]) == (400, "Tensor name: mean has no shape information ")


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"instances": [1, 2]}, "instances is a plain list, but expecting list of objects"),
        ({"inputs": [1, 2]}, "inputs is a plain value/list, but expecting an object"),
        ({"inputs": {"x": [1]}}, "Missing named input: y in 'inputs' object."),
        ({"instances": [{"x": 1}]}, "keys must be equal to: x,y"),
        ({"instances": [{"x": 1, "y": [1, 2], "z": 3}]}, "JSON object: does not have named input: z"),
        ({"instances": [{"x": 1, "y": [1, 2]}, 5]}, "Expecting object but got list at item 1 of input list"),
        ({"instances": [{"x": 1, "y": [1, 2]}, {"x": 1, "y": [[1], [2]]}]}, "Expecting shape [2] but got: [2,1]"),
        ({"instances": [{"x": 1, "y": [1, [2]]}]}, "Encountered list at unexpected level: 1 expected < 1"),
        ({"inputs": {"x": [1], "y": [[1], 2]}}, "found at incorrect level: 2 in the JSON DOM. Expected at level: 2"),
        ({"signature_name": "texts", "instances": [{"b64": "?"}]}, "Unable to base64 decode"),
        ({"signature_name": "texts", "instances": ["a", {"b": "?"}]}, "Expecting value/list but got object at item 1"),
        ({"signature_name": 1}, "'signature_name' key must be a string value."),
    ],
)
def test_errors_of_named_inputs_are_worded_as_tensorflow_serving_does(port, body, error):
    status, reply = post(port, "toys:predict", body)
    assert (status, error in reply["error"]) == (400, True), reply


def test_a_model_of_tensorflow_1_is_served(port):
    assert post(port, "half_plus_two:predict", {"instances": [1.0, 2.0, 5.0]}) == (
        200,
        {"predictions": [2.5, 3.0, 4.5]},
    )
    status, body = send(port, Request("/v1/models/half_plus_two:predict", b'{"instances": [1.0, 2.0, 5.0]}'))
    assert body == b'{\n    "predictions": [2.5, 3.0, 4.5\n    ]\n}'


def test_a_vocabulary_that_the_model_brings_along_is_read(port):
    words = ["malignant", "benign", "unheard-of"]
    assert post(port, "words:predict", {"instances": words}) == (200, {"predictions": [1, 0, -1]})


def test_a_slow_graph_ends_at_the_time_limit_and_holds_up_nobody(server):
    process, ports, _ = server
    post(ports["rest"], "slow:predict", {"instances": [400]})  # answered on the spot: only now it is known as slow
    for _ in range(3):
        with ThreadPoolExecutor(1) as pool:
            slow = start_slow_call(pool, process, ports, 400)
            assert post(ports["rest"], "half_plus_two:predict", {"instances": [1.0]})[0] == 200
            if not slow.done():
                break
    else:
        pytest.fail("the quick request was answered only after the slow one, three times")
    status, reply = post(ports["rest"], "slow:predict", {"instances": [400]})
    assert (status, reply) == (504, {"error": "Timed out waiting for notification"})


def start_slow_call(pool: ThreadPoolExecutor, process: subprocess.Popen, ports: dict[str, int], products: int):
    """Return the future of a gRPC call that the server is computing now; gRPC has no time limit."""
    call = Request(METHOD, predict_request("slow", "n", products), content_type="application/grpc")
    busy_s = psutil.Process(process.pid).cpu_times().user
    under_way = pool.submit(grpc_connection.send, ports["grpc"], call)
    while psutil.Process(process.pid).cpu_times().user < busy_s + 0.05 and not under_way.done():
        time.sleep(0.005)
    return under_way


# Versions.


def test_version_folders_are_read_as_integers(port):
    assert list(statuses(port, "toys")) == ["7"]
    body = {"inputs": {"x": [], "y": [[1, 2]]}}
    assert post(port, "toys/versions/7:predict", body) == (200, {"outputs": {"a": [], "b": [[2.0, 4.0]]}})


def test_policies_choose_versions(port):
    assert list(statuses(port, "latest")) == ["2"]
    assert list(statuses(port, "specific")) == ["1"]
    status, reply = post(port, "specific/versions/2:predict", {"instances": [GOOD_ROW]})
    assert (status, reply["error"]) == (404, "Servable not found for request: Specific(specific, 2)")


def test_a_damaged_version_is_kept_out_and_the_others_are_served(server):
    _, ports, log = server
    states = statuses(ports["rest"], "my_model")
    assert {version: entry["state"] for version, entry in states.items()} == {
        "5": "END",
        "4": "END",
        "3": "END",
        "2": "END",
        "1": "AVAILABLE",
    }
    assert states["4"]["status"]["error_code"] == "NOT_FOUND"
    assert all(states[version]["status"]["error_message"] for version in "2345")
    lines = [line for line in log.read_text().splitlines() if "not loaded" in line]
    assert [line.split()[4] for line in lines] == ["5", "4", "3", "2"], "tried again despite --max_num_load_retries=0"
    assert post(ports["rest"], "my_model:predict", {"instances": [GOOD_ROW]})[0] == 200
    status, reply = post(ports["rest"], "my_model/labels/gone:predict", {"instances": [GOOD_ROW]})
    assert (status, reply["error"]) == (404, "Servable not found for request: Specific(my_model, 2)")


def test_with_no_version_that_loads_the_server_ends(only_damaged):
    code, lines = finish(only_damaged)
    assert code == 1
    assert lines[0].startswith("local server: m version 1 not loaded: Cannot parse file")
    assert lines[1:] == ["local server: no version could be loaded; run python export_model.py"]


# Classify, regress, multi-inference.


def test_classify_gives_labels_and_scores_and_regress_gives_values(port):
    body = {"context": {"bias": 0.25}, "examples": [{"x": 0.5}, {"x": [0.25], "bias": 0.5}]}
    labelled = [[["yes", 0.75], ["no", 0.25]], [["yes", 0.75], ["no", 0.25]]]
    assert post(port, "verbs:classify", body) == (200, {"results": labelled})
    assert post(port, "verbs:regress", {**body, "signature_name": "value"}) == (200, {"results": [0.75, 0.75]})


@pytest.mark.parametrize(
    ("path", "body", "error"),
    [
        ("verbs:classify", {"examples": []}, "key 'examples' is expected"),
        ("verbs:classify", {"instances": [[1]]}, "key 'examples' is expected"),
        ("verbs:classify", {"examples": [[1]]}, "Example must be JSON object"),
        ("verbs:classify", {"examples": [{"x": None}]}, "Unsupported value of feature: x"),
        ("verbs:classify", {"examples": [{"x": [0.5, "a"]}]}, "all values must be of one type"),
        ("verbs:classify", {"examples": [{"x": 1}]}, "Data types don't match"),
        ("verbs:classify", {"examples": [{}], "signature_name": "z"}, "No signature was found with the name: z"),
        ("verbs:regress", {"examples": [{"x": 0.5}]}, "method_name to be tensorflow/serving/regress. Was: tensorflow"),
        ("toys:classify", {"examples": [{"x": 0.5}]}, "Was: tensorflow/serving/predict"),
    ],
)
def test_a_wrong_classify_or_regress_request_is_told(port, path, body, error):
    status, reply = post(port, path, body)
    assert status == 400, reply
    assert error in reply["error"]


EXAMPLES = """
import sys
from quiet_tensorflow import tf
import grpc
from tensorflow_serving.apis import classification_pb2, inference_pb2, prediction_service_pb2_grpc, regression_pb2

def fill(request):
    for x in (0.5, 0.75):
        feature = request.input.example_list.examples.add().features.feature["x"]
        feature.float_list.value.append(x)
    return request

with grpc.insecure_channel(f"127.0.0.1:{sys.argv[1]}") as channel:
    stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    classify = fill(classification_pb2.ClassificationRequest())
    classify.model_spec.name = "verbs"
    reply = stub.Classify(classify)
    rows = [[(c.label, c.score) for c in row.classes] for row in reply.result.classifications]
    print(rows, reply.model_spec.version.value)
    regress = fill(regression_pb2.RegressionRequest())
    regress.model_spec.name, regress.model_spec.signature_name = "verbs", "value"
    print([r.value for r in stub.Regress(regress).result.regressions])
    both = fill(inference_pb2.MultiInferenceRequest())
    both.tasks.add(method_name="tensorflow/serving/classify").model_spec.name = "verbs"
    task = both.tasks.add(method_name="tensorflow/serving/regress")
    task.model_spec.name, task.model_spec.signature_name = "verbs", "value"
    results = stub.MultiInference(both).results
    print([r.WhichOneof("result") for r in results], [r.value for r in results[1].regression_result.regressions])
    task.model_spec.signature_name = ""
    try:
        stub.MultiInference(both)
    except grpc.RpcError as error:
        print(error.code().name, error.details())
"""


def test_grpc_has_the_older_verbs_too(server):
    code, lines = finish(python("-c", f"import sys; sys.path.insert(0, '.')\n{EXAMPLES}", server[1]["grpc"]))
    assert code == 0, lines
    assert lines[-4:] == [
        "[[('yes', 0.5), ('no', 0.5)], [('yes', 0.75), ('no', 0.25)]] 1",
        "[0.5, 0.75]",
        "['classification_result', 'regression_result'] [0.5, 0.75]",
        "INVALID_ARGUMENT Duplicate evaluation of signature: serving_default",
    ]


def test_grpcs_own_options_are_passed_on(server):
    request = Request(METHOD, bytes(MAX_MESSAGE_BYTES + 1), content_type="application/grpc")
    status, message = grpc_connection.send(server[1]["grpc"], request)
    assert (status, b"larger than max" in message) == ("grpc-status 8", True), message  # RESOURCE_EXHAUSTED


def test_what_keras_exports_by_itself_is_served(port, toy_models):
    status, reply = post(port, "keras3:predict", {"instances": [[1.0, 2.0, 3.0]]})
    assert status == 200, reply
    expected = json.loads((toy_models / "keras.txt").read_text())
    assert np.abs(np.array(reply["predictions"]) - expected).max() <= TOLERANCE


def samples(page: str) -> dict[str, float]:
    """The samples of a Prometheus page by name and labels."""
    lines = [line for line in page.splitlines() if line and not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_metrics_count_requests_by_status_and_latencies_by_interface(server, port):
    def read() -> dict[str, float]:
        status, page = send(port, Request("/monitoring/prometheus/metrics", b"", method="GET"))
        assert status == 200
        return samples(page.decode())

    before = read()
    for body in ({"instances": [1.0]}, {"instances": [2.0]}, {"instances": ["a"]}):
        post(port, "half_plus_two:predict", body)
    post(port, "nobody:predict", {"instances": [1.0]})  # no such model: not to be counted, names have no end
    with grpc.insecure_channel(f"unix:{server[2].parent / 'socket'}") as channel:
        reply = channel.unary_unary(METHOD)(predict_request("half_plus_two", "x", 1.0), timeout=DEADLINE_S)
    response = import_messages().PredictResponse.FromString(reply)
    assert (list(response.outputs["y"].float_val), response.model_spec.version.value) == ([2.5], 123)
    after = read()
    grown = {name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name, 0)}
    name = ":tensorflow:serving:request_count"
    assert grown.pop(f'{name}{{model_name="half_plus_two",status="OK"}}') == 3
    assert grown.pop(f'{name}{{model_name="half_plus_two",status="INVALID_ARGUMENT"}}') == 1
    name = ":tensorflow:serving:request_latency"
    for labels, count in (('API="predict",entrypoint="REST"', 2), ('API="Predict",entrypoint="GRPC"', 1)):
        labels = f'model_name="half_plus_two",{labels}'
        assert grown.pop(f"{name}_count{{{labels}}}") == grown[f'{name}_bucket{{{labels},le="+Inf"}}'] == count
        assert 0 < grown.pop(f"{name}_sum{{{labels}}}") < count * DEADLINE_S * 1e6
        buckets = [value for key, value in after.items() if key.startswith(f"{name}_bucket{{{labels}")]
        assert buckets == sorted(buckets) and len(buckets) == 34
        assert f'{name}_bucket{{{labels},le="58.32"}}' in after  # 10 * 1.8**3, as TensorFlow Serving prints it
    assert all("half_plus_two" in key and "_bucket" in key for key in grown), grown


def test_what_keras_2_saved_is_served(port):
    expected = json.loads((KERAS_2 / "expected.json").read_text())
    status, reply = post(port, "keras2:predict", {"instances": expected["rows"]})
    assert status == 200, reply
    assert np.abs(np.array(reply["predictions"]) - expected["probabilities"]).max() <= TOLERANCE


# Versions that come and go.


@pytest.fixture
def changing(tmp_path):
    """(base path, ports, log) of a local server that serves the newest version under the base path, now 1."""
    base = tmp_path / "models"
    shutil.copytree(MODELS / "1", base / "1")
    (tmp_path / "models.config").write_text(
        f'model_config_list {{ config {{ name: "my_model" base_path: "{base}" }} }}'
    )
    ports = find_free_ports(["rest", "grpc"])
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, FOLDER / "local_server.py", f"--port={ports['grpc']}", f"--rest_api_port={ports['rest']}"]
            + [f"--model_config_file={tmp_path / 'models.config'}", "--model_config_file_poll_wait_seconds=1"],
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_for_line(log, " ready at ")
        yield base, ports, log
    finally:
        process.kill()
        process.wait()


def wait_until(condition, explain=lambda: "") -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, explain()
        time.sleep(0.05)


def wait_for_line(log: Path, text: str) -> None:
    wait_until(lambda: text in log.read_text(), log.read_text)


def test_a_label_for_a_version_that_comes_later_is_given_when_it_comes(changing, tmp_path):
    base, ports, log = changing
    config = (tmp_path / "models.config").read_text()
    labelled = config.replace(" } }", " model_version_policy { all {} } version_labels { key: 'stable' value: 2 } } }")
    assert labelled != config
    (tmp_path / "models.config").write_text(labelled)
    wait_for_line(log, "not taken up: Request to assign label to version 2")
    shutil.copytree(MODELS / "2", tmp_path / "2")
    (tmp_path / "2").rename(base / "2")
    rows, _ = load_test_rows()
    wait_until(lambda: post(ports["rest"], "my_model/labels/stable:predict", {"instances": rows[:1]})[0] == 200)
    assert log.read_text().count("not taken up") == 1


LATE_CHANGE = """
import asyncio
import contextlib
import model_config
import servables  # these take seconds, which are not to count
from pathlib import Path
from types import SimpleNamespace
from local_server import watch_config

library = SimpleNamespace(reload=None)  # it does not come to that
with contextlib.suppress(TimeoutError):
    asyncio.run(asyncio.wait_for(watch_config(library, Path(sys.argv[1]), b"as it was read", 0.05), 2))
"""


def test_a_config_that_changed_while_the_server_loaded_is_looked_at_once(tmp_path):
    config = tmp_path / "models.config"
    config.write_text("this is no config")
    _, lines = finish(python("-c", f"import sys; sys.path.insert(0, {str(FOLDER)!r})\n{LATE_CHANGE}", config))
    assert lines[0] == f"local server: {config} has changed"
    assert sum(str(config) in line for line in lines) == 2, lines  # and what is wrong with it


def test_a_new_version_replaces_the_old_one_without_a_failed_or_mixed_answer(changing, tmp_path):
    base, ports, log = changing
    rows, _ = load_test_rows()
    body = {"instances": [rows[0]] * 3}
    expected = {version: load_expected(version)[0] for version in ("1", "2")}
    shutil.copytree(MODELS / "2", tmp_path / "2")
    answered, stop = [], threading.Event()

    def ask():
        while not stop.is_set():
            status, reply = post(ports["rest"], "my_model:predict", body)
            answer = np.array(reply.get("predictions", np.nan))
            fits = [version for version in expected if np.abs(answer - expected[version]).max() <= TOLERANCE]
            answered.append((status, *fits))

    clients = [threading.Thread(target=ask) for _ in range(4)]
    for client in clients:
        client.start()
    try:
        (tmp_path / "2").rename(base / "2")  # one move: the server never sees half a version
        wait_for_line(log, "my_model version 1 retired")
        deadline_s = time.monotonic() + DEADLINE_S
        while len(answered) < 1000 and time.monotonic() < deadline_s:
            time.sleep(0.05)
    finally:
        stop.set()
        for client in clients:
            client.join()
    assert len(answered) >= 1000
    assert set(answered) == {(200, "1"), (200, "2")}
    assert {version: entry["state"] for version, entry in statuses(ports["rest"], "my_model").items()} == {
        "2": "AVAILABLE",
        "1": "END",
    }
    shutil.rmtree(base / "2")  # the newest goes: the next one answers again
    wait_for_line(log, "my_model version 2 retired")
    assert post(ports["rest"], "my_model:predict", body)[0] == 200


def test_a_damaged_new_version_never_replaces_a_good_one_and_may_be_repaired(changing):
    base, ports, log = changing
    (base / "2").mkdir()  # and filled later: LOADING until then, as in TensorFlow Serving
    wait_for_line(log, "my_model version 2 not loaded: ")
    states = statuses(ports["rest"], "my_model")
    assert {version: entry["state"] for version, entry in states.items()} == {"2": "LOADING", "1": "AVAILABLE"}
    assert states["2"]["status"] == {"error_code": "OK", "error_message": ""}
    assert post(ports["rest"], "my_model/versions/2:predict", {"instances": [GOOD_ROW]})[0] == 404
    (base / "2" / "saved_model.pb").write_bytes(b"no graph")
    wait_for_line(log, "my_model version 2 not loaded: Cannot parse")
    assert post(ports["rest"], "my_model/versions/1:predict", {"instances": [GOOD_ROW]})[0] == 200
    assert post(ports["rest"], "my_model:predict", {"instances": [GOOD_ROW]})[0] == 200
    shutil.copytree(MODELS / "2", base / "2", dirs_exist_ok=True)
    wait_for_line(log, "my_model version 2 loaded")
    wait_for_line(log, "my_model version 1 retired")
    assert statuses(ports["rest"], "my_model")["2"]["state"] == "AVAILABLE"
    assert log.read_text().count("version 2 not loaded") <= 4, "it was tried again although nothing had changed"


def test_a_version_that_failed_is_tried_again_as_often_as_asked(tmp_path):
    module = f"import sys; sys.path.insert(0, {str(FOLDER)!r})\n{RETRIES}"
    code, lines = finish(python("-c", module, tmp_path))
    assert (code, lines[-3:]) == (0, ["1 LOADING", "1 LOADING", "1 END DATA_LOSS"]), lines


RETRIES = """
from pathlib import Path
from model_config import single_model_config
from servables import Library, LoadSettings

(Path(sys.argv[1]) / "1").mkdir()
(Path(sys.argv[1]) / "1" / "saved_model.pb").write_bytes(b"no graph")
library = Library(LoadSettings(max_retries=2, retry_interval_s=-1))
library.configs = list(single_model_config("m", sys.argv[1]).model_config_list.config)
for expected in (1, 1, 1, 0):
    changes = library.poll()
    assert len(changes) == expected, changes
    if changes:
        status = library.models["m"].statuses[1]
        print(*[1, status.state, *[status.error_code] * (status.error_code != "OK")])
"""


RELOAD = """
import sys
from quiet_tensorflow import tf
import grpc
from google.protobuf import text_format
from tensorflow_serving.apis import model_management_pb2, model_service_pb2_grpc

request = model_management_pb2.ReloadConfigRequest()
text_format.Parse(sys.argv[2], request.config)
with grpc.insecure_channel(f"127.0.0.1:{sys.argv[1]}") as channel:
    status = model_service_pb2_grpc.ModelServiceStub(channel).HandleReloadConfigRequest(request).status
print(status.error_code, status.error_message)
"""


def test_the_config_can_be_reloaded_over_grpc_and_from_its_file(changing, tmp_path):
    base, ports, log = changing
    shutil.copytree(MODELS / "2", base / "2.part")
    (base / "2.part").rename(base / "2")

    def reload(config: str) -> str:
        code, lines = finish(python("-c", f"import sys; sys.path.insert(0, '.')\n{RELOAD}", ports["grpc"], config))
        assert code == 0, lines
        return lines[-1].strip()

    models = (
        f'model_config_list {{ config {{ name: "%s" base_path: "{base}" model_version_policy {{ all {{}} }} %s }} }}'
    )
    refused = reload(models % ("my_model", 'version_labels { key: "canary" value: 9 }'))
    assert refused.startswith("9 Request to assign label to version 9 of model my_model, which is not currently")
    assert reload(models % ("my_model", 'version_labels { key: "canary" value: 2 }')) == "0"
    rows, _ = load_test_rows()
    for path, version in (("versions/1", "1"), ("labels/canary", "2")):
        status, reply = post(ports["rest"], f"my_model/{path}:predict", {"instances": rows[:1]})
        assert status == 200, reply
        assert np.abs(np.array(reply["predictions"]) - load_expected(version)[:1]).max() <= TOLERANCE
    assert reload(models % ("other", "")) == "0"
    assert post(ports["rest"], "other:predict", {"instances": [GOOD_ROW]})[0] == 200
    assert post(ports["rest"], "my_model:predict", {"instances": [GOOD_ROW]})[0] == 404

    config = tmp_path / "models.config"
    config.write_text(models % ("my_model", 'version_labels { key: "canary" value: 1 }'))
    canary = "my_model/labels/canary:predict"
    wait_until(lambda: post(ports["rest"], canary, {"instances": [GOOD_ROW]})[0] == 200, log.read_text)
    config.write_text("no config")
    wait_for_line(log, "Error parsing text-format tensorflow.serving.ModelServerConfig")
    status, reply = post(ports["rest"], canary, {"instances": rows[:1]})
    assert status == 200, reply
    assert np.abs(np.array(reply["predictions"]) - load_expected("1")[:1]).max() <= TOLERANCE
    config.write_text(models % ("my_model", 'version_labels { key: "canary" value: 9 }'))
    wait_for_line(log, "not taken up: Request to assign label to version 9 of model my_model")
    assert post(ports["rest"], canary, {"instances": rows[:1]})[0] == 200


# Batching.


@pytest.fixture(scope="module")
def batching_port(tmp_path_factory):
    """REST port of a local server that shares runs: 32 rows at most, 20 ms, 2 batches in the queue."""
    folder = tmp_path_factory.mktemp("batching")
    # Without the recorded warm-up requests: they are larger than a batch here.
    shutil.copytree(MODELS / "2", folder / "models" / "2", ignore=shutil.ignore_patterns("assets.extra"))
    with batching_server(
        folder,
        "max_batch_size { value: 32 } batch_timeout_micros { value: 20000 } # comment\n"
        "max_enqueued_batches { value: 2 }\nallowed_batch_sizes: 16 allowed_batch_sizes: 32",
        f"--model_base_path={folder / 'models'}",
        "--model_name=my_model",
    ) as port:
        yield port


@contextlib.contextmanager
def batching_server(folder: Path, parameters: str, *options: str):
    """REST port of a local server with these batching parameters."""
    (folder / "batching.config").write_text(parameters)
    port = find_free_ports(["rest"])["rest"]
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, FOLDER / "local_server.py", "--port=0", f"--rest_api_port={port}", *options]
            + ["--enable_batching=true", f"--batching_parameters_file={folder / 'batching.config'}"],
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline_s = time.monotonic() + DEADLINE_S
        while " ready at " not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline_s, log.read_text()
            time.sleep(0.05)
        yield port
    finally:
        process.kill()
        process.wait()


def test_requests_that_share_a_run_get_their_own_answers(batching_port):
    rows, _ = load_test_rows()
    expected = load_expected("2")
    with ThreadPoolExecutor(6) as pool:  # fewer than the queue takes
        replies = list(pool.map(lambda row: post(batching_port, "my_model:predict", {"instances": [row]}), rows))
    assert [status for status, _ in replies] == [200] * len(rows)
    answers = np.array([reply["predictions"][0] for _, reply in replies])
    assert np.abs(answers - expected).max() <= TOLERANCE


def test_a_wrong_request_in_a_batch_fails_alone(batching_port):
    bodies = [{"instances": [GOOD_ROW]}, {"instances": [GOOD_ROW[:4]]}, {"instances": [GOOD_ROW]}] * 2
    with ThreadPoolExecutor(6) as pool:
        statuses = [
            status for status, _ in pool.map(lambda body: post(batching_port, "my_model:predict", body), bodies)
        ]
    assert statuses == [200, 400, 200] * 2


def test_a_request_larger_than_a_batch_is_refused(batching_port):
    status, reply = post(batching_port, "my_model:predict", {"instances": [GOOD_ROW] * 33})
    assert (status, reply["error"]) == (400, "Task size 33 is larger than maximum input batch size 32")
    assert post(batching_port, "my_model:predict", {"instances": [GOOD_ROW] * 32})[0] == 200


def test_a_full_queue_refuses_at_once(batching_port):
    body = {"instances": [GOOD_ROW] * 16}
    with ThreadPoolExecutor(32) as pool:
        replies = list(pool.map(lambda _: post(batching_port, "my_model:predict", body), range(200)))
    codes = {status for status, _ in replies}
    assert codes <= {200, 503} and 200 in codes
    assert all("queue" in reply["error"] for status, reply in replies if status == 503)
    assert post(batching_port, "my_model:predict", body)[0] == 200


HEAVY_BATCH = 8


@pytest.fixture(scope="module")
def heavy_port(toy_models, tmp_path_factory):
    """REST port of a local server with a slow graph: one batch of 8 rows at a time, 2 in the queue."""
    folder = tmp_path_factory.mktemp("heavy")
    config = folder / "models.config"
    models = [f'config {{ name: "{name}" base_path: "{toy_models}/{name}" }}' for name in ("heavy", "half_plus_two")]
    config.write_text(f"model_config_list {{ {' '.join(models)} }}")
    parameters = "num_batch_threads { value: 1 } max_enqueued_batches { value: 2 } "
    parameters += f"max_batch_size {{ value: {HEAVY_BATCH} }}"
    with batching_server(folder, parameters, f"--model_config_file={config}") as port:
        for _ in range(3):  # answered on the spot: only now it is known as slow
            assert post(port, "heavy:predict", {"instances": [1.0]}) == (200, {"predictions": [2.0]})
        yield port


def ask_heavy(port: int, values: list) -> tuple[list[tuple[int, dict]], float]:
    """Send one request for each of `values` at the same time; return the replies, and how long all took."""
    with ThreadPoolExecutor(len(values)) as pool:
        started_s = time.monotonic()
        replies = list(pool.map(lambda value: post(port, "heavy:predict", {"instances": [value]}), values))
        return replies, time.monotonic() - started_s


def test_requests_for_a_slow_graph_share_its_runs_and_hold_up_nobody(heavy_port):
    values = [float(value) for value in range(2 * HEAVY_BATCH)]
    ratios, quick_ratios = [], []
    for _ in range(5):
        one_s = min(ask_heavy(heavy_port, [1.0])[1] for _ in range(3))
        with ThreadPoolExecutor(1) as pool:
            heavy = pool.submit(ask_heavy, heavy_port, values)
            time.sleep(one_s / 2)
            started_s = time.monotonic()
            assert post(heavy_port, "half_plus_two:predict", {"instances": [1.0]}) == (200, {"predictions": [2.5]})
            quick_ratios.append((time.monotonic() - started_s) / one_s)
            replies, took_s = heavy.result()
        assert replies == [(200, {"predictions": [2 * value]}) for value in values]
        ratios.append(took_s / one_s)
    # The first alone, eight, then seven: three runs. One by one, on two cores, would be eight runs' time.
    assert min(ratios) < 5, ratios
    assert min(quick_ratios) < 0.5, "a quick graph's request waited for the slow one's run"


def test_a_wrong_request_for_a_slow_graph_fails_alone(heavy_port):
    replies, _ = ask_heavy(heavy_port, [1.0, 2.0, 2e6, 4.0, 5.0])
    assert [status for status, _ in replies] == [200, 200, 400, 200, 200]
    assert [reply["predictions"] for status, reply in replies if status == 200] == [[2.0], [4.0], [8.0], [10.0]]


def test_a_full_queue_of_a_slow_graph_refuses_at_once(heavy_port):
    replies, _ = ask_heavy(heavy_port, [1.0] * 60)
    assert {status for status, _ in replies} == {200, 503}
    assert all("queue" in reply["error"] for status, reply in replies if status == 503)
    assert sum(status == 200 for status, _ in replies) >= 2 * HEAVY_BATCH
    assert ask_heavy(heavy_port, [1.0])[0] == [(200, {"predictions": [2.0]})]


# Start and end.


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--nonsense=1"], "unknown argument: --nonsense=1"),
        (
            ["--ssl_config_file=x"],
            "--ssl_config_file is a flag of tensorflow_model_server that the local server does not have",
        ),
        (["--grpc_channel_arguments=a", "--model_base_path=m"], "'a' is not key=value"),
        (["--monitoring_config_file=x", "--model_base_path=m"], "--monitoring_config_file needs --rest_api_port"),
        (
            ["--port={free}", "--rest_api_port=0", "--grpc_socket_path={socket}", "--model_base_path=m"],
            "(--grpc_socket_path) is in use; choose another path or stop what uses it",
        ),
        (["--port={free}", "--grpc_socket_path=client.py", "--model_base_path=m"], "is a file; choose another path"),
        (
            ["--batching_parameters_file=batching.config", "--model_base_path=m"],
            "--batching_parameters_file is set without setting --enable_batching to true",
        ),
        (
            [
                "--port={free}",
                "--model_base_path=models/my_model",
                "--enable_batching",
                "--batching_parameters_file=client.py",
            ],
            "Error parsing text-format tensorflow.serving.BatchingParameters",
        ),
        (["--port=many", "--model_base_path=m"], "argument --port: invalid int value: 'many'"),
        ([], "give --model_base_path or --model_config_file"),
        (["--port=1", "--rest_api_port=1", "--model_base_path=m"], "--port and --rest_api_port cannot be the same"),
        (["--rest_api_port=70000", "--model_base_path=m"], "port must be 0-65535"),
        (["--port={free}", "--model_base_path=/nowhere"], "no version folder in /nowhere; run python export_model.py"),
        (["--port={free}", "--model_config_file=/nowhere"], "/nowhere: No such file or directory"),
        (
            ["--port={free}", "--model_config_file=client.py"],
            "Error parsing text-format tensorflow.serving",
        ),
        (["--port={free}", "--model_config_file=models.config"], "Request to assign label to version"),
        (["--port={taken}", "--model_base_path=m"], "Address already in use; choose another port"),
    ],
)
def test_a_start_that_cannot_work_ends_at_once_with_one_line(server, arguments, error):
    ports = {
        "free": find_free_ports(["grpc"])["grpc"],
        "taken": server[1]["rest"],
        "socket": server[2].parent / "socket",
    }
    started_s = time.monotonic()
    code, lines = finish(python("local_server.py", *(argument.format(**ports) for argument in arguments)))
    assert code != 0
    assert len(lines) == 1, lines
    assert error in lines[0]
    assert time.monotonic() - started_s < 5, "TensorFlow was imported first"


def test_a_monitoring_config_that_does_not_parse_ends_the_start(tmp_path):
    (tmp_path / "monitoring.config").write_text('prometheus_config { enable: true port: "x" }')
    ports = find_free_ports(["rest", "grpc"])
    options = [f"--port={ports['grpc']}", f"--rest_api_port={ports['rest']}", f"--model_base_path={MODELS}"]
    code, lines = finish(
        python("local_server.py", *options, f"--monitoring_config_file={tmp_path / 'monitoring.config'}")
    )
    assert (code, len(lines)) == (1, 1), lines
    assert "Error parsing text-format tensorflow.serving.MonitoringConfig" in lines[0]


def test_the_version_is_tensorflows():
    code, lines = finish(python("local_server.py", "--version"))
    assert (code, lines) == (0, ["local server", f"TensorFlow Library: {importlib.metadata.version('tensorflow')}"])


def test_a_stop_while_it_starts_is_no_error():
    port = find_free_ports(["grpc"])["grpc"]
    process = python("local_server.py", f"--port={port}", f"--model_base_path={MODELS}")
    deadline_s = time.monotonic() + DEADLINE_S
    while not any("tensorflow" in item.path for item in psutil.Process(process.pid).memory_maps()):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    code, lines = finish(process)
    assert (code, lines) == (0, [])


def test_the_server_prints_nothing_of_tensorflow_and_ends_on_sigterm(server):
    process, ports, log = server
    assert all(line.startswith("local server: ") for line in log.read_text().splitlines()), log.read_text()

    with ThreadPoolExecutor(1) as pool:
        under_way = start_slow_call(pool, process, ports, 60)
        process.send_signal(signal.SIGTERM)
        assert under_way.result()[0] == 200, "a request under way was dropped"
    assert process.wait(timeout=15) == 0
    assert log.read_text().splitlines()[-1] == "local server: stopped"
    with pytest.raises(ConnectionRefusedError):
        send(ports["rest"], Request("/v1/models/my_model", b"", method="GET"))
