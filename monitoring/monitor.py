"""Start the collector, Prometheus and Alertmanager, until Ctrl-C.

    python monitor.py

Prints an address for each when it is ready, and then every alert. Keeps all
files in state. The gateway sends its predictions when it is started with
GATEWAY_PREDICTIONS=state/records.sock, the path of a Unix socket.
"""

import argparse
import ctypes
import json
import os
import select
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

from addresses import RECORDS_SOCKET, Address, explain, join, listen, parse_records_address, stop_listening

FOLDER = Path(__file__).resolve().parent
READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
POLL_S = 0.1
RESTART_AFTER_S = 1.0
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MOST_SHORT_RUNS, SHORT_RUN_S = 3, 10.0
MOST_DAYS = 36_500  # as in collect.py
PR_SET_PDEATHSIG = 1  # linux/prctl.h
PORTS = {"collector": 8405, "prometheus": 9090, "alertmanager": 9093}
GATEWAY_METRICS = "127.0.0.1:8404"


class MonitorError(Exception):
    """The monitoring cannot run; the message is one line that says what to do."""


class Keeper:
    """Listens for HAProxy's records, and keeps a copy of each connection that the collector reads.

    So a connection outlives a killed collector, with all that this had not yet taken from it, and the next one gets it.
    """

    def __init__(self, address: Address):
        """OSError if the address is taken."""
        self.listener = listen(address)
        self.listener.setblocking(False)
        self.connections: list[socket.socket] = []
        self.collector: socket.socket | None = None  # over which it gets them

    def make_source(self) -> socket.socket:
        """Return the socket over which a new collector gets all connections, old and new."""
        if self.collector:
            self.collector.close()
        self.collector, source = socket.socketpair()
        self.collector.setblocking(False)
        for connection in self.connections:
            self._hand_over(connection)
        return source

    def _hand_over(self, connection: socket.socket) -> None:
        with suppress(OSError):  # a collector that has ended: the next one gets it
            socket.send_fds(self.collector, [b"c"], [connection.fileno()])

    def wait(self, seconds: float) -> None:
        """Take HAProxy's new connections for some time, and let ended ones go."""
        for connection in filter(has_ended, list(self.connections)):
            self.connections.remove(connection)
            connection.close()
        if select.select([self.listener], [], [], seconds)[0]:
            try:
                self.connections.append(self.listener.accept()[0])
            except OSError:  # no more files may be open
                time.sleep(seconds)
            else:
                self._hand_over(self.connections[-1])

    def drop(self) -> None:
        """End all connections; HAProxy connects again, and sends what it has not sent yet."""
        while self.connections:
            self.connections.pop().close()

    def close(self) -> None:
        """Take no more connections; those that the collector has are still open."""
        stop_listening(self.listener)
        self.drop()


def has_ended(connection: socket.socket) -> bool:
    """Return whether HAProxy or the collector has closed the connection, and all of it has been taken."""
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


@dataclass
class Program:
    """One of the three programs, and the URL that answers when it is ready."""

    name: str
    command: list[str]
    ready_url: str
    address: str  # for people
    keeper: Keeper | None = None  # gives it connections
    process: subprocess.Popen | None = None
    started_s: float = 0.0
    ended_s: float = 0.0
    short_runs: int = 0  # in a row

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
            command, inherited = self.command, []
            if self.keeper:
                inherited = [stack.enter_context(self.keeper.make_source()).fileno()]
                command = [*command, "--connections", *map(str, inherited)]
            self.started_s = time.monotonic()
            self.process = subprocess.Popen(
                command, cwd=FOLDER, stdin=subprocess.DEVNULL, stdout=output, stderr=output and subprocess.STDOUT,
                start_new_session=True, preexec_fn=end_with_parent, pass_fds=inherited,
            )  # fmt: skip

    def note_end(self) -> None:
        """Note when the program ended. If it does so soon, again and again, its connections may hold the cause."""
        self.ended_s = time.monotonic()
        self.short_runs = self.short_runs + 1 if self.ended_s - self.started_s < SHORT_RUN_S else 0
        if self.keeper and self.short_runs >= MOST_SHORT_RUNS:
            self.keeper.drop()

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
        "../gateway/state/targets.json": json.dumps(str(targets))[1:-1],  # within the quotes of YAML
        "rules.yml": json.dumps(str(FOLDER / "rules.yml"))[1:-1],
    }
    for name in ("prometheus.yml", "alertmanager.yml"):
        text = (FOLDER / name).read_text()
        for old in replaced:  # in two steps, so that no new address is replaced as an old one
            text = text.replace(old, f"\0{list(replaced).index(old)}\0")
        for number, new in enumerate(replaced.values()):
            text = text.replace(f"\0{number}\0", new)
        (state / name).write_text(text)


def make_programs(
    state: Path, ports: dict[str, int], records: Address, keep_days: int, keeper: Keeper
) -> list[Program]:
    place = str(records) if isinstance(records, Path) else join(records)  # whole: the collector runs in another folder
    collector, prometheus, alertmanager = (f"127.0.0.1:{ports[r]}" for r in ("collector", "prometheus", "alertmanager"))
    return [
        Program(
            "collector",
            [sys.executable, "collect.py", "--state", str(state), "--http", collector,
             "--records", place, "--keep-days", str(keep_days)],
            f"http://{collector}/metrics", f"takes predictions at {join(records)}",
            keeper,
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

    stopping = []

    def interrupt(*_) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: None)  # a second one must not stop what is cleaned up after the first
        stopping.append(True)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        signal.signal(signal.SIGHUP, interrupt)
    with ExitStack() as stack:
        records = arguments.records or state / RECORDS_SOCKET
        try:
            keeper = Keeper(records)
        except OSError as error:
            raise MonitorError(explain(records, error, "--records")) from None
        stack.callback(keeper.close)
        programs = make_programs(state, ports, records, arguments.keep_days, keeper)
        logs = {p.name: None if p.name == "collector" else state / f"{p.name}.log" for p in programs}
        for program in programs:
            stack.callback(program.stop)
            program.start(logs[program.name])
        stack.callback(keeper.close)  # before the programs end: from now on HAProxy keeps its records
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        for program in programs:
            while not program.is_ready():
                if program.process.poll() is not None:
                    raise MonitorError(f"{program.name} has ended: {last_words(logs[program.name])}")
                if time.monotonic() > deadline_s:
                    raise MonitorError(f"{program.name} is not ready within {READY_TIMEOUT_S:.0f} s")
                keeper.wait(POLL_S)
            say(f"{program.name}: {program.address}")
        say("monitoring, Ctrl-C to stop")
        while True:
            if stopping:  # in a destructor, Python has ignored the exception
                raise KeyboardInterrupt
            keeper.wait(POLL_S)
            for program in programs:
                if program.process.poll() is None:
                    continue
                if not program.ended_s:
                    program.note_end()
                    say(f"{program.name} has ended with {program.process.returncode}; it is started again")
                elif time.monotonic() > program.ended_s + RESTART_AFTER_S:
                    program.ended_s = 0.0
                    program.start(logs[program.name])


def say(text: str) -> None:
    with suppress(OSError):  # no terminal any more, as after SIGHUP, or a full disk
        print(text, flush=True)


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
        "--records", type=parse_records_address, metavar="ADDRESS",
        help=f"for HAProxy: a Unix socket, or as in 127.0.0.1:8406 (default: {RECORDS_SOCKET} in the folder for files)",
    )  # fmt: skip
    parser.add_argument(
        "--gateway-metrics", default=GATEWAY_METRICS, help=f"address of its metrics (default: {GATEWAY_METRICS})"
    )
    parser.add_argument(
        "--targets", type=Path, default=FOLDER.parent / "gateway" / "state" / "targets.json",
        help="the gateway's list of replicas (default: ../gateway/state/targets.json)",
    )  # fmt: skip
    parser.add_argument("--keep-days", type=int, default=30, help="days of predictions and metrics (default: 30)")
    arguments = parser.parse_args()
    if not 1 <= arguments.keep_days <= MOST_DAYS:
        parser.error(f"--keep-days must be from 1 to {MOST_DAYS}")
    for role in PORTS:
        if not 0 < getattr(arguments, role) < 65536:
            parser.error(f"--{role} must be from 1 to 65535")
    try:
        run(arguments)
    except KeyboardInterrupt:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # Python's end gives handlers back their defaults, and takes a while
        say("stopped")
    except MonitorError as error:
        sys.exit(f"monitor: {error}")


if __name__ == "__main__":
    main()
