"""The server's container of a pod of kubernetes/, on a Docker engine, as far as an engine knows what a kubelet does.

Command, arguments, variables, user, groups, capabilities, memory, volumes and probes are the manifest's. The sidecar's
work is done before: the models lie open in their volume.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from engine import Engine
from helpers import DEADLINE_S, REPOSITORY_DIR, wait_until

# How unseal.py lays out each server's volume, and where those models lie here.
OPENED = {
    "torchserve": {name: f"torchserve/model_store/{name}" for name in ("model_v1.mar", "model_v2.mar")},
    "tfserving": {"my_model": "tfserving/models/my_model"},
    "bentoml": {"models/my_model": "bentoml/store/models/my_model"},
    "onnx": {"my_model": "onnx/models/my_model"},
}  # fmt: skip
ASK_ALL = """
import json, sys
sys.path.insert(0, "benchmarks")
from endpoints.base import load_endpoints
from servers.parity import max_abs_difference
endpoint = load_endpoints()[sys.argv[1]]()
print(json.dumps([max_abs_difference(endpoint, version) for version in endpoint.versions]))
"""
GET = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=5).status)"


class PodServer:
    """The running container `server` of a Deployment, as a context manager."""

    def __init__(self, engine: Engine, server: str, manifests: list[dict], folder: Path):
        self.engine, self.server, self.folder = engine, server, folder
        deployment = next(
            one for one in manifests if (one["kind"], one["metadata"]["name"]) == ("Deployment", server)
        )  # fmt: skip
        self.pod = deployment["spec"]["template"]["spec"]
        (self.container,) = self.pod["containers"]
        self.configs = {one["metadata"]["name"]: one["data"] for one in manifests if one["kind"] == "ConfigMap"}

    def __enter__(self) -> Self:
        self.started: list[str] = []
        self.id = self._run(*self._options(), self._image(), *self.container.get("command", [])[1:], *self._arguments())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.engine.run("docker", "rm", "--force", "--volumes", *self.started, check=False)

    def _run(self, *options: str) -> str:
        self.started.append(self.engine.run("docker", "run", "--detach", *options).stdout.split()[-1])
        return self.started[-1]

    def _image(self) -> str:
        name, _, tag = self.container["image"].partition(":")
        return f"{name}:{'latest' if tag == 'local' else tag}"

    def _arguments(self) -> list[str]:
        return list(self.container.get("args", []))

    def _options(self) -> list[str]:
        pod, own = self.pod["securityContext"], self.container["securityContext"]
        user = {**pod, **own}
        options = [
            "--network=none",
            f"--user={user['runAsUser']}:{user['runAsGroup']}",
            f"--group-add={pod['fsGroup']}",
        ]
        options += ["--read-only"] * own["readOnlyRootFilesystem"]
        options += [f"--cap-drop={name}" for name in own["capabilities"]["drop"]]
        options += ["--security-opt=no-new-privileges"] * (own["allowPrivilegeEscalation"] is False)
        options += [f"--memory={self.container['resources']['limits']['memory'].replace('Mi', 'm')}"]
        options += [f"--env={one['name']}={one['value']}" for one in self.container.get("env", [])]
        if command := self.container.get("command"):
            options += [f"--entrypoint={command[0]}"]
        if self.pod.get("shareProcessNamespace"):  # the first process is the pod's, not the server's
            holder = self._run("--network=none", "--entrypoint=sleep", self._image(), "infinity")
            options += [f"--pid=container:{holder}"]
        volumes = {volume["name"]: volume for volume in self.pod["volumes"]}
        for mount in self.container["volumeMounts"]:
            options.append(self._mount(mount, volumes[mount["name"]]))
        return options

    def _mount(self, mount: dict, volume: dict) -> str:
        path, read_only = mount["mountPath"], ",readonly" * bool(mount.get("readOnly"))
        if volume["name"] != "models" and "emptyDir" in volume:
            size = int(volume["emptyDir"]["sizeLimit"].removesuffix("Mi")) << 20
            return f"--mount=type=tmpfs,destination={path},tmpfs-size={size},tmpfs-mode=1777"
        source = self.folder / volume["name"]
        if not source.exists():
            source.mkdir()
            self._fill(source, volume)
        return f"--mount=type=bind,source={source / mount.get('subPath', '')},target={path}{read_only}"

    def _fill(self, source: Path, volume: dict) -> None:
        if volume["name"] == "models":
            for place, model in OPENED[self.server].items():
                (source / place).parent.mkdir(parents=True, exist_ok=True)
                given = REPOSITORY_DIR / model
                (shutil.copytree if given.is_dir() else shutil.copyfile)(given, source / place)
        else:
            for name, text in self.configs[volume["configMap"]["name"]].items():
                (source / name).write_text(text)
        for path in [source, *source.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)

    def look(self) -> dict:
        (found,) = self.engine.inspect(self.id)
        return found["State"]

    def _logs(self) -> str:
        return f"{self.look()}\n{self.engine.run('docker', 'logs', self.id, check=False).stdout[-3000:]}"

    def wait_until_started(self) -> None:
        """Run the startup probe until it succeeds."""
        command = self.container["startupProbe"]["exec"]["command"]

        def succeeds() -> bool:
            assert self.look()["Running"], self._logs()
            return self.engine.run("docker", "exec", self.id, *command, check=False).returncode == 0

        wait_until(succeeds, lambda: f"{self.server} predicts: {self._logs()}")

    def _inside(self, *arguments: str) -> str:
        """Run this environment's Python in the container's network."""
        command = ["nsenter", f"--target={self.look()['Pid']}", "--net", sys.executable, "-c", *arguments]
        done = subprocess.run(command, cwd=REPOSITORY_DIR, capture_output=True, text=True, timeout=DEADLINE_S)
        assert done.returncode == 0, done.stdout + done.stderr + self._logs()
        return done.stdout

    def differences(self) -> list[float]:
        """Return each version's largest difference from the reference."""
        return list(json.loads(self._inside(ASK_ALL, self.server)))

    def status_of_liveness(self) -> int:
        probe = self.container["livenessProbe"]["httpGet"]
        ports = {port["name"]: port["containerPort"] for port in self.container["ports"]}
        return int(self._inside(GET, f"http://127.0.0.1:{ports[probe['port']]}{probe['path']}"))

    def stop(self) -> dict:
        """Send the stop signal, wait as long as the grace period leaves after preStop, and return the final state."""
        seconds = self.pod["terminationGracePeriodSeconds"] - self.container["lifecycle"]["preStop"]["sleep"]["seconds"]
        self.engine.run("docker", "stop", f"--time={seconds}", self.id)
        return self.look()
