"""monitoring/: the tap, the collector and its log, on a real HAProxy before toys that speak all servers' forms."""

import base64
import contextlib
import gzip
import http.client
import json
import math
import os
import re
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import grpc
import numpy as np
import psutil
import pytest

from endpoints.base import load_endpoints
from helpers import DEADLINE_S, REPOSITORY_DIR, load_together, needs, run, run_python, stop_impatiently, wait_until
from machine.free_ports import find_free_ports
from machine.signals import end_with_parent
from test_gateway import Gateway, list_haproxies, script

MONITORING = REPOSITORY_DIR / "monitoring"
TOY = REPOSITORY_DIR / "tests" / "toy_predictors.py"
TOYS = ("onnx", "bentoml", "tfserving", "torchserve")
RESPONSES = 'haproxy_frontend_http_responses_total{proxy="gateway",'  # by their codes
prediction_log, records, grpc_exchanges, exchanges = load_together(
    MONITORING, "prediction_log", "records", "grpc_exchanges", "exchanges"
)


def toy_rows(n: int, start: int = 0) -> list[list[float]]:
    """Rows of which each is another: P(benign) is a hundredth of the first number, or of the second by version 2."""
    return [[(start + i) % 97 + 0.25, (start + i) % 89 + 0.5, 0.1, 0.1, 0.2 + (start + i) / 1e6] for i in range(n)]


class Program:
    """A process of the monitoring, whose output is kept."""

    def __init__(
        self,
        *command: str | Path,
        log: Path,
        environment: dict[str, str] | None = None,
        inherited: tuple[int, ...] = (),
    ):
        self.log_path = log
        parent = os.getpid()
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, *command], cwd=MONITORING, env={**os.environ, **(environment or {})},
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True, pass_fds=inherited,
                preexec_fn=lambda: end_with_parent(parent),  # whatever becomes of the test
            )  # fmt: skip

    def log(self) -> str:
        return self.log_path.read_text()

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self.log(), lambda: f"{text!r} in {self.log()!r}", while_alive=self.process)

    def end(self, number: int = signal.SIGINT) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(DEADLINE_S)


class Collector(Program):
    def __init__(self, folder: Path, records: str | None = None, http_port: int | None = None):
        self.state = folder / "monitoring"
        self.records = records or str(folder / "records.sock")
        self.http_port = http_port or find_free_ports(["http"])["http"]
        super().__init__(
            "collect.py", "--state", self.state, "--records", self.records,
            "--http", f"127.0.0.1:{self.http_port}", log=folder / "collector.log",
        )  # fmt: skip
        count = self.log().count("records on")
        wait_until(lambda: self.log().count("records on") > count or self.answers(), self.log, while_alive=self.process)

    def answers(self) -> bool:
        with contextlib.suppress(OSError):
            return bool(self.get("/metrics"))
        return False

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}{path}", timeout=DEADLINE_S) as reply:
            return reply.read().decode()

    def post(self, path: str, body: object = "", **headers: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=DEADLINE_S)
        with contextlib.closing(connection):
            connection.request("POST", path, body if isinstance(body, str) else json.dumps(body), headers)
            reply = connection.getresponse()
            return reply.status, reply.read().decode()

    def value(self, metric: str) -> float:
        """Return the sum of a metric's values, of those whose labels are named in it."""
        name, _, labels = metric.partition("{")
        wanted = re.findall(r'\w+="[^"]*"', labels)
        lines = [line.rpartition(" ") for line in self.get("/metrics").splitlines() if re.match(rf"{name}[{{ ]", line)]
        return sum(float(value) for key, _, value in lines if all(pair in key for pair in wanted))

    def ask(self, sql: str) -> list[tuple]:
        with prediction_log.open_view(self.state / "predictions", self.state / "labels") as connection:
            return connection.execute(sql).fetchall()

    def wait_for_records(self, count: int) -> None:
        wait_until(
            lambda: self.value("gateway_records_total") >= count,
            lambda: f"{count} records: {self.value('gateway_records_total')}, {self.log()}",
        )


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """The environment of a gateway behind which both versions of all four servers are toys."""
    folder, programs, environment = tmp_path_factory.mktemp("toys"), [], {}
    try:
        for version in "12":
            ports = find_free_ports(["rest", "grpc"])
            programs.append(
                Program(
                    REPOSITORY_DIR / "tests" / "toy_predictors.py",
                    version,
                    *map(str, ports.values()),
                    log=folder / version,
                )
            )
            for name in TOYS:
                environment[f"GATEWAY_{name.upper()}_V{version}"] = f"127.0.0.1:{ports['rest']}"
            for name in ("TFSERVING", "TORCHSERVE"):
                environment[f"GATEWAY_{name}_V{version}_GRPC"] = f"127.0.0.1:{ports['grpc']}"
            wait_until(lambda port=ports["rest"]: listens(port), programs[-1].log, while_alive=programs[-1].process)
        yield environment
    finally:
        for program in programs:
            program.end(signal.SIGKILL)


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def all_up(gateway: Gateway) -> bool:
    versions = [gateway.versions(name) for name in TOYS]
    return all(
        replica["state"] == "UP" for v in versions for facts in v.values() for replica in facts["replicas"].values()
    )


@pytest.fixture(scope="module")
def collector(tmp_path_factory):
    collector = Collector(tmp_path_factory.mktemp("collector"))
    yield collector
    assert collector.end() == 0
    assert "Traceback" not in collector.log()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory, toys, collector):
    environment = {**toys, "GATEWAY_PREDICTIONS": collector.records}
    with Gateway(tmp_path_factory.mktemp("gateway") / "state", "--servers", *TOYS, environment=environment) as gateway:
        wait_until(lambda: all_up(gateway), gateway.log, while_alive=gateway.process)
        yield gateway


def ask(gateway: Gateway, name: str, rows: list[list[float]], version: str | None = None, **headers: str):
    """Ask over REST; return id, version and probabilities of the reply."""
    endpoint = load_endpoints()[name]()
    request = endpoint.request(rows, None)
    headers |= {"X_Model_Version": version} if version else {}
    status, replied, body = gateway.ask(f"/{name}{request.path}", request.body, **headers)
    assert status == 200, body
    return replied["x-request-id"], replied["x-model-version"], endpoint.decode(body)


def ask_grpc(gateway: Gateway, name: str, rows: list[list[float]], version: str):
    endpoint = load_endpoints()[f"{name}-grpc"]()
    request = endpoint.request(rows, None)
    with gateway.channel() as channel:
        metadata = (("x-api-key", gateway.key), ("x-model-version", version))
        reply, state = channel.unary_unary(request.path).with_call(request.body, metadata=metadata, timeout=DEADLINE_S)
        headers = dict(state.initial_metadata())
        return headers["x-request-id"], headers["x-model-version"], endpoint.decode(reply)


def test_every_prediction_of_every_server_and_version_is_in_the_log_once_with_its_values(gateway, collector):
    sent = {}
    before = collector.value("gateway_records_total")
    for number, name in enumerate(TOYS):
        for version in "12":
            for n in (1, 3):
                rows = toy_rows(n, start=100 * number + n)
                ways = [ask] + ([ask_grpc] if f"{name}-grpc" in load_endpoints() else [])
                for way in ways:
                    key, answered, probabilities = way(gateway, name, rows, version)
                    assert answered == version
                    sent[key] = (name, version, "gRPC" if way is ask_grpc else "REST", rows, probabilities)
    collector.wait_for_records(before + len(sent))
    kept = collector.ask("SELECT * FROM predictions ORDER BY time, id, row")
    mine = [row for row in kept if str(row[1]) in sent]
    assert len(mine) == sum(len(rows) for *_, rows, _ in sent.values())
    for (
        _,
        key,
        row,
        count,
        server,
        version,
        wanted,
        replica,
        owner,
        bucket,
        protocol,
        status,
        ms,
        *numbers,
        note,
    ) in mine:
        name, asked, way, rows, probabilities = sent[str(key)]
        tolerance = 1e-9 if way == "REST" else 1e-6  # over gRPC the rows are float32
        assert (server, version, wanted, replica, owner) == (name, asked, asked, f"v{asked}-1", "tester")
        assert (protocol, status, count, note) == (way, 200, len(rows), "")
        assert 0 <= bucket < 100
        assert 0 < ms < DEADLINE_S * 1000
        assert np.abs(np.array(numbers[:5]) - rows[row]).max() <= tolerance * np.abs(rows[row]).max()
        assert np.abs(np.array(numbers[5:]) - probabilities[row]).max() <= tolerance


def fresh(collector: Collector, key: str) -> tuple:
    """Return status, note, mean radius and benign of the one line of a request."""
    wait_until(lambda: collector.ask(f"SELECT id FROM predictions WHERE id = '{key}'"), collector.log)
    [line] = collector.ask(f"SELECT status, note, \"mean radius\", benign FROM predictions WHERE id = '{key}'")
    return line


@pytest.mark.parametrize(
    ("body", "status", "note"),
    [
        (b"{", 400, "the body is no JSON; status 400"),
        (b"", 400, "the body is no JSON; status 400"),
        (b'{"data": [[1, 2]]}', 200, "rows of 2 numbers"),
        (b'{"data": [["patient 4711", 2, 3, 4, 5]]}', 400, "a row holds something that is no number; status 400"),
        (b'{"data": [[1, 2, 3, 4, 5]], "pad": "' + b"x" * 30_000 + b'"}', 200, "request too large to be logged"),
        (b'{"fail": 500, "data": [[1, 2, 3, 4, 5]]}', 500, "status 500"),
    ],
    ids=["no JSON", "empty", "short rows", "words", "large", "fails"],
)
def test_what_is_no_prediction_has_a_line_that_says_why(gateway, collector, body, status, note):
    answered, headers, _ = gateway.ask("/onnx/predict", body)
    assert answered == status
    kept, said, radius, benign = fresh(collector, headers["x-request-id"])
    assert (kept, said) == (status, note)
    assert radius == (1.0 if status == 500 else None)
    assert (benign is None) == (note != "rows of 2 numbers")


def test_what_the_gateway_refuses_and_what_predicts_nothing_is_counted_and_not_logged(gateway, collector):
    before, lines = collector.value("gateway_records_total"), collector.ask("SELECT count(*) FROM predictions")
    assert gateway.ask(key="gw_unknown")[0] == 401
    assert gateway.ask("/nobody/predict")[0] == 404
    gateway.ask("/onnx/v2/health/ready")
    collector.wait_for_records(before + 3)
    assert collector.ask("SELECT count(*) FROM predictions") == lines


def count_requests(gateway: Gateway) -> int:
    """Return how many requests HAProxy has answered, or given up."""
    with urllib.request.urlopen(f"http://127.0.0.1:{gateway.metrics_port}/metrics", timeout=DEADLINE_S) as reply:
        metrics = reply.read().decode()
    counts = dict(line.rsplit(" ", 1) for line in metrics.splitlines())
    return sum(int(count) for name, count in counts.items() if name.startswith(RESPONSES))


def test_haproxy_counts_as_many_requests_as_there_are_records(gateway, collector):
    """Their difference is what is lost, so whatever is asked must be counted by both, and a probe by neither."""
    for _ in range(3):
        socket.create_connection(("127.0.0.1", gateway.port), timeout=DEADLINE_S).close()
        with gateway.connection():  # the same over TLS
            pass
    for junk in (
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nXX",
        b"POST /onnx/predict HTTP/1.1\r\nContent-Length: 9\r\n\r\n",
    ):
        with gateway.connection() as connection:
            connection.sendall(junk)
            connection.settimeout(1)
            with contextlib.suppress(OSError):
                connection.recv(4096)
    for body in (b"", b"[[1, 2"):  # who leaves before the answer, and before the end of his question
        with gateway.connection() as connection:
            head = f"POST /onnx/predict HTTP/1.1\r\nHost: x\r\nX-API-Key: {gateway.key}\r\nContent-Length: 9\r\n\r\n"
            connection.sendall(head.encode() + body)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    gateway.ask(key="gw_unknown")
    key, _, _ = ask(gateway, "onnx", toy_rows(1))
    fresh(collector, key)

    wait_until(
        lambda: collector.value("gateway_records_total") == count_requests(gateway),
        lambda: f"{collector.value('gateway_records_total')} records, {count_requests(gateway)} requests",
    )


def test_failures_over_grpc_are_failures_though_http_says_200(gateway, collector):
    metric = 'gateway_request_seconds_count{server="tfserving",code="5xx"}'
    before = collector.value(metric)
    with pytest.raises(grpc.RpcError):
        ask_grpc(gateway, "tfserving", [[200.0, 1, 1, 1, 1]], "1")
    wait_until(
        lambda: collector.value('gateway_request_seconds_count{server="tfserving",code="5xx"}') == before + 1,
        collector.log,
    )


def test_nothing_that_names_a_user_is_in_a_file(gateway, collector):
    planted = "planted-user-4711"
    headers = {"X_User_Id": planted, "User_Agent": f"{planted}-agent", "X_Forwarded_For": "203.0.113.77"}
    key, _, _ = ask(gateway, "onnx", toy_rows(1), "1", **headers)
    body = json.dumps({"data": toy_rows(1), "name": planted}).encode()
    other = gateway.ask("/onnx/predict", body, Content_Encoding=f"'{planted}'")[1]["x-request-id"]
    fresh(collector, key), fresh(collector, other)
    assert collector.post("/reset")[0] == 200  # writes the collector's own file
    # What is being written gets another name at any moment.
    files = [path for path in collector.state.rglob("*") if path.is_file() and path.suffix != ".writing"]
    assert len(files) >= 4
    for path in files:
        content = path.read_bytes()
        for secret in (planted, gateway.key, "203.0.113.77", "127.0.0.1", "7F000001"):
            assert secret.encode() not in content, f"{secret} in {path.name}"
        assert path.stat().st_mode & 0o077 == 0, f"others may read {path}"
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", key)
    assert "7F000001" not in (gateway.state / "access.log").read_text()


def test_the_histogram_counts_every_prediction_once_by_server_version_and_code(gateway, collector):
    metric = 'gateway_request_seconds_count{server="bentoml",version="2",code="2xx"}'
    before = collector.value(metric)
    for _ in range(7):
        ask(gateway, "bentoml", toy_rows(2), "2")
    wait_until(lambda: collector.value(metric) >= before + 7, collector.log)
    assert collector.value(metric) == before + 7


def test_labels_that_come_later_say_how_accurate_each_version_was(gateway, collector):
    rows = [
        [80.0, 20.0, 0.1, 0.1, 0.2],
        [10.0, 90.0, 0.1, 0.1, 0.2],
    ]  # benign by version 1: yes, no; by version 2: no, yes
    keys = {version: ask(gateway, "onnx", rows, version)[0] for version in "12"}
    for key in keys.values():
        fresh_rows = f"SELECT id FROM predictions WHERE id = '{key}'"
        wait_until(lambda sql=fresh_rows: len(collector.ask(sql)) == 2, collector.log)
    metrics = [f'gateway_labels_total{{server="onnx",right="{right}"}}' for right in ("yes", "no")]
    before = list(map(collector.value, metrics))
    lines = [f"{key},{row},{target}\n" for key in keys.values() for row, target in ((0, 1), (1, 0))]
    lines += [lines[0], "00000000-0000-0000-0000-000000000000,0,1\n", "no label\n", f"{keys['1']},0,7\n"]
    path = collector.state / "labels" / "hospital.csv"
    with path.open("a") as file:
        file.write("".join(lines) + f"{keys['1']}")  # the last line is not whole yet
    wait_until(lambda: collector.value("gateway_unknown_labels_total") == 1, collector.log)
    assert list(map(collector.value, metrics)) == [count + 2 for count in before]  # one that comes twice counts once
    done = run_python("ask.py", "accuracy", "--state", collector.state, cwd=MONITORING, check=True)
    assert re.search(r"onnx +1 +2 +1\.0 ", done.stdout), done.stdout
    assert re.search(r"onnx +2 +2 +0\.0 ", done.stdout), done.stdout


def test_alerts_are_printed_when_they_begin_and_when_they_end(collector):
    alert = {
        "fingerprint": "f1", "status": "firing", "labels": {"alertname": "ReplicaDown", "severity": "page"},
        "annotations": {"summary": "onnx v2-1 does\x1b[31m not answer", "runbook": "README.md#replicadown"},
    }  # fmt: skip
    for status in ("firing", "firing", "resolved", "resolved"):
        assert collector.post("/alerts", {"alerts": [{**alert, "status": status}]})[0] == 200
    lines = [line for line in collector.log().splitlines() if "ReplicaDown" in line]
    assert [line.split(maxsplit=1)[1] for line in lines] == [
        "FIRING page ReplicaDown: onnx v2-1 does?[31m not answer; what to do: README.md#replicadown",
        "resolved page ReplicaDown: onnx v2-1 does?[31m not answer",
    ]
    kept = [json.loads(line) for line in (collector.state / "alerts.jsonl").read_text().splitlines()]
    assert [line["status"] for line in kept if line["alertname"] == "ReplicaDown"] == ["firing", "resolved"]
    for junk in ("", "{", "[]", '{"alerts": [{}]}', '{"alerts": 7}'):
        assert collector.post("/alerts", junk)[0] == 400
    assert collector.post("/reset", Origin="http://evil.example")[0] == 403
    assert collector.post("/elsewhere")[0] == 404


def test_a_silent_watchdog_is_printed_once_and_again_only_after_it_has_come_back(tmp_path, capsys, monkeypatch):
    collect = load_together(MONITORING, "collect")[0]
    collector, now_s = collect.Collector(tmp_path, 30), 1000.0
    monkeypatch.setattr(collect.time, "monotonic", lambda: now_s)

    def printed_at(seconds: float) -> str:
        nonlocal now_s
        now_s = seconds
        collector.check_watchdog()
        return capsys.readouterr().out

    assert printed_at(5000) == ""  # it has never come: Alertmanager may not have started yet
    collector.watchdog_s = 5000.0
    assert printed_at(5180) == ""
    assert "no Watchdog for 180 s: Prometheus or Alertmanager fails, and no alert can come" in printed_at(5181)
    assert printed_at(9000) == ""
    collector.watchdog_s = 9000.0
    assert "no Watchdog" in printed_at(9181)


def test_the_watchdog_is_posted_to_its_own_path(collector):
    assert collector.post("/watchdog", {"alerts": []})[0] == 200
    assert "Watchdog" not in collector.log()


def test_nonsense_among_the_records_is_counted_and_does_no_harm(gateway, collector):
    before = collector.value("gateway_unreadable_records_total")
    for junk in (b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 5000, b"99999999 x", b"5 hello5 world", b"12 [p@1 ] {}   "):
        with connect(collector.records) as connection:
            connection.sendall(junk)
            connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(OSError):
                connection.recv(10)
    wait_until(lambda: collector.value("gateway_unreadable_records_total") == before + 6, collector.log)
    key, _, _ = ask(gateway, "onnx", toy_rows(1))
    assert fresh(collector, key)[0] == 200


def test_a_second_collector_and_a_taken_address_are_refused_in_one_line(collector, tmp_path):
    free = ["--http", f"127.0.0.1:{find_free_ports(['http'])['http']}"]
    same_state = run_python("collect.py", "--state", collector.state, *free, cwd=MONITORING)
    assert same_state.returncode == 1
    assert same_state.stderr.startswith("collect: another collector writes into ")
    taken, long = "Address already in use", f"{tmp_path}/{'long' * 25}/records.sock"
    (tmp_path / "file").write_text("of something else")
    with socket.create_server(("127.0.0.1", 0)) as server:
        for option, address, reason in (
            ("--records", collector.records, taken),
            ("--records", f"127.0.0.1:{server.getsockname()[1]}", taken),
            ("--records", str(tmp_path / "file"), taken),
            ("--records", long, "File name too long"),
            ("--http", f"127.0.0.1:{collector.http_port}", taken),
        ):
            done = run_python("collect.py", "--state", tmp_path / "state", *free, option, address, cwd=MONITORING)
            assert done.returncode == 1
            remedy = f"{'stop what listens there, or ' if reason is taken else ''}choose another {option}"
            assert done.stderr == f"collect: {address}: {reason}; {remedy}\n"
    assert (tmp_path / "file").read_text() == "of something else"
    assert Path(collector.records).stat().st_mode & 0o077 == 0


def test_only_a_socket_at_which_nobody_listens_is_replaced(tmp_path):
    [addresses] = load_together(MONITORING, "addresses")
    path = tmp_path / "records.sock"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    listener = addresses.listen(path)
    with pytest.raises(OSError, match="in use"):
        addresses.listen(path)
    with connect(path) as connection, contextlib.ExitStack() as stack:
        connection.sendall(b"record")
        answers = [stack.enter_context(listener.accept()[0]).recv(10) for _ in range(2)]  # the refused one's probe, too
    assert answers == [b"", b"record"]
    addresses.stop_listening(listener)
    assert not path.exists()
    addresses.stop_listening(listener)
    assert addresses.join(path.relative_to(tmp_path).resolve()) == "./records.sock"
    for text in ("8406", "records.sock"):
        with pytest.raises(addresses.argparse.ArgumentTypeError, match=r"a path with a /, as in ./records.sock, or an"):
            addresses.parse_records_address(text)


def test_the_log_of_an_hour_becomes_parquet_with_the_same_rows(tmp_path, collector, gateway):
    key = ask(gateway, "onnx", toy_rows(5))[0]
    wait_until(lambda: len(collector.ask(f"SELECT id FROM predictions WHERE id = '{key}'")) == 5, collector.log)
    [lines] = list((collector.state / "predictions").glob("date=*/*.jsonl"))[:1]
    text = lines.read_bytes()
    log = prediction_log.PredictionLog(tmp_path / "predictions", keep_days=7)
    now = prediction_log.utc_now()
    log.append(text, now - prediction_log.timedelta(hours=2))
    log.append(text[:-20], now - prediction_log.timedelta(days=1))  # cut as by a full disk
    log.append(text, now - prediction_log.timedelta(days=9))
    log.append(text, now)
    with prediction_log.open_view(log.folder) as before:
        rows = sorted(before.execute("SELECT * FROM predictions").fetchall(), key=str)
    count = len(text.splitlines())
    assert len(rows) == 4 * count - 1
    done = log.tidy(now)
    oldest = now - prediction_log.timedelta(days=9)
    assert [line for line in done if "removed" in line] == [f"removed {oldest:date=%Y-%m-%d}, older than 7 days"]
    with prediction_log.open_view(log.folder) as after:
        kept = sorted(after.execute("SELECT * FROM predictions").fetchall(), key=str)
        assert after.execute("SELECT typeof(time), typeof(id) FROM predictions LIMIT 1").fetchall() == [
            ("TIMESTAMP", "UUID")
        ]
    assert len(kept) == 3 * count - 1
    assert set(map(str, kept)) == set(map(str, rows))
    assert len(list(log.folder.glob("date=*/*.parquet"))) == 2
    assert len(list(log.folder.glob("date=*/*.jsonl"))) == 1
    log.close()


def test_a_deleted_day_is_gone_and_what_comes_later_is_kept(tmp_path):
    log, now = prediction_log.PredictionLog(tmp_path / "predictions"), prediction_log.utc_now()
    log.append(b'{"id": "00000000-0000-0000-0000-000000000001"}\n', now)
    shutil.rmtree(log.folder / f"{now:date=%Y-%m-%d}")
    log.append(b'{"id": "00000000-0000-0000-0000-000000000002"}\n', now)
    with prediction_log.open_view(log.folder) as connection:
        assert [str(key) for (key,) in connection.execute("SELECT id FROM predictions").fetchall()] == [
            "00000000-0000-0000-0000-000000000002"
        ]
    log.close()


def test_a_full_disk_loses_rows_says_so_and_goes_on(tmp_path):
    if not os.access("/dev/full", os.W_OK):
        pytest.skip("no /dev/full on this system")
    collector = load_together(MONITORING, "collect")[0].Collector(tmp_path / "state", 30)
    line = next(iter(make_records(1)))
    collector.log.append(b"", prediction_log.utc_now())
    working, collector.log._file = collector.log._file, os.open("/dev/full", os.O_WRONLY)
    collector.take([line])
    assert (collector.records.value, collector.write_errors._value.get()) == (0, 1)
    os.close(collector.log._file)
    collector.log._file = working
    collector.take([line])
    assert collector.records.value == 1


def make_records(n: int) -> list[bytes]:
    """Lines as HAProxy writes them, of rows of test.csv's scale."""
    lines = []
    for i in range(n):
        body = base64.b64encode(json.dumps({"data": [[13.82, 24.49, 0.1162, 0.1357, 0.2275]]}).encode()).decode()
        reply = base64.b64encode(json.dumps({"predictions": [[0.25, 0.75]]}).encode()).decode()
        said = {
            "time": "2026-11-29T13:25:36Z", "id": str(uuid.UUID(int=i)), "owner": "alice", "http": "HTTP/1.1",
            "method": "POST", "path": "/onnx/predict", "server": "onnx", "bucket": "24", "percent": "0", "wanted": "1",
            "version": "1", "replica": "v1-1", "status": 200, "retries": "0", "queue_ms": 0, "connect_ms": 0,
            "reply_ms": 1, "total_us": "1747", "bytes_in": 165, "bytes_out": 144, "end": "--",
        }  # fmt: skip
        lines.append(
            '<134>1 2026-11-29T13:25:36+00:00 - haproxy 1 - [p@1 us="1795958736554251" '
            f'heads="{{application/json||}}" reply_heads="{{|}}" grpc_status="-" '
            f'body="{body}" reply="{reply}"] {json.dumps(said)}'.encode()
        )
    return lines


@pytest.mark.parametrize(
    ("end", "status", "code"),
    [("--", 200, "2xx"), ("SD", 200, "5xx"), ("sD", 200, "5xx"), ("CD", 200, "2xx"), ("CD", 400, "aborted")],
)
def test_a_reply_that_its_server_broke_off_is_a_failure_whatever_its_status(end, status, code):
    [line] = make_records(1)
    line = line.replace(b'"end": "--"', f'"end": "{end}"'.encode()).replace(b"200", str(status).encode())
    assert records.read_record(line).code == code


def connect(address: str | Path | tuple[str, int]) -> socket.socket:
    """Connect as HAProxy does, to a Unix socket, or to a host and a port."""
    if isinstance(address, tuple):
        return socket.create_connection(address, timeout=DEADLINE_S)
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(DEADLINE_S)
    connection.connect(str(address))
    return connection


@pytest.fixture(params=["unix", "tcp"])
def address(request, tmp_path) -> Path | tuple[str, int]:
    """Where a collector can listen."""
    if request.param == "unix":
        return tmp_path / "records.sock"
    return "127.0.0.1", find_free_ports(["records"])["records"]


def frame(lines: list[bytes]) -> bytes:
    """Return the lines as HAProxy sends them, each after its length."""
    return b"".join(b"%d %s" % (len(line), line) for line in lines)


def test_records_arrive_once_however_the_stream_is_cut(tmp_path, address):
    collect = load_together(MONITORING, "collect")[0]
    lines = make_records(50)
    stream = frame(lines)
    for cut in range(len(stream)):
        whole, length, can_follow = collect.split(stream[:cut])
        assert whole == lines[: len(whole)]
        assert length == len(frame(whole))
        assert can_follow
    # Of what is written to a Unix socket the kernel keeps the pieces, and of small ones not as many as a record has.
    for size in (*((101,) if isinstance(address, Path) else (1, 7)), 1000, len(stream)):
        collector = collect.Collector(tmp_path / str(size), 30)
        intake = collect.Intake(collector, collect.listen(address))
        with connect(address) as connection:
            if connection.family != socket.AF_UNIX:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for start in range(0, len(stream), size):
                connection.sendall(stream[start : start + size])
            wait_until(lambda c=collector: c.records.value == 50, "all records are taken")
        intake.close()
        with prediction_log.open_view(collector.log.folder) as connection:
            assert connection.execute("SELECT count(*), count(DISTINCT id) FROM predictions").fetchall() == [(50, 50)]


@pytest.mark.parametrize("buffer_bytes", [None, 1])
def test_records_of_any_size_that_haproxy_sends_arrive(tmp_path, monkeypatch, address, buffer_bytes):
    """They stay in the connection until they are whole, which must not be for ever where it cannot hold them."""
    collect, addresses = load_together(MONITORING, "collect", "addresses")
    if buffer_bytes:
        monkeypatch.setattr(addresses, "RECEIVE_BUFFER", buffer_bytes)  # the kernel gives some 2 kB
        monkeypatch.setattr(collect, "SHORTEST_WAIT_S", 0.001)
        monkeypatch.setattr(collect, "MOST_READS", 2)
    collector = collect.Collector(tmp_path, 30)
    lines = make_records(60)
    for number in (0, 1, 30):
        lines[number] += b" " * (65_535 - len(lines[number]))
    intake = collect.Intake(collector, collect.listen(address))
    try:
        with connect(address) as connection:
            if buffer_bytes:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
            connection.sendall(frame(lines))
            wait_until(lambda: collector.records.value == 60, lambda: f"{collector.records.value} of 60")
    finally:
        intake.close()
    with prediction_log.open_view(collector.log.folder) as view:
        assert view.execute("SELECT count(*), count(DISTINCT id) FROM predictions").fetchall() == [(60, 60)]


def test_the_collector_waits_as_long_as_few_records_come(tmp_path):
    """Many that came in one wait are many, also when they are read in several pieces."""
    collect = load_together(MONITORING, "collect")[0]

    class Waits(threading.Event):
        seconds: list[float] = []
        go_on = threading.Event()

        def wait(self, timeout=None):
            self.seconds.append(timeout)
            return self.go_on.wait(DEADLINE_S)

    address = tmp_path / "records.sock"
    intake = collect.Intake(collect.Collector(tmp_path, 30), collect.listen(address))
    intake.closing = Waits()
    line = frame(make_records(1))
    try:
        with connect(address) as connection:
            wait_until(lambda: len(Waits.seconds) == 1, "the connection is accepted")
            connection.sendall(line * (collect.READ_BYTES // len(line) + 10))
            Waits.go_on.set()
            wait_until(lambda: len(Waits.seconds) == 2, "all records are read")
            connection.sendall(line)
            wait_until(lambda: len(Waits.seconds) == 3, "one is read")
    finally:
        intake.close()
    assert Waits.seconds[:3] == [collect.SHORTEST_WAIT_S, collect.SHORTEST_WAIT_S, collect.LONGEST_WAIT_S]


def test_what_a_killed_collector_had_written_but_not_taken_is_not_written_again(tmp_path):
    """The moment in which a kill could write rows twice: they are in the log, and still in HAProxy's connection."""
    collect = load_together(MONITORING, "collect")[0]
    lines, hands, folder = make_records(500), socket.socketpair(), tmp_path / "state"
    killed = collect.Collector(folder, 30)
    haproxy, connection = socket.socketpair()
    haproxy.settimeout(DEADLINE_S)
    with haproxy, connection, hands[0]:
        haproxy.sendall(frame(lines[:50]))
        wait_until(
            lambda: len(collect.split(connection.recv(collect.READ_BYTES, socket.MSG_PEEK))[0]) == 50, "50 have come"
        )
        killed.take(collect.split(connection.recv(collect.READ_BYTES, socket.MSG_PEEK))[0])
        killed.log.close()
        collector = collect.Collector(folder, 30)
        intake = collect.Intake(collector, hands[1])
        socket.send_fds(hands[0], [b"c"], [connection.fileno()])
        haproxy.sendall(frame(lines[50:]))
        wait_until(lambda: collector.records.value >= 500, lambda: f"{collector.records.value} of 500")
        intake.close()
    with prediction_log.open_view(collector.log.folder) as view:
        assert view.execute("SELECT count(*), count(DISTINCT id) FROM predictions").fetchall() == [(500, 500)]
    assert collector.records.value == 500
    collector.log.close()


@pytest.mark.slow
def test_a_collector_that_is_killed_again_and_again_loses_nothing_that_monitor_py_keeps(tmp_path):
    """monitor.py's part, its Keeper, is in this process, and so is HAProxy's: it sends some 2,000 records/s."""
    keeper_of = load_together(MONITORING, "monitor")[0].Keeper
    records, http_port = tmp_path / "records.sock", find_free_ports(["http"])["http"]
    keeper, state, ended = keeper_of(records), tmp_path / "monitoring", threading.Event()
    lines = make_records(100_000)  # then it waits
    sent = 0

    def send_as_haproxy_does() -> None:
        nonlocal sent
        with connect(records) as connection:
            while not ended.wait(0.01) and sent < len(lines):
                connection.sendall(frame(lines[sent : sent + 20]))
                sent += 20

    def start(number: int) -> Program:
        with keeper.make_source() as source:
            return Program(
                "collect.py", "--state", state, "--http", f"127.0.0.1:{http_port}", "--connections",
                str(source.fileno()), log=tmp_path / f"collector-{number}", inherited=(source.fileno(),),
            )  # fmt: skip

    def waits_for(condition) -> None:
        wait_until(lambda: keeper.wait(0.02) or condition(), lambda: collector.log(), while_alive=collector.process)

    haproxy = threading.Thread(target=send_as_haproxy_does)
    try:
        collector = start(0)
        haproxy.start()
        for number in (1, 2):
            waits_for(lambda program=collector: "records on" in program.log())
            taken = prediction_log.Count(state / "records.count")
            waits_for(lambda now=taken, n=taken.value + 300: now.value >= n)
            collector.end(signal.SIGKILL)
            collector = start(number)
        ended.set()
        haproxy.join(DEADLINE_S)
        waits_for(lambda: taken.value >= sent)
        waits_for(lambda: not keeper.connections)  # HAProxy's end is noticed, and nothing left
        assert collector.end() == 0
    finally:
        ended.set()
        keeper.close()
        collector.end(signal.SIGKILL)
    with prediction_log.open_view(state / "predictions") as view:
        assert view.execute("SELECT count(*), count(DISTINCT id) FROM predictions").fetchall() == [(sent, sent)]
    assert prediction_log.Count(state / "records.count").value == sent


def test_a_collector_that_was_suspended_ends_with_the_first_signal(tmp_path):
    """While it continues, the kernel may give the signal to another thread than the first, which waits for it."""
    for _ in range(3):
        collector = Collector(tmp_path)
        process = psutil.Process(collector.process.pid)
        process.suspend()
        wait_until(lambda process=process: process.status() == psutil.STATUS_STOPPED)
        process.resume()
        assert collector.end() == 0


def test_signals_again_and_again_change_no_exit_code(tmp_path):
    collector = Collector(tmp_path)
    assert stop_impatiently(collector.process, signal.SIGTERM) == 0
    assert "Traceback" not in collector.log()


def test_a_connection_with_nonsense_ends_also_for_monitor_py(tmp_path, address):
    monitor, collect = load_together(MONITORING, "monitor", "collect")
    keeper, collector = monitor.Keeper(address), collect.Collector(tmp_path, 30)
    intake = collect.Intake(collector, keeper.make_source())
    try:
        for junk in (b"GET / HTTP/1.1\r\n\r\n", b"\0" * 200_000):
            with connect(address) as connection:
                connection.sendall(junk)
                wait_until(lambda: keeper.wait(0.01) or keeper.connections, "it is accepted")
                with contextlib.suppress(ConnectionError):
                    assert connection.recv(1) == b""
                wait_until(lambda: keeper.wait(0.01) or not keeper.connections, "it is let go")
        wait_until(lambda: collector.unreadable._value.get() == 2, "both are counted")
    finally:
        intake.close()
        keeper.close()


def test_connections_that_end_one_collector_after_another_are_dropped(address):
    monitor = load_together(MONITORING, "monitor")[0]
    keeper = monitor.Keeper(address)
    program = monitor.Program("collector", [], "", "", keeper)
    try:
        with connect(address) as connection:
            with keeper.make_source():
                wait_until(lambda: keeper.wait(0.01) or keeper.connections, "it is accepted")
            for seconds in (1.0, 1.0, 60.0, 1.0, 1.0):  # a long run between them: the kills had other causes
                program.started_s = time.monotonic() - seconds
                program.note_end()
                assert keeper.connections
            program.started_s = time.monotonic()
            program.note_end()
            assert not keeper.connections
            assert connection.recv(1) == b""
    finally:
        keeper.close()


def test_a_slow_disk_and_a_long_question_delay_neither_metrics_nor_records(tmp_path, monkeypatch):
    """Each waits, here until the test is over, and the others go on."""
    collect = load_together(MONITORING, "collect")[0]
    for name in ("COUNT_EVERY_S", "LABELS_EVERY_S", "KEEP_EVERY_S", "TIDY_EVERY_S"):
        monkeypatch.setattr(collect, name, 0.01)
    collector, go_on, ending = collect.Collector(tmp_path, 30), threading.Event(), threading.Event()
    taker = threading.Thread(target=collector.take, args=(make_records(10),))
    waiting: set[str] = set()

    def wait_as(name: str, result: object = None):
        def wait(*_):
            waiting.add(name)
            assert go_on.wait(DEADLINE_S)
            return result

        return wait

    monkeypatch.setattr(collector, "_find_predictions", wait_as("question", []))
    monkeypatch.setattr(collector.log, "tidy", wait_as("tidy", []))
    (collector.labels_dir / "hospital.csv").write_text("00000000-0000-0000-0000-000000000000,0,1\n")
    tasks = collect.start_tasks(collector, ending)
    try:
        wait_until(lambda: waiting == {"question", "tidy"}, lambda: f"only {waiting}")
        collector.take(make_records(10))
        wait_until(lambda: not collector.uncounted, "what is taken is counted")
        assert b"gateway_records_total 10.0" in collector.render()
        (tmp_path / "collector.json").unlink(missing_ok=True)
        wait_until((tmp_path / "collector.json").exists, "the state is kept")
        monkeypatch.setattr(collector.log, "append", wait_as("append"))
        taker.start()
        wait_until(lambda: "append" in waiting, "the disk has been asked")
        assert b"gateway_records_total 10.0" in collector.render()
        assert collector.reset("", "") == 1
        assert taker.is_alive()
    finally:
        go_on.set()
        ending.set()
        for task in tasks:
            task.join(DEADLINE_S)
    taker.join(DEADLINE_S)
    assert b"gateway_records_total 20.0" in collector.render()
    assert len(collector.early) == 1


def test_labels_are_asked_for_again_if_the_question_fails(tmp_path, monkeypatch):
    collect = load_together(MONITORING, "collect")[0]
    collector = collect.Collector(tmp_path, 30)
    (collector.labels_dir / "hospital.csv").write_text("00000000-0000-0000-0000-000000000000,0,1\n")
    with monkeypatch.context() as patch:
        patch.setattr(collect, "open_view", lambda folder: (_ for _ in ()).throw(OSError("a disk that fails")))
        for _ in range(2):
            with pytest.raises(OSError, match="a disk that fails"):
                collector.look_for_labels()
    counts = []
    for _ in range(collect.MOST_QUESTIONS + 1):
        collector.look_for_labels()
        counts.append(collector.unknown_labels._value.get())
    assert counts == [0] * (collect.MOST_QUESTIONS - 1) + [1, 1]


def test_a_label_that_comes_before_its_prediction_is_in_the_log_is_not_lost(tmp_path):
    """Whoever writes it at once is faster than the collector, also than one that starts again in between."""
    collect = load_together(MONITORING, "collect")[0]
    collector = collect.Collector(tmp_path, 30)
    lines = make_records(2)  # benign, with 0.75
    keys = [records.read_record(line).id for line in lines]
    collector.take(lines[:1])
    path = collector.labels_dir / "hospital.csv"
    path.write_text(f"{keys[0]},0,1\n{keys[1]},0,0\n")
    collector.look_for_labels()
    assert list(collector.early) == [(keys[1], 0)]
    collector.keep()
    collector.log.close()

    collector = collect.Collector(tmp_path, 30)
    with path.open("a") as file:
        file.write(f"{keys[1]},0,1\n")  # the first label counts
    collector.look_for_labels()
    collector.take(lines[1:])
    for _ in range(2):
        collector.look_for_labels()
        metrics = collector.render().decode()
        assert re.findall(r'gateway_labels_total{.*right="(\w+)".*} (\S+)', metrics) == [("no", "1.0"), ("yes", "0.0")]
    assert (collector.early, collector.unknown_labels._value.get()) == ({}, 0)


def test_an_intake_that_is_closed_takes_nobody_who_connects_again(tmp_path, address):
    """A close alone leaves `accept` waiting: it took HAProxy's next connection, and its records into a closed log."""
    collect = load_together(MONITORING, "collect")[0]
    collector = collect.Collector(tmp_path, 30)
    intake = collect.Intake(collector, collect.listen(address))
    stream = frame(make_records(20))
    ended, refused = threading.Event(), threading.Event()

    def send_as_haproxy_does() -> None:
        while not ended.is_set():
            try:
                with connect(address) as connection:
                    while not ended.is_set():
                        connection.sendall(stream)
            except (ConnectionRefusedError, FileNotFoundError):
                refused.set()
            except OSError:
                continue

    client = threading.Thread(target=send_as_haproxy_does)
    client.start()
    try:
        wait_until(lambda: collector.records.value > 100, "no record has come")
        intake.close()
        assert not intake.thread.is_alive()
        assert not intake.connections
        taken = collector.records.value
        assert refused.wait(DEADLINE_S)
        assert collector.records.value == taken
    finally:
        ended.set()
        client.join(DEADLINE_S)
        collector.log.close()
    with pytest.raises(OSError, match="closed"):
        collector.log.append(b"{}\n", prediction_log.utc_now())


def test_a_stream_that_begins_with_a_blank_is_refused():
    assert load_together(MONITORING, "collect")[0].split(b" " * 1000) == ([], 0, False)


@pytest.mark.parametrize("path", ["/predict", "/predict/2", "/predictions/my_model", "/v1/models/my_model:predict"])
def test_the_fast_way_to_read_a_body_reads_what_exchanges_reads(path):
    """Numbers under each name, and what is almost that: both read the same, or both refuse."""

    def read(way, *arguments):
        try:
            return [list(map(float, row)) for row in way(*arguments)]
        except exchanges.Unreadable:
            return None

    bodies = [
        "[[0.25, 0.75]]",
        "[]",
        "[0.25, 0.75]",
        "{}",
        "[[0.25, 1.5]]",
        "[[NaN, 1]]",
        "[[1, 2, 3]]",
        "\ufeff[[0, 1]]",
        "[[0, 1]",
    ]
    for name in ("data", "features", "rows", "instances", "predictions", "probability", "other"):
        for value in (
            "[[1, 2.5, 3e-3, 4, 5]]", "[[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]", "[1, 2, 3, 4, 5]", "[[1, 2]]", "[[]]",
            "[]", "null", '[[1, 2, 3, 4, "5"]]', "[[1, 2, 3, 4, true]]", "[[1, 2, 3, 4, NaN]]", "[[1, 2, 3, 4, 1e999]]",
            "[[0.25, 0.75]]", "[[1, 0], [0, 1]]", "[[0.5, 1.0000001]]", "[0.25, 0.75]",
            "[[1, 2, 3, 4, 9007199254740993]]", f"[[1, 2, 3, 4, 1{'0' * 40}]]",
        ):  # fmt: skip
            bodies += [f'{{"{name}": {value}}}', f'{{"{name}": [[9, 8, 7, 6, 5]], "x": [{{}}], "{name}": {value}}}',
                       f'{{"{name}": {value}, "data": [[1, 1, 1, 1, 1]], "predictions": [[0, 1]]}}']  # fmt: skip
    deep = "[" * 9000 + "]" * 9000
    bodies += [f'{{"x": {deep}, "data": [[1, 2, 3, 4, 5]], "predictions": [[0, 1]]}}', deep]
    sent = records.Sent(records.PLAIN, records.NO_HEADS, *[records.ABSENT] * 3)
    fast = [0, 0]  # read by the fast way itself: of TorchServe only one reply, a bare table
    for body in [text.encode() for text in bodies] + [b'{"\xff": 1, "data": [[1, 2, 3, 4, 5]]}', b"\xff\xfe[\x00"]:
        headers = {"content-type": "application/json"}
        for place, found, slow in (
            (0, records.read_usual_rows(path, sent, body), read(exchanges.read_rows, path, headers, body)),
            (1, records.read_usual_pairs(path, sent, body), read(exchanges.read_probabilities, path, {}, body)),
        ):
            fast[place] += bool(found)
            assert not found or list(map(list, found)) == slow, body
    assert fast[0] > 5 and fast[1] > 0


def test_a_method_that_is_not_post_a_stream_and_other_paths_of_torchserve_are_logged(gateway, collector):
    """TorchServe predicts at /invocations and /models/M/invoke, too, and whatever the method is."""
    body = json.dumps({"data": toy_rows(1)}).encode()
    for path, method in (
        ("/predictions/my_model", "PUT"),
        ("/invocations", "POST"),
        ("/models/my_model/invoke", "PUT"),
    ):
        connection = http.client.HTTPSConnection("localhost", gateway.port, context=gateway.context())
        with contextlib.closing(connection):
            connection.request(method, f"/torchserve{path}", body, {"X-API-Key": gateway.key})
            reply = connection.getresponse()
            assert (reply.status, bool(reply.read())) == (200, True)
        status, _, radius, _ = fresh(collector, reply.headers["X-Request-Id"])
        assert (status, radius) == (200, 0.25)
    for path in grpc_exchanges.STREAMS:
        [line] = make_records(1)
        line = line.replace(b"{application/json||}", b"{application/grpc||}")
        record = records.read_record(line.replace(b"/onnx/predict", path.encode()))
        assert (record.is_prediction, record.note, len(record.lines())) == (True, "stream", 1)


def test_of_two_content_types_the_last_counts(gateway, collector):
    """As TorchServe takes it, whose forms are no JSON."""
    json_body, form = json.dumps({"data": toy_rows(1)}).encode(), b"data=" + quote(json.dumps(toy_rows(1))).encode()
    types = "application/json", "application/x-www-form-urlencoded"
    for body, kinds in ((json_body, types[::-1]), (form, types)):
        connection = http.client.HTTPSConnection("localhost", gateway.port, context=gateway.context())
        with contextlib.closing(connection):
            connection.putrequest("POST", "/torchserve/predictions/my_model")
            for name, value in [("X-API-Key", gateway.key), *[("Content-Type", kind) for kind in kinds]]:
                connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            reply = connection.getresponse()
            reply.read()
        assert fresh(collector, reply.headers["X-Request-Id"])[2] == 0.25


@pytest.mark.parametrize(
    "kind",
    ['application/json; note="x|{#22}]% \xfc"', f"application/json; note={'x' * 5000}", "", '"] {"id": "x"'],
    ids=["what divides a record", "long", "blank", "the end of a record"],
)
def test_whatever_a_content_type_holds_the_record_is_read(gateway, collector, kind):
    unreadable = collector.value("gateway_unreadable_records_total")
    connection = http.client.HTTPSConnection("localhost", gateway.port, context=gateway.context())
    with contextlib.closing(connection):
        headers = {"X-API-Key": gateway.key, "Content-Type": kind}
        connection.request("POST", "/onnx/predict", json.dumps({"data": toy_rows(1)}), headers)
        reply = connection.getresponse()
        assert (reply.status, bool(reply.read())) == (200, True)
    assert fresh(collector, reply.headers["X-Request-Id"])[2] == 0.25
    assert collector.value("gateway_unreadable_records_total") == unreadable


def test_captured_headers_are_read_as_they_were_sent():
    sent = 'text/plain; a="x|{#22}]% \xfc"'
    captured = b"{text/plain; a=#22x#7C#7B#2322#7D]% #FC#22|gzip|7}"
    assert records._read_headers(captured, records.ASKED) == {
        "content-type": sent, "content-encoding": "gzip", "inference-header-content-length": "7",
    }  # fmt: skip
    assert records._read_headers(b"{||}", records.ASKED) == records._read_headers(b"", records.ASKED) == {}
    with pytest.raises(ValueError):
        records._read_headers(b"{|}", records.ASKED)


def test_few_bytes_that_stand_for_many_rows_do_not_fill_the_disk():
    """Compressed, or TensorFlow's tensors, whose last number is repeated until their shape is filled."""
    many = ("[" + ", ".join(["[1, 1, 1, 1, 1]"] * 100_000) + "]").encode()
    packed = gzip.compress(b'{"data": ' + many + b"}")
    [line] = make_records(1)
    body, reply = re.search(rb' body="([^"]*)" reply="([^"]*)"', line).groups()
    tensor = b"\x08\x01\x12\x09\x12\x03\x08\x90\x4e\x12\x02\x08\x05\x2a\x04" + b"\0\0\x80\x3f"  # 10,000 × 5 floats
    entry = b"\x0a\x01x\x12" + bytes([len(tensor)]) + tensor
    message = b"\x12" + bytes([len(entry)]) + entry
    framed = b"\0" + len(message).to_bytes(4, "big") + message
    grown = b"\1" + len(gzip.compress(bytes(1 << 20))).to_bytes(4, "big") + gzip.compress(bytes(1 << 20))
    as_grpc = line.replace(b"{application/json||}", b"{application/grpc||}").replace(
        b"/onnx/predict", grpc_exchanges.PREDICT.encode()
    )
    for sent, note in (
        (line.replace(body, base64.b64encode(packed)).replace(b"{application/json||}", b"{|gzip|}"),
         "the body is larger than 100000 bytes when decompressed"),
        (line.replace(reply, base64.b64encode(gzip.compress(many))).replace(
            b"{|}", b"{gzip|}"), "the body is larger than 100000 bytes when decompressed"),
        (as_grpc.replace(body, base64.b64encode(framed)), "10000 rows are too many to be logged"),
        (as_grpc.replace(body, base64.b64encode(grown)), "the compressed message is cut off or too large"),
    ):  # fmt: skip
        assert len(sent) < 65_536
        record = records.read_record(sent)
        assert note in record.note
        assert len(records.write_lines(record.lines())) < 1000


def labels_of(folder: Path) -> list[tuple[int, int]]:
    with prediction_log.open_view(folder / "predictions", folder / "labels") as view:
        return view.execute("SELECT row, target FROM labels ORDER BY ALL").fetchall()


def test_whatever_lies_among_the_labels_spoils_neither_the_others_nor_the_log(tmp_path):
    collector = load_together(MONITORING, "collect")[0].Collector(tmp_path, 30)
    key, folder = "00000000-0000-0000-0000-000000000000", collector.labels_dir
    (folder / "bom.csv").write_bytes(f'\ufeff{key},0,1\r\nid,row,target\r\n"{key}", 1 ,0\r\n'.encode())
    (folder / "poison.csv").write_text(f"{key},{10**40},1\n{key},-1,1\n{key},70000,1\n{key},2,1,x\n\0,0,1\n{key},2,1\n")
    (folder / "binary.csv").write_bytes(np.random.default_rng(1).bytes(5000) + f"\n{key},3,0\n".encode())
    (folder / "long.csv").write_bytes(b"x" * (1 << 20) + f"x\n{key},4,0\n".encode())
    (folder / "empty.csv").touch()
    (folder / "folder.csv").mkdir()
    os.mkfifo(folder / "pipe.csv")
    for _ in range(10):
        collector.look_for_labels()
    assert collector.unknown_labels._value.get() == 6  # with \0,0,1, whose id is none
    assert labels_of(tmp_path) == [(0, 1), (1, 0), (2, 1), (3, 0), (4, 0)]


def test_a_clock_that_is_set_back_over_the_hour_loses_no_row_and_none_comes_twice(tmp_path):
    log = prediction_log.PredictionLog(tmp_path / "predictions")
    now = prediction_log.utc_now().replace(minute=30, second=0)
    before = now - prediction_log.timedelta(hours=1)
    lines = [b'{"id": "00000000-0000-0000-0000-%012d", "row": 0}\n' % number for number in range(4)]

    def ids() -> list[str]:
        with prediction_log.open_view(log.folder) as view:
            return [str(key)[-1] for (key,) in view.execute("SELECT id FROM predictions ORDER BY id").fetchall()]

    log.append(lines[0] + lines[1], before)
    kept = next(log.folder.glob("*/*.jsonl")).read_bytes()
    log.tidy(now)
    log.append(kept + lines[2], before)  # also those that a crash has left beside the Parquet file
    assert ids() == ["0", "1", "2"]
    log.append(lines[3], now)
    assert ["3 rows in Parquet" in line for line in log.tidy(now)] == [True]
    assert ids() == ["0", "1", "2", "3"]
    late = now.replace(minute=0) + prediction_log.timedelta(hours=1)  # the hour is over, its last lines may still come
    assert log.tidy(late + prediction_log.timedelta(seconds=30)) == []
    damaged = next(log.folder.glob("*/*.parquet"))
    damaged.write_bytes(b"")
    log.append(lines[0], before)
    [told, done] = log.tidy(late + prediction_log.timedelta(seconds=90))
    assert "does not become Parquet: " in told and "1 rows in Parquet" in done  # the other hour's
    assert log.tidy(late + prediction_log.timedelta(seconds=90)) == []  # once is enough
    log.close()


def test_what_a_full_disk_has_cut_does_not_join_the_next_line(tmp_path, monkeypatch):
    log, now = prediction_log.PredictionLog(tmp_path / "predictions"), prediction_log.utc_now()
    write, room = os.write, 60

    def write_what_fits(descriptor: int, data: bytes) -> int:
        nonlocal room
        if not room:
            raise OSError(28, "No space left on device")
        written = write(descriptor, data[:room])
        room -= written
        return written

    lines = [b'{"id": "00000000-0000-0000-0000-%012d"}\n' % number for number in range(3)]
    with monkeypatch.context() as patch:
        patch.setattr(prediction_log.os, "write", write_what_fits)
        for _ in range(2):
            with pytest.raises(OSError, match="No space"):
                log.append(lines[0] + lines[1], now)
    log.append(lines[2], now)
    with prediction_log.open_view(log.folder) as view:
        assert view.execute("SELECT right(id::VARCHAR, 1) FROM predictions ORDER BY id").fetchall() == [("0",), ("2",)]
    log.close()


def test_an_output_that_cannot_be_written_costs_no_record(tmp_path):
    """A full disk, to which nohup writes, or a reader that has gone."""
    if not os.access("/dev/full", os.W_OK):
        pytest.skip("no /dev/full on this system")
    port = find_free_ports(["http"])["http"]
    options = ["--http", f"127.0.0.1:{port}"]
    with Path("/dev/full").open("w") as full, subprocess.Popen(
        [sys.executable, "collect.py", "--state", tmp_path, *options], cwd=MONITORING, stdout=full,
        stderr=subprocess.DEVNULL, start_new_session=True,
    ) as collector:  # fmt: skip
        try:
            wait_until(lambda: listens(port), "it listens", while_alive=collector)
            with connect(tmp_path / "records.sock") as connection:
                connection.sendall(frame(make_records(10)))
                taken = prediction_log.Count(tmp_path / "records.count")
                wait_until(lambda: taken.value == 10, "all are taken", while_alive=collector)
            collector.terminate()
            collector.wait(DEADLINE_S)
        finally:
            collector.kill()


def test_a_query_whose_reader_has_gone_and_a_log_that_may_not_be_read_end_quietly(tmp_path):
    (tmp_path / "predictions").mkdir()
    done = run(
        "sh", "-c", f"{sys.executable} ask.py --state {tmp_path} 'SELECT range FROM range(50000)' | head -1; "
        f"{sys.executable} ask.py | true", cwd=MONITORING, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["range"]
    assert done.stderr == ""


def test_a_restart_keeps_when_labels_came_and_alerts_that_come_again_are_printed(tmp_path, capsys):
    collect = load_together(MONITORING, "collect")[0]
    collector = collect.Collector(tmp_path, 30)
    collector._count_labels([("x", 0, "onnx", "1", 0)], {("x", 0): 1}, {})
    collector.take(make_records(1))
    assert (
        b'gateway_fallbacks_total{server="onnx",version="1",wanted="2"} 0.0' in collector.render()
    )  # before the first
    collector.keep()
    collector.log.close()
    again = collect.Collector(tmp_path, 30)
    assert again.last_labels == collector.last_labels
    assert b'gateway_last_label_seconds{server="onnx",version="1"} 1.' in again.render()

    def printed(status: str, start: str) -> bool:
        alert = {
            "fingerprint": "f",
            "status": status,
            "startsAt": start,
            "labels": {"alertname": "A"},
            "annotations": {},
        }
        again.take_alerts({"alerts": [alert]})
        return " A: " in capsys.readouterr().out

    assert printed("resolved", "1")  # it was printed as firing before the restart
    assert not printed("resolved", "1")
    assert printed("firing", "2")
    assert not printed("firing", "2")
    assert printed("firing", "3")  # the end of the second was lost with a killed Alertmanager
    again.log.close()
    for damage in (
        '{"watches": [["onnx", "1", {"detectors": {"input": [Infinity, []]}}]], "offsets": {"a": 1e999}}',
        "[" * 9999,
    ):
        (tmp_path / "collector.json").write_text(damage)
        last = collect.Collector(tmp_path, 30)
        assert "collector.json is damaged: the drift detectors begin again" in capsys.readouterr().out
        last.log.close()


def test_what_fails_again_and_again_is_said_once(capsys):
    collect, ending, times = load_together(MONITORING, "collect")[0], threading.Event(), iter(range(9))

    def task() -> None:
        number = next(times)
        if number == 8:
            ending.set()
        if number != 4:
            raise OSError("a disk that fails")

    collect.repeat(task, 0.001, ending)
    assert capsys.readouterr().out.count("a disk that fails") == 2  # and again after a success


def send_many(gateway: Gateway, count: int, connections: int = 4) -> tuple[int, float]:
    """Send `count` requests of one row as fast as they are answered; return how many failed, and the slowest."""
    failed, slowest, numbers, lock = 0, 0.0, iter(range(count)), threading.Lock()
    body = json.dumps({"data": toy_rows(1)}).encode()

    def user() -> None:
        nonlocal failed, slowest
        connection = http.client.HTTPSConnection(
            "localhost", gateway.port, timeout=DEADLINE_S, context=gateway.context()
        )
        with contextlib.closing(connection):
            while True:
                with lock:
                    if next(numbers, None) is None:
                        return
                start_s = time.perf_counter()
                connection.request("POST", "/onnx/predict", body, {"X-API-Key": gateway.key})
                reply = connection.getresponse()
                reply.read()
                with lock:
                    failed += reply.status != 200
                    slowest = max(slowest, time.perf_counter() - start_s)

    threads = [threading.Thread(target=user) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    return failed, slowest


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_a_collector_that_hangs_loses_nothing_one_that_dies_almost_nothing_and_no_user_notices(toys, tmp_path, kind):
    port = find_free_ports(["records"])["records"]
    collector = Collector(tmp_path, f"127.0.0.1:{port}" if kind == "tcp" else None)
    where = collector.records if kind == "tcp" else os.path.relpath(collector.records)
    environment = {**toys, "GATEWAY_PREDICTIONS": where}
    with Gateway(tmp_path / "state", "--servers", "onnx", environment=environment) as gateway:
        gateway_ready(gateway)
        assert send_many(gateway, 200)[0] == 0
        collector.wait_for_records(200)
        collector.process.send_signal(signal.SIGSTOP)
        assert send_many(gateway, 200)[0] == 0
        collector.process.send_signal(signal.SIGCONT)
        collector.wait_for_records(400)
        collector.end(signal.SIGKILL)
        ask(gateway, "onnx", toy_rows(1))
        if kind == "tcp":  # by this record, which is written to nobody, HAProxy finds out
            wait_until(lambda: not is_connected(port), "HAProxy closes the connection to the dead")
        assert send_many(gateway, 200)[0] == 0
        collector = Collector(tmp_path, collector.records, collector.http_port)
        last = ask(gateway, "onnx", toy_rows(1))[0]
        fresh(collector, last)
    rows, different = collector.ask("SELECT count(*), count(DISTINCT id) FROM predictions")[0]
    assert rows == different == collector.value("gateway_records_total")
    assert 602 - 5 <= rows <= 602  # the 200 that came while it was dead, too, but for what was on its way
    assert collector.end() == 0


def test_a_reply_that_is_longer_than_the_body_limit_is_in_its_record(toys, tmp_path):
    collector = Collector(tmp_path)
    environment = {**toys, "GATEWAY_PREDICTIONS": collector.records, "GATEWAY_MAX_BODY": "2000"}
    with Gateway(tmp_path / "state", "--servers", "onnx", environment=environment) as gateway:
        gateway_ready(gateway)
        status, headers, reply = gateway.ask(body=json.dumps({"data": [[30, 1, 0, 0, 0]], "length": 19_900}).encode())
        assert (status, len(reply)) == (200, 19_900)
        assert fresh(collector, headers["x-request-id"]) == (200, "", 30, 0.3)
    assert collector.end() == 0


def is_connected(port: int) -> bool:
    """Whether anybody has a connection to `port` that he takes for open."""
    open_ones = (psutil.CONN_ESTABLISHED, psutil.CONN_CLOSE_WAIT)
    return any(each.raddr and each.raddr.port == port and each.status in open_ones for each in psutil.net_connections())


def gateway_ready(gateway: Gateway, *server: str) -> None:
    wait_until(
        lambda: gateway.versions(*server)["1"]["replicas"]["v1-1"]["state"] == "UP",
        gateway.log,
        while_alive=gateway.process,
    )


def test_what_did_not_fit_into_the_ring_is_missing_and_the_counts_say_how_much(toys, tmp_path):
    """The ring holds 32 MB by default, some 50,000 records; this one less, so that a test can fill it."""
    small, records = 131072, str(tmp_path / "records.sock")
    environment = {**toys, "GATEWAY_PREDICTIONS": records, "GATEWAY_PREDICTIONS_BUFFER": str(small)}
    with Gateway(tmp_path / "state", "--servers", "onnx", environment=environment) as gateway:
        gateway_ready(gateway)
        assert send_many(gateway, 1000)[0] == 0
        collector = Collector(tmp_path, records)
        assert send_many(gateway, 10)[0] == 0
        last = ask(gateway, "onnx", toy_rows(1))[0]
        fresh(collector, last)
        asked = count_requests(gateway)
    kept = collector.ask("SELECT count(*) FROM predictions")[0][0]
    assert asked == 1011
    assert collector.value("gateway_records_total") == kept
    size = int(script.DEFAULTS["GATEWAY_PREDICTIONS_BUFFER"])
    assert f"size {size}\n" in (REPOSITORY_DIR / "gateway/containers.cfg").read_text()
    assert 45_000 < (kept - 11) * size / small < 55_000
    assert collector.end() == 0


def test_without_its_variable_the_gateway_has_no_tap_and_a_wrong_one_is_refused(toys, tmp_path):
    expected = (
        "expected the collector's socket, as in monitoring/state/records.sock, or its address, as in 127.0.0.1:8406"
    )
    reasons = dict.fromkeys(("8406", "127.0.0.1", "127.0.0.1:x", "records.sock"), expected)
    reasons[f"{tmp_path}/{'long' * 25}"] = "the path of a socket has at most 97 bytes"
    for wrong, reason in reasons.items():
        gateway = Gateway(tmp_path / "state", environment={"GATEWAY_PREDICTIONS": wrong})
        done = gateway.command("serve", check=False)
        assert (done.returncode, done.stderr) == (1, f"gateway: GATEWAY_PREDICTIONS={wrong}: {reason}\n")
    with Gateway(tmp_path / "state", "--servers", "onnx", environment={**toys, "GATEWAY_PREDICTIONS": ""}) as gateway:
        gateway_ready(gateway)
        assert gateway.ask()[0] == 200
        assert "predictions" not in gateway_show(gateway)


@pytest.mark.parametrize("haproxy", list_haproxies())
def test_while_nobody_listens_haproxy_rests(tmp_path, haproxy):
    """A version that would try to connect again and again, on a whole core, gets no Unix socket."""
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(tmp_path / "stale.sock"))
    stale.close()
    nobody = f"127.0.0.1:{find_free_ports(['nobody'])['nobody']}"
    environment = {f"GATEWAY_ONNX_V{version}": nobody for version in "12"} | {"GATEWAY_HAPROXY": haproxy}
    known = [(2, 6, 12), (2, 8, 24), (2, 8, 25), (3, 0, 9), (3, 0, 11), (3, 1, 0), (3, 2, 0)]
    assert [version for version in known if script.is_patient(version)] == [(2, 8, 25), (3, 0, 11), (3, 2, 0)]
    for number, records in enumerate((str(tmp_path / "no.sock"), str(tmp_path / "stale.sock"), nobody)):
        environment["GATEWAY_PREDICTIONS"] = records
        gateway = Gateway(tmp_path / f"state-{number}", "--servers", "onnx", environment=environment)
        if "/" in records and not script.is_patient(script.find_version(haproxy)):
            done = gateway.command("serve", "--servers", "onnx", check=False)
            assert done.returncode == 1
            assert " takes a whole core while nobody listens at a Unix socket; use " in done.stderr
            continue
        with gateway:
            state, used_s = script.State(gateway.state), cpu_s(gateway.haproxy())

            def uptime_s(state=state) -> int:
                return int(re.search(r"^Uptime_sec: (\d+)", state.ask("show info"), re.MULTILINE)[1])

            start_s = uptime_s()
            wait_until(lambda start=start_s: uptime_s() >= start + 2, "two seconds pass", while_alive=gateway.process)
            # CPU time, so other programs change little: at rest it takes 0.005 s of these two, else all that it gets.
            assert cpu_s(gateway.haproxy()) - used_s < 0.3


def gateway_show(gateway: Gateway) -> str:
    """What HAProxy knows of its rings."""
    from state import State

    return State(gateway.state).ask("show events")


def test_the_copies_of_what_reads_exchanges_are_equal():
    copies = [REPOSITORY_DIR / folder / "exchanges.py" for folder in ("gateway", "monitoring")]
    assert copies[0].read_bytes() == copies[1].read_bytes(), "cp gateway/exchanges.py monitoring/"


@pytest.mark.parametrize("name", ["tfserving-grpc", "torchserve-grpc", "onnx-grpc-tuned"])
def test_grpc_requests_are_read_as_they_were_written(name):
    endpoint = load_endpoints()[name]()
    rows = toy_rows(7)
    message = endpoint.request(rows, "1").body
    framed = b"\0" + len(message).to_bytes(4, "big") + message
    packed = gzip.compress(message)
    for body in (framed, b"\1" + len(packed).to_bytes(4, "big") + packed):
        assert np.abs(np.array(grpc_exchanges.read_rows(endpoint.path(None), body)) - rows).max() < 1e-5
    for cut in range(len(framed)):
        with pytest.raises(exchanges.Unreadable):
            grpc_exchanges.read_rows(endpoint.path(None), framed[:cut])
    rng = np.random.default_rng(1)
    for _ in range(300):  # whatever the bytes are, they are rows or Unreadable
        junk = bytearray(message)
        for place in rng.integers(len(junk), size=3):
            junk[place] = rng.integers(256)
        with contextlib.suppress(exchanges.Unreadable):
            grpc_exchanges.read_rows(endpoint.path(None), b"\0" + len(junk).to_bytes(4, "big") + bytes(junk))


def test_grpc_replies_are_read_as_the_onnx_server_writes_them():
    messages = load_together(REPOSITORY_DIR / "onnx", "grpc_messages")[0]
    reply = messages.ModelInferResponse()
    output = reply.outputs.add(name="probabilities", datatype="FP32", shape=[2, 2])
    reply.outputs.add(name="label", datatype="INT64", shape=[2])
    values = np.array([[0.25, 0.75], [1, 0]], "<f4")
    reply.raw_output_contents.extend([values.tobytes(), np.array([1, 0], "<i8").tobytes()])
    for text in (reply, messages.ModelInferResponse(outputs=[output])):
        if text is not reply:
            text.outputs[0].contents.fp32_contents.extend(values.ravel().tolist())
        message = text.SerializeToString()
        framed = b"\0" + len(message).to_bytes(4, "big") + message
        assert grpc_exchanges.read_probabilities(grpc_exchanges.INFER, framed) == values.tolist()


@pytest.mark.slow
def test_ten_million_rows_are_asked_in_seconds_and_take_sixty_bytes_each(tmp_path):
    """Features as clinics write them, four digits; each row another id, and a probability of a float32."""
    hours, rows = 24, 10_000_000
    day = tmp_path / "predictions" / "date=2026-11-29"
    day.mkdir(parents=True)
    with prediction_log.duckdb.connect() as connection:
        for hour in range(hours):
            connection.execute(
                f"""COPY (
                SELECT make_timestamp(1795910400000000 + {hour} * 3600000000 + i * 8640) AS time, uuid() AS id,
                0::USMALLINT AS row, 1::USMALLINT AS rows, s AS server, v AS version, v AS wanted,
                'v' || v || '-1' AS replica, 'alice' AS owner, (random() * 99)::UTINYINT AS bucket, 'REST' AS protocol,
                200::SMALLINT AS status, round(1 + random() * 5, 3)::FLOAT AS ms,
                round(6 + random() * 22, 2) AS "mean radius", round(9 + random() * 30, 2) AS "mean texture",
                round(0.05 + random() * 0.1, 4) AS "mean smoothness", round(random() * 0.4, 4) AS "mean concavity",
                round(0.1 + random() * 0.2, 4) AS "mean symmetry", 1 - p AS malignant, p AS benign, '' AS note
                FROM (SELECT i, ['onnx', 'bentoml', 'tfserving', 'torchserve'][1 + i % 4] AS s,
                (1 + i % 2)::VARCHAR AS v, random()::FLOAT::DOUBLE AS p FROM range({rows // hours}) t(i)))
                TO '{day}/{hour:02}.parquet' {prediction_log.PARQUET}"""
            )
    count = rows // hours * hours
    size = sum(path.stat().st_size for path in day.iterdir())
    questions = load_together(MONITORING, "ask")[0].read_questions((MONITORING / "queries.sql").read_text())
    with prediction_log.open_view(tmp_path / "predictions") as connection:
        assert [c[0] for c in connection.execute("SELECT * FROM predictions LIMIT 1").description] == list(
            prediction_log.COLUMNS
        )
        for text in ("SELECT server, version, count(*), avg(benign), max(ms) FROM predictions GROUP BY ALL",
                     questions["newest"][1], questions["failures"][1]):  # fmt: skip
            start_s = time.perf_counter()
            connection.execute(text).fetchall()
            print(
                f"\n{count:,} rows, {size / count:.1f} bytes each: {time.perf_counter() - start_s:.2f} s: {text[:60]}"
            )
    assert size / count <= 60


def wrk_command(
    gateway: Gateway, folder: Path, connections: int, seconds: int, pause_ms: int = 0, name: str = "onnx"
) -> list[str | Path]:
    """Return the command that asks a server for one row again and again."""
    request = load_endpoints()[name]().request(toy_rows(1), None)
    lua = folder / f"ask-{gateway.port}.lua"
    lua.write_text(
        f"wrk.method = 'POST'\nwrk.body = '{request.body.decode()}'\n"
        f"wrk.headers['X-API-Key'] = '{gateway.key}'\nwrk.headers['Content-Type'] = 'application/json'\n"
        + (f"function delay() return {pause_ms} end\n" if pause_ms else "")
    )
    url = f"https://localhost:{gateway.port}/{name}{request.path}"
    return ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-s", lua, url]


def ask_with_wrk(*arguments) -> tuple[float, ...]:
    """Run wrk_command; return p50 and p99 in ms, requests/s, requests, and failures."""
    text = run(*wrk_command(*arguments), check=True).stdout
    unit_ms = {"us": 1e-3, "ms": 1, "s": 1e3}
    p50, p99 = (
        float(amount) * unit_ms[unit] for amount, unit in re.findall(r" (?:50|99)%\s+([\d.]+)(us|ms|s)\b", text)
    )
    failed = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    errors = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", text)
    return (
        p50, p99, float(re.search(r"Requests/sec:\s+([\d.]+)", text)[1]),
        int(re.search(r"(\d+) requests in", text)[1]),
        (int(failed[1]) if failed else 0) + sum(map(int, errors.groups() if errors else ())),
    )  # fmt: skip


def find_interval(values: list[float]) -> tuple[float, float]:
    """Return what holds the median with 95 % or more: the order statistics of a sign test."""
    ordered, n = sorted(values), len(values)
    beyond = next(k for k in range(n) if sum(math.comb(n, i) for i in range(k + 1)) / 2**n > 0.025)
    return ordered[max(0, beyond - 1)], ordered[n - max(1, beyond)]


def describe(values: list[float]) -> str:
    """Return the median and its interval."""
    low, high = find_interval(values)
    return f"{statistics.median(values):.3f} ({low:.3f} to {high:.3f})"


def cpu_s(processes: list[psutil.Process]) -> float:
    """Return the seconds that all threads have run, without those that have ended; psutil gives steps of 10 ms only."""
    files = [path for process in processes for path in Path(f"/proc/{process.pid}/task").glob("*/schedstat")]
    return sum(int(path.read_text().split()[0]) for path in files) / 1e9


@dataclass
class Tap:
    """What the tap adds, one number for each pair of rounds."""

    p50_ms: list[float]
    rates: list[float]  # requests/s with the tap, as a part of those without
    haproxy: list[float]  # its CPU time, as a part of that without
    collector_ms: float  # of CPU time for each record


def measure_tap(environment: dict[str, str], folder: Path, connections: int, pause_ms: int) -> Tap:
    """Ask a server through a gateway without and one with the tap, in turn; print and return what each pair gave."""
    collector = Collector(folder)
    with contextlib.ExitStack() as stack:
        gateways, haproxies = {}, {}
        for name in ("without", "with"):
            settings = {**environment, "GATEWAY_PREDICTIONS": collector.records if name == "with" else ""}
            gateway = Gateway(folder / name, "--servers", "onnx", environment=settings)
            gateways[name] = stack.enter_context(gateway)
            gateway_ready(gateway)
            haproxies[name] = gateway.haproxy()
        found: dict[str, list[tuple[float, ...]]] = {name: [] for name in gateways}
        spent: dict[str, list[float]] = {name: [] for name in gateways}  # µs of HAProxy for each request
        of_collector = psutil.Process(collector.process.pid)
        collector_s = -sum(of_collector.cpu_times()[:2])  # also of threads that have ended
        for number in range(30):
            for name in list(gateways) if number % 2 else reversed(gateways):
                before_s = cpu_s(haproxies[name])
                found[name].append(ask_with_wrk(gateways[name], folder, connections, 1, pause_ms))
                spent[name].append((cpu_s(haproxies[name]) - before_s) / found[name][-1][3] * 1e6)
        count = sum(each[3] for each in found["with"])
        collector.wait_for_records(count)
        collector_s += sum(of_collector.cpu_times()[:2])
    assert not sum(each[4] for each in found["with"])
    pairs = list(zip(found["without"], found["with"], strict=True))
    tap = Tap(
        [with_[0] - without[0] for without, with_ in pairs],
        [with_[2] / without[2] for without, with_ in pairs],
        [with_ / without for without, with_ in zip(spent["without"], spent["with"], strict=True)],
        collector_s / count * 1e3,
    )
    print(
        f"\n{connections} connections, {pause_ms} ms between requests: p50 {describe(tap.p50_ms)} ms over "
        f"{statistics.median(without[0] for without, _ in pairs):.3f} ms, requests/s times {describe(tap.rates)} of "
        f"{statistics.median(without[2] for without, _ in pairs):,.0f}, HAProxy's CPU time times "
        f"{describe(tap.haproxy)} of {statistics.median(spent['without']):.0f} µs, the collector's "
        f"{tap.collector_ms * 1e3:.0f} µs a record"
    )
    assert collector.end() == 0
    return tap


@pytest.mark.slow
@pytest.mark.timing
@needs("wrk")
@pytest.mark.parametrize(("connections", "pause_ms"), [(1, 0), (1, 3), (10, 9), (16, 0)])
def test_the_tap_costs_users_little(toys, tmp_path, connections, pause_ms):
    """Before a server that costs nothing, where every microsecond shows. Fails where a limit is surely exceeded."""
    tap = measure_tap(toys, tmp_path, connections, pause_ms)
    if connections == 1:  # 16 users at once take all that the cores give, so their p50 follows the rate
        assert find_interval(tap.p50_ms)[0] <= 0.05
        assert statistics.median(tap.p50_ms) <= 0.5
    assert statistics.median(tap.rates) >= 0.6
    assert find_interval(tap.haproxy)[0] <= 1.2
    assert tap.collector_ms <= 0.06


class Nonsense(threading.Thread):
    """A collector that answers what it gets with nonsense, breaks off, and begins again."""

    def __init__(self, path: str):
        super().__init__(daemon=True)
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(path)
        self.socket.listen()
        self.socket.settimeout(0.2)
        self.stopped = threading.Event()
        self.start()

    def run(self) -> None:
        with self.socket:
            while not self.stopped.is_set():
                with contextlib.suppress(OSError):
                    connection, _ = self.socket.accept()
                    with connection:
                        connection.recv(5000)
                        connection.sendall(b"\x00 HTTP/1.1 200 nonsense\r\n" * 500)


@pytest.mark.slow
@pytest.mark.timing
@needs("wrk")
@pytest.mark.parametrize("trouble", ["stopped", "slow", "nonsense"])
def test_a_collector_in_trouble_costs_no_user_an_answer_and_changes_no_p99(toys, tmp_path, trouble):
    """Prints the differences of users' p50 and p99 between a collector in trouble and a sound one, asked in turn."""
    folders = {name: tmp_path / name for name in ("sound", "trouble")}
    for folder in folders.values():
        folder.mkdir()
    collectors = {name: Collector(folder) for name, folder in folders.items()}
    ended = threading.Event()
    with contextlib.ExitStack() as stack:
        gateways = {}
        for name in folders:
            environment = {**toys, "GATEWAY_PREDICTIONS": collectors[name].records}
            gateways[name] = stack.enter_context(
                Gateway(folders[name] / "state", "--servers", "onnx", environment=environment)
            )
            gateway_ready(gateways[name])
        process = collectors["trouble"].process
        if trouble == "stopped":
            process.send_signal(signal.SIGSTOP)
        elif trouble == "slow":  # it runs a twentieth of the time

            def slow_down() -> None:
                while not ended.wait(0.19):
                    process.send_signal(signal.SIGCONT)
                    ended.wait(0.01)
                    process.send_signal(signal.SIGSTOP)

            stack.callback(threading.Thread(target=slow_down).start() or ended.set)
        else:
            assert collectors["trouble"].end() == 0
            nonsense = Nonsense(collectors["trouble"].records)
            stack.callback(nonsense.stopped.set)
        found = {name: [] for name in folders}
        for number in range(12):
            for name in list(gateways) if number % 2 else reversed(gateways):
                found[name].append(ask_with_wrk(gateways[name], tmp_path, 4, 2, 3))
        pairs = list(zip(found["sound"], found["trouble"], strict=True))
        ended.set()
        print(
            f"\n{trouble}: p50 {describe([b[0] - a[0] for a, b in pairs])} ms, p99 "
            f"{describe([b[1] - a[1] for a, b in pairs])} ms; p99 of a sound one "
            f"{statistics.median(a[1] for a, _ in pairs):.3f} ms, {sum(b[3] for _, b in pairs):,} requests"
        )
        assert sum(each[4] for each in found["trouble"]) == 0
    if trouble != "nonsense":
        process.send_signal(signal.SIGCONT)
        assert collectors["trouble"].end() == 0
    assert collectors["sound"].end() == 0
    added = [b[1] - a[1] for a, b in pairs]
    assert statistics.median(added) <= 50  # a user who waits for the collector waits for seconds
    # Unchanged: the interval of the difference holds no change, or one of less than a tenth.
    assert find_interval(added)[0] <= 0.1 * statistics.median(a[1] for a, _ in pairs)


@pytest.mark.slow
@needs("wrk")
def test_a_thousand_records_a_second_arrive_also_when_the_collector_is_killed(toys, tmp_path):
    """Prints how many are lost: what HAProxy had sent to it before it saw that it is dead."""
    collector = Collector(tmp_path)
    environment = {**toys, "GATEWAY_PREDICTIONS": collector.records}
    with Gateway(tmp_path / "state", "--servers", "onnx", environment=environment) as gateway:
        gateway_ready(gateway)
        counts = []

        def count_asked() -> int:
            return (gateway.state / "access.log").read_bytes().count(b"\n")

        for is_killed in (False, True):
            asked: list[tuple[float, ...]] = []
            user = threading.Thread(target=lambda found=asked: found.append(ask_with_wrk(gateway, tmp_path, 10, 15, 9)))
            before = collector.ask("SELECT count(DISTINCT id) FROM predictions")[0][0]
            user.start()
            if is_killed:
                collector.wait_for_records(before + 3000)
                collector.end(signal.SIGKILL)
                enough = count_asked() + 500
                wait_until(lambda least=enough: count_asked() > least, "users ask on while the collector is dead")
                collector = Collector(tmp_path, collector.records, collector.http_port)
            user.join(2 * DEADLINE_S)
            fresh(collector, ask(gateway, "onnx", toy_rows(1))[0])  # the last one: nothing comes after it
            [(rows, different)] = collector.ask("SELECT count(*), count(DISTINCT id) FROM predictions")
            assert rows == different
            # wrk leaves requests under way when its time is over: HAProxy's count is the one that counts
            sent = count_asked() - sum(n for n, _ in counts)
            counts.append((sent, sent - (different - before)))
    print(f"\n{counts[0][0]:,} requests: {counts[0][1]} lost; {counts[1][0]:,} and a kill: {counts[1][1]} lost")
    assert counts[0][1] == 0
    assert counts[1][1] <= counts[1][0] / 100  # on a busy machine a process that is killed takes its time to die
    assert collector.end() == 0
