"""What the tests share: wait for a condition, run a command, call a script's main, ask a server over HTTP."""

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import psutil
import pytest

from client.ask import send
from endpoints.base import Request, load_endpoints
from servers.process import ServerProcess

REPOSITORY_DIR = Path(__file__).resolve().parent.parent
TESTS_DIR = REPOSITORY_DIR / "tests"
# At least ten times as long as anything that a test waits for takes on a quiet machine. Nothing here is a measurement:
# a test that passes never waits so long.
DEADLINE_S = 240.0
# For what must come before a server's own time-out for the idle (60 s of BentoML's) ends the wait as well.
BEFORE_IDLE_TIMEOUT_S = 50.0
POLL_S = 0.02


def wait_until(
    condition: Callable[[], Any],
    what: str | Callable[[], str] = "",
    while_alive: subprocess.Popen | None = None,
    timeout_s: float = DEADLINE_S,
) -> Any:
    """Return the first true value of `condition()`.

    Fails after `timeout_s`, or once the process `while_alive` has ended; `what` is the message, or makes it.
    """
    deadline_s = time.monotonic() + timeout_s
    while True:
        ended = while_alive is not None and while_alive.poll() is not None  # before the condition: its last words count
        if value := condition():
            return value
        words = what if isinstance(what, str) else ""
        if ended:
            raise AssertionError(f"ended with {while_alive.returncode} before: {words or what()}")
        if time.monotonic() > deadline_s:
            raise AssertionError(f"not within {timeout_s:g} s: {words or what()}")
        time.sleep(POLL_S)


def make_environment(changes: dict[str, str | None] | None = None) -> dict[str, str]:
    """Return this process's environment with `changes`; None removes a variable."""
    return {name: value for name, value in {**os.environ, **(changes or {})}.items() if value is not None}


def run(
    *command: str | Path,
    cwd: Path = REPOSITORY_DIR,
    env: dict[str, str | None] | None = None,
    check: bool = False,
    timeout_s: float = DEADLINE_S,
) -> subprocess.CompletedProcess:
    """Run a command to its end, with its output as text.

    `env` is added to this process's environment; None removes a variable. `check` makes any exit code but 0 a failure
    that shows what was printed.
    """
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=make_environment(env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert not check or done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done


def run_python(*arguments: str | Path, **options) -> subprocess.CompletedProcess:
    """Run `python *arguments`, with the options of `run`."""
    return run(sys.executable, *arguments, **options)


def load_script(path: Path) -> ModuleType:
    """Import the file at `path` under a name that tells its folder, for two folders have files of one name."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_together(folder: Path, *names: str) -> list[ModuleType]:
    """Import files of a framework's folder by their own names, and the files of the folder that they import.

    Afterwards the names are free again, for another folder has files of the same names.
    """
    stems = {path.stem for path in folder.glob("*.py")}
    others = {name: sys.modules.pop(name) for name in stems & sys.modules.keys()}
    sys.path.insert(0, str(folder))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(folder))
        for name in stems:
            sys.modules.pop(name, None)
        sys.modules.update(others)


@dataclass
class Done:
    """How a script's `main` ended; the fields are named as subprocess.CompletedProcess names them."""

    returncode: int
    stdout: str
    stderr: str


@contextlib.contextmanager
def own_process_kept():
    """Restore what a script's `main` changes of its process: signal handlers and the cores that it may use."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if cpus is not None:
            os.sched_setaffinity(0, cpus)


def call_main(script: ModuleType, *arguments: str | Path, columns: int = 200) -> Done:
    """Call `main()` of a script in this process, with its command line and a terminal `columns` wide.

    For tests of what a command line means and what is printed: a process of its own would import everything again.
    """
    out, err = io.StringIO(), io.StringIO()
    argv = [f"{script.__name__}.py", *map(str, arguments)]
    with (
        own_process_kept(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", argv),
        mock.patch.dict(os.environ, {"COLUMNS": str(columns)}),
    ):
        try:
            code = script.main()
        except SystemExit as error:
            code = error.code
    if isinstance(code, str):  # sys.exit("why")
        err.write(f"{code}\n")
        code = 1
    return Done(code or 0, out.getvalue(), err.getvalue())


def needs(program: str, package: str = "") -> pytest.MarkDecorator:
    """Skip a test if a program of Debian's `package` (default: of its name) is missing; CI allows no skip."""
    reason = f"no {program} on PATH: apt-get install {package or program}"
    return pytest.mark.skipif(shutil.which(program) is None, reason=reason)


def find_port(server: ServerProcess | int) -> int:
    """Return the REST port of a server, which may already be given as its port."""
    return server if isinstance(server, int) else server.endpoint.ports["rest"]


def get(server: ServerProcess | int, path: str) -> tuple[int, Any]:
    """GET `path`; return the status and the reply, decoded where it is JSON, else as text."""
    return _decode(*send(find_port(server), Request(path, b"", method="GET")))


def post(server: ServerProcess | int, path: str, body: Any, **headers: str) -> tuple[int, Any]:
    """POST `body`, which is bytes or what JSON can say; return the status and the reply as `get` does."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return _decode(*send(find_port(server), Request(path, content, headers=headers)))


def _decode(status: int, reply: bytes) -> tuple[int, Any]:
    try:
        return status, json.loads(reply)
    except ValueError:
        return status, reply.decode(errors="replace")


def start(name: str, **options) -> ServerProcess:
    """Return a ServerProcess, not yet entered, for the endpoint `name` on free ports; `options` are the endpoint's."""
    endpoint = load_endpoints()[name].on_free_ports(**options)
    endpoint.start_timeout_s = DEADLINE_S
    return ServerProcess(endpoint)


def stop_impatiently(process: subprocess.Popen, number: signal.Signals) -> int:
    """Send a signal again and again until the process ends; return its exit code.

    As a user does who presses Ctrl-C once more. Some come while Python itself ends, which takes milliseconds.
    """
    deadline_s = time.monotonic() + DEADLINE_S
    while process.poll() is None:
        assert time.monotonic() < deadline_s, f"{process.args} does not end"
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.002)
    return process.returncode


def assert_ends_whole(server: ServerProcess, number: signal.Signals) -> None:
    """Send a signal to the process that was started; it and all that it started must end, well."""
    processes = server.processes()
    assert len(processes) > 1
    server.process.send_signal(number)
    if number != signal.SIGKILL:
        assert server.process.wait(BEFORE_IDLE_TIMEOUT_S) == 0
    _, alive = psutil.wait_procs(processes, timeout=BEFORE_IDLE_TIMEOUT_S)
    assert alive == []


def skip_without_haproxy() -> None:
    """Skip the test, in one line that says how to install HAProxy, unless the gateway finds one."""
    sys.path.append(str(REPOSITORY_DIR / "gateway"))
    from gateway import GatewayError, find_haproxy

    try:
        find_haproxy()
    except GatewayError as error:
        pytest.skip(str(error))


def write_onnx_settings(path: Path, **changes: object) -> Path:
    """Write the ONNX server's tuned.toml with these values changed; return the path."""
    text = (REPOSITORY_DIR / "onnx" / "tuned.toml").read_text()
    for key, value in changes.items():
        text, count = re.subn(rf"^{key} = \S+", f"{key} = {value}", text, flags=re.M)
        assert count == 1, key
    path.write_text(text)
    return path
