"""BentoML: the model store, the service's answers and refusals, the Bento, and how it starts and ends."""

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

import bentoml
import numpy as np
import psutil
import pytest
import yaml
from bad_requests import GOOD_ROW, bad_requests
from endpoint import REPOSITORY_DIR, Request, load_endpoints
from reference import TOLERANCE, load_expected, load_test_rows
from server_process import ServerProcess, ask, send

FOLDER = REPOSITORY_DIR / "bentoml"
TAGS = {"1": "my_model:v1.0.0", "2": "my_model:v2.0.0"}
STOP_TIMEOUT_S = 10.0
RELOAD_TIMEOUT_S = 20.0

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


def post(server: ServerProcess, body: dict) -> tuple[int, dict]:
    """POST `body` to /predict; return the status and the reply."""
    status, reply = send(server.endpoint.ports["rest"], Request("/predict", json.dumps(body).encode()))
    return status, json.loads(reply)


def run(*command: str, folder: Path, store: Path) -> subprocess.CompletedProcess:
    """Run a command of the README in `folder` with the model store `store`; its stderr is merged into stdout."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "BENTOML_HOME": str(store), "BENTOML_DO_NOT_TRACK": "True"}
    return subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60
    )


def server_of(folder: Path, *command: str) -> ServerProcess:
    """A server, not yet entered, that runs `command` in `folder`, on a free port and with the store of `folder`."""
    endpoint = load_endpoints()["bentoml"].on_free_ports()
    endpoint.folder = folder
    endpoint.command = lambda: [*command, "--port", str(endpoint.ports["rest"])]
    return ServerProcess(endpoint)


def assert_ends_whole(server: ServerProcess, number: signal.Signals) -> None:
    """Send a signal to the process that was started; it and all that it started must end, well."""
    processes = server.processes()
    assert len(processes) > 1  # the supervisor and its worker
    server.process.send_signal(number)
    if number != signal.SIGKILL:
        assert server.process.wait(STOP_TIMEOUT_S) == 0
    _, alive = psutil.wait_procs(processes, timeout=STOP_TIMEOUT_S)
    assert alive == []


@pytest.fixture
def folder_copy(tmp_path) -> Path:
    """The folder beside data/, as a student copies it, with the trained models in its store."""
    ignored = shutil.ignore_patterns("bentos", "prometheus_multiproc_dir", "__pycache__")
    shutil.copytree(FOLDER, tmp_path / "bentoml", ignore=ignored)
    shutil.copytree(REPOSITORY_DIR / "data", tmp_path / "data")
    return tmp_path / "bentoml"


@pytest.mark.parametrize("version", ["1", "2"])
def test_answers_every_test_row_as_the_reference_does(bentoml_server, version):
    rows, _ = load_test_rows()
    assert np.abs(ask(bentoml_server.endpoint, rows, version) - load_expected(version)).max() <= TOLERANCE


def test_answers_with_the_newest_version_when_none_is_named(bentoml_server):
    rows, _ = load_test_rows()
    status, reply = post(bentoml_server, {"features": rows})
    assert (status, reply["version"]) == (200, "v2.0.0")
    assert np.abs(np.array(reply["probability"]) - load_expected("2")).max() <= TOLERANCE
    assert reply["prediction"] == load_expected("2").argmax(axis=1).tolist()


def test_answers_one_unnested_row_unnested(bentoml_server):
    status, reply = post(bentoml_server, {"features": GOOD_ROW, "version": "v1.0.0"})
    assert status == 200
    assert set(reply) == {"version", "prediction", "probability"}
    assert isinstance(reply["prediction"], int)
    _, nested = post(bentoml_server, {"features": [GOOD_ROW], "version": "v1.0.0"})
    assert nested["prediction"] == [reply["prediction"]]
    assert nested["probability"] == [reply["probability"]]


def test_takes_integers_for_numbers(bentoml_server):
    _, integers = post(bentoml_server, {"features": [14, 24, 0, 1, 0]})
    _, floats = post(bentoml_server, {"features": [14.0, 24.0, 0.0, 1.0, 0.0]})
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
    assert post(bentoml_server, {"features": GOOD_ROW})[0] == 200


def test_refuses_a_misspelt_key_instead_of_ignoring_it(bentoml_server):
    status, reply = post(bentoml_server, {"features": GOOD_ROW, "verson": "v1.0.0"})
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


def test_keeps_the_connection_open_between_requests(bentoml_server):
    connection = http.client.HTTPConnection("127.0.0.1", bentoml_server.endpoint.ports["rest"], timeout=10)
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
    stored = bentoml.sklearn.get(TAGS[version])
    assert stored.info.labels == {"framework": "sklearn", "task": "classification"}
    assert stored.info.signatures["predict_proba"].batchable
    accuracy = np.mean(load_expected(version).argmax(axis=1) == labels)
    assert stored.info.metadata["test_accuracy"] == pytest.approx(accuracy, abs=5e-5)  # 4 decimals
    probabilities = bentoml.sklearn.load_model(stored).predict_proba(np.array(rows))
    assert np.abs(probabilities - load_expected(version)).max() <= 1e-9  # expected.csv has 10 decimals


def test_the_newest_model_is_called_latest():
    assert str(bentoml.sklearn.get("my_model:latest").tag) == TAGS["2"]


def test_training_again_replaces_both_models_by_equal_ones(folder_copy):
    store = folder_copy / "store"
    model_yaml = store / "models" / "my_model" / "v1.0.0" / "model.yaml"
    created = yaml.safe_load(model_yaml.read_text())["creation_time"]
    done = run("python", "train_and_save.py", folder=folder_copy, store=store)
    assert done.returncode == 0
    assert done.stdout.count("test accuracy 0.9386") == 2
    assert yaml.safe_load(model_yaml.read_text())["creation_time"] > created
    rows = np.array(load_test_rows()[0])
    for tag in TAGS.values():
        saved = [
            bentoml.sklearn.load_model(bentoml.Model.from_path(home / "models" / tag.replace(":", "/")))
            for home in (FOLDER / "store", store)
        ]
        assert np.array_equal(saved[0].predict_proba(rows), saved[1].predict_proba(rows))


def test_the_constants_of_the_service_are_those_of_the_data():
    recipe = json.loads((REPOSITORY_DIR / "data" / "recipe.json").read_text())
    service = (FOLDER / "service.py").read_text()
    assert f"FEATURES = {json.dumps(recipe['features'])}" in service
    assert f"VERSIONS = {json.dumps([f'v{version}.0.0' for version in recipe['versions']])}" in service


def test_the_pins_of_the_bento_are_those_of_the_repository():
    pins = re.findall(r"^[\w-]+==\S+", (REPOSITORY_DIR / "requirements.txt").read_text(), re.MULTILINE)
    packages = yaml.safe_load((FOLDER / "bentofile.yaml").read_text())["python"]["packages"]
    assert set(packages) <= set(pins)


def test_a_missing_model_is_one_line(tmp_path):
    done = run("bentoml", "serve", "service:svc", "--port", "0", folder=FOLDER, store=tmp_path)
    assert done.returncode != 0
    assert done.stdout.count("\n") == 1
    assert "my_model:v1.0.0 not found: run python train_and_save.py" in done.stdout


def test_a_damaged_model_is_one_line(folder_copy):
    pickled = folder_copy / "store" / "models" / "my_model" / "v2.0.0" / "saved_model.pkl"
    pickled.write_bytes(pickled.read_bytes()[:3000])
    done = run("bentoml", "serve", "service:svc", "--port", "0", folder=folder_copy, store=folder_copy / "store")
    assert done.returncode != 0
    assert done.stdout.count("\n") == 1
    assert "my_model:v2.0.0 cannot be loaded" in done.stdout
    assert "run python train_and_save.py" in done.stdout


def test_missing_data_is_one_line(folder_copy):
    (folder_copy.parent / "data" / "train.csv").unlink()
    done = run("python", "train_and_save.py", folder=folder_copy, store=folder_copy / "store")
    assert done.returncode != 0
    assert done.stdout.count("\n") == 1
    assert "train.csv not found: run python make_data.py" in done.stdout


def test_a_taken_port_is_one_line_and_the_first_server_goes_on(bentoml_server, folder_copy):
    port = str(bentoml_server.endpoint.ports["rest"])
    done = run("bentoml", "serve", "service:svc", "--port", port, folder=folder_copy, store=folder_copy / "store")
    assert done.returncode != 0
    assert done.stdout.count("\n") == 1
    assert f"127.0.0.1:{port} is in use; stop that program first" in done.stdout
    assert post(bentoml_server, {"features": GOOD_ROW})[0] == 200


def test_a_bento_carries_its_own_files_and_both_models_and_ends_on_ctrl_c(folder_copy):
    store = folder_copy / "store"
    done = run("bentoml", "build", folder=folder_copy, store=store)
    assert done.returncode == 0, done.stdout
    bento = next((store / "bentos" / "my_model_service").glob("*/"))
    ours = {"service.py", "accepting.py", "guard.py", "direct.py", "tuned_service.py", "tuned.yaml"}
    assert {path.name for path in (bento / "src").iterdir()} == {*ours, "bentofile.yaml"}
    manifest = yaml.safe_load((bento / "bento.yaml").read_text())
    assert {model["tag"] for model in manifest["models"]} == set(TAGS.values())
    dockerfile = (bento / "env" / "docker" / "Dockerfile").read_text()
    assert "BENTOML_HOST=0.0.0.0" in dockerfile
    assert dockerfile.count("FROM python:3.11.15-slim-bookworm") == 2, "what installs is not what serves"
    assert "USER 1034" in dockerfile and "build-essential" not in dockerfile

    rows, _ = load_test_rows()
    (folder_copy / "service.py").unlink()  # the Bento must not need it
    with server_of(folder_copy, "bentoml", "serve", "my_model_service:latest") as server:
        for version in TAGS:
            assert np.abs(ask(server.endpoint, rows, version) - load_expected(version)).max() <= TOLERANCE
        assert_ends_whole(server, signal.SIGINT)


def test_serve_with_reload_takes_up_a_change_and_ends_with_its_terminal(folder_copy):
    with server_of(folder_copy, "bentoml", "serve", "service:svc", "--reload") as server:
        status, reply = post(server, {"features": [1.0, 2.0, 3.0, 4.0, 5.0]})  # the document's request
        assert status == 200
        assert len(reply["probability"]) == 2

        service = folder_copy / "service.py"
        service.write_text(service.read_text().replace("features is empty", "nothing here"))
        deadline_s = time.monotonic() + RELOAD_TIMEOUT_S
        message = ""
        while "nothing here" not in message:
            assert time.monotonic() < deadline_s
            try:
                message = json.dumps(post(server, {"features": []})[1])
            except (OSError, http.client.HTTPException):
                time.sleep(0.1)  # between two workers
        assert_ends_whole(server, signal.SIGHUP)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_worker_ends_with_its_supervisor(folder_copy, number):
    with server_of(folder_copy, "bentoml", "serve", "service:svc") as server:
        assert_ends_whole(server, number)
