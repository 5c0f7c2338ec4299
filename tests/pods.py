"""A pod of kubernetes/ on a Docker engine, as far as an engine knows what a kubelet does: its sidecar and its server.

Command, arguments, variables, users, groups, capabilities, memory, volumes and probes are the manifest's. The sidecar
starts first, and the server once the models lie open in the volume that both have.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from engine import Engine
from helpers import DEADLINE_S, REPOSITORY_DIR, wait_until

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
    """The running pod of a Deployment, as a context manager. The image my_model-sealed holds models for `keys`."""

    def __init__(self, engine: Engine, server: str, manifests: list[dict], keys: Path, folder: Path):
        self.engine, self.server, self.folder = engine, server, folder
        deployment = next(
            one for one in manifests if (one["kind"], one["metadata"]["name"]) == ("Deployment", server)
        )  # fmt: skip
        self.pod = deployment["spec"]["template"]["spec"]
        (self.container,), (self.sidecar,) = self.pod["containers"], self.pod["initContainers"]
        self.volumes = {volume["name"]: volume for volume in self.pod["volumes"]}
        configs = {one["metadata"]["name"]: one["data"] for one in manifests if one["kind"] == "ConfigMap"}
        (identity,) = (keys / "identities" / server).iterdir()
        self.texts = {
            **configs,
            "trusted-keys": {path.name: path.read_text() for path in (keys / "trusted").iterdir()},
            f"{server}-identity": {"identity.txt": identity.read_text()},
        }

    def __enter__(self) -> Self:
        self.started: list[str] = []
        self.models = Path(tempfile.mkdtemp(prefix="pod-", dir="/dev/shm"))
        self.namespace: list[str] = []
        try:
            self._make_empty(self.models)
            if self.pod.get("shareProcessNamespace"):  # the first process is the pod's, and no container's
                image = self._image(self.container)
                self.namespace = [
                    f"--pid=container:{self._run('--network=none', '--entrypoint=sleep', image, '99999')}"
                ]
            self.sidecar_id = self._start(self.sidecar)
            self._wait(self.sidecar_id, self.sidecar)
            self.id = self._start(self.container)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.engine.run("docker", "rm", "--force", "--volumes", *self.started, check=False)
        shutil.rmtree(self.models)

    def _run(self, *options: str) -> str:
        self.started.append(self.engine.run("docker", "run", "--detach", *options).stdout.split()[-1])
        return self.started[-1]

    def _start(self, container: dict) -> str:
        command = container.get("command", [])[1:] + container.get("args", [])
        return self._run(*self._options(container), self._image(container), *command)

    @staticmethod
    def _image(container: dict) -> str:
        name, _, tag = container["image"].partition(":")
        return f"{name}:{'latest' if tag == 'local' else tag}"

    def _options(self, container: dict) -> list[str]:
        pod, own = self.pod["securityContext"], container["securityContext"]
        user = {**pod, **own}
        options = [
            "--network=none",
            f"--user={user['runAsUser']}:{user['runAsGroup']}",
            f"--group-add={pod['fsGroup']}",
            *self.namespace,
        ]
        options += ["--read-only"] * own["readOnlyRootFilesystem"]
        options += [f"--cap-drop={name}" for name in own["capabilities"]["drop"]]
        options += ["--security-opt=no-new-privileges"] * (own["allowPrivilegeEscalation"] is False)
        options += [f"--memory={container['resources']['limits']['memory'].replace('Mi', 'm')}"]
        options += [f"--env={one['name']}={one['value']}" for one in container.get("env", [])]
        if command := container.get("command"):
            options += [f"--entrypoint={command[0]}"]
        return options + [self._mount(mount, self.volumes[mount["name"]]) for mount in container["volumeMounts"]]

    def _mount(self, mount: dict, volume: dict) -> str:
        path, read_only = mount["mountPath"], ",readonly" * bool(mount.get("readOnly"))
        if volume["name"] == "models":
            source = self.models
        elif volume.get("emptyDir", {}).get("medium") == "Memory":  # of one container only
            size = int(volume["emptyDir"]["sizeLimit"].removesuffix("Mi")) << 20
            return f"--mount=type=tmpfs,destination={path},tmpfs-size={size},tmpfs-mode=1777"
        else:
            source = self.folder / volume["name"]
            if not source.exists():
                self._make_empty(source)
                if "emptyDir" not in volume:
                    self._publish(source, volume)
        return f"--mount=type=bind,source={source / mount.get('subPath', '')},target={path}{read_only}"

    def _make_empty(self, folder: Path) -> None:
        """Make a folder as a kubelet does: the root's, and its group's that all containers of the pod belong to."""
        folder.mkdir(exist_ok=True)
        os.chown(folder, 0, self.pod["securityContext"]["fsGroup"])
        folder.chmod(0o2777)

    def _publish(self, source: Path, volume: dict) -> None:
        """Write a ConfigMap's or Secret's files as a kubelet does: links over ..data, which a change exchanges."""
        secret = volume.get("secret", {})
        (source / "..2026_11_29").mkdir()
        (source / "..data").symlink_to("..2026_11_29")
        for name, text in self.texts[secret.get("secretName") or volume["configMap"]["name"]].items():
            path = source / "..2026_11_29" / name
            path.write_text(text)
            os.chown(path, 0, self.pod["securityContext"]["fsGroup"])
            path.chmod(secret.get("defaultMode", 0o644))
            (source / name).symlink_to(f"..data/{name}")
        (source / "..2026_11_29").chmod(0o755)

    def look(self, identifier: str) -> dict:
        (found,) = self.engine.inspect(identifier)
        return found["State"]

    def _logs(self, identifier: str) -> str:
        return f"{self.look(identifier)}\n{self.engine.run('docker', 'logs', identifier, check=False).stdout[-3000:]}"

    def _wait(self, identifier: str, container: dict) -> None:
        """Run the startup probe until it succeeds."""
        command = container["startupProbe"]["exec"]["command"]

        def succeeds() -> bool:
            assert self.look(identifier)["Running"], self._logs(identifier)
            return self.engine.run("docker", "exec", identifier, *command, check=False).returncode == 0

        wait_until(succeeds, lambda: f"{container['name']} of {self.server} has started: {self._logs(identifier)}")

    def wait_until_started(self) -> None:
        self._wait(self.id, self.container)

    def _inside(self, *arguments: str) -> str:
        """Run this environment's Python in the container's network."""
        command = ["nsenter", f"--target={self.look(self.id)['Pid']}", "--net", sys.executable, "-c", *arguments]
        done = subprocess.run(command, cwd=REPOSITORY_DIR, capture_output=True, text=True, timeout=DEADLINE_S)
        assert done.returncode == 0, done.stdout + done.stderr + self._logs(self.id)
        return done.stdout

    def differences(self) -> list[float]:
        """Return each version's largest difference from the reference."""
        return list(json.loads(self._inside(ASK_ALL, self.server)))

    def status_of_liveness(self) -> int:
        probe = self.container["livenessProbe"]["httpGet"]
        ports = {port["name"]: port["containerPort"] for port in self.container["ports"]}
        return int(self._inside(GET, f"http://127.0.0.1:{ports[probe['port']]}{probe['path']}"))

    def stop(self) -> list[dict]:
        """Send the stop signal, to the server first, within the grace period less preStop; return both states."""
        seconds = self.pod["terminationGracePeriodSeconds"] - self.container["lifecycle"]["preStop"]["sleep"]["seconds"]
        for identifier in (self.id, self.sidecar_id):
            self.engine.run("docker", "stop", f"--time={seconds}", identifier)
        return [self.look(self.id), self.look(self.sidecar_id)]
