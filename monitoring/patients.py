"""Send patients to the gateway, and their diagnoses later.

    python patients.py                     20 patients a second
    python patients.py --drift "mean texture=+0.5sd"
                                           another scanner: a feature is higher
    python patients.py --labels-after 30   the truth comes 30 s later
    python patients.py --labels-after 5 --wrong-labels 0.3
                                           and three of ten contradict the model

Patients are drawn from data/*.csv and varied a little, so that no two are
equal. The key is read from KEY (python gateway.py keys add alice).
"""

import argparse
import csv
import http.client
import json
import math
import os
import re
import signal
import ssl
import sys
import threading
import time
from collections import Counter, deque
from pathlib import Path

try:
    import numpy as np
except ModuleNotFoundError as error:
    sys.exit(f"patients: {error.name} is not installed in this Python; run `source ../.venv/bin/activate` first")

FOLDER = Path(__file__).resolve().parent
DATA_DIR = FOLDER.parent / "data"
GATEWAY_DIR = FOLDER.parent / "gateway"
MOVED_SD = 0.1  # of a feature's standard deviation within the class: little enough to keep the diagnosis
SIGNIFICANT = 4  # digits, as in the files
TIMEOUT_S = 35.0


class PatientsError(Exception):
    """No patient can be sent; the message is one line that says what to do."""


class Population:
    """The rows of train.csv and test.csv, from which patients are drawn."""

    def __init__(self, folder: Path, drift: dict[str, float]):
        """`drift` is the number of standard deviations to add, by feature."""
        lines = []
        for name in ("train.csv", "test.csv"):
            with (folder / name).open(newline="") as file:
                self.names, *more = csv.reader(file)
            lines += more
        self.names = self.names[:-1]
        self.rows = np.array([line[:-1] for line in lines], float)  # (569, 5)
        self.targets = np.array([int(line[-1]) for line in lines])
        unknown = set(drift) - set(self.names)
        if unknown:
            raise PatientsError(f"no feature {unknown.pop()!r}; there are {', '.join(self.names)}")
        deviation = self.rows.std(axis=0)
        self.shift = np.array([drift.get(name, 0.0) for name in self.names]) * deviation
        self.within = np.stack([self.rows[self.targets == target].std(axis=0) for target in (0, 1)])  # (2, 5)

    def draw(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return the features (n, 5) and the targets (n,) of new patients."""
        chosen = rng.integers(len(self.rows), size=n)
        targets = self.targets[chosen]
        moved = self.rows[chosen] + rng.normal(size=(n, len(self.names))) * MOVED_SD * self.within[targets]
        moved = np.maximum(moved, 0) + self.shift
        with np.errstate(divide="ignore"):
            digits = SIGNIFICANT - 1 - np.floor(np.log10(np.where(moved > 0, moved, 1)))
        return np.round(moved * 10**digits) / 10**digits, targets


class Clinic:
    """Sends the patients and, after a while, their diagnoses."""

    def __init__(self, arguments: argparse.Namespace, population: Population, key: str):
        self.arguments, self.population, self.key = arguments, population, key
        self.seen: Counter[str] = Counter()  # replies by version, or by what went wrong
        self.waiting: deque[tuple[float, str]] = deque()  # when a line of labels is due
        self.lock = threading.Lock()
        self.is_interrupted = False  # set by a signal handler, which must not take an Event's lock
        self.stopping = threading.Event()
        self.servers = self._read_servers()
        try:
            self.context = ssl.create_default_context(cafile=str(arguments.ca))
        except OSError:
            raise PatientsError(f"no certificate {arguments.ca}: start the gateway, or name it with --ca") from None

    def _read_servers(self) -> list[tuple[str, str, str]]:
        """Return name, path and the rows' key of each server to ask."""
        known = json.loads((GATEWAY_DIR / "servers.json").read_text())
        names = self.arguments.servers
        if not names:
            try:  # those that the gateway has
                lines = (self.arguments.ca.parent / "servers.map").read_text().splitlines()
                names = sorted({line.split()[1] for line in lines if len(line.split()) == 2}) or ["onnx"]
            except OSError:
                names = ["onnx"]
        for name in names:
            if name not in known:
                raise PatientsError(f"no server called {name!r}; there are {', '.join(known)}")
        return [(name, known[name]["path"], next(iter(json.loads(known[name]["body"])))) for name in names]

    def run(self) -> None:
        """Send until the time is over, the number is reached or Ctrl-C is pressed."""
        arguments = self.arguments
        start_s = time.monotonic()
        count = min(
            arguments.count or 1 << 62, int(arguments.rate * arguments.seconds) if arguments.seconds else 1 << 62
        )
        threads = [
            threading.Thread(target=self._send, args=(first, count, start_s), daemon=True)
            for first in range(arguments.connections)
        ]
        for thread in threads:
            thread.start()
        told_s = start_s
        while any(thread.is_alive() for thread in threads) or self.waiting:
            self._send_labels()
            if time.monotonic() - told_s >= 10:
                told_s = time.monotonic()
                self.tell()
            time.sleep(0.2)
            if self.is_interrupted:
                self.stopping.set()
                break

    def _send(self, first: int, count: int, start_s: float) -> None:
        """Send every connections-th patient, from `first` on, when it is due."""
        arguments = self.arguments
        rng = np.random.default_rng([arguments.seed, first] if arguments.seed is not None else None)
        connection = None
        for number in range(first, count, arguments.connections):
            if self.stopping.wait(max(0.0, start_s + number / arguments.rate - time.monotonic())):
                return
            name, path, rows_key = self.servers[number % len(self.servers)]
            rows, targets = self.population.draw(arguments.rows, rng)
            headers = {"X-API-Key": self.key, "Content-Type": "application/json"}
            headers["X-User-Id"] = f"patient-{rng.integers(arguments.users)}"
            try:
                if connection is None:
                    host, _, port = arguments.gateway.rpartition(":")
                    connection = http.client.HTTPSConnection(host, int(port), timeout=TIMEOUT_S, context=self.context)
                connection.request("POST", f"/{name}{path}", json.dumps({rows_key: rows.tolist()}), headers)
                reply = connection.getresponse()
                body = reply.read()
            except (OSError, http.client.HTTPException) as error:
                connection = None
                self._count(f"{name}: {type(error).__name__}")
                self.stopping.wait(0.2)
                continue
            if reply.status != 200:
                self._count(f"{name}: {reply.status} {body[:100].decode(errors='replace')}")
                continue
            self._count(f"{name} v{reply.headers['X-Model-Version']}")
            if arguments.labels_after is not None:
                wrong = rng.random(len(targets)) < arguments.wrong_labels
                lines = [
                    f"{reply.headers['X-Request-Id']},{row},{target}\n"
                    for row, target in enumerate(np.where(wrong, 1 - targets, targets).tolist())
                ]
                with self.lock:
                    self.waiting.append((time.monotonic() + arguments.labels_after, "".join(lines)))

    def _send_labels(self) -> None:
        """Write the labels that are due into the folder that the collector reads."""
        due = []
        with self.lock:
            while self.waiting and self.waiting[0][0] <= time.monotonic():
                due.append(self.waiting.popleft()[1])
        if due:
            try:
                self.arguments.labels.mkdir(parents=True, exist_ok=True, mode=0o700)
                with (self.arguments.labels / f"patients-{os.getpid()}.csv").open("a") as file:
                    file.write("".join(due))
            except OSError as error:
                raise PatientsError(f"{self.arguments.labels}: {error.strerror}; choose another --labels") from None
            self._count("labels", sum(lines.count("\n") for lines in due))

    def _count(self, what: str, more: int = 1) -> None:
        with self.lock:
            self.seen[what] += more

    def tell(self) -> None:
        with self.lock:
            print(
                ", ".join(f"{count:,} {what}" for what, count in sorted(self.seen.items())) or "no reply yet",
                flush=True,
            )


def parse_drift(text: str) -> tuple[str, float]:
    """Return feature and shift of "mean texture=+0.5sd"; raise ArgumentTypeError for any other form."""
    found = re.fullmatch(r"(.+?)\s*=\s*([+-]?\d*\.?\d+)\s*sd", text.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}: write a feature and a shift, as in 'mean texture=+0.5sd'")
    return found[1], float(found[2])


def positive(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected a number above 0")
    return float(text)


def duration(text: str) -> float:
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected a number of seconds from 0 on")
    return float(text)


def whole_number(text: str, least: int = 1) -> int:
    if not least <= int(text) < 1 << 31:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from {least} to {(1 << 31) - 1}")
    return int(text)


def gateway_address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a name and a port, as in localhost:8443")
    return text


def main() -> None:
    state = Path(os.environ.get("GATEWAY_STATE") or GATEWAY_DIR / "state")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=positive, default=20.0, help="patients a second (default: 20)")
    parser.add_argument("--seconds", type=positive, help="how long (default: until Ctrl-C)")
    parser.add_argument("--count", type=whole_number, help="how many (default: until Ctrl-C)")
    parser.add_argument("--rows", type=whole_number, default=1, help="rows of each request (default: 1)")
    parser.add_argument("--users", type=whole_number, default=1000, help="how many different user ids (default: 1000)")
    parser.add_argument("--servers", nargs="+", metavar="NAME", help="asked in turn (default: all behind the gateway)")
    parser.add_argument(
        "--drift", type=parse_drift, action="append", default=[], metavar="FEATURE=±Xsd",
        help="move a feature by X standard deviations (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--labels-after", type=duration, metavar="S", help="seconds until the diagnosis (default: none comes)"
    )
    parser.add_argument(
        "--wrong-labels", type=float, default=0.0, metavar="SHARE", help="share of inverted diagnoses (default: 0)"
    )
    parser.add_argument(
        "--labels", type=Path, default=FOLDER / "state" / "labels", help="folder for diagnoses (default: state/labels)"
    )
    parser.add_argument(
        "--gateway", type=gateway_address, default="localhost:8443", help="its address (default: localhost:8443)"
    )
    parser.add_argument("--ca", type=Path, default=state / "tls.pem", help="its certificate (default: the gateway's)")
    parser.add_argument("--connections", type=whole_number, default=4, help="requests at once (default: 4)")
    parser.add_argument(
        "--seed", type=lambda text: whole_number(text, 0), help="for the same patients every time (default: other ones)"
    )
    arguments = parser.parse_args()
    if not 0 <= arguments.wrong_labels <= 1:
        parser.error("wrong-labels is 0 to 1")
    key = os.environ.get("KEY", "")
    if not (key.isascii() and key.isprintable() and key):
        raise PatientsError("no KEY: export KEY=$(cd ../gateway && python gateway.py keys add alice)")
    clinic = Clinic(arguments, Population(DATA_DIR, dict(arguments.drift)), key)

    def interrupt(*_: object) -> None:
        clinic.is_interrupted = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    clinic.run()
    clinic.tell()
    if not any(" v" in what for what in clinic.seen):
        sys.exit("patients: no prediction came; does the gateway run? cd ../gateway && python gateway.py status")


if __name__ == "__main__":
    try:
        main()
    except PatientsError as error:
        sys.exit(f"patients: {error}")
