"""Serve a repository of ONNX models over HTTP; ONNX Runtime brings no server.

    python server.py
    python server.py --config tuned.toml --port 8000 --device cpu

POST /predict            {"data": [[5 numbers], ...]}
                         -> {"predictions": [[P(malignant), P(benign)], ...]}
POST /predict/<version>  the same with that version; without one the default
                         answers, mostly the newest
GET  /v2...              the Open Inference Protocol: health, metadata and
                         POST .../infer for every model
GET  /metrics, /docs     Prometheus metrics; the OpenAPI page

Serves models/<name>/<version>/model.onnx, as convert_to_onnx.py writes them,
and follows changes there. Writes nothing. Ctrl-C stops it.
"""

import argparse
import asyncio
import contextlib
import errno
import gc
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # else ONNX Runtime writes to ~/.cache and reports to Microsoft
import onnxruntime as ort
import openapi
import uvicorn
from accepting import Server
from metrics import CONTENT_TYPE, Metrics
from models import BinaryReply, Refusal, Repository, encode
from onnx_inference import PROVIDERS, DeviceError
from settings import Settings, SettingsError, read_settings
from workers import open_shared, supervise

FOLDER = Path(__file__).resolve().parent

MAX_BODY_BYTES = 1_000_000

UVICORN_SETTINGS = {
    "loop": "uvloop",
    "http": "httptools",
    "ws": "none",
    "lifespan": "off",
    "access_log": False,
    "log_level": "warning",
    "server_header": False,
    "timeout_keep_alive": 75,  # longer than the idle timeout of most proxies: they close first, and no request is lost
    "timeout_graceful_shutdown": 2,
}

# A request's body, how much of it is JSON where that was said, and whether no other is under way, to the reply.
Handler = Callable[[bytes, int | None, bool], Awaitable[bytes | BinaryReply]]
JSON = b"application/json"


class IndexRequest(msgspec.Struct):
    """The body of POST /v2/repository/index."""

    ready: bool = False  # only what is ready


decode_index_request = msgspec.json.Decoder(IndexRequest).decode


class Route:
    """What answers one path and method."""

    def __init__(self, handler: Handler, model: str = "", version: str = "", content_type: bytes = JSON):
        self.handler = handler
        self.model = model  # "" where no model is asked: such requests are not counted
        self.version = version
        self.content_type = content_type


def make_routes(repository: Repository, model_name: str, metrics: Metrics | None) -> dict[str, dict[str, Route]]:
    """Return every path that is served, and what answers it by method."""

    def get(reply: bytes | Callable[[], bytes], content_type: bytes = JSON) -> dict[str, Route]:
        async def handler(*_) -> bytes:
            return reply() if callable(reply) else reply

        return {"GET": Route(handler, content_type=content_type)}

    models = repository.models

    async def ready(*_) -> bytes:
        if model_name not in models:
            raise Refusal(503, f"no version of {model_name} is served")
        return encode({"ready": True})

    async def index(body: bytes, *_) -> bytes:
        try:
            only_ready = bool(body) and decode_index_request(body).ready
        except msgspec.DecodeError as error:
            raise Refusal(400, str(error)) from None
        return encode([entry for entry in repository.index() if not only_ready or entry["state"] == "READY"])

    server = encode({"name": "onnxruntime", "version": ort.__version__, "extensions": ["binary_tensor_data"]})
    description = openapi.describe(models, repository.defaults, model_name, MAX_BODY_BYTES)
    routes = {
        "/v2": get(server),
        "/v2/": get(server),
        "/v2/health/live": get(encode({"live": True})),
        "/v2/health/ready": {"GET": Route(ready)},
        "/v2/repository/index": {"POST": Route(index)},
        "/openapi.json": get(encode(description)),
        "/docs": get(openapi.render_page(description), b"text/html; charset=utf-8"),
    }
    if metrics is not None:
        routes["/metrics"] = get(metrics.render, CONTENT_TYPE)
    for name, versions in models.items():
        for version, model in versions.items():
            paths = [f"/v2/models/{name}/versions/{version}"]
            if version == repository.defaults[name]:
                paths.append(f"/v2/models/{name}")
            infer = {"POST": Route(model.infer, name, version)}
            for path in paths:
                routes[path] = get(encode(model.describe(list(versions))))
                routes[f"{path}/ready"] = get(encode({"name": name, "ready": True}))
                routes[f"{path}/infer"] = infer
    for version, model in models.get(model_name, {}).items():
        routes[f"/predict/{version}"] = {"POST": Route(model.predict, model_name, version)}
        if version == repository.defaults[model_name]:
            routes["/predict"] = routes[f"/predict/{version}"]
    return routes


class Application:
    """The ASGI application: find the route, read the body, answer."""

    def __init__(self, repository: Repository, model_name: str, settings: Settings):
        self.repository = repository
        self.model_name = model_name
        self.body_timeout_s = settings.body_timeout_s
        self.under_way: set[asyncio.Task] = set()  # uvicorn's own, once it serves
        self.metrics = Metrics() if settings.metrics else None
        self.update()

    def update(self) -> None:
        """Serve what the repository holds now; requests under way keep the model that they have."""
        if self.metrics is not None:
            self.metrics.set_loaded(self.repository.models)
        self.routes = make_routes(self.repository, self.model_name, self.metrics)

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        started_s = time.perf_counter()
        status, headers, content_type, route = 200, (), JSON, None
        try:
            route = self.find_route(scope["path"], scope["method"])
            content_type = route.content_type
            if scope["method"] == "POST":
                json_bytes = read_headers(scope["headers"])
                message = await receive()
                body = message.get("body", b"")
                if message["type"] != "http.request" or message.get("more_body", False) or len(body) > MAX_BODY_BYTES:
                    body = await self.read_rest(message, receive)
                reply = await route.handler(body, json_bytes, len(self.under_way) < 2)
            else:
                reply = await route.handler(b"", None, True)
            if type(reply) is BinaryReply:
                content_type = b"application/octet-stream"
                headers = ((b"inference-header-content-length", b"%d" % reply.json_bytes),)
                reply = reply.body
        except ConnectionResetError:
            return  # the client has gone
        except Refusal as refusal:
            # A body that is still on its way is read and dropped by uvicorn, so a kept connection stays in step.
            status, headers, reply, content_type = (
                refusal.status,
                refusal.headers,
                encode({"error": str(refusal)}),
                JSON,
            )
        await send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(b"content-type", content_type), (b"content-length", b"%d" % len(reply)), *headers],
            }
        )
        await send({"type": "http.response.body", "body": reply})
        if self.metrics is not None and route is not None and route.model:
            self.metrics.observe(route.model, route.version, status, time.perf_counter() - started_s)

    async def read_rest(self, message: dict, receive: Callable) -> bytes:
        """Return the body that began with `message`.

        Refusal 413 as soon as it grows too large, 408 where it takes too long; ConnectionResetError if it breaks off.
        """
        body = b""
        try:
            async with asyncio.timeout(self.body_timeout_s):
                while message["type"] == "http.request":
                    body += message.get("body", b"")
                    if len(body) > MAX_BODY_BYTES:
                        raise too_large()
                    if not message.get("more_body", False):
                        return body
                    message = await receive()
        except TimeoutError:
            close = ((b"connection", b"close"),)
            raise Refusal(408, f"the body did not arrive within {self.body_timeout_s:g} s", close) from None
        raise ConnectionResetError

    def find_route(self, path: str, method: str) -> Route:
        """Return the route; Refusal 404 or 405 where there is none."""
        methods = self.routes.get(path)
        if methods is None:
            raise Refusal(404, self.explain_unknown(path))
        if method not in methods:
            allowed = ", ".join(methods)
            raise Refusal(405, f"{path} takes {allowed}, not {method}", ((b"allow", allowed.encode()),))
        return methods[method]

    def explain_unknown(self, path: str) -> str:
        """Return why `path` is not served: the model, the version, or the path itself."""
        found = re.match(r"/v2/models/([^/]+)(?:/versions/([^/]+))?", path) or re.match(r"/predict()/([^/]+)$", path)
        name, version = (found[1] or self.model_name, found[2]) if found else (None, None)
        models = self.repository.models
        if reason := self.repository.failures.get((name, version)):
            return f"version {version!r} of {name} is there and {reason}"
        if name is not None and name not in models:
            return f"model {name!r} is not served; there are {', '.join(models) or 'none'}"
        if version is not None and version not in models[name]:
            return f"version {version!r} of {name} is not served; there are {', '.join(models[name])}"
        return f"no such path: {path!r}; there are /predict, /predict/<version> and /v2"


def read_headers(headers: list[tuple[bytes, bytes]]) -> int | None:
    """Return how many bytes of the body are JSON where the binary tensor extension says so, else None.

    Raises Refusal 415 for a body that is not JSON and 413 for one announced as too large, before any is read.
    """
    content_type, json_bytes = JSON, None
    for name, value in headers:
        if name == b"content-type":
            content_type = value
        elif name == b"content-length" and int(value) > MAX_BODY_BYTES:
            raise too_large()
        elif name == b"inference-header-content-length":
            if not value.isdigit() or len(value) > 9:
                raise Refusal(400, f"Inference-Header-Content-Length is {value.decode('latin-1')!r}, expected a number")
            json_bytes = int(value)
    if content_type != JSON:
        word = content_type.partition(b";")[0].strip().lower()
        if word != JSON and (json_bytes is None or word != b"application/octet-stream"):
            raise Refusal(415, f"Content-Type is {content_type.decode('latin-1')!r}, expected 'application/json'")
    return json_bytes


def too_large() -> Refusal:
    return Refusal(413, f"the body is larger than {MAX_BODY_BYTES} bytes; send fewer rows at a time")


def stop(*_) -> None:
    """End with exit code 0: being asked to stop is no failure. uvicorn hands the signal on after its clean-up.

    Raising SystemExit instead would be lost now and then: Python ignores what is raised inside a destructor.
    """
    tell_stopped()
    os._exit(0)


def stop_worker(*_) -> None:
    """The same without the line: the supervisor prints it once."""
    os._exit(0)


def tell_stopped() -> None:
    """Print the last line; not by `print`, which a signal may have interrupted."""
    with contextlib.suppress(OSError):  # the terminal has gone
        os.write(sys.stdout.fileno(), b"stopped\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    parser.add_argument(
        "--model-repository", type=Path, default=FOLDER / "models", help="folder of the models (default: models)"
    )
    parser.add_argument("--model", default="my_model", help="the model behind /predict (default: my_model)")
    parser.add_argument(
        "--only-version", metavar="N", help="serve this version and no other, as behind a gateway (default: all)"
    )
    parser.add_argument(
        "--config", type=Path, default=FOLDER / "default.toml", help="settings (default: default.toml; see tuned.toml)"
    )
    parser.add_argument("--device", choices=list(PROVIDERS), help="where to compute (default: the settings')")
    parser.add_argument("--intra-op-threads", type=int, help="threads in one operator (default: the settings')")
    parser.add_argument("--batch-rows", type=int, help="rows of requests that share a run (default: the settings')")
    parser.add_argument("--workers", type=int, help="processes that serve (default: the settings')")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # started by the supervisor
    arguments = parser.parse_args()
    if not 0 <= arguments.port <= 65535:
        parser.error(f"--port {arguments.port}: expected 0 (any free port) to 65535")
    try:
        settings = read_settings(
            arguments.config,
            device=arguments.device,
            intra_op_threads=arguments.intra_op_threads,
            batch_rows=arguments.batch_rows,
            workers=arguments.workers,
        )
    except SettingsError as error:
        parser.error(str(error))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop_worker if arguments.worker else stop)

    family = socket.AF_INET6 if ":" in arguments.host else socket.AF_INET
    if settings.workers > 1 and not arguments.worker:
        return start_workers(arguments.host, arguments.port, family, settings.workers)
    repository = Repository(arguments.model_repository, settings, arguments.only_version)
    try:
        repository.scan()
    except DeviceError as error:
        print(f"server: {error}", file=sys.stderr)
        return 1
    models = repository.models
    if arguments.model not in models:
        wanted = "version" if arguments.only_version is None else f"version {arguments.only_version}"
        print(
            f"server: no {wanted} of {arguments.model} to serve in {arguments.model_repository}: "
            "run python convert_to_onnx.py",
            file=sys.stderr,
        )
        return 1
    try:
        if arguments.worker:
            listener = open_shared(family, arguments.host, arguments.port)
            listener.listen(2048)
        else:
            listener = socket.create_server((arguments.host, arguments.port), family=family)
    except OSError as error:
        tell_unusable(arguments.host, arguments.port, error)
        return 1

    application = Application(repository, arguments.model, settings)
    gc.collect()
    gc.freeze()  # what is loaded stays: the collector need not look through it again and again
    gc.set_threshold(50_000)  # a request makes some 50 objects and no cycles: 700, the default, is every 14 requests
    providers = next(iter(models[arguments.model].values())).predictor.providers
    served = f"models and versions: {repository.describe()} ({providers[0]})"
    address = f"http://{arguments.host}:{listener.getsockname()[1]}"
    # In one write: of a worker that is ended meanwhile no half line may stand before the next one's.
    print(f"{served}\nserving on {address}, Ctrl-C to stop\n", end="", flush=True)
    config = uvicorn.Config(application, limit_concurrency=settings.max_connections, **UVICORN_SETTINGS)
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(serve(Server(config), listener, repository, application))
    return 0


async def serve(server: Server, listener: socket.socket, repository: Repository, application: Application) -> None:
    """Answer, and follow the repository, until a signal ends both."""
    application.under_way = server.server_state.tasks
    watcher = asyncio.create_task(repository.watch(application.update))
    await server.serve(sockets=[listener])
    watcher.cancel()


def start_workers(host: str, port: int, family: socket.AddressFamily, workers: int) -> int:
    """Hold the port, run the workers on it until they are told to end; return the exit code."""
    try:
        with socket.create_server((host, port), family=family) as probe:  # refused where others listen already
            port = probe.getsockname()[1]
        shared = open_shared(family, host, port)  # never listens: it keeps the port ours between two workers
    except OSError as error:
        tell_unusable(host, port, error)
        return 1
    with shared:
        print(f"{workers} workers on http://{host}:{port}, Ctrl-C to stop", flush=True)
        command = [sys.executable, str(FOLDER / "server.py"), *sys.argv[1:], "--port", str(port), "--worker"]
        code = supervise(command, workers)
    if code == 0:
        tell_stopped()
    return code


def tell_unusable(host: str, port: int, error: OSError) -> None:
    """Print why the address cannot be listened on."""
    if error.errno == errno.EADDRINUSE:
        problem = f"{host}:{port} is in use; stop the program that listens there, or choose another --port"
    else:
        problem = f"cannot listen on {host}:{port} ({error.strerror}); choose another --host or --port"
    print(f"server: {problem}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
