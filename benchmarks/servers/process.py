"""Start one server for a measurement or a test, wait until it answers correctly, and end all of it afterwards."""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil

from endpoints.base import Endpoint, ServerError
from machine.priority import lift_priority
from machine.signals import deferred_interrupts, end_with_parent
from servers.parity import find_problem

STOP_TIMEOUT_S = 20.0
POLL_INTERVAL_S = 0.02
LOOK_INTERVAL_S = 0.5  # between two looks at what a starting server has started


class ServerProcess:
    """A running server, as a context manager: inside the block it answers, after it no process of it is left.

    `cpus` pins the server and all that it starts (None: not pinned); `goes_first` puts it before other programs if
    the system allows that. After the start `listens_s` and `ready_s` hold the seconds from the spawn until the port
    took a connection, and until the first correct prediction. Raises ServerError if a port is taken, the server ends
    early, or no correct prediction comes within `endpoint.start_timeout_s`.
    """

    def __init__(self, endpoint: Endpoint, cpus: set[int] | None = None, goes_first: bool = False):
        self.endpoint = endpoint
        self.cpus = cpus
        self.goes_first = goes_first
        self.listens_s = self.ready_s = float("nan")
        self.process: subprocess.Popen[bytes] | None = None
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

    def __exit__(self, *_: object) -> None:
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
        return self._spawned().pid

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
            root = psutil.Process(self.pid)
            for process in [root, *root.children(recursive=True)]:
                if self.goes_first and process.pid not in self._descendants:
                    lift_priority(process.pid)  # it may have a session of its own
                self._descendants[process.pid] = process
        return [process for process in list(self._descendants.values()) if process.is_running()]

    def _spawned(self) -> subprocess.Popen[bytes]:
        if self.process is None:
            raise ServerError(f"{self.endpoint.name}: not started yet")
        return self.process

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
        environment |= self.endpoint.environment_in(Path(self._log_dir.name))
        cpus, goes_first = self.cpus, self.goes_first
        parent = os.getpid()

        def in_child() -> None:
            end_with_parent(parent)
            if cpus is not None:
                os.sched_setaffinity(0, cpus)
            if goes_first:
                lift_priority()

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
                raise ServerError(
                    f"{self.endpoint.name}: {error.filename} not found: run {self.endpoint.how_to_install}"
                ) from None

    def wait_until_correct(self) -> None:
        """Wait for the first correct prediction; ServerError if the server ends or answers none in time."""
        with self._watched():
            self._wait_until_correct()
        self.processes()

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Look every half second for what the server starts, so that it goes first, too, also during a request."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(LOOK_INTERVAL_S):
                with contextlib.suppress(psutil.Error):
                    self.processes()

        watcher = threading.Thread(target=watch, daemon=True)
        if self.goes_first:
            watcher.start()
        try:
            yield
        finally:
            ended.set()
            if self.goes_first:
                watcher.join()

    def _wait_until_correct(self) -> None:
        process = self._spawned()
        deadline_s = self._started_s + self.endpoint.start_timeout_s
        problem = "no answer"
        while time.perf_counter() < deadline_s:
            if process.poll() is not None:
                raise ServerError(
                    f"{self.endpoint.name}: ended with exit code {process.returncode} before it served: "
                    f"{self._last_words()}"
                )
            if np.isnan(self.listens_s) and self._listens():
                self.listens_s = time.perf_counter() - self._started_s
            problem = find_problem(self.endpoint, self.endpoint.only_version or "1")
            if not problem:
                self.ready_s = time.perf_counter() - self._started_s
                return
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
