"""Keep the gateway's prediction log, its metrics and the drift detectors.

    python collect.py

Takes HAProxy's records at the Unix socket state/records.sock
(GATEWAY_PREDICTIONS of gateway.py) and writes one line per prediction into
state/predictions. Answers Prometheus on port 8405, prints the alerts that
Alertmanager posts there, and reads the labels that come later from
state/labels. `python monitor.py` starts it with Prometheus and Alertmanager.
"""

import argparse
import contextlib
import gc
import json
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, permutations
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

try:
    import numpy as np
    from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    from addresses import RECORDS_SOCKET, explain, join, listen, parse_address, parse_records_address, stop_listening
    from drift import Reference, Watch
    from prediction_log import (
        BESIDE_FIELDS,
        LARGEST_ROW,
        Count,
        LogError,
        PredictionLog,
        find_labels,
        open_view,
        utc_now,
    )
    from records import FEATURES, Record, read_record, write_lines
except ModuleNotFoundError as error:
    sys.exit(f"collect: {error.name} is not installed in this Python; run `source ../.venv/bin/activate` first")

FOLDER = Path(__file__).resolve().parent
DATA_DIR = FOLDER.parent / "data"
HTTP_ADDRESS = "127.0.0.1:8405"
LONGEST_RECORD = 1 << 16  # haproxy.cfg's are at most 65,535 bytes
READ_BYTES = 1 << 17
MOST_READS = 20  # of the same beginning of a record: its connection cannot hold more
# From a small model's time to a client's timeout; 50 ms is the objective of rules.yml.
BUCKETS_S = (
    0.0005, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0,
    5.0, 10.0, 30.0,
)  # fmt: skip
EDGES = [*map(str, BUCKETS_S), "+Inf"]
CODES = ("2xx", "4xx", "5xx")  # from 0 on: Prometheus sees no increase in a number's first value
COUNT_EVERY_S, LABELS_EVERY_S, KEEP_EVERY_S, TIDY_EVERY_S = 5.0, 2.0, 5.0, 60.0
MOST_UNCOUNTED = 1000  # records
# After each read, until some 60 records are there: a reader that is woken for every record costs the user's next
# request time, and many records at once cost less than one by one.
SHORTEST_WAIT_S, LONGEST_WAIT_S, RECORDS_AT_ONCE = 0.05, 0.25, 60
STOP_TIMEOUT_S = 5.0
ENDED = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR  # macOS has no POLLRDHUP
DRAIN_S = 1.0  # for HAProxy to end its connections
WATCHDOG_SILENCE_S = 180.0
MOST_DAYS = 36_500  # more, and no date is that old
LABELS_BYTES = 1 << 20  # read at once of each file
MOST_LABELS_KNOWN = 100_000  # so that a repeated label counts once
MOST_QUESTIONS = 3  # about a label, LABELS_EVERY_S apart: it may come before its prediction is in the log
PRINTED = {"firing": "FIRING", "resolved": "resolved"}


class Collector:
    """What one record, one label and one alert changes.

    A record is written into the log at once, and counted and watched with others, up to COUNT_EVERY_S later: that takes
    a tenth of the time. Prometheus sees the same, for `render` counts first.
    """

    def __init__(self, state: Path, keep_days: int):
        self.state = state
        self.log = PredictionLog(state / "predictions", keep_days)
        self.labels_dir = state / "labels"
        self.labels_dir.mkdir(exist_ok=True, mode=0o700)
        self.records = Count(state / "records.count")
        self.reference = Reference.read(DATA_DIR)
        self.deciles = np.quantile(self.reference.features, np.arange(1, 10) / 10, axis=1).T  # (5, 9)
        self.watches: dict[tuple[str, str], Watch] = {}
        self.offsets: dict[str, int] = {}  # bytes read of each file of labels
        self.last_labels: dict[tuple[str, str], float] = {}  # when one came, in s since 1970, by server and version
        self.labelled: OrderedDict[tuple[str, int], None] = OrderedDict()
        self.early: dict[tuple[str, int], tuple[int, int]] = {}  # target and questions, of labels without a prediction
        self.alerts: dict[str, tuple[str, str | None]] = {}  # status and beginning, as last posted, by fingerprint
        self.watchdog_s = 0.0  # when Alertmanager last said that it is there; 0: not yet
        self.uncounted: list[Record] = []
        self.durations: dict[tuple[str, str, str], np.ndarray] = {}  # by server, version, code: requests by bucket
        self.seconds: dict[tuple[str, str, str], float] = {}  # the same: the sum
        self.lock = threading.Lock()  # around counts and watches: the HTTP thread counts and resets, too
        self.keeping = threading.Lock()  # around collector.json
        self._children: dict = {}
        self._log_works = True
        self._make_metrics()
        self._load()

    def _make_metrics(self) -> None:
        self.registry = CollectorRegistry()
        of, by = {"registry": self.registry}, ["server", "version"]
        self.rows = Counter("gateway_rows", "Predicted rows by the class that they were given", [*by, "class"], **of)
        self.deciles_seen = Counter(
            "gateway_rows_by_decile", "Rows by the decile of train.csv that a feature lies in: a tenth each",
            [*by, "feature", "decile"], **of,
        )  # fmt: skip
        self.expected_right = Counter("gateway_expected_right", "The sum of max(p, 1 - p) over the rows", by, **of)
        self.fallbacks = Counter(
            "gateway_fallbacks", "Requests that another version answered than was wanted", [*by, "wanted"], **of
        )
        self.labels = Counter("gateway_labels", "Labels by whether the prediction was right", [*by, "right"], **of)
        self.unknown_labels = Counter("gateway_unknown_labels", "Labels of no prediction that is in the log", **of)
        self.last_label = Gauge("gateway_last_label_seconds", "When the last label came, since 1970", by, **of)
        self.unreadable = Counter("gateway_unreadable_records", "Lines that are no record of the gateway", **of)
        self.write_errors = Counter("gateway_log_write_errors", "Records that the disk did not take", **of)
        self.registry.register(self)

    def render(self) -> bytes:
        """Return all metrics as Prometheus reads them."""
        with self.lock:
            self.count()
        return generate_latest(self.registry)

    def collect(self):
        """Return what is counted here, for prometheus_client: the records, their times, and what the watches know."""
        total = CounterMetricFamily("gateway_records", "Requests in the prediction log, also before a restart")
        total.add_metric([], self.records.value)
        histogram = HistogramMetricFamily(
            "gateway_request_seconds", "From the request to the end of its reply, as its user sees it",
            labels=["server", "version", "code"],
        )  # fmt: skip
        by = ["server", "version", "kind"]
        alarm = GaugeMetricFamily("drift_alarm", "1 from an alarm until the reset", labels=[*by, "statistic"])
        progress = GaugeMetricFamily("drift_progress", "Evidence, logarithmic: 0 none, 1 an alarm", labels=by)
        seen = CounterMetricFamily("drift_observations", "Requests, or labels, that were watched", labels=by)
        with self.lock:
            for key, counts in self.durations.items():
                histogram.add_metric(key, list(zip(EDGES, counts.cumsum().tolist(), strict=True)), self.seconds[key])
            for key, watch in self.watches.items():
                for kind, detectors in watch.detectors.items():
                    seen.add_metric([*key, kind], detectors.observations)
                    progress.add_metric([*key, kind], float(detectors.progress.max()))
                    for name in watch.alarms[kind]:
                        alarm.add_metric([*key, kind, name], 1)
                    if not watch.alarms[kind]:
                        alarm.add_metric([*key, kind, "none"], 0)
        return [total, histogram, alarm, progress, seen]

    def _of(self, metric, *labels: str):
        """Return a metric with these labels, from a cache that is faster than the library's."""
        key = (metric, *labels)
        if (child := self._children.get(key)) is None:
            child = self._children[key] = metric.labels(*labels)
        return child

    def take(self, lines: list[bytes], known: frozenset[str] = frozenset()) -> None:
        """Take the gateway's lines: write them into the log, and keep them to be counted.

        Records with an id in `known` are left out. The lock is not held while the disk writes: a slow one delays no
        other thread.
        """
        records, written = [], []
        for line in lines:
            try:
                record = read_record(line)
                if record.id in known:
                    continue
                if record.is_prediction:
                    written += record.lines()
            except ValueError:
                self.unreadable.inc()
                continue
            records.append(record)
        try:
            if written:
                self.log.append(write_lines(written), utc_now())
            self.records.add(len(records))
            self._tell_about_the_disk(None)
        except OSError as error:
            self.write_errors.inc(len(records))
            self._tell_about_the_disk(error)
        with self.lock:
            self.uncounted += [record for record in records if record.is_prediction]
            if len(self.uncounted) >= MOST_UNCOUNTED:
                self.count()

    def _tell_about_the_disk(self, error: OSError | None) -> None:
        if self._log_works == (error is not None):
            self._log_works = error is None
            say("the prediction log is written again" if error is None else
                f"the prediction log cannot be written ({error.strerror}): rows are lost until it can")  # fmt: skip

    def count(self) -> None:
        """Count and watch the records that were taken; the caller holds the lock."""
        groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
        for record in self.uncounted:
            groups[record.server, record.version].append(record)
        self.uncounted = []
        for (server, version), records in groups.items():
            for answered, wanted in permutations(self.reference.benign, 2):
                self._of(self.fallbacks, server, answered, wanted)  # from 0 on, as CODES
            self._count_durations(server, version, records)
            for record in records:
                if record.wanted != version:
                    self._of(self.fallbacks, server, version, record.wanted).inc()
            if answered := [record for record in records if record.probabilities]:
                self._count_rows(server, version, answered)

    def _count_durations(self, server: str, version: str, records: list[Record]) -> None:
        by_code: dict[str, list[float]] = {code: [] for code in CODES}
        for record in records:
            by_code.setdefault(record.code, []).append(record.ms / 1e3)
        for code, seconds in by_code.items():
            counts = np.bincount(np.searchsorted(BUCKETS_S, seconds), minlength=len(EDGES))
            key = server, version, code
            self.durations[key] = self.durations.get(key, 0) + counts
            self.seconds[key] = self.seconds.get(key, 0.0) + sum(seconds)

    def _count_rows(self, server: str, version: str, records: list[Record]) -> None:
        """Count and watch the rows of requests that were answered."""
        key = server, version
        benign = np.array([pair[1] for record in records for pair in record.probabilities])
        positive = int((benign >= 0.5).sum())
        self._of(self.rows, *key, "benign").inc(positive)
        self._of(self.rows, *key, "malignant").inc(len(benign) - positive)
        self._of(self.expected_right, *key).inc(float(np.maximum(benign, 1 - benign).sum()))
        read = [record for record in records if record.rows]
        if not read:
            return
        if len(read) < len(records):
            benign = np.array([pair[1] for record in read for pair in record.probabilities])
        rows = np.array(list(chain.from_iterable(record.rows for record in read)))  # (rows, 5)
        for name, values, edges in zip(FEATURES, rows.T, self.deciles, strict=True):
            counts = np.bincount(np.searchsorted(edges, values, "right"))
            for decile in np.flatnonzero(counts).tolist():
                self._of(self.deciles_seen, *key, name, str(decile + 1)).inc(int(counts[decile]))
        starts = np.cumsum([0] + [len(record.rows) for record in read[:-1]])
        for kind, statistic in self._watch(*key).observe(rows, benign, starts):
            say(f"drift: {server} version {version}, {kind}: {statistic}")

    def _watch(self, server: str, version: str) -> Watch:
        if (watch := self.watches.get((server, version))) is None:
            watch = self.watches[server, version] = Watch(self.reference, version)
        return watch

    def look_for_labels(self) -> None:
        """Count the labels that have come, and note how far the files were read; neither if the question fails."""
        offsets = dict(self.offsets)
        labels = self._read_new_labels(offsets) | {key: target for key, (target, _) in self.early.items()}
        self._count_labels(self._find_predictions(labels) if labels else [], labels, offsets)

    def _read_new_labels(self, offsets: dict[str, int]) -> dict[tuple[str, int], int]:
        """Return the targets, by id and row, of the complete lines behind the offsets, which move on."""
        labels = {}
        for path in find_labels(self.labels_dir):
            start = offsets.get(path.name, 0)
            with contextlib.suppress(OSError), path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < start:
                    start = 0  # the file has been replaced
                file.seek(start)
                data = file.read(LABELS_BYTES)
                whole, end, _ = data.rpartition(b"\n")
                if not end and len(data) == LABELS_BYTES:
                    whole = data  # one line that is no label: what follows it is read
                offsets[path.name] = start + len(whole) + len(end)
                for line in whole.decode("utf-8-sig", errors="replace").split("\n"):
                    with contextlib.suppress(ValueError):
                        name, row, target = (field.strip(BESIDE_FIELDS) for field in line.split(","))
                        key = name.lower(), int(row)
                        if 0 <= key[1] <= LARGEST_ROW and target in ("0", "1") and key not in self.labelled:
                            labels.setdefault(key, int(target))
        return labels

    def _find_predictions(self, labels: dict[tuple[str, int], int]) -> list[tuple[str, int, str, str, int]]:
        """Return id, row, server, version, and 1 if the prediction was wrong, of labels whose prediction is logged."""
        with open_view(self.log.folder) as connection:
            connection.execute("SET threads = 1")  # users need the cores
            return connection.execute(
                "WITH asked AS (SELECT unnest(?) AS id, unnest(?) AS row, unnest(?) AS target) "
                "SELECT a.id, a.row, server, version, ((benign >= 0.5) <> (target = 1))::INTEGER "
                "FROM predictions p, asked a "
                "WHERE p.id = TRY_CAST(a.id AS UUID) AND p.row = a.row AND benign IS NOT NULL ORDER BY time, p.row",
                list(map(list, zip(*((*key, target) for key, target in labels.items()), strict=True))),
            ).fetchall()

    def _count_labels(
        self, found: list[tuple[str, int, str, str, int]], labels: dict[tuple[str, int], int], offsets: dict[str, int]
    ) -> None:
        groups: dict[tuple[str, str], list[int]] = defaultdict(list)
        for _, _, server, version, is_error in found:
            groups[server, version].append(is_error)
        missing = labels.keys() - {(name, row) for name, row, *_ in found}
        asked = {key: (labels[key], self.early.get(key, (0, 0))[1] + 1) for key in missing}
        early = {key: kept for key, kept in asked.items() if kept[1] < MOST_QUESTIONS}
        self.unknown_labels.inc(len(missing) - len(early))
        self.labelled.update(dict.fromkeys(key for key in labels if key not in early))
        while len(self.labelled) > MOST_LABELS_KNOWN:
            self.labelled.popitem(last=False)
        with self.lock:
            self.offsets, self.early = offsets, early
            for (server, version), errors in groups.items():
                self._of(self.labels, server, version, "no").inc(sum(errors))
                self._of(self.labels, server, version, "yes").inc(len(errors) - sum(errors))
                self._note_label(server, version, time.time())
                for kind, statistic in self._watch(server, version).observe_labels(np.array(errors)):
                    say(f"drift: {server} version {version}, {kind}: {statistic}")

    def _note_label(self, server: str, version: str, at_s: float) -> None:
        self.last_labels[server, version] = at_s
        self._of(self.last_label, server, version).set(at_s)

    def reset(self, server: str, version: str) -> int:
        """Reset the detectors of a server's version, an empty name meaning all; return how many were reset."""
        with self.lock:
            self.count()
            chosen = [w for (s, v), w in self.watches.items() if server in ("", s) and version in ("", v)]
            for watch in chosen:
                watch.reset()
        self.keep()
        return len(chosen)

    def keep(self) -> None:
        """Save the state that a restart needs, in one atomic step."""
        temporary = self.state / "collector.json.writing"
        with self.keeping, contextlib.suppress(OSError):  # a full disk: already reported by the log
            with self.lock:
                watches = [[*key, watch.dump()] for key, watch in self.watches.items()]
                last_labels = [[*key, at_s] for key, at_s in self.last_labels.items()]
                early = [[*key, *kept] for key, kept in self.early.items()]
                content = json.dumps(
                    {"watches": watches, "offsets": self.offsets, "last_labels": last_labels, "early": early}
                )
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(content)
            temporary.replace(self.state / "collector.json")

    def _load(self) -> None:
        path = self.state / "collector.json"
        try:
            kept = json.loads(path.read_text())
            self.offsets = {str(name): int(offset) for name, offset in kept["offsets"].items()}
            for server, version, watch in kept["watches"]:
                self._watch(server, version).load(watch)
            for server, version, at_s in kept.get("last_labels", []):
                self._note_label(server, version, float(at_s))
            self.early = {(str(name), int(row)): (int(to), int(n)) for name, row, to, n in kept.get("early", [])}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            say(f"{path} is damaged: the drift detectors begin again")
            self.watches, self.offsets, self.early = {}, {}, {}

    def take_alerts(self, posted: dict) -> None:
        """Print and keep what Alertmanager posts: each alert when it begins and when it ends."""
        for alert in posted["alerts"]:
            name, status = alert["fingerprint"], alert["status"]
            if self.alerts.get(name) == (status, alert.get("startsAt")):
                continue  # repeated while the alert lasts
            self.alerts[name] = status, alert.get("startsAt")
            labels, notes = alert["labels"], alert["annotations"]
            words = f"{labels.get('severity', '')} {labels['alertname']}: {notes.get('summary', '')}"
            runbook = f"; what to do: {notes['runbook']}" if status == "firing" and "runbook" in notes else ""
            say(f"{PRINTED.get(status, status)} {words}{runbook}")
            descriptor = os.open(self.state / "alerts.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(json.dumps({"time": time.time(), "status": status, **labels, **notes}) + "\n")

    def check_watchdog(self) -> None:
        """Print once that the Watchdog has been silent for too long."""
        if self.watchdog_s and time.monotonic() - self.watchdog_s > WATCHDOG_SILENCE_S:
            self.watchdog_s = 0.0
            say(f"no Watchdog for {WATCHDOG_SILENCE_S:.0f} s: Prometheus or Alertmanager fails, and no alert can come")


def split(data: bytes) -> tuple[list[bytes], int, bool]:
    """Return the whole records, each after its length (RFC 6587, octet counting), the number of bytes that they take,
    and whether more can follow: after nonsense no record begins anywhere."""
    lines, position = [], 0
    while (end := data.find(b" ", position, position + 7)) >= 0:
        if not data[position:end].isdigit() or (length := int(data[position:end])) > LONGEST_RECORD:
            return lines, position, False
        if len(data) < end + 1 + length:
            return lines, position, True
        lines.append(data[end + 1 : end + 1 + length])
        position = end + 1 + length
    size = data[position : position + 7]
    return lines, position, not size or (size.isdigit() and len(size) < 7)


@dataclass
class Connection:
    """One of HAProxy's."""

    socket: socket.socket
    start: bytes = b""  # of a record that the connection cannot hold as a whole: taken out
    reads: int = 0  # in a row in which no record was whole
    is_new: bool = True  # nothing has been taken yet


class Intake:
    """Reads HAProxy's records from all its connections, in one thread.

    What is read stays in its connection until it is in the log. monitor.py has a copy of each connection, and hands it
    to the collector that follows a killed one. What the killed one had not written is still in the connection; what it
    had written but not yet taken out is known by its ids.
    """

    def __init__(self, collector: Collector, source: socket.socket):
        """`source`: a listening socket, or a pair's half over which monitor.py hands over connections."""
        self.collector, self.source = collector, source
        self.are_kept = not source.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        self.known = collector.log.last_ids()
        self.connections: dict[int, Connection] = {}  # by file descriptor
        self.taken = bytearray(READ_BYTES)
        self.count = 0  # of records that have been read
        self.closing = threading.Event()
        self.wakened, self.waking = os.pipe()
        self.poll = select.poll()
        source.setblocking(False)
        for descriptor in (source.fileno(), self.wakened):
            self.poll.register(descriptor, select.POLLIN)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        wait_s, before = SHORTEST_WAIT_S, self.count
        while not self.closing.is_set():
            if not self._read_all():
                count, before = self.count - before, self.count  # since the last wait
                wait_s = min(wait_s * RECORDS_AT_ONCE / count, LONGEST_WAIT_S) if count else 0
                wait_s = max(wait_s, SHORTEST_WAIT_S)
                self.closing.wait(wait_s)
        with contextlib.suppress(KeyError):
            self.poll.unregister(self.source)
        stop_listening(self.source)
        if self.are_kept:  # the next collector continues where this one stops
            for descriptor, connection in list(self.connections.items()):
                self._read(descriptor, False)
                connection.socket.close()
            return
        for connection in self.connections.values():
            with contextlib.suppress(OSError):
                connection.socket.shutdown(socket.SHUT_WR)  # then HAProxy ends it, and keeps its further records
        self.poll.unregister(self.wakened)
        deadline_s = time.monotonic() + DRAIN_S
        while self.connections and time.monotonic() < deadline_s:
            self._read_all(DRAIN_S)
        for descriptor in list(self.connections):
            self._close(descriptor)

    def _read_all(self, timeout_s: float | None = None) -> bool:
        """Wait for records or a connection and take them; return whether there is more to read already."""
        has_more = False
        for descriptor, events in self.poll.poll(timeout_s and timeout_s * 1000):
            if descriptor in self.connections:
                has_more |= self._read(descriptor, bool(events & ENDED))
            elif descriptor != self.wakened:
                self._accept(descriptor)
        return has_more

    def _accept(self, descriptor: int) -> None:
        try:
            connection = receive(self.source) if self.are_kept else self.source.accept()[0]
        except OSError:  # no more files may be open
            return
        if connection is None:
            self.poll.unregister(descriptor)
            return
        self.connections[connection.fileno()] = Connection(connection)
        self.poll.register(connection, select.POLLIN | ENDED)

    def _read(self, descriptor: int, has_ended: bool) -> bool:
        """Take the records that have come; return whether there are as many as can be read at once."""
        connection = self.connections[descriptor]
        try:
            data = connection.start + connection.socket.recv(READ_BYTES, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            lines, length, can_follow = split(data)
            if lines:
                self.collector.take(lines, self.known if connection.is_new else frozenset())
                connection.is_new, connection.reads = False, 0
                self.count += len(lines)
                self._take_out(connection, length)
            elif data:
                connection.reads += 1
                if connection.reads == MOST_READS:
                    self._take_out(connection, len(data))
                    connection.start, connection.reads = data, 0
            if not can_follow:
                self.collector.unreadable.inc()
            elif not has_ended or lines:  # an ended one is read again until nothing comes
                return length > LONGEST_RECORD
        except BlockingIOError:
            return False
        except OSError:
            pass
        except Exception as error:  # noqa: BLE001  # whatever it is, HAProxy connects again
            self.collector.unreadable.inc()
            say(f"collector: a connection is given up, {type(error).__name__}: {error}")
        self._close(descriptor)
        return False

    def _take_out(self, connection: Connection, length: int) -> None:
        """Take bytes out of a connection, and of what was taken out before."""
        connection.socket.recv_into(self.taken, length - len(connection.start), socket.MSG_DONTWAIT)
        connection.start = b""

    def _close(self, descriptor: int) -> None:
        """End a connection, also for monitor.py, which has a copy, and drop what is left in it."""
        self.poll.unregister(descriptor)
        with self.connections.pop(descriptor).socket as connection, contextlib.suppress(OSError):
            # Whoever sends on is reset at once, and does not wait for the end of the connection's time-outs.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.shutdown(socket.SHUT_RDWR)
            while connection.recv_into(self.taken, READ_BYTES, socket.MSG_DONTWAIT):
                pass

    def close(self) -> None:
        """Take no more connections, and of each what has come."""
        self.closing.set()
        os.write(self.waking, b".")
        self.thread.join(STOP_TIMEOUT_S)


def receive(source: socket.socket) -> socket.socket | None:
    """Return HAProxy's next connection; None if it should come from monitor.py, which has ended."""
    _, descriptors, _, _ = socket.recv_fds(source, 1, 1)
    return socket.socket(fileno=descriptors[0]) if descriptors else None


class Handler(BaseHTTPRequestHandler):
    """GET /metrics; POST /alerts, /watchdog and /reset."""

    collector: Collector
    address: tuple[str, int]
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_GET(self) -> None:
        if urlsplit(self.path).path != "/metrics":
            return self._answer(404, "there are /metrics, and POST /alerts, /watchdog, /reset\n")
        return self._answer(200, self.collector.render().decode())

    def do_POST(self) -> None:
        target = urlsplit(self.path)
        if self.headers.get("Origin"):  # sent by a page in a browser
            return self._answer(403, "not for browsers\n")
        try:
            body = self.rfile.read(min(int(self.headers.get("Content-Length", 0)), 1 << 20))
            if target.path == "/alerts":
                self.collector.take_alerts(json.loads(body))
            elif target.path == "/watchdog":
                self.collector.watchdog_s = time.monotonic()
            elif target.path == "/reset":
                asked = parse_qs(target.query)
                count = self.collector.reset(*(asked.get(name, [""])[0] for name in ("server", "version")))
                return self._answer(200, f"{count} reset\n")
            else:
                return self._answer(404, "POST /alerts, /watchdog or /reset\n")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return self._answer(400, f"not what Alertmanager posts: {error!r}\n")
        return self._answer(200, "")

    def _answer(self, status: int, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


class HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def answer_all(self) -> None:
        """Answer requests until the process ends, as serve_forever does, which wakes up twice a second."""
        while True:
            self.handle_request()

    def handle_error(self, *_) -> None:
        """Ignore a client that disconnects."""


def repeat(task: Callable[[], None], every_s: float, ending: threading.Event) -> None:
    """Do a task again and again until `ending` is set; say once what keeps it from succeeding."""
    said = ""
    while not ending.wait(every_s):
        try:
            task()
            said = ""
        except Exception as error:  # noqa: BLE001  # whatever it is, it must be done again
            text = f"collector: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            if text != said:
                say(text)
            said = text


def start_tasks(collector: Collector, ending: threading.Event) -> list[threading.Thread]:
    """Count, look for labels and take care of the files, each in its own thread: none waits for another's disk."""

    def count() -> None:
        with collector.lock:
            collector.count()
        collector.check_watchdog()

    def tidy() -> None:
        for line in collector.log.tidy(utc_now()):
            say(f"prediction log: {line}")

    every = {
        count: COUNT_EVERY_S, collector.look_for_labels: LABELS_EVERY_S, collector.keep: KEEP_EVERY_S,
        tidy: TIDY_EVERY_S,
    }  # fmt: skip
    threads = [threading.Thread(target=repeat, args=(task, every_s, ending)) for task, every_s in every.items()]
    for thread in threads:
        thread.start()
    return threads


def say(text: str) -> None:
    printable = "".join(character if character.isprintable() else "?" for character in text)
    with contextlib.suppress(OSError):  # a full disk, or a reader that has gone: records are taken all the same
        sys.stdout.write(f"{time.strftime('%H:%M:%S')} {printable}\n")  # in one piece: several threads say something
        sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--state", type=Path, default=FOLDER / "state", help="folder for all files (default: state in this folder)"
    )
    parser.add_argument(
        "--records", type=parse_records_address, metavar="ADDRESS",
        help=f"for HAProxy: a Unix socket, or as in 127.0.0.1:8406 (default: {RECORDS_SOCKET} in the folder for files)",
    )  # fmt: skip
    parser.add_argument(
        "--http", type=parse_address, default=HTTP_ADDRESS, help=f"for Prometheus (default: {HTTP_ADDRESS})"
    )
    parser.add_argument(
        "--connections", type=int, metavar="FD",
        help="file descriptor over which monitor.py hands over HAProxy's connections (default: listen)",
    )  # fmt: skip
    parser.add_argument("--keep-days", type=int, default=30, help="days of predictions to keep (default: 30)")
    arguments = parser.parse_args()
    if not 1 <= arguments.keep_days <= MOST_DAYS:
        parser.error(f"--keep-days must be from 1 to {MOST_DAYS}")
    arguments.state = arguments.state.resolve()
    arguments.records = arguments.records or arguments.state / RECORDS_SOCKET
    os.umask(0o077)
    os.nice(10)  # on a busy machine users come first: records can wait in HAProxy
    try:
        collector = Collector(arguments.state, arguments.keep_days)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"collect: {error}")
    Handler.collector, Handler.address = collector, arguments.http
    try:
        http = HttpServer(arguments.http, Handler)
    except OSError as error:
        sys.exit(f"collect: {explain(arguments.http, error, '--http')}")
    try:
        handed_over = arguments.connections is not None
        source = socket.socket(fileno=arguments.connections) if handed_over else listen(arguments.records)
    except OSError as error:
        sys.exit(f"collect: {explain(arguments.records, error, '--records')}")
    gc.freeze()  # what is there by now stays: no collection of garbage need look at it
    gc.set_threshold(10_000)  # and of what comes, only forms of several parts leave circles
    stop, stopping = os.pipe()
    os.set_blocking(stopping, False)
    signal.set_wakeup_fd(stopping)  # written whichever thread the kernel gives the signal, unlike what a handler does
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    intake, ending = Intake(collector, source), threading.Event()
    threading.Thread(target=http.answer_all, daemon=True).start()
    tasks = start_tasks(collector, ending)
    say(f"collector: records on {join(arguments.records)}, metrics on http://{join(Handler.address)}/metrics")
    try:
        os.read(stop, 1)
    finally:
        intake.close()
        ending.set()
        for task in tasks:
            task.join()
        with collector.lock:
            collector.count()
        collector.keep()
        collector.log.close()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # Python's end gives handlers back their defaults, and takes a while


if __name__ == "__main__":
    try:
        main()
    except LogError as error:
        sys.exit(f"collect: {error}")
