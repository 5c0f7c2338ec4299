"""monitoring/: rules, routes, panels and monitor.py, on Debian's Prometheus and Alertmanager."""

import base64
import concurrent.futures
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from bisect import bisect_left
from pathlib import Path
from types import SimpleNamespace

import grpc
import numpy as np
import psutil
import pytest
import yaml

from endpoints.base import load_endpoints
from helpers import (
    DEADLINE_S,
    REPOSITORY_DIR,
    load_script,
    load_together,
    needs,
    run,
    run_python,
    skip_without_haproxy,
    stop_impatiently,
    wait_until,
)
from machine.free_ports import find_free_ports
from machine.priority import lifted_priority
from terminal import Terminal
from test_gateway import ROWS, Gateway
from test_monitoring import (
    MONITORING,
    RESPONSES,
    TOY,
    Collector,
    Program,
    ask_grpc,
    ask_with_wrk,
    count_requests,
    gateway_ready,
    listens,
    prediction_log,
)  # fmt: skip

SERVERS = ("onnx", "bentoml", "tfserving", "torchserve")
ALWAYS = {"Watchdog"}  # never silent
RULES = yaml.safe_load((MONITORING / "rules.yml").read_text())["groups"]
ALERTS = {rule["alert"] for group in RULES for rule in group["rules"] if "alert" in rule}
panels = load_script(MONITORING / "panels.py")


def needs_debian(program: str, package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        shutil.which(program) is None, reason=f"no {program} on PATH: RUNLEVEL=1 apt-get install {package}"
    )


needs_prometheus = needs_debian("promtool", "prometheus")
needs_both = needs_debian("prometheus-alertmanager", "prometheus prometheus-alertmanager")


@needs_prometheus
def test_every_alert_fires_and_stays_silent_as_its_cases_say():
    run("promtool", "test", "rules", "rules_test.yml", cwd=MONITORING, check=True)


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_is_silent():
    cases = yaml.safe_load((MONITORING / "rules_test.yml").read_text())["tests"]
    checks = [check for case in cases for check in case["alert_rule_test"]]
    fired = {check["alertname"] for check in checks if check["exp_alerts"]}
    silent = {check["alertname"] for check in checks if not check["exp_alerts"]}
    assert fired == ALERTS
    assert silent == ALERTS - ALWAYS
    for name in ("ErrorBudgetBurn", "LatencyBudgetBurn"):  # each pair of windows for itself
        windows = [
            {alert["exp_labels"]["window"] for alert in c["exp_alerts"]} for c in checks if c["alertname"] == name
        ]
        assert {"1h", "6h", "3d"} in windows
        assert {"6h", "3d"} in windows
        assert {"3d"} in windows


def test_every_alert_names_a_runbook_that_is_there():
    text = (MONITORING / "REFERENCE.md").read_text()
    headings = {heading.lower() for heading in re.findall(r"^#+ (\w+)$", text, re.MULTILINE)}
    for group in RULES:
        for rule in group["rules"]:
            if "alert" in rule:
                assert rule["annotations"]["runbook"] == f"monitoring/REFERENCE.md#{rule['alert'].lower()}"
                assert rule["alert"].lower() in headings, f"no runbook for {rule['alert']}"
                assert rule["labels"]["severity"] in ("page", "ticket", "none")


@needs_both
def test_the_settings_are_those_that_the_programs_take():
    run("promtool", "check", "config", "prometheus.yml", cwd=MONITORING, check=True)
    run("amtool", "check-config", "alertmanager.yml", cwd=MONITORING, check=True)
    for labels, receiver in (("alertname=Watchdog", "watchdog"), ("alertname=ReplicaDown", "terminal")):
        done = run("amtool", "config", "routes", "test", "--config.file=alertmanager.yml", labels, cwd=MONITORING)
        assert done.stdout.strip() == receiver


def test_page_and_dashboard_are_made_of_the_panels():
    assert panels.PAGE.read_text() == panels.make_page(), "run make panels"
    assert panels.DASHBOARD.read_text() == panels.make_dashboard(), "run make panels"
    dashboard = json.loads(panels.DASHBOARD.read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert asked == [expression for panel in panels.PANELS for expression, _ in panel.lines]


class Monitor(Program):
    """monitor.py on free ports."""

    def __init__(self, folder: Path, gateway_metrics: int, targets: Path, ports: dict[str, int] | None = None):
        self.state = folder / "monitoring"
        self.ports = ports or find_free_ports(["collector", "prometheus", "alertmanager"])
        options = [word for role, port in self.ports.items() for word in (f"--{role}", str(port))]
        super().__init__(
            "monitor.py", "--state", self.state, *options, "--gateway-metrics", f"127.0.0.1:{gateway_metrics}",
            "--targets", targets, log=folder / "monitor.log",
        )  # fmt: skip

    def ask(self, expression: str) -> list[dict]:
        """Return what Prometheus answers to an expression."""
        words = urllib.parse.urlencode({"query": expression})
        url = f"http://127.0.0.1:{self.ports['prometheus']}/api/v1/query?{words}"
        with urllib.request.urlopen(url, timeout=DEADLINE_S) as reply:
            return json.load(reply)["data"]["result"]

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self, number: int = signal.SIGINT) -> int:
        """Send one signal; nothing may be left."""
        family = self.family() if self.process.poll() is None else []
        try:
            code = super().end(number)
            _, alive = psutil.wait_procs(family, timeout=DEADLINE_S)
            assert not alive, alive
        finally:
            for process in family:
                if process.is_running():
                    process.kill()
        return code


class Toys:
    """A gateway whose onnx has one replica of each version, toys, and a monitor beside it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.ports = find_free_ports(["v1", "v2"])
        self.programs = {}
        for version in "12":
            self.start(version)
        environment = {f"GATEWAY_ONNX_V{v}": f"127.0.0.1:{self.ports[f'v{v}']}" for v in "12"}
        environment["GATEWAY_PREDICTIONS"] = str(folder / "monitoring" / "records.sock")
        self.gateway = Gateway(folder / "gateway", "--servers", "onnx", environment=environment)
        self.gateway.__enter__()
        self.monitor = Monitor(folder, self.gateway.metrics_port, folder / "gateway" / "targets.json")

    def start(self, version: str) -> None:
        program = Program(TOY, version, str(self.ports[f"v{version}"]), log=self.folder / f"toy-{version}")
        self.programs[version] = program
        wait_until(lambda: listens(self.ports[f"v{version}"]), program.log, while_alive=program.process)

    def patients(self, *options: str) -> str:
        done = run(
            sys.executable, "patients.py", "--gateway", f"localhost:{self.gateway.port}", "--servers", "onnx",
            "--ca", self.gateway.state / "tls.pem", "--labels", self.monitor.state / "labels", "--seed", "1", *options,
            cwd=MONITORING, env={"KEY": self.gateway.key}, check=True,
        )  # fmt: skip
        return done.stdout

    def when(self, text: str) -> float:
        """Return on the clock of `wait_for_alert` when the monitor printed a line, to the second."""
        self.monitor.wait_for(text)
        [line] = [line for line in self.monitor.log().splitlines() if text in line][:1]
        hours, minutes, seconds = map(int, line.split()[0].split(":"))
        now = time.localtime()
        ago = (now.tm_hour - hours) * 3600 + (now.tm_min - minutes) * 60 + now.tm_sec - seconds
        return time.monotonic() - ago % 86400

    def wait_for_alert(self, text: str, since_s: float) -> None:
        """Wait for a line of the monitor, and print how many seconds after `since_s` it came."""
        print(f"\n{self.when(text) - since_s:5.0f} s until {text.strip()[:60]}")

    def stop(self) -> None:
        try:
            self.monitor.end()
        finally:
            self.gateway.__exit__()
            for program in self.programs.values():
                program.end(signal.SIGKILL)


@pytest.fixture
def toys(tmp_path):
    toys = Toys(tmp_path)
    try:
        toys.monitor.wait_for("monitoring, Ctrl-C to stop")
        gateway_ready(toys.gateway)
        yield toys
    finally:
        toys.stop()


@pytest.mark.slow
@needs_both
def test_a_dead_replica_is_told_in_the_terminal_and_so_is_its_return(toys):
    monitor = toys.monitor
    wait_until(lambda: len(monitor.ask('up{job="gateway"} == 1')) == 1, monitor.log)
    start_s = time.monotonic()
    toys.programs["2"].end(signal.SIGKILL)
    toys.wait_for_alert(
        " FIRING page ReplicaDown: onnx v2-1 does not answer; what to do: monitoring/REFERENCE.md#replicadown", start_s
    )
    toys.start("2")
    toys.wait_for_alert(" resolved page ReplicaDown: onnx v2-1 does not answer", time.monotonic())
    assert toys.gateway.ask()[0] == 200
    wait_until(lambda: monitor.ask('gateway_request_seconds_count{server="onnx"} > 0'), monitor.log)
    assert monitor.end() == 0
    assert monitor.log().splitlines()[-1] == "stopped"
    assert "Traceback" not in monitor.log()


@pytest.mark.slow
@needs_both
def test_failures_drift_and_wrong_labels_each_come_as_an_alert_and_end(toys):
    monitor, gateway = toys.monitor, toys.gateway
    assert "failed" not in toys.patients("--count", "200", "--rate", "100")
    # Prometheus sees no increase in a number's first value: it must have seen the 0.
    wait_until(lambda: monitor.ask('gateway_request_seconds_count{code="5xx"} == 0'), monitor.log)
    body = json.dumps({"fail": 500}).encode()
    start_s = time.monotonic()
    for _ in range(30):
        assert gateway.ask(body=body)[0] == 500
    toys.wait_for_alert(" FIRING page ErrorBudgetBurn: onnx version 1:", start_s)
    start_s = time.monotonic()
    toys.patients("--count", "3000", "--rate", "500")  # of all requests of 5 minutes less than 1.44 % have failed now
    toys.wait_for_alert(" resolved page ErrorBudgetBurn: onnx version 1:", start_s)

    toys.patients("--count", "1500", "--rate", "150", "--drift", "mean texture=+1sd")
    # The detector's own line comes with the request that was enough.
    toys.wait_for_alert(
        " FIRING ticket InputDrift: onnx version 1: the inputs are no longer those of train.csv (mean texture higher)",
        toys.when("drift: onnx version 1, input: mean texture higher"),
    )
    toys.patients("--count", "400", "--rate", "100", "--labels-after", "2", "--wrong-labels", "0.5")
    toys.wait_for_alert(
        " FIRING page AccuracyDrift: onnx version 1: more errors than test.csv allows",
        toys.when("drift: onnx version 1, accuracy: errors"),
    )
    wait_until(lambda: monitor.ask("sum(gateway_labels_total) == 400"), monitor.log)  # or the next would alarm again
    url = f"http://127.0.0.1:{monitor.ports['collector']}/reset?server=onnx&version=1"
    start_s = time.monotonic()
    with urllib.request.urlopen(urllib.request.Request(url, method="POST"), timeout=DEADLINE_S) as reply:
        assert reply.read() == b"1 reset\n"
    for name in ("InputDrift", "AccuracyDrift"):
        severity = "page" if name == "AccuracyDrift" else "ticket"
        toys.wait_for_alert(f" resolved {severity} {name}: onnx version 1:", start_s)


@needs_both
def test_what_keeps_the_monitoring_from_starting_is_told_in_one_line(tmp_path):
    ports = find_free_ports(["collector", "prometheus", "alertmanager", "gateway"])
    with subprocess.Popen([sys.executable, "-m", "http.server", str(ports["prometheus"]), "--bind", "127.0.0.1"],
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path) as taken:  # fmt: skip
        try:
            wait_until(lambda: listens(ports["prometheus"]), "http.server")
            monitor = Monitor(tmp_path, ports.pop("gateway"), tmp_path / "targets.json", ports)
            assert monitor.process.wait(DEADLINE_S) == 1
        finally:
            taken.kill()
    [line] = monitor.log().splitlines()
    assert line.startswith(f"monitor: 127.0.0.1:{ports['prometheus']}: Address already in use; stop what listens")
    (tmp_path / "file").touch()
    options = [word for role, port in ports.items() for word in (f"--{role}", str(port))]
    monitor = run_python(
        "monitor.py", "--state", tmp_path / "other", *options, "--records", tmp_path / "file", cwd=MONITORING
    )
    assert (monitor.returncode, monitor.stderr) == (
        1, f"monitor: {tmp_path}/file: Address already in use; stop what listens there, or choose another --records\n"
    )  # fmt: skip
    environment = {"PATH": str(Path(sys.executable).parent)}
    monitor = run(
        sys.executable, "monitor.py", "--state", tmp_path / "other", *options, cwd=MONITORING, env=environment
    )
    assert monitor.returncode == 1
    assert monitor.stderr.startswith(
        "monitor: prometheus-alertmanager not found; install it: sudo apt-get install prome"
    )


@needs_both
def test_ctrl_c_again_and_again_leaves_nothing_and_changes_no_exit_code(tmp_path):
    gateway_metrics = find_free_ports(["nobody"])["nobody"]
    monitor = Monitor(tmp_path, gateway_metrics, tmp_path / "targets.json")
    monitor.wait_for("monitoring, Ctrl-C to stop")
    family = monitor.family()
    assert stop_impatiently(monitor.process, signal.SIGINT) == 0
    assert psutil.wait_procs(family, timeout=DEADLINE_S)[1] == []
    assert not (monitor.state / "records.sock").exists()
    assert monitor.log().splitlines()[-1].endswith("stopped")
    assert "Traceback" not in monitor.log()


@needs_both
@pytest.mark.slow
def test_a_killed_monitor_leaves_nothing_and_a_killed_collector_is_started_again(toys):
    monitor = toys.monitor
    collector = next(p for p in monitor.family() if "collect.py" in " ".join(p.cmdline()))
    collector.kill()
    monitor.wait_for("collector has ended with -9; it is started again")
    wait_until(lambda: monitor.log().count("collector: records on") == 2, monitor.log)
    assert monitor.end(signal.SIGKILL) == -signal.SIGKILL


@pytest.mark.slow
@needs_both
@needs("wrk")
def test_a_collector_that_is_killed_at_a_thousand_requests_a_second_loses_none_of_ten_thousand(toys, tmp_path):
    """Prints how many are lost: monitor.py keeps the connection, and with it what HAProxy has sent."""
    monitor, gateway = toys.monitor, toys.gateway
    user = threading.Thread(target=ask_with_wrk, args=(gateway, tmp_path, 10, 20, 9))

    def count(sql: str = "count(*)") -> int:
        with prediction_log.open_view(monitor.state / "predictions") as connection:
            return connection.execute(f"SELECT {sql} FROM predictions").fetchone()[0]

    taken = prediction_log.Count(monitor.state / "records.count")
    user.start()
    for number in (1, 2):
        wait_until(lambda least=3000 * number: taken.value > least, lambda: f"{taken.value} records, {monitor.log()}")
        next(p for p in monitor.family() if "collect.py" in " ".join(p.cmdline())).kill()
        wait_until(lambda times=number: monitor.log().count("it is started again") == times, monitor.log)
    user.join(2 * DEADLINE_S)
    last = gateway.ask()[1]["x-request-id"]  # nothing comes after it
    wait_until(lambda: count(f"count(*) FILTER (id = '{last}')"), monitor.log)
    sent, rows, different = count_requests(gateway), count(), count("count(DISTINCT id)")
    print(f"\n{sent:,} requests and two kills: {sent - different} lost, {rows - different} twice")
    assert rows == different
    assert sent - different <= sent / 10_000


@pytest.mark.slow
@pytest.mark.timing
@needs_both
def test_make_monitoring_is_up_within_fifteen_seconds_and_one_ctrl_c_ends_all_of_it(tmp_path):
    """Typed in a terminal; prints how long both take."""
    ports = find_free_ports(["collector", "prometheus", "alertmanager", "gateway-metrics"])
    addresses = {**ports, "gateway-metrics": f"127.0.0.1:{ports['gateway-metrics']}"}
    options = [f"--{role} {address}" for role, address in addresses.items()]
    options += [f"--state {tmp_path / 'monitoring'}", f"--targets {tmp_path / 'targets.json'}"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "MONITORING_OPTIONS": " ".join(options)}
    terminal = Terminal(str(tmp_path), REPOSITORY_DIR, environment)
    try:
        start, start_s = len(terminal.screen), time.monotonic()

        def is_up() -> bool:
            assert not terminal.has_prompted_since(start), terminal.shown_since(start)
            return "monitoring, Ctrl-C to stop" in terminal.shown_since(start)

        terminal.press(b"make monitoring\n")
        wait_until(is_up, lambda: terminal.shown_since(start))
        up_s = time.monotonic() - start_s
        running = " ".join(word for process in terminal.list_processes() for word in process.cmdline())
        assert all(name in running for name in ("collect.py", "prometheus.yml", "alertmanager.yml", "monitor.py"))
        start_s = time.monotonic()
        terminal.interrupt(start)
        terminal.wait_until_empty("Ctrl-C")
        down_s = time.monotonic() - start_s
        wait_until(lambda: terminal.has_prompted_since(start), lambda: terminal.shown_since(start))
        print(f"\nup in {up_s:.1f} s, gone {down_s:.1f} s after Ctrl-C")
        assert "Traceback" not in terminal.shown_since(start)
        assert not any(listens(port) for port in ports.values())
    finally:
        terminal.close()
    assert up_s <= 15


@pytest.fixture(scope="module")
def four_servers(tmp_path_factory):
    """A gateway before one replica of each version of the four real servers, and a monitor beside it."""
    folder = tmp_path_factory.mktemp("four")
    environment = {"GATEWAY_PREDICTIONS": str(folder / "monitoring" / "records.sock")}
    options = ("--replicas", "1", "--servers", *SERVERS)
    with Gateway(folder / "gateway", *options, environment=environment) as gateway:
        monitor = Monitor(folder, gateway.metrics_port, folder / "gateway" / "targets.json")
        try:
            monitor.wait_for("monitoring, Ctrl-C to stop")
            gateway.command("set", "my_model", "v2=50")
            yield gateway, monitor
        finally:
            monitor.end()


@pytest.mark.slow
@needs_both
def test_ten_thousand_requests_to_the_real_servers_are_each_logged_once_with_their_values(four_servers):
    gateway, monitor = four_servers
    numbers, lock, sent = iter(range(10_000)), threading.Lock(), {}
    endpoints = {name: load_endpoints()[name]() for name in SERVERS}

    def user() -> None:
        context = gateway.context()
        connection = http.client.HTTPSConnection("localhost", gateway.port, timeout=DEADLINE_S, context=context)
        with contextlib.closing(connection):
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                endpoint = endpoints[SERVERS[number % len(SERVERS)]]
                rows = [ROWS[(number + i) % len(ROWS)] for i in range(1 + number % 3)]
                request = endpoint.request(rows, None)
                headers = {"X-API-Key": gateway.key, "Content-Type": request.content_type}
                connection.request("POST", f"/{endpoint.name}{request.path}", request.body, headers)
                reply = connection.getresponse()
                body = reply.read()
                assert reply.status == 200, body
                version = reply.headers["X-Model-Version"]
                with lock:
                    sent[reply.headers["X-Request-Id"]] = (endpoint.name, version, rows, endpoint.decode(body))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(user) for _ in range(4)]:
            future.result()
    assert len(sent) == 10_000
    assert {(name, version) for name, version, *_ in sent.values()} == {(n, v) for n in SERVERS for v in "12"}
    wait_until(lambda: monitor.ask("gateway_records_total >= 10000"), monitor.log)
    with prediction_log.open_view(monitor.state / "predictions") as connection:
        kept = connection.execute("SELECT * FROM predictions").fetchall()
    seen, largest = set(), 0.0
    for _, key, row, _, server, version, wanted, _, _, _, _, status, _, *numbers, note in kept:
        if str(key) in sent:
            name, answered, rows, probabilities = sent[str(key)]
            assert (server, version, wanted, status, note) == (name, answered, answered, 200, "")
            assert (key, row) not in seen
            seen.add((key, row))
            largest = max(largest, np.abs(np.array(numbers) - [*rows[row], *probabilities[row]]).max())
    assert largest <= 1e-9
    assert len(seen) == sum(len(rows) for _, _, rows, _ in sent.values())
    print(f"\n{len(sent):,} requests, {len(seen):,} rows, each once, largest difference {largest:g}")


@pytest.mark.slow
@needs_both
def test_grpc_requests_to_the_real_servers_are_logged_with_their_values(four_servers):
    gateway, monitor = four_servers

    def answers(name: str, version: str) -> bool:
        with contextlib.suppress(grpc.RpcError):  # the first connection to a server takes its time on a busy machine
            return bool(ask_grpc(gateway, name, ROWS[:1], version))
        return False

    for name in ("tfserving", "torchserve"):
        for version in "12":
            wait_until(lambda n=name, v=version: answers(n, v), gateway.log)
    sent = {}
    for number in range(400):
        name, version = ("tfserving", "torchserve")[number % 2], "12"[number // 2 % 2]
        rows = [ROWS[(number + i) % len(ROWS)] for i in range(1 + number % 3)]
        key, answered, probabilities = ask_grpc(gateway, name, rows, version)
        sent[key] = (name, answered, rows, probabilities)
    assert len({(name, version) for name, version, *_ in sent.values()}) == 4  # of each server both versions
    with prediction_log.open_view(monitor.state / "predictions") as connection:
        newest = "SELECT count(*) FROM predictions WHERE id = ?"
        wait_until(lambda: connection.execute(newest, [key]).fetchone()[0], "the last request is in the log")
        kept = connection.execute("SELECT * FROM predictions WHERE protocol = 'gRPC'").fetchall()
    seen, largest = set(), 0.0
    for _, key, row, _, server, version, *_, status, _, r0, r1, r2, r3, r4, malignant, benign, note in kept:
        if str(key) not in sent:
            continue  # of the first ones
        name, asked, rows, probabilities = sent[str(key)]
        assert (server, version, status, note) == (name, asked, 200, "")
        assert (key, row) not in seen
        seen.add((key, row))
        expected = np.array([*rows[row], *probabilities[row]])
        largest = max(
            largest, (np.abs([r0, r1, r2, r3, r4, malignant, benign] - expected) / (np.abs(expected) + 1e-9)).max()
        )
    assert len(seen) == sum(len(rows) for _, _, rows, _ in sent.values())
    assert largest <= 1e-6  # over gRPC both are float32
    print(f"\n{len(sent)} requests over gRPC, {len(seen)} rows, each once, largest relative difference {largest:.1g}")


@pytest.mark.slow
@needs_both
@needs("wrk")
def test_the_gateways_histogram_says_what_the_users_clocks_say(four_servers, tmp_path):
    """Prints p50 and p99 by the client's clock, by the gateway's buckets, and the server's own p99."""
    gateway, monitor = four_servers
    edges = load_together(MONITORING, "collect")[0].EDGES
    gateway.command("set", "my_model", "v2=0")

    def read_counts(name: str) -> np.ndarray:
        series = monitor.ask(f'sum by (le) (gateway_request_seconds_bucket{{server="{name}", code="2xx"}})')
        found = {float(s["metric"]["le"]): float(s["value"][1]) for s in series}
        return np.array([found.get(float(edge), 0.0) for edge in edges])

    own = {
        "onnx": "onnx_server_request_latency_seconds_bucket",
        "tfserving": ":tensorflow:serving:request_latency_bucket",
        "bentoml": 'bentoml_service_request_duration_seconds_bucket{endpoint="/predict"}',
    }
    try:
        for name in SERVERS:
            before = read_counts(name)
            with lifted_priority():  # else the user's clock shows how long the user waited for a core
                p50_ms, p99_ms, _, count, failed = ask_with_wrk(gateway, tmp_path, 1, 10, 3, name)
            assert not failed
            wait_until(lambda n=name, b=before, c=count: read_counts(n)[-1] - b[-1] >= c, "they are counted")
            counts = read_counts(name) - before
            places = [int(np.searchsorted(counts, share * counts[-1])) for share in (0.5, 0.99)]
            clocks = [bisect_left(edges[:-1], ms / 1e3, key=float) for ms in (p50_ms, p99_ms)]
            native = "none"
            if name in own:
                expression = f"histogram_quantile(0.99, sum by (le) (rate({own[name]}[10s])))"
                scale = 1e-3 if name == "tfserving" else 1e3  # TensorFlow Serving counts in microseconds
                native = f"{float(monitor.ask(expression)[0]['value'][1]) * scale:.2f} ms"
            print(
                f"\n{name}: client p50 {p50_ms:.2f} ms, p99 {p99_ms:.2f} ms; gateway p50 up to "
                f"{float(edges[places[0]]) * 1e3:g} ms, p99 up to {float(edges[places[1]]) * 1e3:g} ms; "
                f"the server's own p99 {native}"
            )
            assert all(place <= clock for place, clock in zip(places, clocks, strict=True)), "users see no less"
            assert clocks[0] - places[0] <= 2, "p50: what the way to the user adds"
    finally:
        gateway.command("set", "my_model", "v2=50")


@pytest.mark.slow
@needs_both
def test_with_all_four_servers_every_panel_has_data_and_the_page_draws_it(four_servers, tmp_path):
    from test_report import CHROMIUM, Browser

    gateway, monitor = four_servers
    patients = Program(
        "patients.py", "--gateway", f"localhost:{gateway.port}", "--ca", gateway.state / "tls.pem", "--labels",
        monitor.state / "labels", "--labels-after", "2", "--seconds", "600", log=tmp_path / "patients.log",
        environment={"KEY": gateway.key, "GATEWAY_STATE": str(gateway.state)},
    )  # fmt: skip

    def find_empty() -> list[str]:
        expressions = {e for panel in panels.PANELS for e, _ in panel.lines}
        return sorted(e for e in expressions if not any(s["value"][1] != "NaN" for s in monitor.ask(e)))

    try:
        wait_until(lambda: not find_empty(), lambda: f"no data: {find_empty()}", while_alive=patients.process)
        for name in SERVERS:
            for version in "12":
                assert monitor.ask(f'up{{job="servers", server="{name}", version="{version}"}} == 1'), name
        # Each replica counts for itself; in a shared folder BentoML's lost each other's counts.
        for version in "12":
            own = "bentoml_service_request_total"
            assert monitor.ask(f'{own}{{server="bentoml", version="{version}", endpoint="/predict"}} > 0')
        versions = {s["metric"]["model_version"] for s in monitor.ask("ts_inference_requests_total")}
        assert versions == {"1.0", "2.0"}
        if CHROMIUM is None:
            pytest.skip("no Chromium on PATH: apt-get install chromium")
        profile = tmp_path / "profile"
        profile.mkdir()
        browser = Browser(profile)
        try:
            url = f"http://127.0.0.1:{monitor.ports['prometheus']}/consoles/servers.html"
            browser.open(SimpleNamespace(as_uri=lambda: url), 1400)
            wait_until(lambda: browser.evaluate("Number(document.body.dataset.drawn || 0)") >= 2, "it draws")
            drawn = browser.evaluate("[...document.querySelectorAll('section')].map(s => +s.dataset.series).join()")
            assert all(int(count) > 0 for count in drawn.split(",")), drawn
            assert len(drawn.split(",")) == len(panels.PANELS)
            assert not [event for event in browser.events if event["method"] == "Runtime.exceptionThrown"]
            if folder := os.environ.get("KEEP_PICTURES"):
                picture = browser.ask("Page.captureScreenshot", captureBeyondViewport=True)["data"]
                Path(folder, "servers.png").write_bytes(base64.b64decode(picture))
        finally:
            browser.close()
    finally:
        patients.end()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npm") is None, reason="no npm on PATH: apt-get install npm")
def test_grafanas_own_types_accept_the_dashboard_and_refuse_a_wrong_one(tmp_path):
    packages = ["@grafana/schema@13.2.3", "typescript@5.9.3"]
    installed = run("npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", *packages, cwd=tmp_path)
    if installed.returncode:
        pytest.skip(f"npm cannot install Grafana's types here: {installed.stderr.splitlines()[0]}")
    dashboard = panels.DASHBOARD.read_text()

    def check(text: str) -> subprocess.CompletedProcess:
        source = f'import type {{ Dashboard }} from "@grafana/schema";\nexport const dashboard: Dashboard = {text};\n'
        (tmp_path / "dashboard.ts").write_text(source)
        options = "--noEmit --strict --skipLibCheck --module nodenext --moduleResolution nodenext".split()
        return run("npx", "tsc", *options, "dashboard.ts", cwd=tmp_path)

    accepted = check(dashboard)
    assert accepted.returncode == 0, accepted.stdout
    refused = check(dashboard.replace('"unit": "s"', '"unit": 5', 1))
    assert "Type 'number' is not assignable to type 'string'" in refused.stdout


@needs_both
def test_the_containers_read_the_same_files_with_their_names_for_the_addresses(tmp_path):
    """The commands of docker-compose.yml, up to the program that they start, in a folder instead of a container."""
    services = yaml.safe_load((MONITORING.parent / "docker-compose.yml").read_text())["services"]
    for name, check in (("prometheus", ("promtool", "check", "config")), ("alertmanager", ("amtool", "check-config"))):
        service = services[name]
        assert service["image"].split(":")[1].startswith("v"), "pinned"
        mounted = {target: source for source, target, *_ in (v.split(":") for v in service["volumes"])}
        for target, source in mounted.items():
            if target.startswith("/monitoring/"):
                assert (MONITORING.parent / source).exists(), source
        folder = tmp_path / name
        folder.mkdir()
        [command] = service["command"]
        prepare, _, start = (
            command.replace("/tmp/", f"{folder}/").replace("/monitoring/", f"{MONITORING}/").partition("&&")
        )
        run(*service["entrypoint"], prepare, check=True)
        settings = (folder / f"{name}.yml").read_text()
        assert "127.0.0.1" not in settings.partition("\n")[2]
        assert f"--config.file={folder}/{name}.yml" in start
        done = run(*check, folder / f"{name}.yml", check=True)
        assert "WARNING" not in done.stdout + done.stderr
    for address in re.findall(
        r"//([a-z]+):\d+|\"([a-z]+):\d+\"", (tmp_path / "prometheus" / "prometheus.yml").read_text()
    ):
        assert set(filter(None, address)) <= services.keys()


def test_the_gateway_among_containers_logs_predictions_with_the_version_that_the_path_names(tmp_path):
    """containers.cfg on the real HAProxy, with an address where a container has a name."""
    ports = find_free_ports(["users", "health", "metrics", "toy"])
    collector, toy = Collector(tmp_path), Program(TOY, "1", str(ports["toy"]), log=tmp_path / "toy")
    text = (MONITORING.parent / "gateway" / "containers.cfg").read_text()
    for old, new in (
        ("bind :8090", f"bind 127.0.0.1:{ports['users']}"),
        ("bind 127.0.0.1:8403", f"bind 127.0.0.1:{ports['health']}"),
        ("bind :8404", f"bind 127.0.0.1:{ports['metrics']}"),
        (re.search("server-template onnx .*", text)[0], f"server onnx1 127.0.0.1:{ports['toy']} no-check"),
    ):
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "haproxy.cfg").write_text(text)
    skip_without_haproxy()
    from gateway import find_haproxy

    environment = {**os.environ, "GATEWAY_PREDICTIONS": collector.records}
    command = [find_haproxy(), "-db", "-f", tmp_path / "haproxy.cfg"]
    with (tmp_path / "haproxy.log").open("wb") as log:
        haproxy = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        wait_until(lambda: listens(ports["users"]) and listens(ports["toy"]), (tmp_path / "haproxy.log").read_text)
        image = (MONITORING.parent / "gateway" / "Dockerfile").read_text().replace("\\\n", "")
        check = json.loads(re.search(r"^HEALTHCHECK .*?CMD (\[.*\])$", image, re.M)[1])  # is no user's prediction
        run(*(word.replace("127.0.0.1/8403", f"127.0.0.1/{ports['health']}") for word in check), check=True)
        body, keys = json.dumps({"data": [[1.0, 2.0, 3.0, 4.0, 5.0]]}), {}
        for path, version in (("/onnx/predict", "default"), ("/onnx/predict/2", "2"), ("/onnx/predict/1", "1")):
            connection = http.client.HTTPConnection("127.0.0.1", ports["users"], timeout=DEADLINE_S)
            with contextlib.closing(connection):
                connection.request("POST", path, body, {"Content-Type": "application/json"})
                reply = connection.getresponse()
                assert reply.status == 200, reply.read()
                keys[reply.headers["X-Request-Id"]] = version
        collector.wait_for_records(3)
        kept = collector.ask('SELECT id, server, version, "mean radius", benign, note FROM predictions')
        assert {str(key): version for key, _, version, *_ in kept} == keys
        assert {row[1:2] + row[3:] for row in kept} == {("onnx", 1.0, 0.01, "")}
        with urllib.request.urlopen(f"http://127.0.0.1:{ports['metrics']}/metrics", timeout=DEADLINE_S) as reply:
            counts = dict(line.rsplit(" ", 1) for line in reply.read().decode().splitlines())
        by_code = [int(count) for name, count in counts.items() if name.startswith(RESPONSES)]
        assert sum(by_code) == 3, "nor is a probe one"
    finally:
        haproxy.kill()
        haproxy.wait()
        toy.end(signal.SIGKILL)
        assert collector.end() == 0
