"""Several processes that serve one port: start them, restart one that dies, end them all."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STOP_TIMEOUT_S = 5.0
SHORT_LIFE_S = 5.0  # a worker that ends sooner is not restarted: the cause would end it again
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def open_shared(family: socket.AddressFamily, host: str, port: int) -> socket.socket:
    """Return a socket bound to an address that other processes of this user may share; OSError if it is taken.

    The kernel spreads new connections over all listeners (SO_REUSEPORT), so that no worker is idle.
    """
    shared = socket.socket(family)
    shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    shared.bind((host, port))
    return shared


def supervise(command: list[str], workers: int) -> int:
    """Keep `workers` processes of `command` running until SIGINT, SIGTERM or SIGHUP; return the exit code.

    A worker that ends is replaced; one that ends within SHORT_LIFE_S of its start ends everything, with exit code 1,
    unless it was killed by a signal. When this process is killed with -9, the kernel ends the workers (Linux).
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    supervisor = os.getpid()

    def end_with_supervisor() -> None:
        if libc is not None:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent's handler would be lost with its program
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != supervisor:  # it ended before that
                os.kill(os.getpid(), signal.SIGTERM)

    def start() -> tuple[subprocess.Popen, float]:
        # A separate session: Ctrl-C reaches only this process, which then ends the workers one by one.
        worker = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=end_with_supervisor)
        return worker, time.monotonic()

    stopping = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: stopping.append(number))
    with tempfile.TemporaryDirectory(prefix="onnx-server-") as folder:
        # Shared by the workers' metrics: prometheus_client keeps a file for each process there.
        environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": folder}
        running = [start() for _ in range(workers)]
        code = 0
        while not stopping and not code:
            time.sleep(0.05)
            for place, (worker, started_s) in enumerate(running):
                if worker.poll() is None:
                    continue
                if worker.returncode > 0 and time.monotonic() - started_s < SHORT_LIFE_S:
                    code = 1
                    break
                print(f"server: worker {worker.pid} ended ({worker.returncode}); starting another", flush=True)
                for path in Path(folder).glob(f"gauge_live*_{worker.pid}.db"):
                    path.unlink()
                running[place] = start()
        for worker, _ in running:
            with contextlib.suppress(ProcessLookupError):
                worker.terminate()
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        for worker, _ in running:
            try:
                worker.wait(max(deadline_s - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
    return code
