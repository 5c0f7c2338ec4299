"""A benchmark's result file: its form, and how it is written and read.

A file holds raw observations: every latency, as a histogram of whole microseconds (above a
millisecond of three digits), for each window of load. All figures are computed from it.
"""

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

RESULTS_DIR = Path(__file__).resolve().parent.parent / "results"
SAMPLE_PATH = RESULTS_DIR / "sample.json"
PEERS_PATH = RESULTS_DIR / "peers.json"
SCHEMA_VERSION = 2


class ResultError(RuntimeError):
    """A result file is missing or is not one; the message states the remedy."""


@dataclass
class Window:
    """What one stretch of load observed. Failed and wrong answers are counted apart and not among the latencies."""

    connections: int
    elapsed_s: float = 0.0  # first send to last reply
    latencies_s: np.ndarray = field(default_factory=lambda: np.empty(0))  # right answers, send to whole reply
    errors: Counter[str] = field(default_factory=Counter)  # requests by reason: "status 503", "connection closed"
    wrong: int = 0  # replies with status 200 that break the parity contract
    client_cpu_s: float = 0.0
    client_idle_s: float = 0.0  # open loop: of that, looking for something to do and finding nothing
    offered_rate: float = 0.0  # open loop: requests due per second
    lateness_s: np.ndarray = field(default_factory=lambda: np.empty(0))  # open loop: sent after it was due
    request_bytes: int = 0  # size of one request on the wire, headers included
    reply_bytes: int = 0  # size of the last reply's body
    connect_s: float = 0.0  # longest that a connection took to open, in this window or before it

    @property
    def rate(self) -> float:
        """Right answers per second."""
        return len(self.latencies_s) / self.elapsed_s if self.elapsed_s else 0.0


def encode_times(times_s: np.ndarray) -> list[list[int]]:
    """Return times as [[microseconds, count], ...]: whole microseconds below 1 ms, three digits (0.5 %) above."""
    microseconds = np.round(np.asarray(times_s) * 1e6).astype(np.int64)
    step = 10 ** np.maximum(0, np.floor(np.log10(np.maximum(microseconds, 1))) - 2).astype(np.int64)
    values, counts = np.unique((microseconds + step // 2) // step * step, return_counts=True)
    return [[int(value), int(count)] for value, count in zip(values, counts, strict=True)]


def decode_times(pairs: list[list[int]]) -> np.ndarray:
    """Return the times in seconds, ascending, (n,)."""
    if not pairs:
        return np.empty(0)
    values, counts = np.array(pairs, dtype=np.int64).T
    return np.repeat(values, counts) / 1e6


def encode_window(window: Window, **about: Any) -> dict[str, Any]:
    """Return one window as JSON-able values.

    `about` are the keys that the load generator does not know: endpoint, load ("closed" or "open"),
    round, rows_per_request, server_cpu_s and server_rss_bytes of the whole process tree, foreign_share.
    """
    return {
        **about,
        "connections": window.connections,
        "offered_rate": window.offered_rate,
        "elapsed_s": window.elapsed_s,
        "latency_us_counts": encode_times(window.latencies_s),
        "lateness_us_counts": encode_times(window.lateness_s),
        "errors": dict(window.errors),
        "wrong": window.wrong,
        "client_cpu_s": window.client_cpu_s,
        "client_idle_s": window.client_idle_s,
        "request_bytes": window.request_bytes,
        "reply_bytes": window.reply_bytes,
        "connect_s": window.connect_s,
    }


def write_result(result: dict[str, Any], path: Path) -> None:
    """Write the result file, whole or not at all."""
    write_whole(path, json.dumps(result, separators=(",", ":")) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write the file whole or not at all: an interrupted run leaves no half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_result(path: Path) -> dict[str, Any]:
    """Return a result file's content; ResultError if it is missing or has another form."""
    try:
        result = json.loads(path.read_text())
    except FileNotFoundError:
        raise ResultError(f"{path}: no such file; python benchmark_all.py makes one") from None
    except ValueError as error:
        raise ResultError(f"{path}: not JSON ({error}); was it cut off?") from None
    if not isinstance(result, dict) or result.get("schema_version") != SCHEMA_VERSION:
        raise ResultError(f"{path}: not a result file of schema version {SCHEMA_VERSION}; measure again")
    return result


def find_newest_result(machine: dict[str, Any]) -> Path:
    """Return the benchmark result in results/ that was written last on this machine; ResultError if there is none.

    `machine` are the facts of the environment that distinguish machines. The results that
    come with the repository are left out.
    """
    paths = [path for path in RESULTS_DIR.glob("*.json") if path not in (SAMPLE_PATH, PEERS_PATH)]
    for path in sorted(paths, key=lambda path: -path.stat().st_mtime):
        try:
            result = read_result(path)
            if "profile" in result["settings"] and machine.items() <= result["environment"].items():
                return path
        except (ResultError, KeyError, AttributeError, TypeError):
            continue  # what another command wrote
    raise ResultError(f"no result of this machine yet: run python benchmark_all.py, or give {SAMPLE_PATH}")
