"""The gateway on real servers: the split, what moves it, what it refuses, and what breaks behind it or in it."""

import asyncio
import contextlib
import hashlib
import http.client
import itertools
import json
import os
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from conftest import REPOSITORY_DIR, start
from endpoint import load_endpoints
from free_ports import find_free_ports
from reference import TOLERANCE, load_expected, load_test_rows

GATEWAY = REPOSITORY_DIR / "gateway" / "gateway.py"
sys.path.insert(0, str(GATEWAY.parent))

import pools  # noqa: E402
from state import KEYS, SPLIT, State, StateError  # noqa: E402

from gateway import read_statistics  # noqa: E402

USERS, RATE, REQUESTS, CONNECTIONS = 2000, 300, 3000, 16
KILL_AT, MOVE_AT = 2200, 2400  # by then every user has come, and the first ones again
AFTER_MOVE_S = 1.0
ADDED_MS = 1.0
READY_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 60.0
ROWS = load_test_rows()[0]
EXPECTED = {version: load_expected(version) for version in "12"}
ONE_ROW = json.dumps({"data": ROWS[:1]}).encode()
PREDICT = "/tensorflow.serving.PredictionService/Predict"


class Gateway:
    """`gateway.py serve` in a state folder and on ports of its own."""

    def __init__(self, folder: Path, *options: str, environment: dict[str, str] | None = None):
        self.state = folder
        ports = find_free_ports(["serve", "metrics"])
        self.port, self.metrics_port = ports["serve"], ports["metrics"]
        self.environment = {
            **os.environ,
            "GATEWAY_BIND": f"127.0.0.1:{self.port}",
            "GATEWAY_METRICS_BIND": f"127.0.0.1:{self.metrics_port}",
            "GATEWAY_STATE": str(folder),
            **(environment or {}),
        }
        self.options = options
        self.log_path = folder.with_name(f"{folder.name}.log")
        self.process = None

    def command(self, *words: str, check: bool = True) -> subprocess.CompletedProcess:
        run = subprocess.run(
            [sys.executable, GATEWAY, *words], env=self.environment, capture_output=True, text=True, timeout=60
        )
        assert not check or run.returncode == 0, run.stderr
        return run

    def spawn(self) -> None:
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, GATEWAY, "serve", *self.options],
                env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def wait_for(self, text: str) -> None:
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while text not in self.log():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline_s, self.log()
            time.sleep(0.05)

    def log(self) -> str:
        return self.log_path.read_text()

    def __enter__(self):
        self.key = self.command("keys", "add", "tester", "--rate", "100000").stdout.strip()
        self.spawn()
        try:
            self.wait_for("\nserving on")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.end(signal.SIGINT)

    def end(self, number: signal.Signals | None) -> int:
        """Send the signal, where one is given, and see that the gateway and all below it end."""
        family = self.family()
        if self.process.poll() is None and number:
            self.process.send_signal(number)
        try:
            code = self.process.wait(STOP_TIMEOUT_S)
            _, left = psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)
        finally:
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        assert not left, f"left running: {left}"
        return code

    def family(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def haproxy(self) -> list[psutil.Process]:
        """The master, then its worker."""
        found = [process for process in self.family() if process.name() == "haproxy"]
        return sorted(found, key=lambda process: process.ppid() != self.process.pid)

    def status(self) -> dict:
        return json.loads(self.command("status", "--json").stdout)

    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.state / "tls.pem"))

    def ask(self, path="/onnx/predict", body=ONE_ROW, key=None, **headers) -> tuple[int, dict, bytes]:
        """Ask over HTTP/1.1 on a connection of its own; return status, headers and body."""
        connection = http.client.HTTPSConnection("localhost", self.port, timeout=30, context=self.context())
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(
                "POST", path, body, {"X-API-Key": key or self.key, "Content-Type": "application/json", **named}
            )
            reply = connection.getresponse()
            return reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read()
        finally:
            connection.close()

    def curl(self, path: str, body: Path, version: str, key: str) -> tuple[str, dict]:
        """Ask with curl, so that HTTP/2 is another's; return the status and the reply as JSON."""
        run = subprocess.run(
            ["curl", "-sS", version, "--cacert", self.state / "tls.pem", f"https://localhost:{self.port}{path}"]
            + ["-H", f"X-API-Key: {key}", "-H", "Content-Type: application/json", "--data-binary", f"@{body}"]
            + ["-w", "\n%{http_code} %{http_version}"],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        reply, _, last = run.stdout.rpartition("\n")
        status, spoken = last.split()
        assert spoken == {"--http1.1": "1.1", "--http2": "2"}[version]
        return status, json.loads(reply)

    def channel(self) -> grpc.Channel:
        return grpc.secure_channel(
            f"localhost:{self.port}", grpc.ssl_channel_credentials((self.state / "tls.pem").read_bytes())
        )


async def read_reply(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:-2])}
    return int(head[0].split()[1]), headers, await reader.readexactly(int(headers["content-length"]))


def encode(request, prefix: str, **headers: str) -> bytes:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return (
        f"POST {prefix}{request.path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {request.content_type}\r\n"
        f"{lines}Content-Length: {len(request.body)}\r\n\r\n"
    ).encode() + request.body


@dataclass
class Sent:
    """One answered request: where the split stood when it was sent and when its answer came, and who answered."""

    user: str
    split_before: str
    split_after: str
    version: str


async def drive(gateway: Gateway, endpoint, kill_pid: int) -> tuple[list[Sent], list[str], float]:
    """Send REQUESTS at RATE and some more, while a replica is killed and the split moved to 100 % and to 0 %.

    Every user comes once, then the first ones come again. Returns what was answered, what failed, and the rate.
    """
    context = gateway.context()
    numbers, answered, failures = itertools.count(), [], []
    split, moved = "30", asyncio.Event()

    async def move() -> None:
        nonlocal split
        for percent in ("100", "0"):
            split = "moving"
            words = "set", "my_model", f"v2={percent}"
            process = await asyncio.create_subprocess_exec(
                sys.executable, str(GATEWAY), *words, env=gateway.environment, stdout=subprocess.DEVNULL
            )
            assert await process.wait() == 0
            split = percent  # what is sent from here on must follow it
            await asyncio.sleep(AFTER_MOVE_S)
        moved.set()

    async def user() -> None:
        reader, writer = await asyncio.open_connection("localhost", gateway.port, ssl=context)
        for number in numbers:
            if number >= REQUESTS and moved.is_set():
                break
            await asyncio.sleep(started_s + number / RATE - time.perf_counter())
            if number == KILL_AT:
                os.kill(kill_pid, signal.SIGKILL)
            elif number == MOVE_AT:
                tasks.append(asyncio.create_task(move()))
            row, name, before = number % len(ROWS), f"user-{number % USERS}", split
            request = endpoint.request(ROWS[row : row + 1], None)
            try:
                writer.write(encode(request, f"/{endpoint.name}", X_API_Key=gateway.key, X_User_Id=name))
                status, headers, body = await read_reply(reader)
                if status != 200:
                    raise ValueError(f"{status} {body[:100]}")
                version = headers["x-model-version"]
                if np.abs(endpoint.decode(body) - EXPECTED[version][row : row + 1]).max() > TOLERANCE:
                    raise ValueError(f"no answer of version {version}")
                answered.append(Sent(name, before, split, version))
            except (OSError, ValueError, KeyError, asyncio.IncompleteReadError) as error:
                failures.append(f"request {number}: {error!r}")
                reader, writer = await asyncio.open_connection("localhost", gateway.port, ssl=context)
        writer.close()

    tasks = []
    started_s = time.perf_counter()
    await asyncio.gather(*(user() for _ in range(CONNECTIONS)))
    duration_s = time.perf_counter() - started_s
    await asyncio.gather(*tasks)
    return answered, failures, (len(answered) + len(failures)) / duration_s


async def measure_added_ms(gateway: Gateway, endpoint, direct_port: int) -> list[float]:
    """Return the p50 that the gateway adds, asked in turn with the server itself, in each of some blocks.

    The machine may be busy with something else: blocks go on until one is within ADDED_MS, or there are enough.
    """
    request = endpoint.request(ROWS[:1], None)
    through = encode(request, f"/{endpoint.name}", X_API_Key=gateway.key, X_User_Id="someone", X_Model_Version="1")
    ways = [
        (await asyncio.open_connection("localhost", gateway.port, ssl=gateway.context()), through),
        (await asyncio.open_connection("127.0.0.1", direct_port), encode(request, "")),
    ]
    differences = []
    while len(differences) < 5 or (min(differences) > ADDED_MS and len(differences) < 40):
        times_s = ([], [])
        for _ in range(60):
            for ((reader, writer), message), kept in zip(ways, times_s, strict=True):
                started_s = time.perf_counter()
                writer.write(message)
                status, _, _ = await read_reply(reader)
                kept.append(time.perf_counter() - started_s)
                assert status == 200
        differences.append(1000 * (statistics.median(times_s[0]) - statistics.median(times_s[1])))
    for (_, writer), _ in ways:
        writer.close()
    return differences


def binomial_interval_99(share: float, n: int) -> tuple[float, float]:
    half = 2.576 * (share * (1 - share) / n) ** 0.5
    return n * (share - half), n * (share + half)


def test_a_check_that_is_under_way_does_not_hide_the_last_ones_result():
    class Haproxy:
        def ask(self, _command: str) -> str:
            return "# pxname,svname,check_status\nonnx-v1,v1-1,* L7OK\nonnx-v1,v1-2,L7OK\nonnx-v1,BACKEND,\n"

    assert [row["check_status"] for row in read_statistics(Haproxy())] == ["L7OK", "L7OK", ""]


@pytest.mark.parametrize(
    "name",
    ["onnx", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bentoml", "tfserving", "torchserve"))],
)
def test_the_split_is_right_sticky_and_moved_without_a_failed_request(name, tmp_path):
    endpoint = load_endpoints()[name]()
    # BentoML's default set-up does not answer 300 requests/s beside its client on two cores.
    options = ["--servers", name, "--replicas", "2", *(["--tuned"] if name == "bentoml" else [])]
    with Gateway(tmp_path / "state", *options) as gateway:
        gateway.command("set", "my_model", "v2=30", "--server", name)
        replicas = gateway.status()["servers"][name]
        direct_port = int(replicas["1"]["replicas"]["v1-1"]["address"].rpartition(":")[2])
        added_ms = asyncio.run(measure_added_ms(gateway, endpoint, direct_port))
        users_by_grpc = ask_over_grpc(gateway, name) if f"{name}-grpc" in load_endpoints() else {}

        pid = replicas["2"]["replicas"]["v2-1"]["pid"]
        answered, failures, rate = asyncio.run(drive(gateway, endpoint, pid))

        by_user = {}
        for sent in answered:
            if sent.split_after == "30":
                by_user.setdefault(sent.user, set()).add(sent.version)
        v2_users = sum(versions == {"2"} for versions in by_user.values())
        print(
            f"\n{name}: {rate:.0f} requests/s, {v2_users} of {len(by_user)} users got version 2, {len(failures)} of "
            f"{len(answered) + len(failures)} failed, p50 {min(added_ms):+.2f} to {max(added_ms):+.2f} ms in "
            f"{len(added_ms)} blocks"
        )
        assert failures == []
        assert len(by_user) == USERS
        low, high = binomial_interval_99(0.3, USERS)
        assert low <= v2_users <= high
        assert max(map(len, by_user.values())) == 1  # nobody saw both versions, also when a replica was killed
        assert all(by_user[user] == {version} for user, version in users_by_grpc.items())
        for split, version in (("100", "2"), ("0", "1")):
            under = [sent.version for sent in answered if sent.split_before == sent.split_after == split]
            assert under
            assert set(under) == {version}
        seen = gateway.status()["servers"][name]
        assert seen["2"]["replicas"]["v2-1"]["state"].startswith("DOWN")
        assert seen["2"]["replicas"]["v2-2"]["state"] == "UP"
        assert seen["1"]["requests"] + seen["2"]["requests"] >= REQUESTS
        assert min(added_ms) <= ADDED_MS


def ask_over_grpc(gateway: Gateway, name: str, users: int = 100) -> dict[str, str]:
    """Ask as some users with grpcio; return which version each got, which is what the reply's numbers say, too."""
    endpoint = load_endpoints()[f"{name}-grpc"]()
    request = endpoint.request(ROWS[:1], None)
    versions = {}
    with gateway.channel() as channel:
        call = channel.unary_unary(request.path)
        for number in range(users):
            metadata = (("x-api-key", gateway.key), ("x-user-id", f"user-{number}"))
            reply, state = call.with_call(request.body, metadata=metadata, timeout=30)
            user = f"user-{number}"
            versions[user] = dict(state.initial_metadata())["x-model-version"]
            assert np.abs(endpoint.decode(reply) - EXPECTED[versions[user]][:1]).max() <= TOLERANCE
        assert set(versions.values()) == {"1", "2"}
        with pytest.raises(grpc.RpcError) as refused:
            call(request.body, timeout=30)
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
    return versions


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    """One with two replicas of each version of the ONNX server; in TensorFlow Serving's place stand the floors."""
    with start("null") as rest, start("null-grpc") as floor:
        addresses = {}
        for version in "12":
            addresses[f"GATEWAY_TFSERVING_V{version}"] = f"127.0.0.1:{rest.endpoint.port}"
            addresses[f"GATEWAY_TFSERVING_V{version}_GRPC"] = f"127.0.0.1:{floor.endpoint.port}"
        folder = tmp_path_factory.mktemp("gateway") / "state"
        options = "--servers", "onnx", "tfserving", "--replicas", "2"
        with Gateway(folder, *options, environment=addresses) as running:
            yield running


@pytest.fixture
def user_key(gateway, request):
    name = hashlib.sha256(request.node.name.encode()).hexdigest()[:12]
    yield gateway.command("keys", "add", name, "--rate", "5").stdout.strip()
    gateway.command("keys", "revoke", name)


def write(folder: Path, size_bytes: int) -> Path:
    path = folder / f"{size_bytes}.json"
    path.write_bytes(ONE_ROW.ljust(size_bytes))
    return path


def test_a_tester_chooses_the_version_by_header(gateway):
    for version in "12":
        status, headers, body = gateway.ask(X_Model_Version=version)
        assert (status, headers["x-model-version"]) == (200, version)
        assert np.abs(np.array(json.loads(body)["predictions"]) - EXPECTED[version][:1]).max() <= TOLERANCE
    status, _, body = gateway.ask(X_Model_Version="3")
    assert status == 400
    assert "X-Model-Version is 1 or 2" in json.loads(body)["error"]


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
def test_refusals_over_rest(gateway, user_key, version, tmp_path):
    small = write(tmp_path, 100)
    assert gateway.curl("/onnx/predict", small, version, user_key)[0] == "200"
    for key in ("gw_unknown", "a b", user_key[:-1], f"{user_key}x"):
        assert gateway.curl("/onnx/predict", small, version, key)[0] == "401"
    status, reply = gateway.curl("/other/predict", small, version, user_key)
    assert (status, reply["error"][:8]) == ("404", "gateway:")
    for size_bytes, wanted in ((131072, "200"), (131073, "413"), (1_000_000, "413")):
        assert gateway.curl("/onnx/predict", write(tmp_path, size_bytes), version, gateway.key)[0] == wanted


def test_refusals_over_grpc(gateway, user_key):
    request = load_endpoints()["null-grpc"]().request(ROWS[:1], None)
    with gateway.channel() as channel:
        call = channel.unary_unary(PREDICT)
        other = channel.unary_unary("/tensorflow.serving.ModelService/HandleReloadConfigRequest")

        def code(method, message: bytes, *metadata) -> grpc.StatusCode:
            try:
                method.with_call(message, metadata=metadata, timeout=30)
            except grpc.RpcError as error:
                return error.code()
            return grpc.StatusCode.OK

        key = "x-api-key", gateway.key
        assert code(call, request.body, key) == grpc.StatusCode.OK
        assert code(call, request.body) == grpc.StatusCode.UNAUTHENTICATED
        assert code(call, request.body, ("x-api-key", "gw_no")) == grpc.StatusCode.UNAUTHENTICATED
        assert code(call, bytes(200_000), key) == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert code(call, bytes(2_000_000), key) == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert code(other, b"", key) == grpc.StatusCode.UNIMPLEMENTED
        assert code(call, request.body, key, ("x-model-version", "9")) == grpc.StatusCode.INVALID_ARGUMENT
        codes = [code(call, request.body, ("x-api-key", user_key)) for _ in range(30)]
        assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
def test_a_key_that_asks_too_often_gets_429_and_still_its_share(gateway, user_key, version, tmp_path):
    small = write(tmp_path, 100)
    statuses = [gateway.curl("/onnx/predict", small, version, user_key)[0] for _ in range(30)]
    assert set(statuses) == {"200", "429"}
    deadline_s = time.monotonic() + 30
    while gateway.curl("/onnx/predict", small, version, user_key)[0] != "200":
        assert time.monotonic() < deadline_s
    assert gateway.curl("/onnx/predict", small, version, gateway.key)[0] == "200"  # another key has its own rate


def test_a_revoked_key_is_worthless_at_once_and_keys_are_stored_as_hashes(gateway):
    key = gateway.command("keys", "add", "leaver").stdout.strip()
    assert gateway.ask(key=key)[0] == 200
    assert gateway.command("keys", "add", "leaver", check=False).returncode == 1
    assert "leaver: the default rate" in gateway.command("keys", "list").stdout
    gateway.command("keys", "revoke", "leaver")
    assert gateway.ask(key=key)[0] == 401
    for path in gateway.state.rglob("*"):
        if path.is_file():
            assert gateway.key.encode() not in path.read_bytes(), path
    for name in ("tls.pem", "keys.map", "split.map"):
        assert (gateway.state / name).stat().st_mode & 0o777 == 0o600


def test_the_access_log_is_json_and_tells_no_key_and_no_user(gateway):
    gateway.ask(path='/onnx/"quoted"\\<>', X_User_Id='person "7"', X_Model_Version="2")
    gateway.ask(path="/onnx/%22", key="gw_secret")
    deadline_s = time.monotonic() + 10
    log = gateway.state / "access.log"
    while not any(json.loads(line)["status"] == 401 and "%22" in line for line in log.read_text().splitlines()):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    text = log.read_text()
    assert gateway.key not in text
    assert "gw_secret" not in text
    assert "person" not in text
    line = next(line for line in map(json.loads, text.splitlines()) if line["owner"] == "tester")
    assert {"time", "version", "bucket", "percent", "replica", "total_us", "server", "id"} <= set(line)


def test_prometheus_reads_what_each_version_answered(gateway):
    gateway.ask(X_Model_Version="2")
    connection = http.client.HTTPConnection("127.0.0.1", gateway.metrics_port, timeout=10)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    found = [line for line in text.splitlines() if line.startswith("haproxy_backend_http_responses_total")]
    count = next(line for line in found if 'proxy="onnx-v2"' in line and 'code="2xx"' in line)
    assert float(count.split()[-1]) >= 1


def test_a_refusal_names_the_version_that_had_been_chosen(gateway, user_key):
    for version in "12":
        status, headers, _ = gateway.ask(body=bytes(200_000), X_Model_Version=version)
        assert (status, headers["x-model-version"]) == (413, version)
        statuses = []
        while 429 not in statuses and len(statuses) < 100:
            status, headers, _ = gateway.ask(key=user_key, X_Model_Version=version)
            assert headers["x-model-version"] == version
            statuses.append(status)
        assert statuses[-1] == 429
    assert "x-model-version" not in gateway.ask(key="gw_unknown")[1]


def test_junk_does_not_disturb_the_gateway(gateway):
    for body in (b"", b"{", b"\xff\x00" * 500, b"[" * 5000):
        status, headers, _ = gateway.ask(body=body)
        assert 400 <= status < 500
        assert headers["x-model-version"] in "12"  # the server refused it, and a version had been chosen
    for junk in (b"\x00\xff" * 100, b"GET / HTTP/9.9\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nxxxxxxxxxxxx"):
        raw = socket.create_connection(("localhost", gateway.port), timeout=10)
        with raw, gateway.context().wrap_socket(raw, server_hostname="localhost") as connection:
            connection.sendall(junk)
            with contextlib.suppress(OSError):
                connection.recv(4096)
    assert gateway.ask()[0] == 200


def test_what_is_no_http_leaves_the_access_log_json(gateway):
    raw = socket.create_connection(("localhost", gateway.port), timeout=10)
    with raw, gateway.context().wrap_socket(raw, server_hostname="localhost") as connection:
        connection.sendall(b"GARBAGE\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 400")
    deadline_s = time.monotonic() + 10
    while '"status":400' not in (lines := (gateway.state / "access.log").read_text()):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    assert all({"bucket", "total_us"} <= set(json.loads(line)) for line in lines.splitlines())


def test_headers_that_leave_the_body_no_room_are_refused(gateway):
    assert gateway.ask(**{f"X_Long_{i}": "h" * 8000 for i in range(8)})[0] == 431
    assert gateway.ask(X_Long="h" * 7000)[0] == 200


@pytest.mark.parametrize(("first", "second"), [("1", "99"), ("2", "1abc")])
def test_of_two_versions_asked_for_the_last_counts(gateway, first, second):
    connection = http.client.HTTPSConnection("localhost", gateway.port, timeout=30, context=gateway.context())
    connection.putrequest("POST", "/onnx/predict")
    headers = [("X-API-Key", gateway.key), ("Content-Length", "0")]
    for header in [*headers, ("X-Model-Version", first), ("X-Model-Version", second)]:
        connection.putheader(*header)
    connection.endheaders()
    assert connection.getresponse().status == 400
    connection.close()


def test_a_reload_that_haproxy_refuses_is_told_and_changes_nothing(gateway):
    certificate = gateway.state / "tls.pem"
    good = certificate.read_bytes()
    try:
        certificate.write_text("no certificate")
        run = gateway.command("reload", check=False)
        assert run.returncode == 1
        assert "HAProxy refused, the old settings go on" in run.stderr
    finally:
        certificate.write_bytes(good)
    assert gateway.ask()[0] == 200
    assert gateway.command("reload").stdout == "reloaded\n"


def test_a_slow_body_is_given_up(gateway):
    raw = socket.create_connection(("localhost", gateway.port), timeout=60)
    with raw, gateway.context().wrap_socket(raw, server_hostname="localhost") as connection:
        head = f"POST /onnx/predict HTTP/1.1\r\nHost: x\r\nX-API-Key: {gateway.key}\r\nContent-Length: 100\r\n\r\n"
        connection.sendall(head.encode() + b"{")
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("set", "my_model", "v2=130"), "v2=0 to v2=100"),
        (("set", "my_model", "v2=-1"), "v2=0 to v2=100"),
        (("set", "other", "v2=30"), "no model called 'other'"),
        (("set", "my_model", "v2=30", "--server", "other"), "no server called 'other'"),
        (("keys", "add", "two words"), "use 1 to 64 letters"),
        (("keys", "revoke", "nobody"), "no key of 'nobody'"),
    ],
)
def test_wrong_commands_are_refused_and_change_nothing(gateway, words, reason):
    before = (gateway.state / "split.map").read_text(), (gateway.state / "keys.map").read_text()
    run = gateway.command(*words, check=False)
    assert run.returncode != 0
    assert reason in run.stderr
    assert "Traceback" not in run.stderr
    assert before == ((gateway.state / "split.map").read_text(), (gateway.state / "keys.map").read_text())


def test_promote_and_rollback_survive_a_reload(gateway):
    for command, version in (("promote", "2"), ("rollback", "1"), ("promote", "2")):
        gateway.command(command, "my_model", "--server", "onnx")
        assert gateway.ask(X_User_Id="someone")[1]["x-model-version"] == version
        assert gateway.command("reload").stdout
        assert gateway.ask(X_User_Id="someone")[1]["x-model-version"] == version
    gateway.command("rollback", "my_model")


def test_a_dead_canary_falls_back_to_version_1_and_a_dead_gateway_leaves_nothing(tmp_path):
    with Gateway(tmp_path / "state", "--replicas", "1") as gateway:
        gateway.command("promote", "my_model")
        assert gateway.ask()[1]["x-model-version"] == "2"
        gateway.end(signal.SIGTERM)
        gateway.command("rollback", "my_model")
        gateway.spawn()  # the split survives a restart, and what is set while the replicas start
        gateway.command("promote", "my_model")
        gateway.wait_for("version 2 gets 100 % on onnx")
        gateway.wait_for("\nserving on")
        assert gateway.ask()[1]["x-model-version"] == "2"

        replicas = gateway.status()["servers"]["onnx"]
        os.kill(replicas["2"]["replicas"]["v2-1"]["pid"], signal.SIGKILL)
        for _ in range(20):  # from the first one on
            status, headers, body = gateway.ask()
            assert (status, headers["x-model-version"]) == (200, "1")
        assert np.abs(np.array(json.loads(body)["predictions"]) - EXPECTED["1"][:1]).max() <= TOLERANCE
        gateway.wait_for("onnx v2-1")

        os.kill(replicas["1"]["replicas"]["v1-1"]["pid"], signal.SIGKILL)
        deadline_s = time.monotonic() + 30
        # Until HAProxy has seen it, a request that met the dying replica on a kept connection is closed unanswered.
        while gateway.status()["servers"]["onnx"]["1"]["replicas"]["v1-1"]["state"] == "UP":
            assert time.monotonic() < deadline_s
        status, headers, body = gateway.ask()
        assert (status, headers["x-model-version"], headers["content-type"]) == (503, "2", "application/json")
        assert "no replica of this version answers" in json.loads(body)["error"]
        assert gateway.ask(X_Model_Version="1")[0] == 503

        worker = gateway.haproxy()[-1]
        worker.kill()
        assert gateway.end(None) == 1
        assert "gateway: HAProxy ended with exit code" in gateway.log()


def test_a_killed_launcher_leaves_nothing(tmp_path):
    with Gateway(tmp_path / "state", "--replicas", "1") as gateway:
        assert gateway.end(signal.SIGKILL) == -signal.SIGKILL


def test_ctrl_c_during_the_start_leaves_nothing(tmp_path):
    gateway = Gateway(tmp_path / "state", "--replicas", "1")
    gateway.spawn()
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while not gateway.family():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    assert gateway.end(signal.SIGINT) == 0
    assert gateway.log().splitlines()[-1] == "stopped"


def refused(gateway: Gateway) -> str:
    """Start where it must not start; return the one line that says why."""
    gateway.spawn()
    assert gateway.end(None) == 1
    lines = gateway.log().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_what_keeps_it_from_starting_is_told_in_one_line(tmp_path):
    state = tmp_path / "state"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        gateway = Gateway(state, environment={"GATEWAY_BIND": f"127.0.0.1:{port}"})
        assert f"127.0.0.1:{port}: Address already in use; stop what listens there" in refused(gateway)
    for text in ("onnx 130\n", "onnx\n", "onnx thirty\n", "\xff\xfe"):
        (state / "split.map").write_text(text, encoding="latin-1")
        reason = refused(Gateway(state))
        assert "split.map" in reason
        assert "correct it or remove it" in reason
    (state / "split.map").unlink()
    assert "no server called 'other'" in refused(Gateway(state, "--servers", "other"))
    assert "is no address" in refused(Gateway(state, environment={"GATEWAY_ONNX_V1": "onnx"}))
    assert "expected a whole number" in refused(Gateway(state, environment={"GATEWAY_RATE": "many"}))
    nothing = tmp_path / "bin"
    nothing.mkdir()
    hidden = Gateway(state, environment={"PATH": str(nothing), "GATEWAY_HAPROXY": "no-haproxy"})
    assert "no-haproxy not found; install it: sudo apt-get install haproxy" in refused(hidden)


def test_two_gateways_do_not_share_a_state_folder(gateway):
    second = Gateway(gateway.state)
    second.log_path = second.log_path.with_suffix(".second")
    assert f"a gateway runs in {gateway.state}; stop it" in refused(second)
    assert gateway.ask()[0] == 200


def test_the_servers_of_an_image_are_those_of_the_endpoints():
    run = subprocess.run([sys.executable, GATEWAY, "servers"], capture_output=True, text=True, check=True)
    assert run.stdout == (REPOSITORY_DIR / "gateway" / "servers.json").read_text(), (
        "run python gateway.py servers > servers.json"
    )


def test_addresses_of_one_dns_name_become_a_template():
    server = pools.describe_servers()["tfserving"]
    environment = {"GATEWAY_TFSERVING_V1": "tf-v1:8501*3", "GATEWAY_TFSERVING_V1_GRPC": "tf-v1:8500*3"}
    text = pools.render(pools.pools_from_environment(server, environment))
    assert "server-template v1-1- 3 tf-v1:8500 proto h2 check-proto h1 port 8501" in text
    assert text.count("resolvers dns init-addr none") == 4  # REST and gRPC; of version 1, and behind version 2


def test_an_address_for_rest_alone_gives_grpc_no_replica():
    server = pools.describe_servers()["tfserving"]
    text = pools.render(pools.pools_from_environment(server, {"GATEWAY_TFSERVING_V1": "127.0.0.1:8501"}))
    assert "None" not in text
    assert "server" not in text.split("backend tfserving-v1-grpc")[1].split("backend")[0]


@pytest.fixture
def state(tmp_path, monkeypatch):
    """A state folder whose HAProxy refuses what concerns torchserve, and the keys' rates."""
    state = State(tmp_path)
    state.create()
    state.told = []

    def ask(command: str) -> str:
        state.told.append(command)
        return "unknown map entry" if "torchserve" in command or "del map rates" in command else ""

    monkeypatch.setattr(state, "ask", ask)
    return state


def test_a_refused_split_of_one_server_is_told_and_the_others_get_theirs(state):
    with pytest.raises(StateError, match="HAProxy refused"):
        state.set_split({"torchserve": 0, "onnx": 0})
    assert f"set map {SPLIT} onnx 0" in state.told


def test_a_key_is_worthless_whatever_fails_while_it_is_revoked(state):
    state.add_key("leaver", 5)
    with pytest.raises(StateError, match="HAProxy refused"):
        state.revoke_key("leaver")
    assert state.read(KEYS) == {}
    assert any(command.startswith(f"del map {KEYS}") for command in state.told)
