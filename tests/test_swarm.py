"""swarm/stack.yml on three machines: an update rolls, replicas are doubled, a benchmark asks, and a machine dies.

The machines are Docker engines in network namespaces (nodes.py), on one kernel: they share processor, disk and clock.
"""

import contextlib
import json
import re
import subprocess
import sys
import threading
import time

import pytest

from endpoints.reference import TOLERANCE
from engine import FORBIDDEN, Engine, build_settings, make_base
from helpers import DEADLINE_S, REPOSITORY_DIR, run, wait_until
from nodes import REGISTRY, Nodes, find_missing

STACK = REPOSITORY_DIR / "swarm" / "stack.yml"
SERVICE = "serving_onnx"
REPLICAS = 3
REQUESTS = 3000
# Of the stack only this: the images of the others are gigabytes, three times. A core is not to be had three times here.
FEWER = {
    "REGISTRY": REGISTRY, "TORCHSERVE_REPLICAS": "0", "TFSERVING_REPLICAS": "0", "BENTOML_REPLICAS": "0",
    "ONNX_REPLICAS": str(REPLICAS), "ONNX_CPUS": "0.1", "GATEWAY_CPUS": "0.1",
}  # fmt: skip
pytestmark = pytest.mark.swarm


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The images of the ONNX server and the gateway in one file; the server also as one that serves version 1 alone."""
    if obstacle := find_missing():
        pytest.skip(f"no nodes can be made here: {obstacle}")
    path = tmp_path_factory.mktemp("images") / "images.tar"
    try:
        with Engine() as engine, build_settings(tmp_path_factory.mktemp("build")) as settings:
            make_base(engine)
            engine.environment |= settings
            engine.run("docker", "compose", "--profile", "gateway", "build", "onnx", "gateway", timeout_s=1200)
            names = []
            for tag in ("1", "2"):
                command = ["python", "server.py", "--host", "0.0.0.0", "--config", "tuned.toml", "--only-version", tag]
                folder = tmp_path_factory.mktemp(f"version-{tag}")
                (folder / "Dockerfile").write_text(f"FROM onnx-server:latest\nCMD {json.dumps(command)}\n")
                names.append(f"{REGISTRY}/onnx-server:{tag}")
                engine.run("docker", "build", "--tag", names[-1], str(folder))
            for image in ("onnx-server", "my_model-gateway"):
                names.append(f"{REGISTRY}/{image}:latest")
                engine.run("docker", "tag", f"{image}:latest", names[-1])
            engine.run("docker", "save", "--output", str(path), *names)
    except RuntimeError as error:
        if not FORBIDDEN.search(str(error)):
            raise
        pytest.skip(f"this machine lets no engine start: {error}")
    return path, names


@pytest.fixture(scope="module")
def nodes(images):
    """Three machines that run the stack; afterwards nothing of them is left."""
    path, names = images
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(Nodes())
        first = made.all[0]
        first.run("docker", "load", "--input", str(path))
        for name in names:
            first.run("docker", "push", name)
        deploy(first)
        wait_until(lambda: len(running(first)) == REPLICAS, lambda: tell(first))
        wait_until(lambda: len(running(first, "serving_gateway")) == len(made.all), lambda: tell(first))
        yield made
    wait_until(lambda: not made.list_left(), lambda: f"this is left: {made.list_left()}")


def deploy(node: Engine) -> None:
    node.run("docker", "stack", "deploy", "--compose-file", str(STACK), "serving", **FEWER)


def running(node: Engine, service: str = SERVICE) -> list[str]:
    """Return the machine of each task that runs and should; one with a health check runs once it is healthy."""
    wanted = ("docker", "service", "ps", "--quiet", "--filter", "desired-state=running", service)
    done = node.run(*wanted, check=False)
    if done.returncode != 0:  # while a new leader is elected
        return []
    form = "{{.NodeID}} {{.Status.State}}"
    tasks = node.run("docker", "inspect", "--type", "task", "--format", form, *done.stdout.split(), check=False).stdout
    return [line.split()[0] for line in tasks.splitlines() if line.endswith(" running")]


def tell(node: Engine) -> str:
    """What docker says of the services and the machines."""
    services = node.run("docker", "stack", "ps", "--no-trunc", "serving", check=False).stdout
    return f"{node.run('docker', 'node', 'ls', check=False).stdout}\n{services}\n{node.log_path.read_text()[-2000:]}"


class Load:
    """Clients beside the machines that ask one gateway, from `with` until `end`, and what they saw."""

    def __init__(self, nodes: Nodes, address: str):
        command = [
            *nodes.on_switch,
            sys.executable,
            "tests/cluster_client.py",
            f"http://{address}:8090/onnx",
            str(REQUESTS),
        ]
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY_DIR, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.lines: list[str] = []
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout))
        self.reader.start()

    def __enter__(self) -> "Load":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        self.reader.join()

    def wait_for(self, answered: int) -> None:
        wait_until(lambda: f"answered {answered}\n" in self.lines, f"{answered} answers", self.process)

    def end(self) -> dict:
        self.process.stdin.close()
        self.process.wait(DEADLINE_S)
        self.reader.join()
        return json.loads(self.lines[-1])


def assert_none_lost(seen: dict) -> None:
    lost = seen["lost"]
    assert not lost, f"{len(lost)} of {seen['answered'] + len(lost)} lost, the first: {lost[0]}"
    assert seen["answered"] >= REQUESTS
    assert seen["worst"] <= TOLERANCE


def test_the_replicas_are_on_different_machines(nodes):
    assert len(set(running(nodes.all[0]))) == REPLICAS


def test_a_rolling_update_loses_no_request_and_each_reply_is_of_the_version_that_it_names(nodes):
    first = nodes.all[0]
    first.run("docker", "service", "update", "--detach=false", "--image", f"{REGISTRY}/onnx-server:1", SERVICE)
    with Load(nodes, nodes.all[1].address) as load:
        load.wait_for(300)
        started_s = time.monotonic()
        first.run("docker", "service", "update", "--detach=false", "--image", f"{REGISTRY}/onnx-server:2", SERVICE)
        took_s = time.monotonic() - started_s
        seen = load.end()
    print(f"\nrolling update of {REPLICAS} replicas: {took_s:.0f} s, {seen}")
    assert_none_lost(seen)
    assert seen["versions"]["1"] >= 300 and seen["versions"]["2"] > 0


def test_what_was_doubled_answers_doubled(nodes):
    first = nodes.all[0]
    first.run("docker", "service", "scale", "--detach=false", f"{SERVICE}={2 * REPLICAS}")
    wait_until(lambda: len(running(first)) == 2 * REPLICAS, lambda: tell(first))
    wait_until(lambda: len(count_answers(nodes)) == 2 * REPLICAS, lambda: f"the gateway knows {count_answers(nodes)}")
    before = count_answers(nodes)
    with Load(nodes, nodes.all[1].address) as load:
        load.wait_for(600)
        after = count_answers(nodes)
    assert all(after[server] > before[server] for server in before), f"{before}, then {after}"
    first.run("docker", "service", "scale", "--detach=false", f"{SERVICE}={REPLICAS}")


def count_answers(nodes: Nodes) -> dict[str, int]:
    """Return how many requests each replica has answered that the second machine's gateway has up, by its own name."""
    node = nodes.all[1]
    container = node.run("docker", "ps", "--quiet", "--filter", "name=serving_gateway").stdout.split()[0]
    ask = "exec 3<>/dev/tcp/127.0.0.1/8404 && printf 'GET /metrics HTTP/1.0\\r\\n\\r\\n' >&3 && cat <&3"
    metrics = node.run("docker", "exec", container, "bash", "-c", ask).stdout
    up = re.findall(r'^haproxy_server_status\{proxy="onnx",server="(\w+)",state="UP"\} 1$', metrics, re.M)
    answered = r'^haproxy_server_http_responses_total\{proxy="onnx",server="(\w+)",code="2xx"\} (\d+)$'
    return {server: int(count) for server, count in re.findall(answered, metrics, re.M) if server in up}


def test_the_benchmark_measures_what_answers_at_an_address(nodes, tmp_path):
    first, path = nodes.all[0], tmp_path / "result.json"
    first.run("docker", "service", "update", "--detach=false", "--image", f"{REGISTRY}/onnx-server:latest", SERVICE)
    address = f"http://{nodes.all[1].address}:8090/onnx"
    options = "--settle-seconds 0 --connections 1 4 --rows 1 --rates 50 --rounds 1 --seconds 1 --no-report".split()
    benchmark = ["benchmarks/benchmark_all.py", "--address", f"onnx-tuned={address}", *options, "--output", str(path)]
    output = run(*nodes.on_switch, sys.executable, *benchmark, check=True).stdout
    result = json.loads(path.read_text())
    assert result["endpoints"]["onnx-tuned"]["kind"] == "cluster", output
    assert result["endpoints"]["onnx-tuned"]["settings"] == {"address": address}
    for window in result["windows"]:
        assert window["latency_us_counts"] and not window["errors"] and not window["wrong"], output
    latency = ["benchmarks/latency_test.py", "--endpoint", "onnx", "--address", address, "--seconds", "1"]
    assert "right answers" in run(*nodes.on_switch, sys.executable, *latency, check=True).stdout
    users = ["benchmarks/load_test.py", "--endpoint", "onnx", "--address", address, "--seconds", "2", "--users", "2"]
    done = run(*nodes.on_switch, sys.executable, *users)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_machine_that_dies_under_load_loses_no_request(nodes):
    """The first one, which leads the swarm; clients ask the second one's gateway."""
    first, second, _ = nodes.all
    assert "serving" in first.run("docker", "stack", "ls").stdout
    with Load(nodes, second.address) as load:
        load.wait_for(700)
        first.die()
        died_s = time.monotonic()
        wait_until(lambda: is_down(second, first), lambda: tell(second))
        down_s = time.monotonic() - died_s
        wait_until(lambda: len(running(second)) == REPLICAS, lambda: tell(second))
        whole_s = time.monotonic() - died_s
        seen = load.end()
    print(f"\na machine died: seen after {down_s:.0f} s, {REPLICAS} of {REPLICAS} after {whole_s:.0f} s, {seen}")
    assert_none_lost(seen)


def is_down(asked: Engine, other) -> bool:
    form = "{{.Status}} {{.ManagerStatus}}"
    listing = asked.run("docker", "node", "ls", "--format", form, check=False)
    return listing.returncode == 0 and "Down" in listing.stdout
