"""Users of a split: each sends some test rows through one address, and notes which version answered, how and when."""

import http.client
import ssl
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from endpoints.base import Endpoint
from endpoints.reference import load_test_rows
from rollout.decision import User

VERSIONS = ("1", "2")
MOST_THROTTLES = 50  # replies 429 in a row, with a wait after each, before giving up
THROTTLE_WAIT_S = 0.2


class SplitError(RuntimeError):
    """The split cannot be asked, or does not name the version that answered; the message is one line."""


@dataclass(frozen=True)
class Split:
    """Where the split is and what gets a user in."""

    url: str
    api_key: str = ""
    certificate: Path | None = None  # that vouches for an https address; None: the system's

    def connect(self, timeout_s: float) -> http.client.HTTPConnection:
        """Return an open connection; SplitError if no server answers."""
        parts = urlsplit(self.url)
        if parts.scheme == "https":
            context = ssl.create_default_context(cafile=self.certificate)
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                parts.netloc, timeout=timeout_s, context=context
            )
        else:
            connection = http.client.HTTPConnection(parts.netloc, timeout=timeout_s)
        try:
            connection.connect()
        except ssl.SSLError as error:
            raise SplitError(f"{self.url}: {error.reason}; is --certificate the gateway's?") from error
        except OSError as error:
            raise SplitError(f"{self.url} does not answer ({error.strerror or error}): run make gateway") from error
        return connection


class Crowd:
    """Users by number, the same ones with the same rows for the same `seed`.

    A user's id and rows follow only from seed and number. The rows are drawn with replacement, so the users
    stand for the test rows and for no other patients.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        split: Split,
        rows_per_user: int,
        seed: int,
        connections: int,
        timeout_s: float,
        pause_s: float = 0.0,
    ):
        self.endpoint = endpoint
        self.split = split
        self.rows_per_user = rows_per_user
        self.seed = seed
        self.timeout_s = timeout_s
        self.pause_s = pause_s
        rows, self.labels = load_test_rows()
        self._requests = [endpoint.request([row], None) for row in rows]
        self._prefix = f"/{endpoint.folder.name}"  # the gateway's, of this server
        self._workers = ThreadPoolExecutor(connections, thread_name_prefix="user")
        self._mine = threading.local()
        self._stopped = threading.Event()
        self.throttled = 0

    def __enter__(self) -> "Crowd":
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._workers.shutdown(cancel_futures=True)

    def send(self, numbers: Iterable[int], step: int, deadline_s: float = float("inf")) -> list[User]:
        """Let the users ask, `connections` at a time, each one row after the other; return them in order.

        Interrupted, or past `deadline_s` of time.monotonic(), it returns those who are done, in the second case,
        and raises in the first.
        """
        futures = [self._workers.submit(self._ask_all, User(number, step), deadline_s) for number in numbers]
        try:
            users = [future.result() for future in futures]
        except BaseException:
            self._stopped.set()
            raise
        return [user for user in users if user is not None]

    def _ask_all(self, user: User, deadline_s: float) -> User | None:
        """Send one user's rows; None if there was no time left."""
        if self._stopped.is_set() or time.monotonic() > deadline_s:
            return None
        drawn = np.random.default_rng([self.seed, user.number]).integers(len(self._requests), size=self.rows_per_user)
        for row in drawn.tolist():
            self._ask(user, row)
            if self.pause_s:
                time.sleep(self.pause_s)
        return user

    def _ask(self, user: User, row: int) -> None:
        request = self._requests[row]
        headers = {
            "Content-Type": request.content_type,
            "X-User-Id": f"user-{self.seed}-{user.number}",
            "X-API-Key": self.split.api_key,
        }
        for _ in range(MOST_THROTTLES):
            connection = self._connection()
            started_s = time.perf_counter()
            try:
                connection.request(request.method, self._prefix + request.path, request.body, headers)
                reply = connection.getresponse()
                body = reply.read()
            except (OSError, http.client.HTTPException) as error:
                late = isinstance(error, TimeoutError)
                user.failures.append(f"no reply in {self.timeout_s:g} s" if late else type(error).__name__)
                connection.close()
                version = self._ask_version(self._prefix + request.path, headers)
                user.versions += [version] if version in VERSIONS else []
                return
            latency_s = time.perf_counter() - started_s
            if reply.status != 429:
                break
            self.throttled += 1
            time.sleep(THROTTLE_WAIT_S)
        else:
            raise SplitError(f"{self.split.url} keeps answering 429: give this key a higher rate")
        if reply.status in (401, 403):
            raise SplitError(f"{self.split.url} answers {reply.status}: --api-key is not one of the gateway's")
        version = reply.getheader("X-Model-Version")
        if version in VERSIONS:
            user.versions.append(version)
        elif 400 <= reply.status < 500:
            raise SplitError(f"{self.split.url}{self._prefix + request.path} answers {reply.status}: {body[:200]!r}")
        elif reply.status == 200:
            raise SplitError(
                f"{self.split.url}: the reply's X-Model-Version is {version!r}, not 1 or 2; is this the gateway?"
            )
        if reply.status != 200:
            user.failures.append(f"status {reply.status}")
            return
        benign = self._read_benign(body)
        if benign is None:
            user.failures.append("no probabilities")
            return
        user.rows.append(row)
        user.benign.append(benign)
        user.latencies_s.append(latency_s)

    def _ask_version(self, path: str, headers: dict[str, str]) -> str | None:
        """Return the version that a user has whose request got no reply, by the gateway's own word; None without one.

        Otherwise a version 2 that never answers would look like a split that loses users.
        """
        try:
            connection = self._connection()
            connection.request("OPTIONS", path, headers=headers)
            reply = connection.getresponse()
            reply.read()
            return reply.getheader("X-Model-Version")
        except (OSError, http.client.HTTPException):
            self._mine.connection.close()
            return None

    def _connection(self) -> http.client.HTTPConnection:
        """This thread's connection, opened before the clock starts."""
        connection = getattr(self._mine, "connection", None)
        if connection is None or connection.sock is None:
            connection = self._mine.connection = self.split.connect(self.timeout_s)
        return connection

    def _read_benign(self, body: bytes) -> float | None:
        """Return P(benign), or None if the reply is not one pair of probabilities."""
        try:
            answer = np.asarray(self.endpoint.decode(body), dtype=float)
        except (ValueError, KeyError, TypeError, IndexError):
            return None
        if answer.shape != (1, 2) or not np.all((answer >= 0) & (answer <= 1)) or abs(answer.sum() - 1) > 1e-3:
            return None
        return float(answer[0, 1])
