"""BentoML: the model store, the service's answers and refusals, the Bento, and how it starts and ends."""

import ast
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml

from bad_requests import GOOD_ROW, bad_requests
from client.ask import ask, send
from endpoints.base import REPOSITORY_DIR, Request, load_endpoints
from endpoints.reference import TOLERANCE, load_expected, load_test_rows
from engine import list_package_folders
from helpers import DEADLINE_S, assert_ends_whole, call_main, load_script, post, run, start, wait_until
from servers.process import ServerProcess

FOLDER = REPOSITORY_DIR / "bentoml"
TAGS = {"1": "my_model:v1.0.0", "2": "my_model:v2.0.0"}
TOUCH_AGAIN_S = 30.0  # a server may serve before it watches its files; a change while it reloads would break it
BENTOML = Path(sys.executable).with_name("bentoml")

REFUSALS = {
    "four features": "row 0 has 4 values; 5 are needed",
    "six features": "row 0 has 6 values; 5 are needed",
    "ragged rows": "row 1 has 4 values; 5 are needed",
    "empty batch": "features is empty",
    "empty row": "row 0 has 0 values",
    "a string among numbers": "mean radius is a string",
    "a numeric string": "mean radius is a string",
    "null among numbers": "mean radius is null",
    "null instead of rows": "features is null",
    "a string instead of rows": "features is a string",
    "a number instead of rows": "features is a number",
    "NaN": "not finite",
    "Infinity": "not finite",
    "minus Infinity": "not finite",
    "larger than float32": "beyond the range of float32",
    "nested too deep": "mean radius is an array",
    "the wrong key": "Field required",
    "an array instead of an object": "should be an object",
    "malformed JSON": "Invalid JSON",
    "an empty body": "Field required",
    "not UTF-8": "Invalid JSON: invalid unicode",
    "the wrong content type": "Content-Type",
    "10 MB of junk": "larger than 1000000 bytes",
    "10 MB of brackets": "larger than 1000000 bytes",
    "an unknown version": "v1.0.0, v2.0.0",
}


def run_bentoml(*options: str, folder: Path, store: Path, timeout_s: float = DEADLINE_S) -> subprocess.CompletedProcess:
    """Run `bentoml` in `folder` with the model store `store`."""
    return run(BENTOML, *options, cwd=folder, env={"BENTOML_HOME": str(store)}, timeout_s=timeout_s)


def assert_one_line(ended, *words: str) -> None:
    """It failed with one line that has all of `words`."""
    assert ended.returncode != 0
    printed = ended.stdout + ended.stderr
    assert printed.count("\n") == 1, printed
    assert all(word in printed for word in words), printed


def server_of(folder: Path, *options: str, **environment: str) -> ServerProcess:
    """Return a server, not yet entered, that runs `bentoml serve` in `folder`, on a free port and with its store."""
    server = start("bentoml")
    endpoint = server.endpoint
    variables = {**endpoint.environment(), "BENTOML_HOME": str(folder / "store"), **environment}
    endpoint.folder = folder
    endpoint.command = lambda: ["bentoml", "serve", *options, "--port", str(endpoint.port)]
    endpoint.environment = lambda: variables
    endpoint.environment_in = lambda _: {}  # its own store, no copy of it
    return server


@pytest.fixture(scope="module")
def folder_copy(tmp_path_factory) -> Path:
    """The folder beside data/, as a student copies it, with the trained models in its store."""
    return copy_folder(tmp_path_factory.mktemp("copy"))


def copy_folder(target: Path) -> Path:
    ignored = shutil.ignore_patterns("bentos", "prometheus_multiproc_dir", "monitoring", "__pycache__")
    shutil.copytree(FOLDER, target / "bentoml", ignore=ignored)
    shutil.copytree(REPOSITORY_DIR / "data", target / "data")
    return target / "bentoml"


@pytest.mark.parametrize("version", ["1", "2"])
def test_answers_every_test_row_as_the_reference_does(bentoml_server, version):
    rows, _ = load_test_rows()
    assert np.abs(ask(bentoml_server.endpoint, rows, version) - load_expected(version)).max() <= TOLERANCE


def test_answers_with_the_newest_version_when_none_is_named(bentoml_server):
    rows, _ = load_test_rows()
    status, reply = post(bentoml_server, "/predict", {"features": rows})
    assert (status, reply["version"]) == (200, "v2.0.0")
    assert np.abs(np.array(reply["probability"]) - load_expected("2")).max() <= TOLERANCE
    assert reply["prediction"] == load_expected("2").argmax(axis=1).tolist()


def test_answers_one_unnested_row_unnested(bentoml_server):
    status, reply = post(bentoml_server, "/predict", {"features": GOOD_ROW, "version": "v1.0.0"})
    assert status == 200
    assert set(reply) == {"version", "prediction", "probability"}
    assert isinstance(reply["prediction"], int)
    _, nested = post(bentoml_server, "/predict", {"features": [GOOD_ROW], "version": "v1.0.0"})
    assert nested["prediction"] == [reply["prediction"]]
    assert nested["probability"] == [reply["probability"]]


def test_takes_integers_for_numbers(bentoml_server):
    _, integers = post(bentoml_server, "/predict", {"features": [14, 24, 0, 1, 0]})
    _, floats = post(bentoml_server, "/predict", {"features": [14.0, 24.0, 0.0, 1.0, 0.0]})
    assert integers["probability"] == floats["probability"]


def test_every_bad_request_has_its_expected_words():
    assert set(REFUSALS) == set(bad_requests(load_endpoints()["bentoml"]()))


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses_and_says_why(bentoml_server, name):
    status, reply = send(bentoml_server.endpoint.ports["rest"], bad_requests(bentoml_server.endpoint)[name])
    assert 400 <= status < 500
    error = json.loads(reply)
    assert "error" in error
    assert REFUSALS[name] in json.dumps(error)
    assert len(reply) < 1000
    assert post(bentoml_server, "/predict", {"features": GOOD_ROW})[0] == 200


def test_refuses_a_misspelt_key_instead_of_ignoring_it(bentoml_server):
    status, reply = post(bentoml_server, "/predict", {"features": GOOD_ROW, "verson": "v1.0.0"})
    assert status == 400
    assert reply["detail"][0]["loc"] == ["verson"]


@pytest.mark.parametrize(
    "content_type",
    ["multipart/form-data", "application/x-www-form-urlencoded", "application/vnd.bentoml+pickle", "text/plain", ""],
)
def test_refuses_bodies_that_do_not_call_themselves_json(bentoml_server, content_type):
    request = Request("/predict", json.dumps({"features": GOOD_ROW}).encode(), content_type=content_type)
    status, reply = send(bentoml_server.endpoint.ports["rest"], request)
    assert status == 415
    assert "application/json" in json.loads(reply)["error"]


@pytest.mark.parametrize("other", ["multipart/form-data", "application/x-www-form-urlencoded", "text/plain"])
@pytest.mark.parametrize("comes_first", [True, False])
def test_of_two_content_types_both_must_be_json(bentoml_server, other, comes_first):
    """BentoML reads the first: a form that cannot be parsed would be answered with 500."""
    body = json.dumps({"features": GOOD_ROW}).encode()
    connection = http.client.HTTPConnection("127.0.0.1", bentoml_server.endpoint.ports["rest"], timeout=DEADLINE_S)
    connection.putrequest("POST", "/predict")
    for content_type in [other, "application/json"] if comes_first else ["application/json", other]:
        connection.putheader("Content-Type", content_type)
    connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    reply = connection.getresponse()
    assert (reply.status, "application/json" in json.loads(reply.read())["error"]) == (415, True)
    connection.close()


def test_the_largest_float32_is_taken_as_programs_print_it(bentoml_server):
    for number, status in (("3.4028235e38", 200), ("-3.4028235e+38", 200), ("3.4028236e38", 400)):
        body = f'{{"features": [{number}, 1, 1, 1, 1]}}'.encode()
        assert post(bentoml_server, "/predict", body)[0] == status, number


def test_keeps_the_connection_open_between_requests(bentoml_server):
    connection = http.client.HTTPConnection("127.0.0.1", bentoml_server.endpoint.port, timeout=DEADLINE_S)
    for _ in range(3):
        connection.request("POST", "/predict", json.dumps({"features": GOOD_ROW}), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        assert int(reply.headers["Content-Length"]) == len(reply.read())
        assert connection.sock is not None  # http.client closes it when the server says so
    connection.close()


def test_listens_on_loopback_only(bentoml_server):
    listening = [
        connection.laddr
        for process in bentoml_server.processes()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert {address.ip for address in listening} == {"127.0.0.1"}
    assert bentoml_server.endpoint.ports["rest"] in {address.port for address in listening}


@pytest.mark.parametrize("version", ["1", "2"])
def test_the_store_holds_what_was_trained(version):
    rows, labels = load_test_rows()
    import bentoml

    stored = bentoml.sklearn.get(TAGS[version])
    assert stored.info.labels == {"framework": "sklearn", "task": "classification"}
    assert stored.info.signatures["predict_proba"].batchable
    accuracy = np.mean(load_expected(version).argmax(axis=1) == labels)
    assert stored.info.metadata["test_accuracy"] == pytest.approx(accuracy, abs=5e-5)  # 4 decimals
    probabilities = bentoml.sklearn.load_model(stored).predict_proba(np.array(rows))
    assert np.abs(probabilities - load_expected(version)).max() <= 1e-9  # expected.csv has 10 decimals


def test_the_newest_model_is_called_latest():
    import bentoml

    assert str(bentoml.sklearn.get("my_model:latest").tag) == TAGS["2"]


@pytest.mark.slow
def test_training_again_replaces_both_models_by_equal_ones(tmp_path):
    import bentoml

    folder = copy_folder(tmp_path)
    store = folder / "store"
    model_yaml = store / "models" / "my_model" / "v1.0.0" / "model.yaml"
    created = yaml.safe_load(model_yaml.read_text())["creation_time"]
    done = run(sys.executable, "train_and_save.py", cwd=folder, env={"BENTOML_HOME": str(store)}, check=True)
    assert done.stdout.count("test accuracy 0.9386") == 2
    assert yaml.safe_load(model_yaml.read_text())["creation_time"] > created
    rows = np.array(load_test_rows()[0])
    for tag in TAGS.values():
        saved = [
            bentoml.sklearn.load_model(bentoml.Model.from_path(home / "models" / tag.replace(":", "/")))
            for home in (FOLDER / "store", store)
        ]
        assert np.array_equal(saved[0].predict_proba(rows), saved[1].predict_proba(rows))


def test_missing_data_is_one_line(tmp_path):
    missing = call_main(load_script(FOLDER / "train_and_save.py"), "--data-dir", tmp_path)
    assert_one_line(missing, "recipe.json not found: run python make_data.py")


def test_ctrl_c_within_fit_is_no_end_of_the_training(monkeypatch):
    from sklearn.neural_network import MLPClassifier

    script = load_script(FOLDER / "train_and_save.py")
    recipe = json.loads((script.DATA_DIR / "recipe.json").read_text())
    layers = json.loads((script.DATA_DIR / "initial_weights.json").read_text())
    rows, labels = script.load_rows(script.DATA_DIR / "train.csv")
    step = MLPClassifier._backprop
    steps = []

    def interrupted(*arguments):
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(MLPClassifier, "_backprop", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.train(rows, labels, recipe, layers, epochs=20)
    assert len(steps) == 5


def test_ctrl_c_before_the_training_is_one_line(tmp_path):
    os.mkfifo(tmp_path / "recipe.json")
    command = [sys.executable, "train_and_save.py", "--data-dir", tmp_path]
    training = subprocess.Popen(command, cwd=FOLDER, stderr=subprocess.PIPE, text=True)
    with (tmp_path / "recipe.json").open("w"):  # opens as soon as the script reads, and leaves it waiting
        training.send_signal(signal.SIGINT)
        _, printed = training.communicate(timeout=DEADLINE_S)
    assert (training.returncode, printed) == (1, "train_and_save: interrupted; run it again before you serve\n")


def test_the_constants_of_the_service_are_those_of_the_data():
    recipe = json.loads((REPOSITORY_DIR / "data" / "recipe.json").read_text())
    service = (FOLDER / "service.py").read_text()
    assert f"FEATURES = {json.dumps(recipe['features'])}" in service
    assert f"VERSIONS = {json.dumps([f'v{version}.0.0' for version in recipe['versions']])}" in service


def test_the_pins_of_the_bento_are_those_of_the_repository():
    pins = re.findall(r"^[\w-]+==\S+", (REPOSITORY_DIR / "requirements.txt").read_text(), re.MULTILINE)
    packages = yaml.safe_load((FOLDER / "bentofile.yaml").read_text())["python"]["packages"]
    assert set(packages) <= set(pins)


def test_the_bento_installs_all_that_its_modules_import():
    bentofile = yaml.safe_load((FOLDER / "bentofile.yaml").read_text())
    paths = [FOLDER / name.lstrip("/") for name in bentofile["include"] if name.endswith(".py")]
    imported = set()
    for node in (node for path in paths for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    names = [package.partition("==")[0] for package in bentofile["python"]["packages"]]
    installed = {Path(name).stem for name in list_package_folders("bentoml", *names)}
    assert imported >= {"bentoml", "numpy", "httptools"}
    assert imported <= installed | sys.stdlib_module_names | {path.stem for path in paths}


def test_a_missing_model_is_one_line(tmp_path):
    refused = run_bentoml("serve", "service:svc", "--port", "0", folder=FOLDER, store=tmp_path)
    assert_one_line(refused, "my_model:v1.0.0 not found: run python train_and_save.py")


def test_a_taken_port_is_one_line_and_the_first_server_goes_on(bentoml_server, folder_copy):
    port = str(bentoml_server.endpoint.port)
    refused = run_bentoml("serve", "service:svc", "--port", port, folder=folder_copy, store=folder_copy / "store")
    assert_one_line(refused, f"127.0.0.1:{port} is in use; stop that program first")
    assert post(bentoml_server, "/predict", {"features": GOOD_ROW})[0] == 200


@pytest.fixture(scope="module")
def bento(folder_copy) -> Path:
    """Build a Bento in the store of `folder_copy`; return its folder."""
    store = folder_copy / "store"
    built = run_bentoml("build", folder=folder_copy, store=store)
    assert built.returncode == 0, built.stdout + built.stderr
    return next((store / "bentos" / "my_model_service").glob("*/"))


def test_a_bento_carries_its_own_files_and_both_models(bento):
    ours = {"service.py", "bodies.py", "connections.py", "guard.py", "direct.py", "tuned_service.py", "tuned.yaml"}
    assert {path.name for path in (bento / "src").iterdir()} == {*ours, "bentofile.yaml"}
    manifest = yaml.safe_load((bento / "bento.yaml").read_text())
    assert {model["tag"] for model in manifest["models"]} == set(TAGS.values())
    dockerfile = (bento / "env" / "docker" / "Dockerfile").read_text()
    assert "BENTOML_HOST=0.0.0.0" in dockerfile
    assert dockerfile.count("FROM python:3.11.15-slim-bookworm") == 2, "what installs is not what serves"
    assert "USER 1034" in dockerfile and "build-essential" not in dockerfile


@pytest.mark.slow  # bentoml/README.md serves its Bento, too
def test_a_bento_serves_both_models_and_ends_on_ctrl_c(folder_copy, bento, tmp_path):
    rows, _ = load_test_rows()
    store = str(folder_copy / "store")
    with server_of(tmp_path, "my_model_service:latest", BENTOML_HOME=store) as server:  # no service.py there
        for version in TAGS:
            assert np.abs(ask(server.endpoint, rows, version) - load_expected(version)).max() <= TOLERANCE
        assert_ends_whole(server, signal.SIGINT)


@pytest.mark.slow  # bentoml/README.md starts it so, too
def test_serve_with_reload_takes_up_a_change_and_ends_with_its_terminal(folder_copy):
    service = folder_copy / "service.py"
    changed = folder_copy.parent / "changed.py"
    before = service.read_text()
    changed.write_text(before.replace("features is empty", "nothing here"))

    def has_noticed() -> bool:
        nonlocal touched_s
        if time.monotonic() > touched_s + TOUCH_AGAIN_S:
            touched_s = time.monotonic()
            os.utime(service)
        return "cleanup finalized" in server.log()  # the old worker has ended

    def error_for_no_rows() -> str:
        with contextlib.suppress(OSError, http.client.HTTPException):  # between two workers
            return json.dumps(post(server, "/predict", {"features": []})[1])
        return ""

    try:
        with server_of(folder_copy, "service:svc", "--reload") as server:
            status, reply = post(server, "/predict", {"features": [1.0, 2.0, 3.0, 4.0, 5.0]})  # the document's request
            assert status == 200
            assert len(reply["probability"]) == 2
            changed.replace(service)  # at once: half a file would be loaded, too
            touched_s = time.monotonic()
            wait_until(has_noticed, server.log, server.process)
            wait_until(lambda: "nothing here" in error_for_no_rows(), server.log, server.process)
            assert_ends_whole(server, signal.SIGHUP)
    finally:
        service.write_text(before)
