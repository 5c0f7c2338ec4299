"""The peers: what they are asked and answer; each installed one gives the reference's answers and ends whole."""

import json
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest

from conftest import REPOSITORY_DIR
from endpoints import peer
from endpoints.base import KINDS, ServerError, load_endpoints
from endpoints.open_inference import OpenInferencePeer, decode_reply, encode_request
from endpoints.peer import read_pins
from endpoints.reference import TOLERANCE, load_expected, load_test_rows
from helpers import BEFORE_IDLE_TIMEOUT_S, DEADLINE_S, wait_until
from servers.parity import max_abs_difference
from servers.process import ServerProcess

PEERS = {name: value for name, value in load_endpoints(with_peers=True).items() if value.kind == "peer"}
NAMES = ["triton", "kserve", "mlserver", "litserve", "ray"]
ROW = [13.82, 24.49, 0.1162, 0.1357, 0.2275]
# What each answered to ROW and version 1, whole.
REPLIES = {
    "triton": b'{"model_name":"my_model","model_version":"1","outputs":[{"name":"output","datatype":"FP32",'
    b'"shape":[1,2],"data":[0.7607810497283936,0.23921895027160645]}]}',
    "kserve": b'{"model_name":"my_model-1","model_version":null,"id":"68fac3ec-a501-4999-bb59-c26124036fa0",'
    b'"parameters":null,"outputs":[{"name":"output-0","shape":[1,2],"datatype":"FP32","parameters":null,'
    b'"data":[0.7607810497283936,0.23921895027160645]}]}',
    "mlserver": b'{"model_name":"my_model","model_version":"1","id":"5462326d-0316-4ea8-99f4-4581e6afcb1b",'
    b'"parameters":{},"outputs":[{"name":"output","shape":[1,2],"datatype":"FP32","parameters":{"content_type":"np"},'
    b'"data":[0.7607810497283936,0.23921895027160645]}]}',
    "litserve": b'{"predictions":[[0.7607810497283936,0.23921895027160645]]}',
    "ray": b'{"predictions":[[0.7607810497283936,0.23921895027160645]]}',
}


def list_shared_memory() -> set[Path]:
    """Return what Triton and Ray leave behind if they end badly."""
    return {path for pattern in ("triton_*", "plasma*") for path in Path("/dev/shm").glob(pattern)}


def test_every_peer_is_a_row_of_its_kind_and_in_no_default_set():
    assert sorted(PEERS) == sorted(NAMES)
    assert "peer" in KINDS
    assert not PEERS.keys() & load_endpoints().keys()
    assert all(endpoint_class.settings["packages"] for endpoint_class in PEERS.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_peer_starts_with_its_own_python_from_its_folder(name):
    endpoint = PEERS[name]()
    python, script, *options = endpoint.command()
    assert python == f"../../.venv-peers/{name}/bin/python"
    assert (endpoint.folder / script).exists()
    assert not options
    moved = PEERS[name](dict.fromkeys(endpoint.default_ports, 9000)).command()[2:]
    assert moved == ["--port=9000" if role == "rest" else f"--{role}-port=9000" for role in endpoint.default_ports]


def test_a_peer_that_is_not_installed_is_refused_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(peer, "ENVIRONMENTS_DIR", tmp_path)
    endpoint = PEERS["triton"].on_free_ports()
    assert not endpoint.is_installed()
    with pytest.raises(ServerError, match=r"^triton: not installed; make peers$"):
        ServerProcess(endpoint).spawn()
    pinned = (REPOSITORY_DIR / "benchmarks" / "peers" / "requirements-triton.txt").read_text()
    installed = tmp_path / "triton" / "requirements.txt"
    installed.parent.mkdir()
    installed.write_text(pinned.replace("onnxruntime==", "onnxruntime==0."))
    assert not endpoint.is_installed()
    installed.write_text(pinned)
    assert endpoint.is_installed()


def test_all_other_servers_come_with_the_repository():
    assert all(value.is_installed() for value in load_endpoints().values())


def test_a_peer_serves_both_versions_or_none():
    with pytest.raises(ValueError, match="both versions"):
        PEERS["kserve"](only_version="1")


def test_the_versions_in_the_settings_are_those_that_are_installed():
    assert read_pins("kserve", "kserve", "onnxruntime") in PEERS["kserve"].settings["packages"]
    versions = {read_pins(name, "onnxruntime") for name in NAMES}
    assert len(versions) == 1, "all peers run the model in one release of ONNX Runtime"


def test_requests_are_one_flat_tensor_with_the_models_names():
    request = PEERS["triton"]().request([ROW, ROW], "2")
    assert request.path == "/v2/models/my_model/versions/2/infer"
    assert json.loads(request.body) == {
        "inputs": [{"name": "input", "shape": [2, 5], "datatype": "FP32", "data": ROW + ROW}]
    }
    assert json.loads(encode_request([]))["inputs"][0]["shape"] == [0, 0]
    assert PEERS["mlserver"]().path(None) == "/v2/models/my_model/infer"
    assert PEERS["kserve"]().path("1") == "/v2/models/my_model-1/infer"
    assert PEERS["kserve"]().path(None) == "/v2/models/my_model-2/infer"
    assert PEERS["litserve"]().request([ROW], "1") == PEERS["ray"]().request([ROW], "1")
    assert json.loads(PEERS["ray"]().body([ROW], "1")) == {"data": [ROW]}


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_reply_is_read(name):
    answer = PEERS[name]().decode(REPLIES[name])
    assert answer.shape == (1, 2)
    rows, _ = load_test_rows()
    np.testing.assert_allclose(answer[0], load_expected("1")[rows.index(ROW)], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "reply",
    [
        b"{}",
        b"[]",
        b"no JSON",
        b'{"error":"unknown model"}',
        b'{"outputs":[]}',
        b'{"outputs":[{"name":"output","datatype":"FP32","shape":[1,2]}]}',
        b'{"outputs":[{"name":"output","datatype":"FP32","shape":[1,2],"data":[0.5]}]}',
        b'{"outputs":[{"name":"output","datatype":"FP32","shape":[2],"data":[0.5,0.5]}]}',
        b'{"outputs":[{"name":"output","datatype":"FP32","shape":[1,2],"data":["a","b"]}]}',
        b'{"predictions":[0.5,0.5]}',
    ],
)
def test_a_reply_without_probabilities_is_a_value_error(reply):
    with pytest.raises(ValueError):
        decode_reply(reply)
    with pytest.raises(ValueError):
        PEERS["ray"]().decode(reply)


def test_nested_and_flat_output_of_many_rows_come_back_in_order():
    rows = np.linspace(0, 1, 6).reshape(3, 2)
    reply = {"outputs": [{"name": "output", "datatype": "FP32", "shape": [3, 2], "data": rows.ravel().tolist()}]}
    np.testing.assert_array_equal(decode_reply(json.dumps(reply).encode()), rows)
    reply["outputs"][0]["data"] = rows.tolist()
    np.testing.assert_array_equal(decode_reply(json.dumps(reply).encode()), rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_installed_peer_gives_the_references_answers_and_ends_whole(name, monkeypatch):
    if not PEERS[name].is_installed():
        pytest.skip(f"{name} is not installed: make peers")
    before = list_shared_memory()
    with tempfile.TemporaryDirectory() as folder:  # tmp_path is too long for the sockets of Ray
        monkeypatch.setenv("TMPDIR", folder)
        serve_and_end(name)
        assert not list(Path(folder).iterdir())
    assert list_shared_memory() <= before


def serve_and_end(name: str) -> None:
    endpoint = PEERS[name].on_free_ports()
    endpoint.start_timeout_s = DEADLINE_S
    with ServerProcess(endpoint) as server:
        for version in endpoint.versions:
            assert max_abs_difference(endpoint, version) <= TOLERANCE
        processes = server.processes()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(BEFORE_IDLE_TIMEOUT_S) == 0
        wait_until(
            lambda: not [process for process in processes if process.is_running()], f"all that {name} started ends"
        )


def test_only_the_peers_that_speak_the_open_inference_protocol_are_asked_by_it():
    assert {name for name, value in PEERS.items() if issubclass(value, OpenInferencePeer)} == {
        "triton",
        "kserve",
        "mlserver",
    }
