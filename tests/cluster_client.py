"""Ask ONNX servers behind a gateway, again and again, and never twice: what fails is lost.

    python cluster_client.py http://10.0.0.5:8090/onnx 3000

Four senders ask one row after the other over the Open Inference Protocol, whose
reply names the version that answered, and compare it with that version's
reference. At least so many requests are sent; they end after that when standard
input ends. Prints a line for every hundred, then one of JSON.
"""

import http.client
import itertools
import json
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import numpy as np

from endpoints.reference import load_expected, load_test_rows

SENDERS = 4
PAUSE_S = 0.05  # of a sender between two requests: the load goes on as long as what happens meanwhile
LONGEST_S = 400.0
TIMEOUT_S = 60.0


class Tally:
    """What all senders saw."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.answered = 0
        self.lost: list[str] = []
        self.versions: Counter[str] = Counter()
        self.worst = 0.0  # difference from the reference of the version that the reply names
        self.slowest_s = 0.0

    def note(self, version: str, difference: float, seconds: float) -> None:
        with self.lock:
            self.answered += 1
            self.versions[version] += 1
            self.worst = max(self.worst, difference)
            self.slowest_s = max(self.slowest_s, seconds)
            if self.answered % 100 == 0:
                print(f"answered {self.answered}", flush=True)

    def note_loss(self, error: str) -> None:
        with self.lock:
            self.lost.append(error)


def send(address: str, numbers: "itertools.count[int]", least: int, ended: threading.Event, tally: Tally) -> None:
    """Ask until `least` requests are sent and `ended` is set."""
    url = urlsplit(address)
    rows, _ = load_test_rows()
    expected = {version: load_expected(version) for version in ("1", "2")}
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=TIMEOUT_S)
    stop_s = time.monotonic() + LONGEST_S
    while (number := next(numbers)) < least or not ended.is_set():
        if time.monotonic() > stop_s:
            tally.note_loss(f"not done within {LONGEST_S:.0f} s")
            break
        row = number % len(rows)
        tensor = {"name": "input", "shape": [1, 5], "datatype": "FP32", "data": rows[row]}
        body = json.dumps({"inputs": [tensor]})
        started_s = time.perf_counter()
        try:
            path = f"{url.path}/v2/models/my_model/infer"
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            content = reply.read()
            if reply.status != 200:
                raise ValueError(f"status {reply.status}: {content[:100]!r}")
            answer = json.loads(content)
            version = answer["model_version"]
            difference = np.abs(np.array(answer["outputs"][-1]["data"]) - expected[version][row]).max()
            tally.note(version, float(difference), time.perf_counter() - started_s)
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            tally.note_loss(f"{type(error).__name__}: {error}")
            connection.close()
        time.sleep(PAUSE_S)
    connection.close()


def main() -> None:
    address, least = sys.argv[1], int(sys.argv[2])
    tally, ended, numbers = Tally(), threading.Event(), itertools.count()
    senders = [threading.Thread(target=send, args=(address, numbers, least, ended, tally)) for _ in range(SENDERS)]
    for sender in senders:
        sender.start()
    sys.stdin.read()
    ended.set()
    for sender in senders:
        sender.join()
    print(json.dumps({
        "answered": tally.answered, "lost": tally.lost, "versions": tally.versions, "worst": tally.worst,
        "slowest_s": tally.slowest_s,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
