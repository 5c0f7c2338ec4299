"""Start the collector, Prometheus and Alertmanager, until Ctrl-C.

    python monitor.py

Prints an address for each when it is ready, and then every alert. Keeps all
files in state. The gateway sends its predictions when it is started with
GATEWAY_PREDICTIONS=127.0.0.1:8406.
"""

import argparse
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
POLL_S = 0.1
RESTART_AFTER_S = 1.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h
PORTS = {"collector": 8405, "records": 8406, "prometheus": 9090, "alertmanager": 9093}
GATEWAY_METRICS = "127.0.0.1:8404"


class MonitorError(Exception):
    """The monitoring cannot run; the message is one line that says what to do."""


@dataclass
class Program:
    """One of the three programs, and the URL that answers when it is ready."""

    name: str
    command: list[str]
    ready_url: str
    address: str  # for people
    process: subprocess.Popen | None = None
    ended_s: float = 0.0

    def start(self, log: Path | None) -> None:
        parent = os.getpid()

        def end_with_parent() -> None:
            """Have the kernel send this process SIGTERM when ours ends, even by kill -9; Linux only."""
            if sys.platform == "linux":
                signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent's handler would be lost with the program
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
                if os.getppid() != parent:
                    os.kill(os.getpid(), signal.SIGTERM)

        with ExitStack() as stack:
            output = stack.enter_context(log.open("ab")) if log else None
            self.process = subprocess.Popen(
                self.command, cwd=FOLDER, stdin=subprocess.DEVNULL, stdout=output, stderr=output and subprocess.STDOUT,
                start_new_session=True, preexec_fn=end_with_parent,
            )  # fmt: skip

    def is_ready(self) -> bool:
        with suppress(OSError, urllib.error.URLError), urllib.request.urlopen(self.ready_url, timeout=2) as answer:
            return answer.status == 200
        return False

    def stop(self) -> None:
        """End the program; kill it if it takes longer than STOP_TIMEOUT_S."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.terminate()
            self.process.send_signal(signal.SIGCONT)  # a suspended process could not end
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_TIMEOUT_S)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def find_program(name: str) -> str:
    """Return the path of a program; raise MonitorError with the command that installs it if it is missing."""
    if path := shutil.which(os.environ.get(name.upper()) or name):
        return path
    raise MonitorError(
        f"{name} not found; install it: sudo apt-get install prometheus prometheus-alertmanager (macOS: brew install "
        "prometheus alertmanager)"
    )


def check_port(role: str, port: int) -> None:
    """Raise MonitorError unless the port is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            hint = "sudo systemctl stop prometheus prometheus-alertmanager, or " if port in (9090, 9093) else ""
            raise MonitorError(
                f"127.0.0.1:{port}: {error.strerror}; stop what listens there ({hint}choose another with --{role} PORT)"
            ) from None


def write_settings(state: Path, ports: dict[str, int], gateway_metrics: str, targets: Path) -> None:
    """Write copies of prometheus.yml and alertmanager.yml with this run's addresses."""
    replaced = {
        **{f"127.0.0.1:{PORTS[role]}": f"127.0.0.1:{port}" for role, port in ports.items()},
        GATEWAY_METRICS: gateway_metrics,
        "../gateway/state/targets.json": str(targets),
        "rules.yml": str(FOLDER / "rules.yml"),
    }
    for name in ("prometheus.yml", "alertmanager.yml"):
        text = (FOLDER / name).read_text()
        for old in replaced:  # in two steps, so that no new address is replaced as an old one
            text = text.replace(old, f"\0{list(replaced).index(old)}\0")
        for number, new in enumerate(replaced.values()):
            text = text.replace(f"\0{number}\0", new)
        (state / name).write_text(text)


def make_programs(state: Path, ports: dict[str, int], keep_days: int) -> list[Program]:
    collector, prometheus, alertmanager = (f"127.0.0.1:{ports[r]}" for r in ("collector", "prometheus", "alertmanager"))
    return [
        Program(
            "collector",
            [sys.executable, "collect.py", "--state", str(state), "--http", collector,
             "--records", f"127.0.0.1:{ports['records']}", "--keep-days", str(keep_days)],
            f"http://{collector}/metrics", f"takes predictions on 127.0.0.1:{ports['records']}",
        ),
        Program(
            "alertmanager",
            [find_program("prometheus-alertmanager" if not shutil.which("alertmanager") else "alertmanager"),
             f"--config.file={state / 'alertmanager.yml'}", f"--storage.path={state / 'alertmanager'}",
             f"--web.listen-address={alertmanager}", "--cluster.listen-address="],
            f"http://{alertmanager}/-/ready", f"http://{alertmanager}, for amtool",
        ),
        Program(
            "prometheus",
            [find_program("prometheus"), f"--config.file={state / 'prometheus.yml'}",
             f"--storage.tsdb.path={state / 'prometheus'}", f"--storage.tsdb.retention.time={keep_days}d",
             f"--web.listen-address={prometheus}", "--web.console.templates=consoles",
             "--web.console.libraries=consoles"],
            f"http://{prometheus}/-/ready", f"http://{prometheus}/consoles/servers.html",
        ),
    ]  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Run all three programs until Ctrl-C, then end them."""
    ports = {role: getattr(arguments, role) for role in PORTS}
    for role, port in ports.items():
        check_port(role, port)
    state = arguments.state.resolve()
    os.umask(0o077)
    try:
        state.mkdir(parents=True, exist_ok=True)
        write_settings(state, ports, arguments.gateway_metrics, arguments.targets.resolve())
    except OSError as error:
        raise MonitorError(f"{state}: {error.strerror}; choose another folder with --state") from None
    programs = make_programs(state, ports, arguments.keep_days)

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        signal.signal(signal.SIGHUP, interrupt)
    logs = {
        program.name: None if program.name == "collector" else state / f"{program.name}.log" for program in programs
    }
    with ExitStack() as stack:
        for program in programs:
            stack.callback(program.stop)
            program.start(logs[program.name])
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        for program in programs:
            while not program.is_ready():
                if program.process.poll() is not None:
                    raise MonitorError(f"{program.name} has ended: {last_words(logs[program.name])}")
                if time.monotonic() > deadline_s:
                    raise MonitorError(f"{program.name} is not ready within {READY_TIMEOUT_S:.0f} s")
                time.sleep(POLL_S)
            print(f"{program.name}: {program.address}", flush=True)
        print("monitoring, Ctrl-C to stop", flush=True)
        while True:
            time.sleep(POLL_S)
            for program in programs:
                if program.process.poll() is None:
                    continue
                if not program.ended_s:
                    program.ended_s = time.monotonic()
                    print(
                        f"{program.name} has ended with {program.process.returncode}; it is started again", flush=True
                    )
                elif time.monotonic() > program.ended_s + RESTART_AFTER_S:
                    program.ended_s = 0.0
                    program.start(logs[program.name])


def last_words(log: Path | None) -> str:
    """Return the last error in a program's log; the collector has printed its own."""
    lines = log.read_text(errors="replace").splitlines() if log else []
    wrong = [line for line in lines if "level=error" in line or "err=" in line] or lines
    return wrong[-1] if wrong else "see above"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--state", type=Path, default=FOLDER / "state", help="folder for all files (default: state in this folder)"
    )
    for role, port in PORTS.items():
        parser.add_argument(f"--{role}", type=int, default=port, metavar="PORT", help=f"its port (default: {port})")
    parser.add_argument(
        "--gateway-metrics", default=GATEWAY_METRICS, help=f"address of its metrics (default: {GATEWAY_METRICS})"
    )
    parser.add_argument(
        "--targets", type=Path, default=FOLDER.parent / "gateway" / "state" / "targets.json",
        help="the gateway's list of replicas (default: ../gateway/state/targets.json)",
    )  # fmt: skip
    parser.add_argument("--keep-days", type=int, default=30, help="days of predictions and metrics (default: 30)")
    arguments = parser.parse_args()
    if arguments.keep_days < 1:
        parser.error("--keep-days must be at least 1")
    try:
        run(arguments)
    except KeyboardInterrupt:
        with suppress(OSError):  # after SIGHUP there is no terminal to print to
            print("stopped", flush=True)
    except MonitorError as error:
        sys.exit(f"monitor: {error}")


if __name__ == "__main__":
    main()
