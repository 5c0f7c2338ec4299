"""Serve models/my_model with TensorFlow Serving, or else with the local server.

    python serve.py
    python serve.py --batching-config batching.config

Starts the first of these that the machine has and prints its name:
  native  tensorflow_model_server, if it is on PATH
  docker  the official image, if a Docker engine answers and has or can fetch it
  local   local/server.py, the local server
Models, models.config (or --model-config), ports and requests are the same in
all three. REST on 8501, gRPC on 8500; Ctrl-C ends it. An edited models.config
takes effect within seconds.
"""

import argparse
import contextlib
import ctypes
import functools
import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CONFIG_PATH = HERE / "models.config"
MONITORING_PATH = HERE / "monitoring.config"
MODELS_DIR = HERE / "models"
LOCAL_SERVER = "local/server.py"
IMAGE = "tensorflow/serving:2.21.0"  # as in docker-compose.yml
NATIVE_PROGRAM = "tensorflow_model_server"
ENGINE_TIMEOUT_S = 5.0
STOP_TIMEOUT_S = 10.0
POLL_INTERVAL_S = 0.1
PR_SET_PDEATHSIG = 1  # linux/prctl.h
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Without this flag TensorFlow Serving refuses a config with labels: it reads them before any version is loaded.
LABELS_FLAG = "--allow_version_labels_for_unavailable_models=true"

stop_signals: list[int] = []  # received so far; not an Event, whose lock the main thread may hold when a signal comes


class ServeError(Exception):
    """The server cannot be started; the message is one line with the remedy."""


@dataclass(frozen=True)
class Server:
    """One way to serve: the command that starts it, and the one that ends it besides SIGTERM."""

    kind: str  # native, docker or local
    what: str  # printed next to the kind
    command: list[str]
    stop_command: list[str] | None = None


def native_server(program: str, ports: dict[str, int], config_dir: Path, batching: Path | None) -> Server:
    return Server("native", program, [program, *port_flags(ports), *config_flags(config_dir, batching)])


def local_server(ports: dict[str, int], config_dir: Path, batching: Path | None) -> Server:
    command = [sys.executable, str(HERE / LOCAL_SERVER), *port_flags(ports), *config_flags(config_dir, batching)]
    return Server("local", LOCAL_SERVER, command)


def port_flags(ports: dict[str, int]) -> list[str]:
    return [f"--port={ports['grpc']}", f"--rest_api_port={ports['rest']}"]


def config_flags(config_dir: Path, batching: Path | None) -> list[str]:
    """Return the flags for the configs; `config_dir` is the server's path of the folder that `write_configs` fills."""
    return [
        f"--model_config_file={config_dir / CONFIG_PATH.name}",
        "--model_config_file_poll_wait_seconds=1",  # so that an edited models.config takes effect
        LABELS_FLAG,
        f"--monitoring_config_file={config_dir / MONITORING_PATH.name}",
        *(["--enable_batching=true", f"--batching_parameters_file={config_dir / batching.name}"] if batching else []),
    ]


def docker_server(ports: dict[str, int], models_dir: Path, config_dir: Path, batching: Path | None) -> Server:
    name = f"tfserving-{ports['rest']}"
    command = [
        *("docker", "run", "--rm", "--init", "--name", name),  # --init: the image's shell would ignore SIGTERM
        *container_cpus(),
        *("--publish", f"127.0.0.1:{ports['grpc']}:8500"),
        *("--publish", f"127.0.0.1:{ports['rest']}:8501"),
        *("--volume", f"{models_dir}:/models:ro"),
        *("--volume", f"{config_dir}:/config:ro"),
        *(IMAGE, *config_flags(Path("/config"), batching)),
    ]
    return Server("docker", IMAGE, command, stop_command=["docker", "stop", "--time", "5", name])


def container_cpus() -> list[str]:
    """Return the option that limits the container to this process's cores; the engine does not pass them on."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    return ["--cpuset-cpus", ",".join(map(str, sorted(os.sched_getaffinity(0))))]


def docker_problem() -> str | None:
    """Return why the image cannot run here, or None if it can. Fetches a missing image."""
    if not shutil.which("docker"):
        return "no docker on PATH"
    if not succeeds(["docker", "info"]):
        return "no Docker engine answers"
    if not succeeds(["docker", "image", "inspect", IMAGE]):
        print(f"fetching {IMAGE}, once", file=sys.stderr, flush=True)
        if run_until_stopped(["docker", "pull", "--quiet", IMAGE], quiet=True) != 0:
            return f"docker pull {IMAGE} failed"
    return None


def succeeds(command: list[str]) -> bool:
    """Return whether `command` ends with 0 in time."""
    try:
        return subprocess.run(command, capture_output=True, timeout=ENGINE_TIMEOUT_S).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def choose_server(
    wanted: str, ports: dict[str, int], models_dir: Path, config_dir: Path, batching: Path | None
) -> Server:
    """Return the requested server or, for "auto", the first that the machine has. Raises ServeError."""
    program = shutil.which(NATIVE_PROGRAM)
    if wanted == "native" and not program:
        raise ServeError(f"--server native: no {NATIVE_PROGRAM} on PATH; install it or leave --server out")
    if program and wanted in ("auto", "native"):
        return native_server(program, ports, config_dir, batching)
    if wanted in ("auto", "docker"):
        problem = docker_problem()
        if not problem:
            return docker_server(ports, models_dir, config_dir, batching)
        if wanted == "docker":
            raise ServeError(f"--server docker: {problem}; start the engine or leave --server out")
    return local_server(ports, config_dir, batching)


def check_models(models_dir: Path) -> None:
    if not list(models_dir.glob("my_model/[0-9]*/saved_model.pb")):
        raise ServeError(f"no model in {models_dir / 'my_model'}; run python export_model.py")


def check_ports(ports: dict[str, int]) -> None:
    for role, port in ports.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except (OSError, OverflowError):
                raise ServeError(
                    f"127.0.0.1:{port} (--{role}-port) is in use or refused; stop that program or choose another"
                ) from None


def write_configs(kind: str, models_dir: Path, model_config: Path, config_dir: Path, batching: Path | None) -> None:
    """Write the configs into the server's folder; without a container, with this machine's path of the models."""
    for path in (MONITORING_PATH, *([batching] if batching else [])):
        shutil.copy(path, config_dir)
    config_dir.chmod(0o755)  # the container's user is a different one
    take_up_config(kind, models_dir, model_config, config_dir)


def take_up_config(kind: str, models_dir: Path, model_config: Path, config_dir: Path) -> None:
    """Write `model_config` into the folder if it has changed, in one step: the server may be reading it."""
    with contextlib.suppress(OSError, UnicodeDecodeError):  # an editor is replacing it, or it is not text
        text = model_config.read_text()
        if kind != "docker":
            here = str(models_dir).replace("\\", "\\\\").replace('"', '\\"')
            text = re.sub(r'(base_path:\s*")/models/', lambda m: f"{m[1]}{here}/", text)
        target = config_dir / CONFIG_PATH.name
        if not target.exists() or target.read_text() != text:
            written = target.with_suffix(".new")
            written.write_text(text)
            written.replace(target)


def is_available(rest_port: int) -> bool:
    """Return whether the server reports a version of the model as available."""
    connection = http.client.HTTPConnection("127.0.0.1", rest_port, timeout=1)
    try:
        connection.request("GET", "/v1/models/my_model")
        return b"AVAILABLE" in connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def end_with_launcher(launcher: int) -> None:
    """Have the kernel send this process SIGTERM when the launcher ends, even by kill -9; Linux only.

    If the launcher has already ended, the process ends at once.
    """
    if sys.platform == "linux":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # exec drops the parent's handler
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != launcher:
            os.kill(os.getpid(), signal.SIGTERM)


def run_until_stopped(
    command: list[str],
    stop_command: list[str] | None = None,
    quiet: bool = False,
    meanwhile: Callable[[], None] = lambda: None,
) -> int:
    """Run `command` until it ends or a stop is requested, leave nothing running, and return its exit code.

    `meanwhile` is called every POLL_INTERVAL_S while it runs.
    """
    output = subprocess.DEVNULL if quiet else None
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        preexec_fn=functools.partial(end_with_launcher, os.getpid()),
    )
    while child.poll() is None and not stop_signals:
        meanwhile()
        time.sleep(POLL_INTERVAL_S)
    if child.poll() is None:
        if stop_command:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                subprocess.run(stop_command, capture_output=True, timeout=STOP_TIMEOUT_S)
        child.terminate()
        try:
            child.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
    return child.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ["auto", "native", "docker", "local"]
    parser.add_argument("--server", choices=kinds, default="auto", help="the kind of server (default: auto)")
    parser.add_argument("--rest-port", type=int, default=8501, help="REST port on 127.0.0.1 (default: 8501)")
    parser.add_argument("--grpc-port", type=int, default=8500, help="gRPC port on 127.0.0.1 (default: 8500)")
    parser.add_argument(
        "--model-config",
        type=Path,
        default=CONFIG_PATH,
        help="what to serve; models-1.config and models-2.config serve one version only (default: models.config)",
    )
    parser.add_argument("--models-dir", type=Path, default=MODELS_DIR, help="folder of the models (default: models)")
    parser.add_argument(
        "--batching-config",
        type=Path,
        help="share runs of the graph between requests as this file says: batching.config (default: no sharing)",
    )
    arguments = parser.parse_args()
    ports = {"rest": arguments.rest_port, "grpc": arguments.grpc_port}
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, _: stop_signals.append(number))

    models_dir = arguments.models_dir.resolve()
    announced = False

    def meanwhile() -> None:
        nonlocal announced
        take_up_config(server.kind, models_dir, model_config, Path(folder))
        if not announced and is_available(ports["rest"]):
            announced = True
            print(f"ready: REST at http://127.0.0.1:{ports['rest']}, gRPC at 127.0.0.1:{ports['grpc']}", flush=True)

    try:
        check_models(models_dir)
        check_ports(ports)
        with tempfile.TemporaryDirectory(prefix="tfserving-") as folder:
            model_config = arguments.model_config.resolve()
            if not model_config.is_file():
                raise ServeError(f"{model_config} not found; models.config is next to serve.py")
            batching = arguments.batching_config and arguments.batching_config.resolve()
            if batching and not batching.is_file():
                raise ServeError(f"{batching} not found; batching.config is next to serve.py")
            server = choose_server(arguments.server, ports, models_dir, Path(folder), batching)
            write_configs(server.kind, models_dir, model_config, Path(folder), batching)
            print(f"serving with {server.kind}: {server.what}", flush=True)
            exit_code = run_until_stopped(server.command, server.stop_command, meanwhile=meanwhile)
    except (ServeError, OSError) as error:
        sys.exit(f"serve.py: {error}")
    if not stop_signals:
        sys.exit(f"serve.py: {server.what} ended with exit code {exit_code}; its last lines are above")
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # Python's end gives handlers back their defaults, and takes a while
    with contextlib.suppress(OSError):  # after SIGHUP there is no terminal to print to
        print("stopped", flush=True)


if __name__ == "__main__":
    main()
