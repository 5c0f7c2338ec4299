"""Parse the record that HAProxy logs of a request: metadata, question and answer.

A record is a line of syslog (RFC 5424): `[p@1 us="…" … body="…" reply="…"] {"time": …}`. The names before the object
are those of haproxy.cfg's log-format-sd, with what was sent in base64 and headers as HAProxy captures them,
`{application/json||}`; the object is the gateway's access log.
"""

import math
import re
from binascii import a2b_base64
from functools import lru_cache
from itertools import chain
from typing import Annotated
from urllib.parse import unquote

import msgspec
from msgspec import UNSET, Meta, UnsetType

import exchanges
import grpc_exchanges
from exchanges import Rows, Unreadable

FEATURES = ["mean radius", "mean texture", "mean smoothness", "mean concavity", "mean symmetry"]
CLASSES = ["malignant", "benign"]
MOST_LOGGED = 20_000  # bytes of a body, as in haproxy.cfg
# What such a body may stand for, or a few bytes would fill the disk: gzip and TensorFlow's tensors repeat a number.
MOST_DECOMPRESSED, MOST_ROWS = grpc_exchanges.MOST_DECOMPRESSED, 1000
PLAIN, NO_HEADS = b"{application/json||}", b"{|}"  # heads and reply_heads of almost all
ABSENT = b"-"  # HAProxy writes this for an absent value; it is not valid base64
NOWHERE = ("-", "<NOSRV>")  # the same, in the object
NO_ROW, NO_PAIR = [None] * len(FEATURES), [None] * len(CLASSES)
# gRPC's codes that say that the server failed: UNKNOWN, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, INTERNAL, UNAVAILABLE,
# DATA_LOSS. What else is not 0 is the client's doing.
GRPC_PATHS = {grpc_exchanges.PREDICT, grpc_exchanges.INFER, grpc_exchanges.PREDICTIONS, *grpc_exchanges.STREAMS}
FAILED_GRPC = {"2", "4", "8", "13", "14", "15"}


class Sent(msgspec.Struct, gc=False):
    """The values before the object."""

    heads: bytes  # of the request: ASKED, as captured; empty if it was no HTTP
    reply_heads: bytes  # ANSWERED, the same
    grpc_status: bytes  # in base64, as what follows
    body: bytes
    reply: bytes


SENT = b" ".join(b'%b="([^"]*)"' % name.encode() for name in Sent.__struct_fields__)
RECORD = re.compile(rb"\[p@1 us=\"(\d+|-)\" %b\] (\{.*\})\s*$" % SENT, re.DOTALL)


class Said(msgspec.Struct, gc=False):
    """What is read of the gateway's access log."""

    id: str
    method: str
    path: str
    server: str
    version: str
    wanted: str
    replica: str
    owner: str
    bucket: str
    status: int
    total_us: str
    bytes_in: int
    bytes_out: int
    end: str


class Line(msgspec.Struct, gc=False, rename=lambda name: name.replace("_", " ")):
    """A line of the prediction log; prediction_log.py has the same columns."""

    time: int
    id: str
    row: int
    rows: int
    server: str
    version: str
    wanted: str
    replica: str
    owner: str
    bucket: int | None
    protocol: str
    status: int
    ms: float
    mean_radius: float | None
    mean_texture: float | None
    mean_smoothness: float | None
    mean_concavity: float | None
    mean_symmetry: float | None
    malignant: float | None
    benign: float | None
    note: str


# What almost all bodies are, read ten times as fast as exchanges.py does: a table of numbers under one of these names.
# What does not fit, such as a row that is not in a list, goes to exchanges.py, which reads it or says why not.
Row = tuple[float, float, float, float, float]
Pair = tuple[Annotated[float, Meta(ge=0, le=1)], Annotated[float, Meta(ge=0, le=1)]]
Table, Pairs = Annotated[list[Row], Meta(min_length=1)], Annotated[list[Pair], Meta(min_length=1)]


class Asked(msgspec.Struct, gc=False):
    data: Table | UnsetType = UNSET
    features: Table | UnsetType = UNSET
    rows: Table | UnsetType = UNSET
    instances: Table | UnsetType = UNSET


class Answered(msgspec.Struct, gc=False):
    predictions: Pairs | UnsetType = UNSET
    probability: Pairs | UnsetType = UNSET


KEYS = {"predict": ("data", "features", "rows"), "torchserve": ("data",), "tfserving": ("instances",)}
REPLY_KEYS = {"predict": ("predictions", "probability"), "tfserving": ("predictions",)}

NO_TABLE = (msgspec.DecodeError, RecursionError)
read_said = msgspec.json.Decoder(Said).decode
read_asked = msgspec.json.Decoder(Asked).decode
read_answered = msgspec.json.Decoder(Answered).decode
read_pairs = msgspec.json.Decoder(Pairs).decode
write_lines = msgspec.json.Encoder().encode_lines  # of a list of Line


class Record(msgspec.Struct, gc=False):  # thousands a second, and none is part of a circle
    """One request through the gateway. What it did not come to is empty."""

    time_us: int  # when it came, in µs since 1970; 0 if it was no HTTP
    id: str
    bucket: str
    ms: float
    server: str
    version: str  # of the replica that answered, or would have answered
    wanted: str  # the version before a fallback
    replica: str
    owner: str
    protocol: str  # REST or gRPC
    path: str
    status: int  # of HTTP
    grpc_status: str
    code: str  # 2xx, 4xx, 5xx, or aborted: the client left
    is_prediction: bool  # else the gateway refused it before choosing a version, or the path predicts nothing
    rows: Rows = ()  # (n, 5), empty if they cannot be read
    probabilities: Rows = ()  # (n, 2), empty if there are none
    note: str = ""  # why rows or probabilities are empty

    def lines(self) -> list[Line]:
        """Return the record's lines in the log: one for each row, one for a request whose rows cannot be read."""
        count = max(1, len(self.rows), len(self.probabilities))
        bucket = int(self.bucket) if self.bucket else None
        return [
            Line(
                self.time_us, self.id, row, count, self.server, self.version, self.wanted, self.replica, self.owner,
                bucket, self.protocol, self.status, self.ms, *(self.rows[row] if self.rows else NO_ROW),
                *(self.probabilities[row] if self.probabilities else NO_PAIR), self.note,
            )
            for row in range(count)
        ]  # fmt: skip


def read_record(line: bytes) -> Record:
    """Return the record in a line of HAProxy's log; raise ValueError if it is none of the gateway's."""
    found = RECORD.search(line)
    if not found:
        raise ValueError("no record of the gateway")
    time_us, *values, said = found.groups()
    sent, said = Sent(*values), read_said(said)
    record = Record(
        0 if time_us == ABSENT else int(time_us), said.id, _blank(said.bucket),
        max(0, int(_blank(said.total_us) or 0)) / 1e3,  # the clock may have been set back
        *_read_common(
            said.server, said.version, said.wanted, said.replica, said.owner, said.path, said.status, said.end,
            sent.heads, sent.grpc_status,
        ),
    )  # fmt: skip
    if record.is_prediction and said.method != "POST":  # TorchServe predicts whatever the method is
        record.is_prediction = sent.body != ABSENT or said.bytes_in > MOST_LOGGED
    if record.path in grpc_exchanges.STREAMS:
        record.note = "stream"
    elif record.is_prediction:
        _read_exchange(record, sent, said)
    return record


@lru_cache(maxsize=1024)
def _read_common(
    server: str, version: str, wanted: str, replica: str, owner: str, path: str, status: int, end: str, heads: bytes,
    grpc_status: bytes,
) -> tuple:  # fmt: skip
    """Return Record's fields from server to is_prediction; from a cache, for thousands of records share them."""
    server, version, wanted, replica, owner, path = map(_blank, (server, version, wanted, replica, owner, path))
    is_grpc = _read_headers(heads, ASKED).get("content-type", "").lower().startswith("application/grpc")
    grpc_status = _decode_text(grpc_status)
    predicts = path in GRPC_PATHS if is_grpc else bool(_find_form(path))
    return (
        server, version, wanted, replica, owner, "gRPC" if is_grpc else "REST", path, status, grpc_status,
        _find_code(status, grpc_status, end), bool(server and version and owner and predicts),
    )  # fmt: skip


@lru_cache(maxsize=256)
def _find_form(path: str) -> str:
    """Return the form of the bodies at a path, empty if it predicts nothing; from a cache, for users' paths recur."""
    try:
        return exchanges.find_form(path)
    except Unreadable:
        return ""


def _read_exchange(record: Record, sent: Sent, said: Said) -> None:
    """Set the rows and the probabilities, and the note where there are none."""
    # HAProxy logs an empty body and one that it left out in the same way.
    is_left_out = sent.body == ABSENT and said.bytes_in > MOST_LOGGED
    try:
        if is_left_out:
            raise Unreadable("request too large to be logged")
        record.rows = _read_rows(record, sent, _decode(sent.body))
    except Unreadable as error:
        record.note = _blank_quotes(error)
    if is_left_out:  # then HAProxy has not kept the reply either
        return
    try:
        record.probabilities = _read_probabilities(record, sent, said)
    except Unreadable as error:
        record.note += ("; " if record.note else "") + _blank_quotes(error)


def _read_rows(record: Record, sent: Sent, body: bytes) -> Rows:
    if not (rows := read_usual_rows(record.path, sent, body)):
        if record.protocol == "gRPC":
            rows = grpc_exchanges.read_rows(record.path, body)
        else:
            headers = _read_headers(sent.heads, ASKED)
            body = exchanges.decompress(body, headers.pop("content-encoding", ""), MOST_DECOMPRESSED)
            rows = exchanges.read_rows(record.path, headers, body)
        if len(rows[0]) != len(FEATURES):
            raise Unreadable(f"rows of {len(rows[0])} numbers")
        if not all(map(math.isfinite, chain.from_iterable(rows))):
            raise Unreadable("a number in a row is not finite")
    _check_count(rows)
    return rows


def _read_probabilities(record: Record, sent: Sent, said: Said) -> Rows:
    if record.status != 200:
        raise Unreadable(f"status {record.status}")
    if record.grpc_status not in ("", "0"):
        raise Unreadable(f"gRPC status {record.grpc_status}")
    if sent.reply == ABSENT and said.bytes_out > MOST_LOGGED:
        raise Unreadable("reply too large to be logged")
    reply = _decode(sent.reply)
    if record.protocol == "gRPC":
        if not reply:  # an error whose status came after the headers, which HAProxy does not read
            record.grpc_status = "2"
            record.code = _find_code(record.status, record.grpc_status, said.end)
            raise Unreadable("no message in the reply")
        pairs = grpc_exchanges.read_probabilities(record.path, reply)
    elif not (pairs := read_usual_pairs(record.path, sent, reply)):
        headers = _read_headers(sent.reply_heads, ANSWERED)
        reply = exchanges.decompress(reply, headers.pop("content-encoding", ""), MOST_DECOMPRESSED)
        pairs = exchanges.read_probabilities(record.path, headers, reply)
    if record.rows and len(record.rows) != len(pairs):
        raise Unreadable(f"{len(pairs)} answers to {len(record.rows)} rows")
    _check_count(pairs)
    return pairs


def _check_count(table: Rows) -> None:
    if len(table) > MOST_ROWS:
        raise Unreadable(f"{len(table)} rows are too many to be logged")


def _find_code(status: int, grpc_status: str, end: str) -> str:
    """Return how the request ended. Over gRPC a failed request has HTTP status 200, too."""
    if status < 100 or (end.startswith("C") and status >= 400):
        return "aborted"
    if end[:2] in ("SD", "sD"):  # the server broke its reply off, or stopped sending it, after the status
        return "5xx"
    if status == 200 and grpc_status not in ("", "0"):
        return "5xx" if grpc_status in FAILED_GRPC else "4xx"
    return f"{status // 100}xx"


ANSWERED = ("content-encoding", "inference-header-content-length")
ASKED = ("content-type", *ANSWERED)


def read_usual_rows(path: str, sent: Sent, body: bytes) -> list[Row]:
    """Return the rows of a body as almost all are, (n, 5), which JSON keeps finite; nothing of any other."""
    if sent.heads == PLAIN and body.isascii():  # msgspec skips text unseen
        try:
            asked, form = read_asked(body), _find_form(path)
            for key in KEYS.get(form, ()):
                if (table := getattr(asked, key)) is not UNSET and (form != "tfserving" or _has_once(body, key)):
                    return table
        except NO_TABLE:
            pass
    return []


def _has_once(body: bytes, key: str) -> bool:
    """Whether one member at most has this name: of several TensorFlow Serving reads the first, msgspec the last."""
    return body.count(f'"{key}"'.encode()) == 1 and b"\\" not in body  # nor is a name escaped


def read_usual_pairs(path: str, sent: Sent, reply: bytes) -> list[Pair]:
    """Return the probabilities of a reply as almost all are, (n, 2); nothing of any other."""
    if sent.reply_heads == NO_HEADS and reply.isascii():
        form = _find_form(path)
        try:
            if form != "inference" and reply.startswith(b"["):
                return read_pairs(reply)
            answered = read_answered(reply)
            for key in REPLY_KEYS.get(form, ()):
                if (pairs := getattr(answered, key)) is not UNSET:
                    return pairs
        except NO_TABLE:
            pass
    return []


def _blank(word: str) -> str:
    return "" if word in NOWHERE else word


def _read_headers(heads: bytes, names: tuple[str, ...]) -> dict[str, str]:
    """Return the captured headers that are there; ValueError if they are not as many as names."""
    if not heads:
        return {}
    values = zip(names, heads.decode("ascii").removeprefix("{").removesuffix("}").split("|"), strict=True)
    return {name: unquote(value.replace("%", "%25").replace("#", "%"), "latin-1") for name, value in values if value}


def _decode(value: bytes) -> bytes:
    return b"" if value == ABSENT else a2b_base64(value, strict_mode=True)


@lru_cache(maxsize=256)
def _decode_text(value: bytes) -> str:
    return _decode(value).decode("latin-1")


def _blank_quotes(error: Unreadable) -> str:
    """Return an error's message without the user's words: of what users send, only numbers are logged."""
    return re.sub(r"'[^']*'", "'…'", str(error))
