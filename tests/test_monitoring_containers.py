"""The profile `monitoring` of docker-compose.yml on a real engine: predictions logged, servers scraped, alerts printed.

The images of Prometheus and Alertmanager hold Debian's programs: that proves the wiring, not the official images.
"""

import json
import os
import re
import shutil
import signal
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import yaml

from client.ask import ask
from endpoints.base import load_endpoints
from endpoints.reference import TOLERANCE, load_expected, load_test_rows
from engine import Engine, make_program_stand_in
from helpers import DEADLINE_S, REPOSITORY_DIR, needs, wait_until
from machine.free_ports import find_free_ports
from test_containers import PORT_VARIABLES

PROFILES = ("--profile", "gateway", "--profile", "monitoring")
RECORDS = "127.0.0.1:8406"
ENDPOINTS = {"bentoml": "bentoml", "onnx": "onnx-tuned", "tfserving": "tfserving", "torchserve": "torchserve"}
TEMPLATES = Path("/usr/share/prometheus/alertmanager")  # Alertmanager's
ROWS, _ = load_test_rows()


class Monitored:
    """The four servers, the gateway and the monitoring in containers, on ports of their own."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.ports = find_free_ports(["GATEWAY_PORT", "PROMETHEUS_PORT", "ALERTMANAGER_PORT"])
        self.variables = dict.fromkeys(PORT_VARIABLES, "") | {name: str(port) for name, port in self.ports.items()}
        self.variables |= {"COMPOSE_PROJECT_NAME": "monitored", "GATEWAY_PREDICTIONS": RECORDS}

    def compose(self, *arguments: str) -> str:
        return self.engine.run("docker", "compose", *PROFILES, *arguments, timeout_s=1200, **self.variables).stdout

    def logs(self) -> str:
        return self.compose("logs", "--no-color", "--no-log-prefix", "collector")

    def predict(self, service: str, version: str) -> float:
        """Send all rows of test.csv through the gateway; return the largest difference from the reference."""
        endpoint = load_endpoints()[ENDPOINTS[service]]()
        endpoint.ports[endpoint.timed_port] = self.ports["GATEWAY_PORT"]
        inner_path = endpoint.path
        endpoint.path = lambda version: f"/{service}{inner_path(version)}"
        return float(np.abs(ask(endpoint, ROWS, version) - load_expected(version)).max())

    def count_rows(self) -> dict[tuple[str, str], tuple[int, float]]:
        """Return the rows in the log, and the sum of their P(benign), by server and version."""
        sql = "SELECT server, version, count(*) AS n, sum(benign) AS benign FROM predictions GROUP BY ALL ORDER BY ALL"
        lines = self.compose("exec", "-T", "collector", "python", "ask.py", "--state", "/state", sql).splitlines()
        found = [line.split() for line in lines if re.match(r"\w+ +\w+ +\d+ ", line)]
        return {(server, version): (int(n), float(benign)) for server, version, n, benign in found}

    def query(self, expression: str) -> list[dict]:
        """Return what Prometheus answers to an expression."""
        url = f"http://127.0.0.1:{self.ports['PROMETHEUS_PORT']}/api/v1/query?query={urllib.parse.quote(expression)}"
        with urllib.request.urlopen(url, timeout=DEADLINE_S) as reply:
            return json.load(reply)["data"]["result"]


@pytest.fixture(scope="module")
def monitored(built_engine):
    services = yaml.safe_load((REPOSITORY_DIR / "docker-compose.yml").read_text())["services"]
    prometheus, alertmanager = (Path(shutil.which(name) or "") for name in ("prometheus", "prometheus-alertmanager"))
    make_program_stand_in(built_engine, services["prometheus"]["image"], {"usr/bin/prometheus": prometheus})
    templates = {f"{TEMPLATES}/{name}".lstrip("/"): TEMPLATES / name for name in ("default.tmpl", "email.tmpl")}
    files = {"usr/bin/alertmanager": alertmanager, **templates}
    make_program_stand_in(built_engine, services["alertmanager"]["image"], files)
    monitored = Monitored(built_engine)
    try:
        monitored.compose("up", "--detach", "--wait")
        yield monitored
    finally:
        monitored.compose("down", "--volumes")


@pytest.mark.containers
@needs("prometheus")
@needs("prometheus-alertmanager")
def test_predictions_are_logged_servers_scraped_and_a_stopped_server_is_an_alert(monitored):
    wanted = {}
    for service in ENDPOINTS:
        for version in "12":
            assert monitored.predict(service, version) <= TOLERANCE
            path_names_it = service != "bentoml"
            key = service, version if path_names_it else "default"
            rows, benign = wanted.get(key, (0, 0.0))
            wanted[key] = rows + len(ROWS), benign + float(load_expected(version)[:, 1].sum())
    rows = {key: n for key, (n, _) in wanted.items()}
    wait_until(lambda: {key: n for key, (n, _) in monitored.count_rows().items()} == rows, monitored.logs)
    for key, (_, benign) in monitored.count_rows().items():
        assert benign == pytest.approx(wanted[key][1], abs=1e-3), key

    def up() -> dict[str, str]:
        return {each["metric"]["instance"]: each["value"][1] for each in monitored.query("up")}

    targets = {"gateway:8404", "gateway:8405", "bentoml:3000", "onnx:8000", "tfserving:8501", "torchserve:8082"}
    wait_until(lambda: up() == dict.fromkeys(targets, "1"), lambda: f"{up()}")
    assert len(monitored.query("sum by (server) (gateway_request_seconds_count)")) == len(ENDPOINTS)
    console = f"http://127.0.0.1:{monitored.ports['PROMETHEUS_PORT']}/consoles/servers.html"
    with urllib.request.urlopen(console, timeout=DEADLINE_S) as reply:
        assert b"<title>" in reply.read()
    assert "FIRING" not in monitored.logs()

    monitored.compose("stop", "bentoml")
    line = "page ReplicaDown: bentoml bentoml does not answer"
    wait_until(lambda: f"FIRING {line}" in monitored.logs(), monitored.logs)
    monitored.compose("start", "bentoml")
    wait_until(lambda: f"resolved {line}" in monitored.logs(), monitored.logs)


@pytest.mark.containers
@needs("prometheus")
@needs("prometheus-alertmanager")
def test_a_collector_that_is_stopped_loses_nothing_and_a_killed_one_is_started_again(monitored):
    def count() -> int:
        return monitored.count_rows().get(("onnx", "1"), (0, 0.0))[0]

    before = count()
    monitored.compose("stop", "collector")
    monitored.predict("onnx", "1")  # HAProxy keeps the record
    monitored.compose("start", "collector")
    wait_until(lambda: count() == before + len(ROWS), monitored.logs)
    (container,) = monitored.engine.inspect(monitored.compose("ps", "--quiet", "collector").strip())
    os.kill(container["State"]["Pid"], signal.SIGKILL)
    wait_until(lambda: monitored.engine.inspect(container["Id"])[0]["RestartCount"] > container["RestartCount"])
    monitored.compose("up", "--detach", "--wait")
    monitored.predict("onnx", "1")
    wait_until(lambda: count() == before + 2 * len(ROWS), monitored.logs)
