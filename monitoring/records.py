"""Parse the record that HAProxy logs of a request: metadata, question and answer.

A record is a line of syslog (RFC 5424): `[p@1 us="…" body="…" reply="…"] {"time": …}`. The names before the object
are those of haproxy.cfg's log-format-sd, their values in base64; the object is the gateway's access log.
"""

import base64
import json
import math
import re
from dataclasses import dataclass
from itertools import chain

import exchanges
import grpc_exchanges
from exchanges import Rows, Unreadable

FEATURES = ["mean radius", "mean texture", "mean smoothness", "mean concavity", "mean symmetry"]
CLASSES = ["malignant", "benign"]
RECORD = re.compile(rb"\[p@1 ([^\]]*)\] (\{.*\})\s*$", re.DOTALL)
PAIR = re.compile(rb'(\w+)="([^"]*)"')
MOST_LOGGED = 20_000  # bytes of a body, as in haproxy.cfg
ABSENT = b"-"  # HAProxy's mark for a missing value; not base64
# gRPC's codes of a server's failure: UNKNOWN, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, INTERNAL, UNAVAILABLE, DATA_LOSS.
# Any other code but 0 is the client's fault.
FAILED_GRPC = {"2", "4", "8", "13", "14", "15"}


@dataclass
class Record:
    """One request through the gateway. Fields that do not apply are empty."""

    time_us: int  # when it came, in µs since 1970
    id: str
    server: str
    version: str  # of the replica that answered, or would have answered
    wanted: str  # the version before a fallback
    replica: str
    owner: str
    bucket: str
    protocol: str  # REST or gRPC
    path: str
    status: int  # of HTTP
    grpc_status: str
    seconds: float
    code: str = ""  # 2xx, 4xx, 5xx, or aborted: the client left
    is_prediction: bool = False  # else the gateway refused it before choosing a version, or the path predicts nothing
    rows: Rows = ()  # (n, 5), empty if they cannot be read
    probabilities: Rows = ()  # (n, 2), empty if there are none
    note: str = ""  # why rows or probabilities are empty

    def lines(self) -> str:
        """Return the record's lines in the log: one for each row, or one if the rows cannot be read."""
        count = max(1, len(self.rows), len(self.probabilities))
        line = {
            "time": self.time_us, "id": self.id, "row": 0, "rows": count, "server": self.server,
            "version": self.version, "wanted": self.wanted, "replica": self.replica, "owner": self.owner,
            "bucket": int(self.bucket) if self.bucket else None, "protocol": self.protocol, "status": self.status,
            "ms": round(self.seconds * 1e3, 3),
        }  # fmt: skip
        written = []
        for row in range(count):
            line["row"] = row
            line.update(zip(FEATURES, self.rows[row] if self.rows else [None] * len(FEATURES), strict=True))
            line.update(zip(CLASSES, self.probabilities[row] if self.probabilities else [None, None], strict=True))
            line["note"] = self.note
            written.append(_dump(line))
        return "\n".join(written) + "\n"


def read_record(line: bytes) -> Record:
    """Return the record in a line of HAProxy's log; raise ValueError if it is none of the gateway's."""
    found = RECORD.search(line)
    if not found:
        raise ValueError("no record of the gateway")
    said = json.loads(found[2])
    sent = {name.decode(): value for name, value in PAIR.findall(found[1])}
    try:
        text = {name: _decode(sent[name]).decode("latin-1") for name in sent if name not in ("us", "body", "reply")}
        is_grpc = text["type"].lower().startswith("application/grpc")
        words = ("server", "version", "wanted", "replica", "owner", "bucket", "path")
        record = Record(
            time_us=int(sent["us"]),
            id=said["id"],
            protocol="gRPC" if is_grpc else "REST",
            status=said["status"],
            grpc_status=text["grpc_status"],
            seconds=int(said["total_us"]) / 1e6,
            **{word: "" if said[word] in ("-", "<NOSRV>") else said[word] for word in words},
        )
        record.is_prediction = said["method"] == "POST" and _predicts(record)
        if record.is_prediction:
            _read_exchange(record, sent, text, is_cut=[said[name] > MOST_LOGGED for name in ("bytes_in", "bytes_out")])
        record.code = _find_code(record, said["end"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"a record without {error}") from None
    return record


def _predicts(record: Record) -> bool:
    """Return whether a request reached a server at a path that predicts."""
    if not (record.server and record.version and record.owner):
        return False
    if record.protocol == "gRPC":
        return record.path in (grpc_exchanges.PREDICT, grpc_exchanges.INFER, grpc_exchanges.PREDICTIONS)
    try:
        return bool(exchanges.find_form(record.path))
    except Unreadable:
        return False


def _read_exchange(record: Record, sent: dict[str, bytes], text: dict[str, str], is_cut: list[bool]) -> None:
    """Set the rows and the probabilities, or the note if there are none.

    HAProxy logs an empty body and one that it left out in the same way; `is_cut` tells them apart.
    """
    notes = []
    asked = {"content-type": "type", "content-encoding": "coding", "inference-header-content-length": "json_bytes"}
    answered = {"content-encoding": "reply_coding", "inference-header-content-length": "reply_json_bytes"}
    try:
        if sent["body"] == ABSENT and is_cut[0]:
            raise Unreadable("request too large to be logged")
        body = _decode(sent["body"])
        if record.protocol == "gRPC":
            rows = grpc_exchanges.read_rows(record.path, body)
        else:
            headers = {name: text[key] for name, key in asked.items() if text[key]}
            rows = exchanges.read_rows(record.path, headers, body)
        if len(rows[0]) != len(FEATURES):
            raise Unreadable(f"rows of {len(rows[0])} numbers")
        if not all(map(math.isfinite, chain.from_iterable(rows))):
            raise Unreadable("a number in a row is not finite")
        record.rows = rows
    except Unreadable as error:
        notes.append(_blank_quotes(error))
    if sent["body"] == ABSENT and is_cut[0]:  # then HAProxy has not kept the reply either
        record.note = "; ".join(notes)
        return
    try:
        if record.status != 200:
            raise Unreadable(f"status {record.status}")
        if record.grpc_status not in ("", "0"):
            raise Unreadable(f"gRPC status {record.grpc_status}")
        if sent["reply"] == ABSENT and is_cut[1]:
            raise Unreadable("reply too large to be logged")
        reply = _decode(sent["reply"])
        if record.protocol == "gRPC":
            if not reply:  # an error whose status came after the headers, which HAProxy does not read
                record.grpc_status = "2"
                raise Unreadable("no message in the reply")
            probabilities = grpc_exchanges.read_probabilities(record.path, reply)
        else:
            headers = {name: text[key] for name, key in answered.items() if text[key]}
            probabilities = exchanges.read_probabilities(record.path, headers, reply)
        if record.rows and len(record.rows) != len(probabilities):
            raise Unreadable(f"{len(probabilities)} answers to {len(record.rows)} rows")
        record.probabilities = probabilities
    except Unreadable as error:
        notes.append(_blank_quotes(error))
    record.note = "; ".join(notes)


def _find_code(record: Record, end: str) -> str:
    """Return how the request ended. Over gRPC a failed request has HTTP status 200, too."""
    if record.status < 100 or (end.startswith("C") and record.status >= 400):
        return "aborted"
    if record.status == 200 and record.grpc_status not in ("", "0"):
        return "5xx" if record.grpc_status in FAILED_GRPC else "4xx"
    return f"{record.status // 100}xx"


_dump = json.JSONEncoder(separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode


def _decode(value: bytes) -> bytes:
    return b"" if value == ABSENT else base64.b64decode(value, validate=True)


def _blank_quotes(error: Unreadable) -> str:
    """Return an error's message without the user's words: of what users send, only numbers are logged."""
    return re.sub(r"'[^']*'", "'…'", str(error))
