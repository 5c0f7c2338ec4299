"""Every command of every README is executed, in a fresh copy of the repository, and prints what the README shows.

The READMEs' code fences: ```bash runs, in one shell per README; the ```text or ```json block that
follows is its expected output, where … stands for anything. ```bash server runs in the background
until its expected lines have appeared, and gets Ctrl-C at the next server or at the end.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from conftest import REPOSITORY_DIR, refuse_taken_ports

# `make benchmark` runs in full for a student; here it does all of its steps, with shorter windows.
SHORT_BENCHMARK = "--rounds 1 --seconds 0.3 --settle-seconds 0 --connections 1 16 --rows 1 --rates 100"
# The same with fewer users, and with room for a machine whose cores others use.
SHORT_AB_TEST = "--margin 4 --latency-margin 100"
SHORT_CANARY = "--margin 8 --latency-margin 100"
NO_ENGINE = "needs a Docker engine: test_containers.py does what it does, on an engine of its own"
NOT_EXECUTED = {
    "make calibrate": "test_calibrate.py runs it, and does not take a busy machine for a broken bound",
    "make test": "it is the command that runs this test",
    "make test-slow": "it is the command that runs this test",
    "make test-containers": ".ci/run calls it after the tests",
    "make docker-build": NO_ENGINE,
    "make docker-up": NO_ENGINE,
    "make docker-verify": NO_ENGINE,
    "make docker-benchmark": NO_ENGINE,
    "make docker-measure": NO_ENGINE,
    "make docker-down": NO_ENGINE,
    "ONNX_PORT= docker compose --profile gateway up --detach --wait --scale onnx=3": NO_ENGINE,
    'curl -s -X POST http://localhost:8090/onnx/predict -H "Content-Type: application/json" '
    "-d '{\"data\": [[13.82, 24.49, 0.1162, 0.1357, 0.2275]]}'": NO_ENGINE,
    "(cd / && bentoml containerize my_model_service:latest --image-tag my_model_service:latest)": NO_ENGINE,
    "docker run --rm -p 127.0.0.1:3000:3000 my_model_service:latest": NO_ENGINE,
    "docker build -t my_model-torchserve .": NO_ENGINE,
    "docker run --rm -d --name my_model -p 127.0.0.1:8080:8080 my_model-torchserve": NO_ENGINE,
    "docker stop my_model": NO_ENGINE,
    "docker build -t onnx-server .": NO_ENGINE,
    "docker run --rm -p 127.0.0.1:8000:8000 onnx-server": NO_ENGINE,
    "docker compose up --detach --wait": NO_ENGINE,
    "docker compose down": NO_ENGINE,
}

FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND_TIMEOUT_S = 600.0
READY_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 20.0


@dataclass
class Block:
    """One ```bash fence and the output that the README promises."""

    line: int
    script: str
    is_server: bool
    expected: list[str] = field(default_factory=list)


def list_readmes() -> list[str]:
    return sorted(path for path in list_repository_files() if Path(path).name == "README.md")


def list_repository_files() -> list[str]:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY_DIR, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [path for path in listing.stdout.splitlines() if (REPOSITORY_DIR / path).is_file()]


def read_blocks(readme: str) -> list[Block]:
    text = (REPOSITORY_DIR / readme).read_text()
    blocks: list[Block] = []
    takes_output = False
    for fence in FENCE.finditer(text):
        info = fence["info"].strip()
        if info in ("bash", "bash server"):
            lines = [line for line in fence["text"].splitlines() if line.strip() not in NOT_EXECUTED]
            line = text.count("\n", 0, fence.start()) + 1
            blocks.append(Block(line, "\n".join(lines), info == "bash server"))
            takes_output = True
        elif info in ("text", "json"):
            if takes_output:
                blocks[-1].expected = [line.rstrip() for line in fence["text"].splitlines() if line.strip()]
            takes_output = False
    return blocks


def find_missing(expected: list[str], output: str) -> str | None:
    """Return the first expected line that does not follow in the output, or None where all are there in order."""
    lines = iter(re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", output).splitlines())
    for wanted in expected:
        pattern = re.compile(".*".join(re.escape(part) for part in wanted.split("…")))
        if not any(pattern.fullmatch(line.rstrip()) for line in lines):
            return wanted
    return None


class Shell:
    """One bash in a fresh copy of the repository, as a student's terminal; servers run beside it."""

    def __init__(self, folder: Path, home: Path):
        self.folder = folder
        self.server: psutil.Process | None = None
        self.server_family: list[psutil.Process] = []
        self.log_path = home / "shell.log"
        self.number = 0
        self.children: dict[int, psutil.Process] = {}  # all that was ever seen to run below the shell
        self.temporary = Path(
            tempfile.mkdtemp(prefix="t-")
        )  # TorchServe's pid file lies in $TMPDIR: not in a shared one
        path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if p != str(Path(sys.executable).parent))
        environment = {"PATH": path, "HOME": str(home), "LANG": "C.UTF-8", "COLUMNS": "200", "TERM": "dumb"}
        environment |= {"TMPDIR": str(self.temporary), "TEMP": str(self.temporary)}
        environment["BENCHMARK_OPTIONS"] = SHORT_BENCHMARK
        environment |= {"AB_TEST_OPTIONS": SHORT_AB_TEST, "CANARY_OPTIONS": SHORT_CANARY}
        self.log = self.log_path.open("wb")
        self.process = subprocess.Popen(
            ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail"],
            cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=self.log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        self._send("set -m\n")  # a process group for each server, so that Ctrl-C reaches it alone

    def close(self) -> None:
        try:
            self.stop_server()
        finally:
            self._remember_children()
            for process in self.children.values():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.kill()
            self.process.wait()
            self.log.close()
            shutil.rmtree(self.temporary, ignore_errors=True)

    def _remember_children(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                self.children[process.pid] = process

    def _send(self, text: str) -> None:
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def _wait_for(self, path: Path, timeout_s: float, what: str) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not path.exists():
            self._remember_children()
            if self.process.poll() is not None:
                raise AssertionError(f"{what}: a command failed\n{self.output()}")
            if time.monotonic() > deadline_s:
                raise AssertionError(f"{what}: not done within {timeout_s:.0f} s\n{self.output()}")
            time.sleep(0.02)

    def output(self) -> str:
        return self.log_path.read_text(errors="replace")[self.seen :]

    def run(self, block: Block, where: str) -> None:
        self.number += 1
        self.seen = len(self.log_path.read_text(errors="replace"))
        script = self.log_path.with_name(f"block_{self.number}.sh")
        done = script.with_suffix(".done")
        script.write_text(block.script + "\n")
        self._send(f"source {script}; touch {done}\n")
        self._wait_for(done, COMMAND_TIMEOUT_S, where)
        missing = find_missing(block.expected, self.output())
        assert missing is None, f"{where}: the README shows {missing!r}, the commands printed\n{self.output()}"

    def run_server(self, block: Block, where: str) -> None:
        self.stop_server()
        self.number += 1
        self.seen = 0
        script = self.log_path.with_name(f"server_{self.number}.sh")
        pid_path, log_path = script.with_suffix(".pid"), script.with_suffix(".log")
        script.write_text(block.script + "\n")
        self._send(f"(source {script}) > {log_path} 2>&1 &\necho $! > {pid_path}.new; mv {pid_path}.new {pid_path}\n")
        self._wait_for(pid_path, COMMAND_TIMEOUT_S, where)
        self.server = psutil.Process(int(pid_path.read_text()))
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        assert block.expected, f"{where}: a server needs a text block that ends with the line that says it is ready"
        while (missing := find_missing(block.expected, log_path.read_text(errors="replace"))) is not None:
            alive = self.server.is_running() and self.server.status() != psutil.STATUS_ZOMBIE
            if not alive or time.monotonic() > deadline_s:
                state = "is not ready" if alive else "has ended"
                raise AssertionError(f"{where}: {state} without {missing!r}; it printed\n{log_path.read_text()}")
            time.sleep(0.05)
        self.server_family = [self.server, *self.server.children(recursive=True)]

    def stop_server(self) -> None:
        """Press Ctrl-C and see that nothing of the server is left."""
        if self.server is None:
            return
        self.server_family += self.server.children(recursive=True) if self.server.is_running() else []
        os.killpg(self.server.pid, signal.SIGINT)
        family = [process for process in self.server_family if process.pid != self.server.pid]
        _, left = psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)
        names = [process.name() for process in left]
        for process in left:
            process.kill()
        self.server = None
        self.server_family = []
        assert not names, f"Ctrl-C left {names} running"


def test_the_tests_that_a_readme_names_are_there():
    named = {
        " ".join(command.split())
        for readme in list_readmes()
        for command in re.findall(r"`python -m (pytest\s[^`]+)`", (REPOSITORY_DIR / readme).read_text())
    }
    assert named
    for command in named:
        collect = [sys.executable, "-m", *command.split(), "--collect-only", "--quiet"]
        done = subprocess.run(collect, cwd=REPOSITORY_DIR, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stdout[-500:]}"  # 5: it selects none


@pytest.mark.parametrize(
    "readme",
    [pytest.param(name, marks=pytest.mark.slow if name == "benchmarks/README.md" else ()) for name in list_readmes()],
)
def test_every_command_of_the_readme_works_as_written(readme, tmp_path):
    copy, home = tmp_path / "repository", tmp_path / "home"
    home.mkdir()
    for path in list_repository_files():
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY_DIR / path, copy / path)
    (copy / ".venv").symlink_to(REPOSITORY_DIR / ".venv")
    refuse_taken_ports()
    blocks = read_blocks(readme)
    assert blocks, f"{readme} shows no command"
    shell = Shell(copy, home)
    try:
        for block in blocks:
            if not block.script.strip():
                continue
            where = f"{readme}:{block.line}"
            (shell.run_server if block.is_server else shell.run)(block, where)
        shell.stop_server()
    finally:
        shell.close()


def test_commands_stand_only_in_fences_that_are_executed():
    allowed = {"bash", "bash server", "text", "json", "python", "yaml", "properties", "mermaid", "diff", "protobuf"}
    for readme in list_readmes():
        for fence in FENCE.finditer((REPOSITORY_DIR / readme).read_text()):
            assert fence["info"].strip() in allowed, f"{readme}: a fence of kind {fence['info']!r} would not be run"


def test_each_command_that_is_not_executed_stands_in_a_readme():
    text = "\n".join((REPOSITORY_DIR / readme).read_text() for readme in list_readmes())
    lines = {line.strip() for line in text.splitlines()}
    assert set(NOT_EXECUTED) <= lines, f"not in any README: {set(NOT_EXECUTED) - lines}"
