"""Answer a TorchServe worker's requests: JSON in, one forward pass for the whole batch, JSON out.

The worker calls `handle` with a batch, a list of requests from different clients (by default of one). The
replies are in the same order. A bad request gets a 400 that names the problem, and must not fail the others.

Over REST a request is `{"data": rows}`; over gRPC, or in a form, `rows` come in the field `data`.
There must be exactly one class in this file: TorchServe creates an instance of it.
"""

import json
import os
import zlib

# TorchServe imports ONNX Runtime if it is installed, which writes to ~/.cache and reports to Microsoft.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import torch
from ts.metrics.dimension import Dimension
from ts.torch_handler.base_handler import BaseHandler

FEATURES = ["mean radius", "mean texture", "mean smoothness", "mean concavity", "mean symmetry"]
CLASSES = ["malignant", "benign"]
CODINGS = ("gzip", "x-gzip", "deflate")  # RFC 9110, 8.4.1
MAX_BODY_BYTES = 6_553_500  # decompressed; TorchServe's limit for the body as sent (max_request_size)
PHRASES = {400: "Bad Request", 413: "Content Too Large", 415: "Unsupported Media Type"}
# The largest double that is not rounded to infinity: programs print the largest float32 as 3.4028235e38, a little more.
FLOAT32_MOST = 2.0**128 - 2.0**103 - 2.0**75


class CustomClassifier(BaseHandler):
    """`BaseHandler.initialize` loads model.py and the state dict; the rest is here.

    Each step takes and returns one entry per request: a tensor or, if the request is bad, a ValueError with a
    message, and with a status if that is not 400.
    """

    def handle(self, requests: list[dict], context) -> list[str]:
        """Return one JSON reply per request, and set its HTTP status and content type in `context`."""
        # Not BaseHandler.handle: there one client's `explain` or `describe` header decides for the whole batch.
        self.context = context
        if requests == [{}] and context.get_request_header(0, "describe") == "True":
            # GET /models/my_model?customized=true of the management API shows this.
            return [json.dumps({"features": FEATURES, "classes": CLASSES})]
        entries = self.inference(self.preprocess(requests))
        self.count(entries)
        return self.postprocess(entries)

    def preprocess(self, requests: list[dict]) -> list[torch.Tensor | ValueError]:
        """Return the rows of each request, float32 (rows, 5)."""
        entries = []
        for index, request in enumerate(requests):
            try:
                rows = read_rows(request, self.context.get_all_request_header(index))
                entries.append(torch.tensor(rows, dtype=torch.float32, device=self.device))
            except ValueError as error:
                entries.append(error)
        return entries

    def inference(self, entries: list) -> list:
        """Return the probabilities of each request, (rows, 2); all good requests share one forward pass."""
        good = [entry for entry in entries if not isinstance(entry, ValueError)]
        if not good:
            return entries
        with torch.inference_mode():
            probabilities = self.model(torch.cat(good))  # (rows of all good requests, 2)
        parts = iter(probabilities.split([len(rows) for rows in good]))
        return [entry if isinstance(entry, ValueError) else next(parts) for entry in entries]

    def count(self, entries: list) -> None:
        """Add to the metrics `predicted_rows` by likelier class, and `refused_requests`."""
        good = [entry for entry in entries if not isinstance(entry, ValueError)]
        counts = torch.cat(good).argmax(1).bincount(minlength=len(CLASSES)).tolist() if good else [0, 0]
        # A metric is a line on the worker's output, which TorchServe parses: so one a batch, and only for a change.
        for name, count in zip(CLASSES, counts, strict=True):
            if count:
                self.add("predicted_rows", count, Dimension("Class", name))
        if len(good) < len(entries):
            self.add("refused_requests", len(entries) - len(good))

    def add(self, name: str, count: int, *dimensions: Dimension) -> None:
        """Add `count` to the counter `name` of this model version."""
        version = Dimension("ModelVersion", self.manifest["model"]["modelVersion"])
        self.context.metrics.add_counter(name, count, dimensions=[version, *dimensions])

    def postprocess(self, entries: list) -> list[str]:
        """Return the body of each reply."""
        replies = []
        for index, entry in enumerate(entries):
            self.context.set_response_content_type(index, "application/json")
            if isinstance(entry, ValueError):
                message, status = (*entry.args, 400)[:2]
                self.context.set_response_status(status, PHRASES[status], index)
                if status == 415:
                    self.context.set_response_header(index, "Accept-Encoding", ", ".join(CODINGS))
                # The form of TorchServe's own errors.
                reply = {"code": status, "type": "BadRequestException", "message": message}
            else:
                reply = entry.tolist()
            replies.append(json.dumps(reply) + "\n")  # TorchServe's own replies end with a newline, too
        return replies


def read_rows(request: dict, headers: dict) -> list[list[float]]:
    """Return the rows of one request, n lists of 5 numbers; raise ValueError with the problem of a bad request.

    `request` maps field names to values: `body` is a REST body, `data` a gRPC or form field. TorchServe
    has already decoded a body of type application/json, unless it is malformed: then it is still bytes.
    """
    if "body" in request:
        part = headers.get("body")  # a str if the client sent a header named "body"
        content_type = part["content-type"] if isinstance(part, dict) else ""
        if content_type.partition(";")[0].strip().lower() != "application/json":
            raise ValueError("the content type must be application/json")
        encodings = [value for name, value in headers.items() if name.lower() == "content-encoding"]
        body = parse_json(decompress(request["body"], encodings[0]) if encodings else request["body"])
        if not isinstance(body, dict):
            raise ValueError(f'the body must be a JSON object {{"data": rows}}, not {describe(body)}')
        if "data" not in body:
            raise ValueError('the body has no key "data"')
        rows = body["data"]
    elif "data" in request:
        rows = parse_json(request["data"])
    else:
        raise ValueError('there is neither a JSON body (content type application/json) nor a field "data"')
    check_rows(rows)
    return rows


def decompress(body, encodings: str) -> bytes:
    """Return the decompressed body; `encodings` is its Content-Encoding, codings in the order of their application."""
    for word in reversed(encodings.lower().split(",")):
        if (word := word.strip()) in ("", "identity"):
            continue
        if word not in CODINGS:
            raise ValueError(f"the Content-Encoding {word!r} is not known; gzip and deflate are", 415)
        if not isinstance(body, (bytes, bytearray)):  # TorchServe has parsed it as JSON
            raise ValueError(f"the body is not {word}, as its Content-Encoding says")
        has_zlib_header = body[:1] and body[0] & 15 == 8 and int.from_bytes(body[:2]) % 31 == 0  # RFC 1950, 2.2
        is_raw = word == "deflate" and not has_zlib_header  # some clients send none
        rest, body, members = bytes(body), b"", 0
        while rest or not members:  # gzip may have several members: RFC 1952, 2.2
            decoder = zlib.decompressobj(wbits=-15 if is_raw else 47)  # 47: gzip or zlib, detected from the first bytes
            try:
                body += decoder.decompress(rest, MAX_BODY_BYTES + 1 - len(body))
            except zlib.error:
                raise ValueError(f"the body is not {word}, as its Content-Encoding says") from None
            if len(body) > MAX_BODY_BYTES:
                raise ValueError(f"the body is larger than {MAX_BODY_BYTES} bytes when decompressed", 413)
            rest, members = decoder.unused_data, members + 1
            if not decoder.eof or (rest and word == "deflate"):
                raise ValueError(f"the body's {word} is cut off, or something follows it")
    return body


def parse_json(value):
    """Return the JSON value in `value` if that is text or bytes, else `value`."""
    if not isinstance(value, (bytes, bytearray, str)):
        return value
    if not value:
        raise ValueError("the body is empty")
    try:
        return json.loads(value, parse_int=read_integer)
    except UnicodeDecodeError:
        raise ValueError("the body is not UTF-8") from None
    except RecursionError:
        raise ValueError("the body is not usable JSON: nested too deep") from None
    except ValueError as error:
        raise ValueError(f"the body is not valid JSON: {error}") from None


def read_integer(digits: str) -> int | float:
    """Return the number; one of thousands of digits, which Python refuses to read as an integer, is infinite."""
    return int(digits) if len(digits) < 1000 else float(digits)


def check_rows(rows) -> None:
    """Raise ValueError unless `rows` is a non-empty list of lists of 5 numbers that float32 can hold."""
    if not isinstance(rows, list):
        raise ValueError(f"data must be a list of rows, not {describe(rows)}")
    if not rows:
        raise ValueError("data is empty: it must hold at least one row")
    for i, row in enumerate(rows):
        if not isinstance(row, list):
            raise ValueError(f"data[{i}] must be a row, a list of {len(FEATURES)} numbers, not {describe(row)}")
        if len(row) != len(FEATURES):
            raise ValueError(f"data[{i}] has {len(row)} features, not {len(FEATURES)}")
        for j, value in enumerate(row):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"data[{i}][{j}] must be a number, not {describe(value)}")
            if not abs(value) <= FLOAT32_MOST:  # false for NaN as well
                raise ValueError(f"data[{i}][{j}] must be a finite number within float32, not {describe(value)}")


def describe(value) -> str:
    """Name a JSON value in JSON's terms, for an error message."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, (int, float)):
        return f"{value:.6g}" if isinstance(value, float) else "an integer that large"
    return {str: "a string", list: "a list", dict: "an object"}[type(value)]
