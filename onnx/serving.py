"""The routes: every path and method of REST, and the models for gRPC."""

import re
import urllib.parse
import zlib
from collections.abc import Callable
from typing import Any

import grpc_api
import msgspec
import onnxruntime as ort
import openapi
from batching import Job, threads
from http_messages import JSON, Head, Refusal, Request
from metrics import CONTENT_TYPE, Metrics
from models import INLINE_BYTES, Codec, Model
from open_inference import LENGTH, OCTETS, InferCodec
from predict import PredictCodec
from repository import Repository
from settings import Settings
from tensors import encode

ENCODINGS = {"gzip": "gzip", "x-gzip": "gzip", "deflate": "deflate", "identity": "", "": ""}
NAMES_TOLD = 10  # of models, in the reply to a request for a missing one
EXTENSIONS = ["binary_tensor_data", "statistics"]  # not model_repository: the index is supported, loading is not


class IndexRequest(msgspec.Struct):
    """The body of POST /v2/repository/index."""

    ready: bool = False  # only versions that are ready


decode_index_request = msgspec.json.Decoder(IndexRequest).decode


class Route:
    """The route of one path and method."""

    labels: tuple[str, str] | None = None  # model and version of a prediction: these requests are counted

    def __init__(self, reply: bytes | Callable[[Request], bytes], content_type: bytes = JSON):
        self.reply = reply
        self.content_type = content_type

    def handle(self, request: Request) -> None:
        reply = self.reply
        request.answer(reply if isinstance(reply, bytes) else reply(request), self.content_type)


class ModelRoute(Route):
    """The route to one version of one model: read, run, write."""

    def __init__(self, model: Model, codec: Codec, largest: int):
        self.model = model
        self.codec = codec
        self.largest = largest  # bytes of a body
        self.labels = model.name, model.version

    def handle(self, request: Request) -> None:
        if len(request.body) > INLINE_BYTES or b"content-encoding" in request.head.headers:
            threads.submit(self.handle_apart, request)
            return
        job = self.codec.read(request)
        job.asker, job.done = request, self.finish
        self.model.batcher.add(job)

    def finish(self, job: Job, answer: Any) -> None:
        """Send the answer or the error."""
        if isinstance(answer, Exception):
            job.asker.fail(answer)
            return
        try:
            reply = self.codec.write(job.wanted, answer)
        except Exception as error:  # noqa: BLE001 - others wait for answers from the same run
            job.asker.fail(error)
        else:
            job.asker.answer(*reply)

    def handle_apart(self, request: Request) -> None:
        """Read, run and write in a thread."""
        try:
            if encoding := request.head.headers.get(b"content-encoding"):
                request.body = decompress(request.body, encoding, self.largest)
            reply = self.model.answer_apart(self.codec, request)
        except Exception as error:  # noqa: BLE001 - only the request can report it
            request.later(request.fail, error)
        else:
            request.later(request.answer, *reply)


class Serving:
    """The application of http_server.py: finds the route of a request, and refuses one without a route."""

    def __init__(self, repository: Repository, model_name: str, settings: Settings):
        self.repository = repository
        self.model_name = model_name
        self.settings = settings
        self.metrics = Metrics() if settings.metrics else None
        self.update()

    def update(self) -> None:
        """Serve the present models of the repository; requests under way keep their model.

        The repository is scanned in a thread; its result is taken over here all at once.
        """
        found = self.repository
        self.models, self.defaults, self.failures = found.models, found.defaults, found.failures
        if self.metrics is not None:
            self.metrics.set_loaded(self.models)
        self.messages = {
            key: (model, grpc_api.InferCodec(model))
            for versions in self.models.values()
            for model in versions.values()
            for key in [(model.name, model.version), *([(model.name, "")] if self.is_default(model) else [])]
        }
        self.routes = self.make_routes()

    def is_default(self, model: Model) -> bool:
        return self.defaults[model.name] == model.version

    def observe(self, route: Route, status: int, seconds: float) -> None:
        """Count an answered request to a model."""
        if route.labels is not None and self.metrics is not None:
            self.metrics.observe(route.labels, status, seconds)

    # REST

    def make_routes(self) -> dict[str, dict[bytes, Route]]:
        """Return every served path, and its routes by method."""

        def get(reply: bytes | Callable[[Request], bytes], content_type: bytes = JSON) -> dict[bytes, Route]:
            route = Route(reply, content_type)
            return {b"GET": route, b"HEAD": route}

        largest = self.settings.max_body_bytes
        description = openapi.describe(self.models, self.defaults, self.model_name, largest, self.metrics is not None)
        server = get(encode(self.describe()))
        routes = {
            "/v2": server,
            "/v2/": server,
            "/v2/health/live": get(encode({"live": True})),
            "/v2/health/ready": get(self.answer_ready),
            "/v2/repository/index": {b"POST": Route(self.answer_index)},
            "/openapi.json": get(encode(description)),
            "/docs": get(openapi.render_page(description), b"text/html; charset=utf-8"),
        }
        if self.metrics is not None:
            routes["/metrics"] = get(lambda _: self.metrics.render(), CONTENT_TYPE)
            routes["/v2/models/stats"] = get(lambda _: encode(self.statistics()))
        for name, versions in self.models.items():
            for version, model in versions.items():
                paths = {f"/v2/models/{name}/versions/{version}": version}
                if self.is_default(model):
                    paths[f"/v2/models/{name}"] = ""
                infer = {b"POST": ModelRoute(model, InferCodec(model), largest)}
                for path, asked in paths.items():
                    routes[path] = get(encode(self.describe_model(name, version)))
                    routes[f"{path}/ready"] = get(encode({"name": name, "ready": True}))
                    routes[f"{path}/infer"] = infer
                    if self.metrics is not None:
                        routes[f"{path}/stats"] = get(
                            lambda _, name=name, asked=asked: encode(self.statistics(name, asked))
                        )
                if name == self.model_name and model.is_rows:
                    routes[f"/predict/{version}"] = {b"POST": ModelRoute(model, PredictCodec(model), largest)}
                    if self.is_default(model):
                        routes["/predict"] = routes[f"/predict/{version}"]
        return routes

    def find(self, head: Head) -> Route:
        """Return the route; Refusal 404, 405 or 415 if there is none."""
        methods = None if "%" in head.target else self.routes.get(head.target)
        if methods is None:
            path = read_path(head.target)
            methods = self.routes.get(path)
            if methods is None:
                raise Refusal(404, self.explain_unknown(path))
        route = methods.get(head.method)
        if route is None:
            allowed, method = b", ".join(methods).decode(), head.method.decode("latin-1")
            raise Refusal(405, f"{read_path(head.target)} takes {allowed}, not {method}", f"allow: {allowed}\r\n")
        if head.method == b"POST":
            check_content(head.headers)
        return route

    def explain_unknown(self, path: str) -> str:
        """Return why `path` is not served: the model, the version, or the path itself."""
        found = re.match(r"/v2/models/([^/]+)(?:/versions/([^/]+))?", path) or re.match(
            r"/predict()(?:/([^/]+))?$", path
        )
        if found is None:
            return f"no such path: {path!r}; there are /predict, /predict/<version> and /v2"
        name, version = found[1] or self.model_name, found[2]
        try:
            self.find_model(name, version or "")
        except Refusal as refusal:
            return str(refusal)
        if path.startswith("/predict"):
            return f"{name} is not a model of rows (one FP32 tensor in, one out): use /v2/models/{name}/infer"
        return f"no such path: {path!r}; there are /v2/models/{name} and, behind it, /ready, /infer and /stats"

    def answer_ready(self, _request: Request) -> bytes:
        if not self.is_ready():
            raise Refusal(503, f"no version of {self.model_name} is served")
        return encode({"ready": True})

    def answer_index(self, request: Request) -> bytes:
        try:
            only_ready = bool(request.body) and decode_index_request(request.body).ready
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Refusal(400, str(error)) from None
        return encode(self.index(only_ready))

    # Shared by REST and gRPC

    def is_ready(self) -> bool:
        """Return whether the model of /predict is served, or any model if that one never was."""
        is_expected = (self.repository.folder / self.model_name).is_dir()
        return self.model_name in self.models or (bool(self.models) and not is_expected)

    def describe(self) -> dict:
        """Return the metadata of the server."""
        extensions = EXTENSIONS if self.metrics is not None else [name for name in EXTENSIONS if name != "statistics"]
        return {"name": "onnxruntime", "version": ort.__version__, "extensions": extensions}

    def describe_model(self, name: str, version: str) -> dict:
        """Return the metadata of a model, whose version may be ""; Refusal 404 if it is not served."""
        return self.find_model(name, version).describe(list(self.models[name]))

    def index(self, only_ready: bool) -> list[dict]:
        """Return every version, in the form of the Open Inference Protocol's repository index."""
        served = [
            {"name": name, "version": version, "state": "READY"}
            for name, versions in self.models.items()
            for version in versions
        ]
        failed = [
            {"name": name, "version": version, "state": "UNAVAILABLE", "reason": reason}
            for (name, version), reason in self.failures.items()
            if version not in self.models.get(name, {})
        ]
        return served + ([] if only_ready else failed)

    def statistics(self, name: str = "", version: str = "") -> dict:
        """Return the protocol's statistics of a version, a model or all models; Refusal 404 if there is none."""
        if self.metrics is None:
            raise Refusal(404, "metrics are off in the settings, and so are statistics")
        if name:
            self.find_model(name, version)
        wanted = [
            (model, each)
            for model, versions in self.models.items()
            for each in versions
            if name in ("", model) and version in ("", each)
        ]
        return {"model_stats": self.metrics.statistics(wanted)}

    def find_model(self, name: str, version: str) -> Model:
        """Return a model, its default version for ""; Refusal 404 with the reason if it is not served."""
        return self.find_messages(name, version)[0]

    def find_messages(self, name: str, version: str) -> tuple[Model, "grpc_api.InferCodec"]:
        """Return a model like `find_model`, and the codec of its gRPC messages."""
        found = self.messages.get((name, version))
        if found is not None:
            return found
        models, failures = self.models, self.failures
        failed = [each for each in failures if each[0] == name and version in ("", each[1])]
        if failed and (version or name not in models):
            raise Refusal(404, f"version {failed[-1][1]!r} of {name} is there and not served: {failures[failed[-1]]}")
        if name not in models:
            raise Refusal(404, f"model {name!r} is not served; there are {list_some(list(models))}")
        raise Refusal(404, f"version {version!r} of {name} is not served; there are {list_some(list(models[name]))}")

    def observe_model(self, model: Model, status: int, seconds: float) -> None:
        """Count an answered request over gRPC."""
        if self.metrics is not None:
            self.metrics.observe((model.name, model.version), status, seconds)


def list_some(names: list[str]) -> str:
    """Return the first names, and the number of the others."""
    more = f" and {len(names) - NAMES_TOLD} more" if len(names) > NAMES_TOLD else ""
    return (", ".join(names[:NAMES_TOLD]) or "none") + more


def read_path(target: str) -> str:
    """Return the path of a request's target, which may have a query, a host, and escapes."""
    if target[:8].lower().startswith(("http://", "https://")):
        target = "/" + target.split("/", 3)[3] if target.count("/") > 2 else "/"
    return urllib.parse.unquote(target.partition("?")[0])


def check_content(headers: dict[bytes, bytes]) -> None:
    """Refuse a body that, by its headers, is neither JSON nor JSON with tensors, or has an unknown encoding."""
    content_type = headers.get(b"content-type", JSON)
    if content_type != JSON:
        word = content_type.partition(b";")[0].strip().lower()
        if word != JSON and not (word == OCTETS and LENGTH in headers):
            raise Refusal(415, f"Content-Type is {content_type.decode('latin-1')!r}, expected 'application/json'")
    if b"content-encoding" in headers:
        word = headers[b"content-encoding"].strip().lower().decode("latin-1")
        if word not in ENCODINGS:
            accepted = "accept-encoding: gzip, deflate\r\n"
            raise Refusal(415, f"Content-Encoding is {word!r}, expected gzip or deflate", accepted)


def decompress(body: bytes, word: bytes, largest: int) -> bytes:
    """Return a body without its Content-Encoding; Refusal if it is malformed or becomes too large."""
    encoding = ENCODINGS[word.strip().lower().decode("latin-1")]
    if not encoding:
        return body
    has_zlib_header = body[:1] and body[0] & 15 == 8 and int.from_bytes(body[:2]) % 31 == 0  # RFC 1950, 2.2
    is_raw = encoding == "deflate" and not has_zlib_header  # some clients send none: RFC 9110, 8.4.1.2
    rest, plain, members = body, b"", 0
    while rest or not members:  # gzip may have several members: RFC 1952, 2.2
        decoder = zlib.decompressobj(wbits=-15 if is_raw else 47)
        try:
            plain += decoder.decompress(rest, largest + 1 - len(plain))
        except zlib.error:
            raise Refusal(400, f"the body is not {encoding}, although its Content-Encoding is") from None
        if len(plain) > largest:
            raise Refusal(413, f"the body is larger than {largest} bytes after its Content-Encoding is undone")
        rest, members = decoder.unused_data, members + 1
        if not decoder.eof or (rest and encoding == "deflate"):
            raise Refusal(400, f"the body's {encoding} is cut off, or something follows it")
    return plain
