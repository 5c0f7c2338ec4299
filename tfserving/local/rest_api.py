"""TensorFlow Serving's REST interface as an ASGI application."""

import asyncio
import functools
import re
import sys
import time
import urllib.parse
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import examples
import json_replies
import json_requests
import numpy as np
from google.protobuf import json_format
from metrics import Metrics
from servables import DEFAULT_SIGNATURE, Library, Servable, ServingError
from tensorflow_serving.apis import get_model_metadata_pb2

MAX_BODY_BYTES = MAX_UNZIPPED_BYTES = 100 * 2**20
# A larger body is answered on a thread, because decoding it would delay all other requests. A small one is
# answered at once, because passing it to a thread costs more than the answer.
MAX_INLINE_BYTES = 64 * 2**10

HTTP_STATUS = {
    "OK": 200,
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "OUT_OF_RANGE": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "ABORTED": 409,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 499,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}  # any other code is the server's fault: 500

ROUTES = {
    "POST": re.compile(
        r"/v1/models/(?P<name>[^/:]+)(?:/versions/(?P<version>\d+)|/labels/(?P<label>[^/:]+))?"
        r":(?P<verb>classify|regress|predict)",
        re.IGNORECASE | re.ASCII,
    ),
    "GET": re.compile(
        r"/v1/models(?:/(?P<name>[^/:]+))?(?:/versions/(?P<version>\d+)|/labels/(?P<label>[^/:]+))?"
        r"(?:/(?P<verb>metadata))?",
        re.IGNORECASE | re.ASCII,
    ),
}
RUNNING_VERBS = {"predict", "classify", "regress"}
JSON_HEADER = (b"content-type", b"application/json")
NOT_FOUND_PAGE = b"<html><head><title>404 Not Found</title></head><body><h1>Not Found</h1></body></html>"


@dataclass(frozen=True)
class Route:
    """The verb and the model of a request's path."""

    verb: str  # predict, classify, regress, metadata, status
    name: str
    version: int | None
    label: str | None


@functools.lru_cache(maxsize=1024)
def parse_route(method: str, target: str) -> Route:
    """Return the route of a path with its query string. ServingError if there is none."""
    match = ROUTES[method].fullmatch(target) if method in ROUTES else None
    if not match:
        raise ServingError("INVALID_ARGUMENT", f"Malformed request: {method} {target}")
    name, version, label, verb = match.group("name", "version", "label", "verb")
    if not name:
        raise ServingError("INVALID_ARGUMENT", "Missing model name in request.")
    if version and (len(version.lstrip("0")) > 19 or int(version.lstrip("0") or 0) >= 2**63):
        raise ServingError("INVALID_ARGUMENT", f"Failed to convert version: {version} to numeric.")
    return Route(
        verb=(verb or "status").lower(),
        name=urllib.parse.unquote(name),
        version=int(version.lstrip("0") or 0) if version else None,
        label=urllib.parse.unquote(label) if label else None,
    )


class RestApi:
    """The ASGI application. Its only state are the compiled readers."""

    def __init__(
        self,
        library: Library,
        timeout_s: float | None,
        threads: int,
        metrics: Metrics | None = None,
        metrics_path: str | None = None,
    ):
        """`timeout_s` limits answers on one of the `threads`; one given on the event loop cannot be interrupted."""
        self.library = library
        self.timeout_s = timeout_s
        self.executor = ThreadPoolExecutor(threads, "rest")
        self.metrics = metrics
        self.metrics_path = metrics_path
        self.readers: weakref.WeakKeyDictionary[Servable, json_requests.RowReader] = weakref.WeakKeyDictionary()

    async def __call__(self, scope, receive, send) -> None:
        message = await receive()
        body = message.get("body", b"")
        if message.get("more_body"):
            chunks, size = [body], len(body)
            while message.get("more_body"):
                message = await receive()
                chunks.append(message.get("body", b""))
                size += len(chunks[-1])
                if size > MAX_BODY_BYTES:  # the rest is read and discarded: closing now would lose the reply
                    await send_reply(send, 413, json_replies.write_error("The body is too large"), [JSON_HEADER])
                    return
            body = b"".join(chunks)
        if message["type"] == "http.disconnect":
            return
        for key, value in scope["headers"]:
            if key == b"content-encoding":  # of several, TensorFlow Serving reads the first
                body = unzip(body) if b"gzip" in value else body
                break

        status, reply, headers = await self.respond(scope, body)
        await send_reply(send, status, reply, headers)

    async def respond(self, scope, body: bytes) -> tuple[int, bytes, list]:
        """Return (HTTP status, body, headers) for one request."""
        target = scope["raw_path"].decode("latin-1")
        if target == self.metrics_path:
            return 200, self.metrics.write(), [(b"content-type", b"text/plain")]
        if not target.lower().startswith("/v1/"):
            return 404, NOT_FOUND_PAGE, [(b"content-type", b"text/html")]
        if scope["query_string"]:
            target = f"{target}?{scope['query_string'].decode('latin-1')}"
        started_s = time.perf_counter()
        route = None
        code = "OK"
        try:
            route = parse_route(scope["method"], target)
            reply = await self.answer(route, body)
        except ServingError as error:
            code, reply = error.code, json_replies.write_error(error.message)
        except TimeoutError:
            code, reply = "DEADLINE_EXCEEDED", json_replies.write_error("Timed out waiting for notification")
        except RecursionError:  # json_requests walks nested lists by recursion, as deep as the parser allows
            code, reply = "INVALID_ARGUMENT", json_replies.write_error("JSON Value is nested too deep")
        except Exception as error:  # noqa: BLE001 - any failure is this request's error only
            print(f"local server: {method_of(scope)}: {error!r}", file=sys.stderr, flush=True)
            code, reply = "INTERNAL", json_replies.write_error(f"Internal error: {type(error).__name__}")
        if self.metrics and route and route.verb in RUNNING_VERBS and route.name in self.library.models:
            self.metrics.record(route.name, route.verb, "REST", code, time.perf_counter() - started_s)
        return HTTP_STATUS.get(code, 500), reply, [JSON_HEADER]

    async def answer(self, route: Route, body: bytes) -> bytes:
        """Return the reply's body. Raises ServingError or TimeoutError."""
        method = getattr(self, route.verb)
        if route.verb in RUNNING_VERBS:
            try:
                servable = self.library.find(route.name, route.version, route.label)
            except ServingError:
                servable = None  # an error in the body is reported first
            is_batched = servable and self.library.batching and route.verb == "predict"
            is_large, is_slow = len(body) > MAX_INLINE_BYTES, servable and servable.is_slow
            if is_large or is_slow:
                async with asyncio.timeout(self.timeout_s):
                    in_thread = functools.partial(asyncio.get_running_loop().run_in_executor, self.executor)
                    if is_batched and is_slow:  # a large body for a quick graph is its own batch
                        return write(await run_batched(*await in_thread(self.read, route, body)))
                    return await in_thread(method, route, body)
            if is_batched:
                return write(await run_batched(*self.read(route, body)))
        return method(route, body)

    def predict(self, route: Route, body: bytes) -> bytes:
        servable, signature_name, inputs, by_row = self.read(route, body)
        return write((servable.predict(inputs, signature_name), by_row))

    def read(self, route: Route, body: bytes) -> tuple[Servable, str, dict[str, np.ndarray], bool]:
        """Return (servable, signature name, inputs, whether the reply is by row). Raises ServingError."""
        find_servable = functools.partial(self.library.find, route.name, route.version, route.label)
        try:
            servable = find_servable()
        except ServingError:
            servable = None
        if servable and (inputs := self._read_quickly(servable, body)):
            return servable, DEFAULT_SIGNATURE, inputs, True
        return json_requests.read_request(body, find_servable)

    def _read_quickly(self, servable: Servable, body: bytes):
        reader = self.readers.get(servable)
        if reader is None:
            if DEFAULT_SIGNATURE not in servable.signatures:
                return None
            reader = self.readers[servable] = json_requests.RowReader(servable.signatures[DEFAULT_SIGNATURE])
        return reader.read(body) if reader.usable else None

    def classify(self, route: Route, body: bytes) -> bytes:
        find_servable = functools.partial(self.library.find, route.name, route.version, route.label)
        return examples.write_classifications(examples.classify(*examples.read_json(body, find_servable)))

    def regress(self, route: Route, body: bytes) -> bytes:
        find_servable = functools.partial(self.library.find, route.name, route.version, route.label)
        return examples.write_regressions(examples.regress(*examples.read_json(body, find_servable)))

    def status(self, route: Route, body: bytes) -> bytes:
        return f"{to_json(self.library.status(route.name, route.version, route.label))}\n".encode()

    def metadata(self, route: Route, body: bytes) -> bytes:
        response = self.library.find(route.name, route.version, route.label).metadata()
        signatures = get_model_metadata_pb2.SignatureDefMap()
        response.metadata["signature_def"].Unpack(signatures)
        model_spec = to_json(response.model_spec)
        metadata = f'{{"signature_def": {to_json(signatures)}\n}}'
        return f'{{\n"model_spec":{model_spec}\n,\n"metadata": {metadata}\n}}\n'.encode()


async def run_batched(
    servable: Servable, signature_name: str, inputs: dict[str, np.ndarray], by_row: bool
) -> tuple[dict[str, np.ndarray], bool]:
    """Return the outputs of a run shared with other requests, and `by_row`."""
    return await servable.predict_batched(inputs, signature_name), by_row


def write(answer: tuple[dict[str, np.ndarray], bool]) -> bytes:
    """Return the reply of a predict: the outputs, by row or by column."""
    outputs, by_row = answer
    return json_replies.write_rows(outputs) if by_row else json_replies.write_columns(outputs)


def method_of(scope) -> str:
    return f"{scope['method']} {scope['raw_path'].decode('latin-1')[:100]}"


async def send_reply(send, status: int, reply: bytes, headers: list) -> None:
    """Send a complete reply."""
    headers = [*headers, (b"content-length", str(len(reply)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": reply})


def unzip(body: bytes) -> bytes:
    """Return the body unzipped; empty if it is not gzip or too large, as in TensorFlow Serving."""
    try:
        decompressor = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        unzipped = decompressor.decompress(body, MAX_UNZIPPED_BYTES)
    except zlib.error:
        return b""
    return unzipped if decompressor.eof and not decompressor.unused_data else b""


def to_json(message) -> str:
    """Return a protobuf message as TensorFlow Serving prints it: one space a level, also fields without a value."""
    return json_format.MessageToJson(
        message, indent=1, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
