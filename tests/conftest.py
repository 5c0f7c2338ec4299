"""Shared fixtures: one real server per framework, started once on free ports by its Endpoint; and who runs what.

`make test` runs with three workers (pytest-xdist). Tests that share a server share a worker, so each server is started
once; the groups that take longest come first. Each worker has its own free ports.
"""

import contextlib
import os
import signal
import socket
import sys
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

REPOSITORY_DIR = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY_DIR / "benchmarks"))
# A shell that runs the tests in the background has Ctrl-C ignored, nohup a lost terminal, and what the tests start
# would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.environ["BENTOML_HOME"] = str(REPOSITORY_DIR / "bentoml" / "store")
os.environ["BENTOML_DO_NOT_TRACK"] = "True"
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # else a process that has used gRPC aborts between fork and exec

from endpoints.base import load_endpoints  # noqa: E402
from helpers import start  # noqa: E402
from machine.free_ports import read_free_ports  # noqa: E402

FRAMEWORKS = ("torchserve", "tfserving", "bentoml", "onnx")
LONGEST_FIRST = ("torchserve", "test_gateway", "tfserving", "bentoml", "test_benchmarks", "onnx")  # groups

worker, workers = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]), int(os.getenv("PYTEST_XDIST_WORKER_COUNT", 1))
share = len(read_free_ports()) // workers
first_port = read_free_ports()[worker * share]
os.environ["FREE_PORTS"] = f"{first_port}-{first_port + share - 1}"


def group_of(nodeid: str) -> str:
    """Return the framework whose server a test asks, by its file's name or its own; else its file."""
    path, _, name = nodeid.partition("::")
    stem = Path(path).stem
    for framework in FRAMEWORKS:
        if stem.startswith(f"test_{framework}"):
            return framework
    named = [framework for framework in FRAMEWORKS if framework in name]
    return named[0] if len(named) == 1 else stem


class GroupScheduling(LoadScopeScheduling):
    """Give each worker whole groups of tests; with pytest 9.2, whose node ids differ, xdist's loadgroup finds none."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log) -> LoadScopeScheduling:
    config.option.loadscopereorder = False  # they come sorted, see below
    return GroupScheduling(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="fail if a test was skipped (default: skips are named)")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")  # None in a worker
    if reporter and session.config.option.no_skips and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(group_of(item.nodeid), len(places)))


def refuse_taken_ports(*names: str) -> None:
    """Fail if a program holds a usual port of these endpoints (default: of all): the READMEs' commands use them."""
    endpoints = load_endpoints()
    for name in names or endpoints:
        for role, port in endpoints[name].default_ports.items():
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


@pytest.fixture(scope="session")
def built_engine(tmp_path_factory):
    """A Docker engine that holds the images of `make docker-build`, of which nothing is left afterwards."""
    import engine  # what it imports is for the few tests that need it
    from helpers import wait_until

    if obstacle := engine.find_obstacle():
        pytest.skip(f"no engine can be started here: {obstacle}")
    before = engine.list_traces()
    with contextlib.ExitStack() as stack:
        try:
            built = stack.enter_context(engine.Engine())
        except RuntimeError as error:
            if not engine.FORBIDDEN.search(str(error)):
                raise
            pytest.skip(f"this machine lets no engine start: {error}")
        built.environment |= stack.enter_context(engine.build_settings(tmp_path_factory.mktemp("build")))
        engine.make_base(built)
        engine.make_tfserving_stand_in(built)
        built.run("make", "docker-build", timeout_s=1200)
        yield built
    wait_until(lambda: not engine.list_traces() - before, lambda: f"left behind: {engine.list_traces() - before}")
