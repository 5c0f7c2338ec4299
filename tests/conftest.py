"""Shared fixtures: one real server per framework, started once on free ports by its Endpoint."""

import os
import signal
import socket
import sys
from pathlib import Path

import pytest

REPOSITORY_DIR = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY_DIR / "benchmarks"))
# A shell that runs the tests in the background has Ctrl-C ignored, nohup a lost terminal, and what the tests start
# would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.environ["BENTOML_HOME"] = str(REPOSITORY_DIR / "bentoml" / "store")
os.environ["BENTOML_DO_NOT_TRACK"] = "True"

from endpoint import load_endpoints  # noqa: E402
from server_process import ServerProcess, find_free_ports  # noqa: E402


def start(name: str) -> ServerProcess:
    """A ServerProcess, not yet entered, for the endpoint `name` on free ports."""
    endpoint_class = load_endpoints()[name]
    return ServerProcess(endpoint_class(find_free_ports(list(endpoint_class.default_ports))))


def refuse_taken_ports() -> None:
    """Fail where a program holds one of the usual ports, which commands written in a README use."""
    for name, endpoint_class in load_endpoints().items():
        for role, port in endpoint_class.default_ports.items():
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", port))
                except OSError:
                    pytest.fail(f"{name}'s usual port {port} ({role}) is in use: stop the program that holds it")


@pytest.fixture(scope="session")
def torchserve_server():
    with start("torchserve") as server:
        yield server


@pytest.fixture(scope="session")
def tfserving_server():
    with start("tfserving") as server:
        yield server


@pytest.fixture(scope="session")
def bentoml_server():
    with start("bentoml") as server:
        yield server


@pytest.fixture(scope="session")
def onnx_server():
    with start("onnx") as server:
        yield server


@pytest.fixture(scope="session")
def null_server():
    with start("null") as server:
        yield server
