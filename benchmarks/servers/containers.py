"""A server in its containers, as docker-compose.yml describes them: found or made anew, watched, and left running."""

import contextlib
import json
import os
import shlex
import subprocess
import time
from pathlib import Path

import psutil

from endpoints.base import REPOSITORY_DIR, Endpoint, ServerError
from servers.parity import find_problem

ENGINE_TIMEOUT_S = 120.0
POLL_INTERVAL_S = 0.02


def run_docker(*arguments: str) -> str:
    """Return what `docker` with these arguments prints; ServerError with its last line where it fails."""
    command = ["docker", *arguments]
    try:
        done = subprocess.run(
            command, cwd=REPOSITORY_DIR, capture_output=True, text=True, check=False, timeout=ENGINE_TIMEOUT_S
        )
    except FileNotFoundError:
        raise ServerError("no docker command; install Docker") from None
    except subprocess.TimeoutExpired:
        raise ServerError(f"{' '.join(command)}: not done in {ENGINE_TIMEOUT_S:.0f} s") from None
    if done.returncode != 0:
        last_line = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise ServerError(f"{' '.join(command)}: {last_line}")
    return done.stdout


def list_container_endpoints(classes: dict[str, type[Endpoint]]) -> dict[str, type[Endpoint]]:
    """Return those of `classes` that a container of docker-compose.yml answers, by name."""
    return {name: value for name, value in classes.items() if value.image_settings is not None}


class ContainerServer:
    """The containers of one server, as a context manager with the face of ServerProcess.

    With `recreate` its container is made anew first, and `ready_s` holds the seconds from that command to the first
    correct prediction; with the ContainerServer of another endpoint of this server as `twin` both share that one's.
    `cpus` are the processors that it may use inside the block (None: as docker-compose.yml says). Raises
    ServerError where there is no such container, or none that answers correctly within `endpoint.start_timeout_s`.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        cpus: set[int] | None = None,
        twin: "ContainerServer | None" = None,
        recreate: bool = True,
    ):
        self.endpoint = endpoint
        self.endpoint.settings = endpoint.image_settings or {}
        self.cpus = cpus
        self.twin = twin
        self.recreate = recreate and twin is None
        self.service = endpoint.folder.name
        self.listens_s = self.ready_s = float("nan")
        self._recreate = ["compose", "up", "--detach", "--no-deps", "--force-recreate", self.service]
        self._processes: list[psutil.Process] = []

    @property
    def command(self) -> str:
        return shlex.join(["docker", *self._recreate])

    def __enter__(self) -> "ContainerServer":
        started_s = time.perf_counter()
        if self.recreate:
            run_docker(*self._recreate)
        ids = run_docker("compose", "ps", "--quiet", self.service).split()
        if not ids:
            raise ServerError(f"{self.endpoint.name}: no container of {self.service} runs; make docker-up")
        self.containers = json.loads(run_docker("inspect", *ids))
        self._wait_until_correct(started_s)
        if self.twin:
            self.listens_s, self.ready_s = self.twin.listens_s, self.twin.ready_s
        self.image = json.loads(run_docker("image", "inspect", self.containers[0]["Image"]))[0]
        if self.cpus is not None:
            self._allow(self.cpus)
        self._processes = self._find_processes()
        return self

    def __exit__(self, *_: object) -> None:
        if self.cpus is not None:
            with contextlib.suppress(ServerError):
                self._allow(set(range(os.cpu_count() or 1)))

    def ask_to_end(self) -> None:
        """Nothing: a container ends by the command of who started it."""

    @property
    def kind(self) -> str:
        """ "docker", or what the image's label `kind` says: a stand-in's is not that of the server it stands for."""
        labels: dict[str, str] = self.image["Config"].get("Labels") or {}
        return labels.get("kind", "docker")

    @property
    def is_seen(self) -> bool:
        """Whether the processes are this machine's, and not of a virtual machine that the engine runs in."""
        return bool(self._processes)

    def processes(self) -> list[psutil.Process]:
        """The processes in the containers, and the engine's that carry the published ports to them."""
        alive = [process for process in self._processes if process.is_running()]
        for process in list(alive):
            with contextlib.suppress(psutil.NoSuchProcess):
                alive += [child for child in process.children(recursive=True) if child not in alive]
        return alive

    def _find_processes(self) -> list[psutil.Process]:
        found = []
        for container in self.containers:
            pid = container["State"]["Pid"]
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                # Docker Desktop's numbers are those of another system, where they mean another process here.
                if container["Id"] in Path(f"/proc/{pid}/cgroup").read_text():
                    found.append(psutil.Process(pid))
        if not found:
            return []
        ports = {str(port) for port in self.endpoint.ports.values()}
        for process in psutil.process_iter(["name", "cmdline"]):
            words = process.info["cmdline"] or []
            if process.info["name"] == "docker-proxy" and ports & set(words):
                found.append(process)
        return found

    def _allow(self, cpus: set[int]) -> None:
        ids = [container["Id"] for container in self.containers]
        run_docker("update", "--cpuset-cpus", ",".join(map(str, sorted(cpus))), *ids)

    def _wait_until_correct(self, started_s: float) -> None:
        problem = "no answer"
        while time.perf_counter() < started_s + self.endpoint.start_timeout_s:
            problem = find_problem(self.endpoint, "1")
            if not problem:
                # The engine opens the port before the server in the container does: it tells nothing.
                self.listens_s = self.ready_s = time.perf_counter() - started_s
                return
            time.sleep(POLL_INTERVAL_S)
        raise ServerError(
            f"{self.endpoint.name}: no correct prediction within {self.endpoint.start_timeout_s:.0f} s ({problem}): "
            f"docker compose logs {self.service}"
        )
