"""Start one server for a measurement or a test, wait until it answers rightly, and leave nothing of it behind."""

import contextlib
import ctypes
import http.client
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import grpc_connection
import numpy as np
import psutil
from endpoint import Endpoint, Request
from reference import TOLERANCE, load_expected, load_test_rows

STOP_TIMEOUT_S = 20.0
POLL_INTERVAL_S = 0.02
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class ServerError(RuntimeError):
    """A server could not be started, or answered wrongly; the message is one line that says what to do."""


def send(port: int, request: Request, timeout_s: float = 30.0) -> tuple[int, bytes]:
    """Send one request on a connection of its own; return the status and the body. OSError where nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        headers = {"Content-Type": request.content_type, **request.headers}
        connection.request(request.method, request.path, request.body, headers)
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def ask(endpoint: Endpoint, rows: list, version: str) -> np.ndarray:
    """Return the probabilities (n, 2) that a running server gives.

    Raises ServerError on any status but 200 and on a reply without probabilities, OSError where nobody answers.
    """
    call = grpc_connection.send if endpoint.protocol == "gRPC" else send
    try:
        status, body = call(endpoint.port, endpoint.request(rows, version))
    except http.client.HTTPException as error:
        raise ServerError(f"{endpoint.name}: its answer is not HTTP: {error!r}") from error
    if status != 200:
        raise ServerError(f"{endpoint.name}: answered {status} to version {version}: {body[:200]!r}")
    try:
        return endpoint.decode(body)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ServerError(f"{endpoint.name}: no probabilities in its answer {body[:200]!r}") from error


class ServerProcess:
    """A running server, as a context manager: inside the block it answers, after it no process of it is left.

    `cpus` pins the server and all that it starts (None: not pinned). After the start `listens_s` and
    `ready_s` hold the seconds from the spawn until the port took a connection, and until the first
    correct prediction. Raises ServerError where a port is taken, the server ends early, or no correct
    prediction comes within `endpoint.start_timeout_s`.
    """

    def __init__(self, endpoint: Endpoint, cpus: set[int] | None = None):
        self.endpoint = endpoint
        self.cpus = cpus
        self.listens_s = self.ready_s = float("nan")
        self.process: subprocess.Popen | None = None
        self._descendants: dict[int, psutil.Process] = {}
        self._is_asked = False

    def __enter__(self) -> "ServerProcess":
        self.spawn()
        try:
            self.wait_until_correct()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def spawn(self) -> "ServerProcess":
        """Start the server and do not wait for it, so that many can start side by side; then call `stop`."""
        self._refuse_taken_ports()
        self._log_dir = tempfile.TemporaryDirectory(prefix=f"{self.endpoint.name}-")
        self._log_path = Path(self._log_dir.name) / "server.log"
        try:
            self._spawn()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        with deferred_interrupts():
            self._stop()
            self._log_dir.cleanup()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def kind(self) -> str:
        return self.endpoint.kind_from_log(self.log())

    @property
    def command(self) -> str:
        return shlex.join(self.endpoint.full_command())

    @property
    def is_seen(self) -> bool:
        """Whether the server's processes are below the one started here: a container's are the engine's."""
        return self.kind != "docker"

    def log(self) -> str:
        """All that the server has printed so far."""
        return self._log_path.read_text(errors="replace") if self._log_path.exists() else ""

    def processes(self) -> list[psutil.Process]:
        """The server's process and all its descendants that are alive now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            for process in [root, *root.children(recursive=True)]:
                self._descendants[process.pid] = process
        return [process for process in self._descendants.values() if process.is_running()]

    def _refuse_taken_ports(self) -> None:
        for role, port in self.endpoint.ports.items():
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", port))
                except OSError:
                    raise ServerError(
                        f"{self.endpoint.name}: 127.0.0.1:{port} ({role}) is in use; stop that program first"
                    ) from None

    def _spawn(self) -> None:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        environment = {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", **self.endpoint.environment()}
        cpus = self.cpus
        libc = ctypes.CDLL(None) if sys.platform == "linux" else None

        def in_child() -> None:
            if libc is not None:
                libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # the server ends even when we are killed with -9
            if cpus is not None:
                os.sched_setaffinity(0, cpus)

        with deferred_interrupts(), self._log_path.open("wb") as log:
            self._started_s = time.perf_counter()
            try:
                self.process = subprocess.Popen(
                    self.endpoint.full_command(),
                    cwd=self.endpoint.folder,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=in_child,
                )
            except FileNotFoundError as error:
                raise ServerError(f"{self.endpoint.name}: {error.filename} not found: run make setup") from None

    def wait_until_correct(self) -> None:
        """Wait for the first correct prediction; ServerError where the server ends or answers none in time."""
        rows, _ = load_test_rows()
        version = self.endpoint.only_version or "1"
        expected = load_expected(version)[:1]
        deadline_s = self._started_s + self.endpoint.start_timeout_s
        problem = "no answer"
        while time.perf_counter() < deadline_s:
            if self.process.poll() is not None:
                raise ServerError(
                    f"{self.endpoint.name}: ended with exit code {self.process.returncode} before it served: "
                    f"{self._last_words()}"
                )
            if np.isnan(self.listens_s) and self._listens():
                self.listens_s = time.perf_counter() - self._started_s
            try:
                answer = ask(self.endpoint, rows[:1], version)
                difference = np.abs(answer - expected).max() if self.endpoint.has_model else 0.0
                if difference <= TOLERANCE:
                    self.ready_s = time.perf_counter() - self._started_s
                    self.processes()
                    return
                problem = f"wrong answer, off by {difference:.1e}"
            except (OSError, ServerError, ValueError) as error:
                problem = str(error)
            time.sleep(POLL_INTERVAL_S)
        raise ServerError(
            f"{self.endpoint.name}: no correct prediction within {self.endpoint.start_timeout_s:.0f} s ({problem}): "
            f"{self._last_words()}"
        )

    def _listens(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.endpoint.port), timeout=1):
            return True
        return False

    def _last_words(self) -> str:
        lines = [line.strip() for line in self.log().splitlines() if line.strip()]
        return lines[-1] if lines else "it printed nothing"

    def ask_to_end(self) -> None:
        """Send SIGTERM, once, and do not wait: so several servers can end side by side before each is stopped."""
        if self.process is None or self._is_asked:
            return
        self.processes()  # remember the descendants before their parent is gone
        if self.process.poll() is None:
            self.process.terminate()
            self._is_asked = True

    def _stop(self) -> None:
        """Ask the server to end as Ctrl-C's SIGTERM twin would, then end by force whatever of it is left."""
        if self.process is None:
            return
        self.ask_to_end()
        if self.process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # its own session: the group is the server's alone
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        psutil.wait_procs(list(self._descendants.values()), timeout=STOP_TIMEOUT_S)
        self._descendants.clear()


@contextlib.contextmanager
def deferred_interrupts():
    """Hold back SIGINT, SIGTERM and SIGHUP while the block runs, then deliver the first that came."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received = []
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, lambda number, _: received.append(number)) for number in signals}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])


def interrupt_on_sigterm() -> None:
    """Make SIGTERM and a closed terminal unwind as Ctrl-C does, so that `with` blocks stop what was started."""

    def raise_interrupt(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, raise_interrupt)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        signal.signal(signal.SIGHUP, raise_interrupt)
