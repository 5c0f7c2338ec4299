"""A gateway in miniature for the tests: splits users by a hash of their id, answers by the reference's numbers.

It speaks the ONNX server's form. Over real sockets `ToySplit` is a context manager; `stand_in` answers `split_users`
in this process, by a clock that only the toy moves. What version 2 does wrong is an argument.
"""

import json
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from endpoints.reference import load_expected, load_test_rows
from rollout import split_users

ROWS, _ = load_test_rows()
ANSWERS = {version: dict(zip(map(tuple, ROWS), load_expected(version).tolist(), strict=True)) for version in "12"}
ANSWERS["x"] = {row: [benign, malignant] for row, (malignant, benign) in ANSWERS["1"].items()}  # mostly wrong
LATENCY_S = 0.001  # of a reply without sockets, and up to twice as much


class ToySplit:
    """The split at `url`; `share` per cent of the users get version 2."""

    def __init__(
        self,
        share: int = 50,
        versions: str = "12",  # what answers as version 1 and as version 2
        slow_s: float = 0.0,  # version 2 waits so long
        failing: int = 0,  # version 2 answers 500 to so many per cent
        shapeless: bool = False,  # version 2 answers 200 without a pair of probabilities
        hangs: bool = False,  # version 2 answers nobody; only without sockets
        sticky: bool = True,
        header: str = "X-Model-Version",
        throttles: int = 0,  # so many replies 429 first
    ):
        self.share, self.versions, self.slow_s, self.failing = share, versions, slow_s, failing
        self.shapeless, self.sticky, self.header, self.throttles = shapeless, sticky, header, throttles
        self.hangs = hangs
        self.asked = []  # user ids
        self.url = "http://toy.invalid"
        self._lock = threading.Lock()

    def reply(self, user: str, body: bytes, clock) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body of the reply to one request; `clock.sleep` is how version 2 is slow."""
        [row] = json.loads(body)["data"]
        with self._lock:
            self.asked.append(user)
            number = len(self.asked)
            throttled = self.throttles > 0
            self.throttles -= throttled
        if throttled:
            return 429, {}, b"null"
        version = self.choose(user if self.sticky else f"{user}{number}")
        status, content = 200, {"predictions": [ANSWERS[self.versions[int(version) - 1]][tuple(row)]]}
        if version == "2":
            if self.hangs:
                raise TimeoutError
            if self.slow_s:
                clock.sleep(self.slow_s)
            if number % 100 < self.failing:
                status, content = 500, {"error": "planted"}
            elif self.shapeless:
                content = {"predictions": [1.0]}
        return status, {self.header: version}, json.dumps(content).encode()

    def choose(self, user: str) -> str:
        """Return a user's version."""
        return "2" if zlib.crc32(user.encode()) % 100 < self.share else "1"

    def stand_in(self, patch: pytest.MonkeyPatch) -> None:
        """Answer `split_users` without a socket, and replace its clock, so that no latency is this machine's."""
        clock = ReplyClock()
        patch.setattr(split_users, "time", clock)
        patch.setattr(split_users.Split, "connect", lambda _split, _timeout_s: ToyConnection(self, clock))

    def __enter__(self) -> "ToySplit":
        split = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            wbufsize = -1  # one write a reply

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status, headers, content = split.reply(self.headers["X-User-Id"], body, time)
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)
                self.wfile.flush()

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()


class ReplyClock:
    """Takes the place of the module `time`: what a thread measures is what it has slept, and nothing else passes."""

    def __init__(self):
        self._local = threading.local()

    def perf_counter(self) -> float:
        return getattr(self._local, "now_s", 0.0)

    def sleep(self, duration_s: float) -> None:
        self._local.now_s = self.perf_counter() + duration_s

    monotonic = perf_counter


class ToyConnection:
    """Of http.client.HTTPConnection and its reply, what `split_users` uses."""

    sock = "open"

    def __init__(self, split: ToySplit, clock: ReplyClock):
        self.split, self.clock = split, clock

    def request(self, method: str, _path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.clock.sleep(LATENCY_S * (1 + zlib.crc32(headers["X-User-Id"].encode()) / 2**32))
        if method == "OPTIONS":  # the gateway answers it itself
            version = self.split.choose(headers["X-User-Id"])
            self.status, self.headers, self.body = 204, {self.split.header: version}, b""
            return
        self.status, self.headers, self.body = self.split.reply(headers["X-User-Id"], body, self.clock)

    def getresponse(self) -> "ToyConnection":
        return self

    def read(self) -> bytes:
        return self.body

    def getheader(self, name: str) -> str | None:
        return self.headers.get(name)

    def close(self) -> None:
        pass
