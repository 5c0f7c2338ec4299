"""Several machines on one: each is a Docker engine in a network namespace of its own, on a switch in another.

The switch has a registry, from which the engines get their images, and is where clients ask from. Nothing of it touches
this machine's own network. When it ends, no namespace, interface, mount or process is left.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import psutil

from engine import SETTINGS, Engine, find_obstacle
from helpers import DEADLINE_S, wait_until

SWITCH_ADDRESS = "10.77.0.1"
REGISTRY = f"{SWITCH_ADDRESS}:5000"
# no-new-privileges: Swarm ignores security_opt.
NODE_SETTINGS = SETTINGS | {"insecure-registries": [REGISTRY], "no-new-privileges": True}
REGISTRY_SETTINGS = """\
version: 0.1
log: {level: error, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: %s}}
http: {addr: "%s"}
"""


def find_missing() -> str | None:
    """Return why no nodes can be made here, or None where they can."""
    if obstacle := find_obstacle():
        return obstacle
    for program, package in (("docker-registry", "docker-registry"), ("ip", "iproute2"), ("nsenter", "util-linux")):
        if not shutil.which(program):
            return f"no {program}: apt-get install {package}"
    return None


def ip(*arguments: str) -> None:
    """Run `ip`; AssertionError with what it says where it fails."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


class Node(Engine):
    """One machine."""

    def __init__(self, nodes: "Nodes", number: int):
        self.namespace = f"{nodes.prefix}-{number}"
        self.address = f"10.77.0.{10 + number}"
        self.link = f"port{number}"
        self.switch = nodes.switch
        name = f'hostname node-{number} && exec "$@"'
        prefix = ["nsenter", f"--net=/run/netns/{self.namespace}", "unshare", "--uts", "sh", "-c", name, "sh"]
        super().__init__(prefix, NODE_SETTINGS)

    def plug_in(self) -> None:
        ip("netns", "add", self.namespace)
        ip(
            "link",
            "add",
            self.link,
            "netns",
            self.switch,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            self.namespace,
        )
        ip("-n", self.switch, "link", "set", self.link, "master", "bridge", "up")
        ip("-n", self.namespace, "link", "set", "lo", "up")
        ip("-n", self.namespace, "address", "add", f"{self.address}/24", "dev", "eth0")
        ip("-n", self.namespace, "link", "set", "eth0", "up")

    def die(self) -> None:
        """End as a machine whose power fails: its cable is silent from now on, and none of its processes runs on.

        The cable first: a process that is killed closes its connections, and a machine that is gone does not.
        """
        ip("-n", self.switch, "link", "set", self.link, "down")
        self.kill_all()

    def kill_all(self) -> None:
        """Kill the engine and all that it has started, the containers' processes too."""
        doomed: list[psutil.Process] = []
        for process in psutil.process_iter(["cmdline"]):
            if any(str(self.folder) in word for word in process.info["cmdline"] or []) and process.pid != os.getpid():
                doomed.append(process)
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in list(doomed):
                doomed += process.children(recursive=True)
        for process in doomed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs([process for process in doomed if process.pid != self.process.pid], timeout=DEADLINE_S)

    def __exit__(self, *_) -> None:
        if self.process.poll() is None:
            self.run("docker", "swarm", "leave", "--force", check=False)
        self.kill_all()
        super().__exit__()


class Nodes:
    """`count` machines in one swarm, all managers, as a context manager; the first has made it."""

    def __init__(self, count: int = 3):
        self.prefix = f"node{os.getpid()}"
        self.switch = f"{self.prefix}-switch"
        self.count = count
        self.folder = Path(tempfile.mkdtemp(prefix="engine-registry-"))

    def __enter__(self) -> "Nodes":
        self._stack = contextlib.ExitStack()
        try:
            self._stack.callback(shutil.rmtree, self.folder)
            self._make_switch()
            self._start_registry()
            self.all = []
            for number in range(1, self.count + 1):
                node = Node(self, number)
                self._stack.callback(remove_namespace, node.namespace)
                node.plug_in()
                self.all.append(self._stack.enter_context(node))
            self._join()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def _make_switch(self) -> None:
        self._stack.callback(remove_namespace, self.switch)
        ip("netns", "add", self.switch)
        ip("-n", self.switch, "link", "set", "lo", "up")
        ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", self.switch, "address", "add", f"{SWITCH_ADDRESS}/24", "dev", "bridge")
        ip("-n", self.switch, "link", "set", "bridge", "up")

    def _start_registry(self) -> None:
        settings = self.folder / "registry.yml"
        settings.write_text(REGISTRY_SETTINGS % (self.folder / "images", REGISTRY))
        with (self.folder / "registry.log").open("wb") as log:
            process = subprocess.Popen(
                [*self.on_switch, "docker-registry", "serve", str(settings)],
                stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, "OTEL_TRACES_EXPORTER": "none"},
            )  # fmt: skip
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        asking = [*self.on_switch, "bash", "-c", f"exec 3<>/dev/tcp/{REGISTRY.replace(':', '/')}"]
        wait_until(
            lambda: subprocess.run(asking, capture_output=True).returncode == 0,
            lambda: f"the registry listens: {(self.folder / 'registry.log').read_text()[-2000:]}",
            process,
        )

    def _join(self) -> None:
        first, *others = self.all
        first.run("docker", "swarm", "init", "--advertise-addr", first.address)
        token = first.run("docker", "swarm", "join-token", "--quiet", "manager").stdout.strip()
        for node in others:
            node.run(
                "docker", "swarm", "join", "--token", token, "--advertise-addr", node.address, f"{first.address}:2377"
            )

    def list_left(self) -> list[str]:
        """What is left of it: mounts, namespaces, and processes that name its folders."""
        folders = [str(self.folder), *(str(node.folder) for node in self.all)]
        lines = Path("/proc/self/mounts").read_text().splitlines()
        lines += [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
        names = [str(path) for path in Path("/run/netns").glob(f"{self.prefix}*")]
        return [line for line in lines if any(folder in line for folder in folders)] + names

    @property
    def on_switch(self) -> list[str]:
        """What stands before a command that is to run where the clients are."""
        return ["nsenter", f"--net=/run/netns/{self.switch}"]


def remove_namespace(name: str) -> None:
    """Remove a network namespace and the interfaces in it, once nothing runs there."""
    if Path("/run/netns", name).exists():
        command = ["ip", "netns", "delete", name]
        wait_until(
            lambda: subprocess.run(command, capture_output=True).returncode == 0, f"the namespace {name} is removed"
        )
