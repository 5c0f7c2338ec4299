"""Send version 2 a copy of each request to version 1, and compare the replies.

    python shadow.py --server onnx
    python shadow.py --running 8101 8201 --port 8100 --rate 0 --seconds 60

The first form starts both versions of a server and HAProxy (shadow.cfg) in
front, sends the rows of test.csv to version 1 as users would, and prints how
version 2 answered the same requests: class, probability, latency, failures.
Users get version 1's replies.
The second form stands in front of two running servers, one version each, and
watches the requests to port 8100; Ctrl-C ends it early and loses nothing.
Writes one JSON file with every observation: results/shadow-<server>.json.
"""

import argparse
import base64
import contextlib
import functools
import http.client
import json
import os
import queue
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

try:
    import numpy as np
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as error:
    sys.exit(f"shadow: {error.name} is not installed in this Python; run `source ../.venv/bin/activate` first")

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent / "benchmarks"))

from endpoints.base import (  # noqa: E402
    Endpoint,
    ServerError,
    load_endpoints,
)
from endpoints.reference import load_test_rows  # noqa: E402
from exchanges import Rows, Unreadable, read_probabilities, read_rows  # noqa: E402
from gateway import GatewayError, end_with_parent, find_haproxy  # noqa: E402
from machine.free_ports import find_free_ports  # noqa: E402
from machine.signals import interrupt_on_sigterm  # noqa: E402
from servers.process import ServerProcess  # noqa: E402

DATAGRAM_BYTES = 65507  # the largest of UDP, and the longest line that shadow.cfg writes
RECEIVE_BUFFER_BYTES = 4 << 20  # requested from the kernel; without privileges it grants net.core.rmem_max
# linux/sock_diag.h and asm-generic/socket.h; Python's socket does not name them.
SO_MEMINFO, MEMINFO_FIELDS, SK_MEMINFO_RMEM_ALLOC, SK_MEMINFO_DROPS = 55, 9, 0, 8
START_TIMEOUT_S = 30.0
POLL_S = 0.05
MOST_FLIPS_SHOWN = 10
MESSAGE_BYTES = 12_288  # of headers and body: certain to fit into HAProxy's buffer
# RFC 9110, 7.6.1: headers that a proxy does not pass on. The length is set again; HAProxy has sent 100 Continue.
NOT_COPIED = (
    "connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "http2-settings",
    "content-length", "expect",
)  # fmt: skip
THRESHOLD = 0.5  # P(benign) from which a row is classified as benign


Headers = list[tuple[str, bytes]]


@dataclass(frozen=True)
class Copy:
    """A request and version 1's reply."""

    path: str
    headers: Headers
    body: bytes
    status: int
    reply_headers: Headers
    reply: bytes
    duration_s: float  # from request sent to reply's header, measured by HAProxy

    @classmethod
    def from_record(cls, record: bytes) -> "Copy | None":
        """Read a log record of shadow.cfg; None if no complete request came, ValueError if the bodies were cut."""
        values = json.loads(record)  # fails if the line was cut
        if values["body_bytes"] == "-":
            return None
        headers, body = read_message(values["headers"], values["body"], values["body_bytes"])
        answered = values["us"] != "-"  # else HAProxy itself replied 502, 503 or 504
        reply_headers, reply, duration_s = [], b"", float("nan")
        if answered:
            reply_headers, reply = read_message(values["reply_headers"], values["reply"], values["reply_bytes"])
            duration_s = int(values["us"]) / 1e6
        return cls(values["path"], headers, body, values["status"], reply_headers, reply, duration_s)


def read_message(headers: str, body: str, body_bytes: str) -> tuple[Headers, bytes]:
    """Return headers and body of a log record, all base64; ValueError if HAProxy's buffer did not hold the body.

    If the headers do not give the body's length, HAProxy knows only the part in its buffer.
    """
    head, content = base64.b64decode(headers), base64.b64decode(body)
    lines = [line.partition(b":") for line in head.split(b"\r\n") if line]
    read = [(name.decode("latin-1").lower(), value.strip()) for name, _, value in lines]
    has_length = any(name == "content-length" for name, _ in read)
    if len(content) != int(body_bytes) or (not has_length and len(head) + len(content) > MESSAGE_BYTES):
        raise ValueError("a body larger than HAProxy's buffer")
    return read, content


def choose_copied(headers: Headers, own: dict[str, str]) -> Headers:
    """Return the headers of a copy: the request's without those of the connection, replaced by `own`."""
    names = b",".join(value for name, value in headers if name == "connection").decode("latin-1").lower().split(",")
    left_out = {*NOT_COPIED, *(name.strip() for name in names), *own}
    kept = [(name, value) for name, value in headers if name not in left_out]
    return kept + [(name, value.encode()) for name, value in own.items()]


def as_text(headers: Headers) -> list[tuple[str, str]]:
    return [(name, value.decode("latin-1")) for name, value in headers]


@dataclass
class Comparison:
    """The observations of both versions. Each copy is compared, or counted under the reason why not."""

    server: str
    refused: Counter = field(default_factory=Counter)  # version 1 did not predict: "400 and 400", both statuses
    failed: Counter = field(default_factory=Counter)  # version 1 predicted and version 2 did not
    dropped: Counter = field(default_factory=Counter)  # copies never sent to version 2
    rows: list = field(default_factory=list)  # features; these three have one entry per row predicted by both
    v1: list = field(default_factory=list)  # P(benign)
    v2: list = field(default_factory=list)
    v1_s: list = field(default_factory=list)  # these two have one entry per request predicted by both
    v2_s: list = field(default_factory=list)

    @property
    def compared(self) -> int:
        """Return the number of requests that both versions predicted."""
        return len(self.v1_s)

    @property
    def copies(self) -> int:
        """Return the number of copies that HAProxy had to make."""
        return self.compared + self.refused.total() + self.failed.total() + self.dropped.total()

    @property
    def differences(self) -> np.ndarray:
        """Return |Δp| of every row that both predicted, (n,)."""
        return np.abs(np.array(self.v1) - np.array(self.v2))

    @property
    def flips(self) -> np.ndarray:
        """Return which rows the versions put in different classes, (n,) of bool."""
        return (np.array(self.v1) >= THRESHOLD) != (np.array(self.v2) >= THRESHOLD)

    def add(self, copy: Copy, rows: Rows, v1: Rows, v2: Rows, v2_s: float) -> None:
        """Add a request that both predicted: `rows` (n, 5), probabilities (n, 2)."""
        self.rows += rows
        self.v1 += [benign for _, benign in v1]
        self.v2 += [benign for _, benign in v2]
        self.v1_s.append(copy.duration_s)
        self.v2_s.append(v2_s)

    def flipped_rows(self) -> list[tuple[list[float], float, float, int]]:
        """The different rows that flip, most often seen first: features, P(benign) of both, times seen."""
        places = np.flatnonzero(self.flips)
        seen = Counter(as_float32(self.rows[i]) for i in places)
        first = {as_float32(self.rows[i]): i for i in reversed(places)}
        found = [(first[row], count) for row, count in seen.most_common()]
        return [(self.rows[i], self.v1[i], self.v2[i], count) for i, count in found]


def as_float32(row: list[float]) -> bytes:
    """Return a row in the models' precision, so that the same row in JSON and in bytes is one row."""
    with np.errstate(over="ignore"):  # TensorFlow Serving accepts 1e39 as infinity
        return np.array(row, "<f4").tobytes()


class Shadow:
    """HAProxy in front of version 1, and the threads that send its copies to version 2 and compare.

    A context manager: inside the block `users_port` (None: a free one) answers with version 1's replies. `endpoint`
    is version 1's; version 2's is of the same kind. At most `queue_size` copies wait and `at_once` are under way;
    further ones are dropped and counted. On leaving the block, waiting copies have `drain_s` to be compared. Raises
    GatewayError if HAProxy is missing, ServerError if it does not start or has ended.
    """

    def __init__(
        self, endpoint: Endpoint, v1_port: int, v2_port: int,
        *, users_port: int | None = None, queue_size: int = 1000, at_once: int = 4, timeout_s: float = 5.0,
        drain_s: float = 10.0,
    ):  # fmt: skip
        self._v2 = type(endpoint)({"rest": v2_port})
        self.comparison = Comparison(endpoint.name)
        self.timeout_s, self.drain_s = timeout_s, drain_s
        self.ports = {**find_free_ports(["users", "copies"]), "v1": v1_port, "v2": v2_port}
        if users_port is not None:
            self.ports["users"] = users_port
        self._records: queue.Queue[bytes] = queue.Queue(queue_size)
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._compare) for _ in range(at_once)]
        self._reader = threading.Thread(target=self._read)

    @property
    def users_port(self) -> int:
        return self.ports["users"]

    def __enter__(self) -> "Shadow":
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            self._tap = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            self._tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
            self._tap.bind(("127.0.0.1", 0))
            self._tap.settimeout(POLL_S)
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shadow-")))
            stack.callback(self._stop_haproxy, self._start_haproxy())
            self._wait_for_haproxy()
            self._stack = stack.pop_all()
        for thread in (self._reader, *self._threads):
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        with self._stack:
            try:
                self.wait_until_compared()
                unsent = self._ask_haproxy("DroppedLogs")
            finally:
                self._stopping.set()
                for thread in (self._reader, *self._threads):
                    thread.join()
            dropped = self.comparison.dropped
            dropped["the run ended"] += self._records.qsize()
            dropped["read too late"] += self._read_socket_memory()[SK_MEMINFO_DROPS]
            dropped["not sent by HAProxy"] += unsent
            self.comparison.dropped = +dropped  # without the zeros

    def _start_haproxy(self) -> subprocess.Popen:
        haproxy = find_haproxy()
        ports = {**self.ports, "tap": self._tap.getsockname()[1]}
        settings = {f"SHADOW_{name.upper()}_PORT": str(port) for name, port in ports.items()}
        settings["SHADOW_ADMIN"] = str(self._folder / "admin.sock")
        self._log = (self._folder / "haproxy.log").open("w+")
        self.haproxy = subprocess.Popen(
            [haproxy, "-db", "-f", FOLDER / "shadow.cfg"],
            env={**os.environ, **settings}, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C ends only shadow.py, which first asks HAProxy for its figures
            preexec_fn=functools.partial(end_with_parent, os.getpid()),
        )  # fmt: skip
        return self.haproxy

    def _wait_for_haproxy(self) -> None:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s and self.haproxy.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.users_port), timeout=1):
                return
            time.sleep(POLL_S)
        raise ServerError(f"haproxy does not listen: {self._last_words()}")

    def _last_words(self) -> str:
        self._log.seek(0)
        return self._log.read().strip() or "it printed nothing"

    def _stop_haproxy(self, haproxy: subprocess.Popen) -> None:
        haproxy.kill()
        haproxy.wait()
        self._log.close()

    def _ask_haproxy(self, figure: str) -> int:
        """Return a figure of HAProxy's `show info`; ServerError if it has ended."""
        try:
            with socket.socket(socket.AF_UNIX) as admin:
                admin.connect(str(self._folder / "admin.sock"))
                admin.sendall(b"show info\n")
                lines = admin.makefile().read().splitlines()
            return int(dict(line.split(": ", 1) for line in lines if ": " in line)[figure])
        except (OSError, KeyError) as error:
            raise ServerError(f"haproxy has ended: {self._last_words()}") from error

    def _read_socket_memory(self) -> tuple[int, ...]:
        memory = self._tap.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 4 * MEMINFO_FIELDS)
        return struct.unpack(f"{MEMINFO_FIELDS}I", memory)

    def wait_until_compared(self) -> None:
        """Wait until no copy is under way, for `drain_s` at most."""
        self._ask_haproxy("DroppedLogs")  # one thread serves all: it has logged all its replies
        deadline_s = time.monotonic() + self.drain_s
        # The socket first: `_read` removes a record from it only when the queue has it.
        while self._read_socket_memory()[SK_MEMINFO_RMEM_ALLOC] or self._records.unfinished_tasks:
            if time.monotonic() > deadline_s:
                break
            time.sleep(POLL_S)

    def _read(self) -> None:
        """Read records from the socket as fast as they arrive: those that the kernel cannot hold are lost."""
        while not self._stopping.is_set():
            try:
                record = self._tap.recv(DATAGRAM_BYTES, socket.MSG_PEEK)
            except TimeoutError:
                continue
            try:
                self._records.put_nowait(record)
            except queue.Full:
                self._count(self.comparison.dropped, "the queue was full")
            self._tap.recv(DATAGRAM_BYTES)

    def _compare(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.ports["copies"], timeout=self.timeout_s)
        with contextlib.closing(connection):
            while not self._stopping.is_set():
                try:
                    record = self._records.get(timeout=POLL_S)
                except queue.Empty:
                    continue
                try:
                    self._compare_one(connection, record)
                except Exception as error:  # noqa: BLE001 - one copy must not end the comparison of all
                    self._count(self.comparison.refused, f"not understood, {type(error).__name__}: {error}")
                finally:
                    self._records.task_done()

    def _compare_one(self, connection: http.client.HTTPConnection, record: bytes) -> None:
        try:
            copy = Copy.from_record(record)
        except ValueError:
            self._count(self.comparison.dropped, "a body was too large")
            return
        if copy is None:
            return
        try:
            has_host = any(name == "host" for name, _ in copy.headers)
            connection.putrequest("POST", copy.path, skip_host=has_host, skip_accept_encoding=True)
            for name, value in choose_copied(copy.headers, self._find_token()):
                connection.putheader(name, value)
            connection.putheader("content-length", str(len(copy.body)))
            connection.endheaders(copy.body)
            answer = connection.getresponse()
            reply = answer.read()
        except (OSError, http.client.HTTPException, ValueError):  # ValueError: a path that http.client does not send
            connection.close()
            self._count(self.comparison.failed, "no reply")
            return
        if copy.status != 200:
            self._count(self.comparison.refused, f"{copy.status} and {answer.status}")
            return
        try:
            rows = read_rows(copy.path, as_text(copy.headers), copy.body)
            v1 = read_probabilities(copy.path, as_text(copy.reply_headers), copy.reply)
            if len(v1) != len(rows):
                raise Unreadable(f"{len(v1)} probabilities for {len(rows)} rows")
        except Unreadable as error:
            self._count(self.comparison.refused, f"200, but no prediction of rows: {error}")
            return
        if answer.status != 200:
            self._count(self.comparison.failed, f"status {answer.status}")
            return
        try:
            v2 = read_probabilities(copy.path, answer.getheaders(), reply)
            if len(v2) != len(rows):
                raise Unreadable(f"{len(v2)} probabilities for {len(rows)} rows")
        except Unreadable:
            self._count(self.comparison.failed, "no probabilities in the reply")
            return
        with self._lock:
            self.comparison.add(copy, rows, v1, v2, int(answer.headers["X-Duration-Us"]) / 1e6)

    def _find_token(self) -> dict[str, str]:
        """Return the header that version 2 requires, by its name in lower case; version 1's has another value."""
        headers = self._v2.request([[0.0] * 5], None).headers
        return {name.lower(): value for name, value in headers.items() if name == "Authorization"}

    def _count(self, counter: Counter, reason: str) -> None:
        with self._lock:
            counter[reason] += 1


@dataclass
class Users:
    """The users' view of their requests."""

    answered: int = 0
    failed: int = 0  # no reply, or not status 200


def send_users(endpoint: Endpoint, port: int, rate: float, seconds: float, connections: int = 4) -> Users:
    """Send the rows of test.csv, one per request without a version, `rate` per second over `connections`."""
    requests = [endpoint.request([row], None) for row in load_test_rows()[0]]
    count = max(connections, int(rate * seconds))
    start_s = time.monotonic()

    def send_share(first: int) -> Users:
        seen = Users()
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
            for number in range(first, count, connections):
                time.sleep(max(0.0, start_s + number / rate - time.monotonic()))
                try:
                    request = requests[number % len(requests)]
                    headers = {"Content-Type": request.content_type, **request.headers}
                    connection.request("POST", request.path, request.body, headers)
                    answer = connection.getresponse()
                    answer.read()
                    right = answer.status == 200
                except (OSError, http.client.HTTPException):
                    connection.close()
                    right = False
                seen.answered += right
                seen.failed += not right
        return seen

    with ThreadPoolExecutor(connections) as pool:
        shares = list(pool.map(send_share, range(connections)))
    return Users(sum(share.answered for share in shares), sum(share.failed for share in shares))


def print_comparison(comparison: Comparison, users: Users | None, tolerance: float, console: Console) -> None:
    """Print the figures, and the conclusion in the last line."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("row of test.csv", "P(benign) v1", "v2", "times"):
        shown.add_column(title, justify="right")
    names = {as_float32(row): str(number) for number, row in enumerate(load_test_rows()[0])}
    for row, v1, v2, count in comparison.flipped_rows()[:MOST_FLIPS_SHOWN]:
        name = names.get(as_float32(row)) or "none: " + ", ".join(map(str, row))
        shown.add_row(name, f"{v1:.3f}", f"{v2:.3f}", f"{count:,}")
    console.print(shown)
    uncompared = {
        "not predicted by v1": comparison.refused,
        "failed by v2": comparison.failed,
        "dropped": comparison.dropped,
    }
    for what, counter in uncompared.items():
        for reason, count in counter.most_common():
            console.print(f"{what}: {count:,} ({reason})", soft_wrap=True, markup=False)
    if users:
        console.print(f"users: {users.answered:,} answered by v1, {users.failed:,} failed")
    totals = ", ".join(f"{counter.total():,} {what}" for what, counter in uncompared.items())
    console.print(f"copies: {comparison.copies:,}, {comparison.compared:,} compared, {totals}", soft_wrap=True)
    if not comparison.compared:
        console.print(f"{comparison.server}: nothing to compare")
        return
    differences = comparison.differences
    p50, p90, p99 = np.percentile(differences, (50, 90, 99))
    console.print(
        f"|Δp|: mean {differences.mean():.3f}, p50 {p50:.3f}, p90 {p90:.3f}, p99 {p99:.3f}, "
        f"max {differences.max():.3f}; {(differences <= tolerance).mean():.1%} of rows within {tolerance:g}",
        soft_wrap=True,
    )
    for name, durations_s in (("v1", comparison.v1_s), ("v2", comparison.v2_s)):
        p50, p99 = np.percentile(durations_s, (50, 99)) * 1e3
        console.print(f"latency of {name}: p50 {p50:.2f} ms, p99 {p99:.2f} ms")
    flips = comparison.flips
    console.print(
        f"{comparison.server}: v2 gives v1's class to {1 - flips.mean():.1%} of {len(flips):,} rows; "
        f"{len(comparison.flipped_rows())} different rows flip, max |Δp| {differences.max():.3f}; "
        f"{comparison.failed.total():,} copies failed, {comparison.dropped.total():,} dropped",
        soft_wrap=True,
    )


def main() -> int:
    interrupt_on_sigterm()
    classes = load_endpoints()
    names = [name for name, value in classes.items() if value.has_model and value.protocol == "REST"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--server", choices=names, default="onnx", metavar="NAME", help=f"one of {', '.join(names)} (default: onnx)"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="how long users send requests (default: 10)")
    parser.add_argument(
        "--rate", type=float, default=100.0, help="their requests per second; 0: watch yours only (default: 100)"
    )
    parser.add_argument(
        "--running", type=int, nargs=2, metavar="PORT", help="ports of a running v1 and v2 (default: start them)"
    )
    parser.add_argument("--port", type=int, help="port on 127.0.0.1 for users (default: any free one)")
    parser.add_argument("--tolerance", type=float, default=0.1, help="largest |Δp| that counts as equal (default: 0.1)")
    parser.add_argument("--queue", type=int, default=1000, help="copies that may wait for v2 (default: 1000)")
    parser.add_argument("--at-once", type=int, default=4, help="copies under way to v2 (default: 4)")
    parser.add_argument("--timeout-s", type=float, default=5.0, help="longest wait for v2's reply (default: 5)")
    parser.add_argument("--output", type=Path, help="the JSON file (default: results/shadow-<server>.json)")
    arguments = parser.parse_args()
    if arguments.rate < 0 or min(arguments.seconds, arguments.queue, arguments.at_once, arguments.timeout_s) <= 0:
        parser.error("seconds, rate, queue, at-once and timeout-s must be positive")
    output = arguments.output or FOLDER / "results" / f"shadow-{arguments.server}.json"
    console = Console(highlight=False)
    endpoint_class = classes[arguments.server]
    with contextlib.ExitStack() as stack:
        ports = arguments.running
        if ports is None:
            servers = [ServerProcess(endpoint_class.on_free_ports(only_version=version)) for version in ("1", "2")]
            with console.status(f"{arguments.server}: starting both versions"):
                ports = [stack.enter_context(server).endpoint.port for server in servers]
        endpoint = endpoint_class({"rest": ports[0]})
        shadow = Shadow(
            endpoint, *ports, users_port=arguments.port,
            queue_size=arguments.queue, at_once=arguments.at_once, timeout_s=arguments.timeout_s,
        )  # fmt: skip
        users = None
        with shadow:
            address = f"http://127.0.0.1:{shadow.users_port}{endpoint.path(None)}"
            # Ctrl-C ends the watching, at its first moment, too; it breaks off users of our own.
            ends_watching = () if arguments.rate else (KeyboardInterrupt,)
            with contextlib.suppress(*ends_watching):
                console.print(f"version 1 answers at {address}, version 2 gets copies", soft_wrap=True)
                if arguments.rate:
                    users = send_users(endpoint, shadow.users_port, arguments.rate, arguments.seconds)
                else:
                    time.sleep(arguments.seconds)
    output.parent.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in vars(arguments).items() if key != "output"}
    result = {"settings": settings, "users": users and vars(users), **vars(shadow.comparison)}
    output.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"wrote {output}", soft_wrap=True)
    print_comparison(shadow.comparison, users, arguments.tolerance, console)
    return 0 if shadow.comparison.compared else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ServerError, GatewayError, OSError) as error:
        sys.exit(f"shadow: {error}")
    except KeyboardInterrupt:
        sys.exit("shadow: interrupted; the servers are stopped")
