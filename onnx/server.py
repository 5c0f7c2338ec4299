"""Serve a repository of ONNX models over HTTP and gRPC; ONNX Runtime has no
server.

    python server.py
    python server.py --config tuned.toml --port 8000 --device cpu

POST /predict            {"data": [[5 numbers], ...]}
                         -> {"predictions": [[P(malignant), P(benign)], ...]}
POST /predict/<version>  the same with that version; without one the default
                         answers, usually the newest
GET  /v2...              the Open Inference Protocol: health, metadata,
                         statistics and POST .../infer for every model
GET  /metrics, /docs     Prometheus metrics; the OpenAPI page

The protocol over gRPC is on the next port (--grpc-port). Serves any model in
models/<name>/<version>/model.onnx and follows changes there. Writes nothing.
Ctrl-C stops it.
"""

import argparse
import asyncio
import contextlib
import errno
import gc
import os
import signal
import socket
import sys
from pathlib import Path
from typing import NoReturn

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # else ONNX Runtime writes to ~/.cache and reports to Microsoft
try:
    import grpc_api
    import uvloop
    from http_messages import Limits
    from http_server import Server
    from onnx_inference import PROVIDERS, DeviceError
    from repository import Repository
    from serving import Serving
    from settings import Settings, SettingsError, read_settings
    from workers import open_shared, supervise
except ModuleNotFoundError as error:
    sys.exit(f"server: {error.name} is not installed in this Python; run `source ../.venv/bin/activate` first")

FOLDER = Path(__file__).resolve().parent


def stop(*_) -> NoReturn:
    """End with exit code 0, because a requested stop is no failure, and without waiting for threads that run a model.

    SystemExit would be lost now and then: Python ignores exceptions raised inside a destructor.
    """
    with contextlib.suppress(OSError):  # the terminal has gone
        os.write(sys.stdout.fileno(), b"stopped\n")  # not by print, which the signal may have interrupted
    os._exit(0)


def stop_worker(*_) -> NoReturn:
    """End a worker in the same way, without the last line: the supervisor prints it once."""
    os._exit(0)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port of HTTP (default: 8000)")
    parser.add_argument("--grpc-port", type=int, help="port of gRPC (default: the one after --port)")
    parser.add_argument(
        "--model-repository", type=Path, default=FOLDER / "models", help="folder of the models (default: models)"
    )
    parser.add_argument("--model", default="my_model", help="the model that /predict uses (default: my_model)")
    parser.add_argument("--only-model", metavar="NAME", help="serve only this model (default: all)")
    parser.add_argument(
        "--only-version", metavar="N", help="serve only this version, as behind a gateway (default: all)"
    )
    parser.add_argument(
        "--config", type=Path, default=FOLDER / "default.toml", help="settings (default: default.toml; see tuned.toml)"
    )
    parser.add_argument("--device", choices=list(PROVIDERS), help="where to compute (default: from the settings)")
    parser.add_argument("--intra-op-threads", type=int, help="threads in one operator (default: from the settings)")
    parser.add_argument("--batch-rows", type=int, help="most rows in a shared run (default: from the settings)")
    parser.add_argument("--workers", type=int, help="processes that serve (default: from the settings)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # started by the supervisor
    return parser


def main() -> int:
    parser = make_parser()
    arguments = parser.parse_args()
    if arguments.grpc_port is None:
        arguments.grpc_port = arguments.port + 1 if 0 < arguments.port < 65535 else 0
    for name in ("port", "grpc_port"):
        if not 0 <= getattr(arguments, name) <= 65535:
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"{flag} {getattr(arguments, name)}: expected 0 (any free port) to 65535")
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
    if settings.workers > 1 and not arguments.worker:
        return start_workers(arguments, settings.workers)
    repository = Repository(arguments.model_repository, settings, arguments.only_version, arguments.only_model)
    try:
        repository.scan()
    except DeviceError as error:
        print(f"server: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"server: {arguments.model_repository}: {error.strerror}; {advice(arguments)}", file=sys.stderr)
        return 1
    if not repository.models:
        wanted = " ".join(["no model", *([f"of version {arguments.only_version}"] if arguments.only_version else [])])
        print(f"server: {wanted} to serve in {arguments.model_repository}: {advice(arguments)}", file=sys.stderr)
        return 1
    try:
        listener = listen(arguments.host, arguments.port, arguments.worker)
    except OSError as error:
        tell_unusable(arguments.host, arguments.port, error)
        return 1
    serving = Serving(repository, arguments.model, settings)
    gc.collect()
    gc.freeze()  # loaded objects stay: the collector need not search them each time
    gc.set_threshold(50_000)  # a request makes some 50 objects and no cycles: the default, 700, is every 14 requests
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serve(arguments, settings, listener, repository, serving))


def advice(arguments: argparse.Namespace) -> str:
    own = arguments.model_repository == FOLDER / "models"
    return "run python convert_to_onnx.py" if own else "a model lies at <name>/<version>/model.onnx, version a number"


def listen(host: str, port: int, shares_port: bool) -> socket.socket:
    """Return a socket that is bound to the address; OSError if it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return open_shared(family, host, port) if shares_port else socket.create_server((host, port), family=family)


async def serve(
    arguments: argparse.Namespace, settings: Settings, listener: socket.socket, repository: Repository, serving: Serving
) -> int:
    """Answer requests and follow the repository until a signal; return the exit code."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    try:
        grpc_server, grpc_port = await grpc_api.start(serving, host, arguments.grpc_port, arguments.worker, settings)
    except OSError as error:
        tell_unusable(arguments.host, arguments.grpc_port, error, flag="--grpc-port")
        return 1
    limits = Limits(
        max_connections=settings.max_connections,
        max_body_bytes=settings.max_body_bytes,
        head_timeout_s=settings.body_timeout_s,
        body_timeout_s=settings.body_timeout_s,
    )
    providers = next(iter(next(iter(repository.models.values())).values())).providers
    served = f"models and versions: {repository.describe()} ({providers[0]})"
    address = f"http://{host}:{listener.getsockname()[1]}, gRPC on {host}:{grpc_port}"
    # In one write, so that a worker that ends at this moment leaves no half line before the next one's.
    print(f"{served}\nserving on {address}, Ctrl-C to stop\n", end="", flush=True)
    watcher = asyncio.create_task(repository.watch(serving.update))
    await Server(serving, limits).serve(listener, ended)
    watcher.cancel()
    await grpc_server.stop(grace=2)
    return (stop_worker if arguments.worker else stop)()


def start_workers(arguments: argparse.Namespace, workers: int) -> int:
    """Hold the ports and run the workers on them until a signal; return the exit code."""
    family = socket.AF_INET6 if ":" in arguments.host else socket.AF_INET
    with contextlib.ExitStack() as held:
        ports = []
        for flag, port in (("--port", arguments.port), ("--grpc-port", arguments.grpc_port)):
            try:
                with socket.create_server((arguments.host, port), family=family) as probe:
                    ports.append(probe.getsockname()[1])  # refused if other programs listen already
                # It never listens: it keeps the port ours between two workers.
                held.enter_context(open_shared(family, arguments.host, ports[-1]))
            except OSError as error:
                tell_unusable(arguments.host, port, error, flag)
                return 1
        print(f"{workers} workers on http://{arguments.host}:{ports[0]}, Ctrl-C to stop", flush=True)
        options = [*sys.argv[1:], "--port", str(ports[0]), "--grpc-port", str(ports[1]), "--worker"]
        code = supervise([sys.executable, str(FOLDER / "server.py"), *options], workers)
    if code == 0:
        stop()
    return code


def tell_unusable(host: str, port: int, error: OSError, flag: str = "--port") -> None:
    """Print why the address cannot be listened on."""
    if error.errno == errno.EADDRINUSE:
        problem = f"{host}:{port} is in use; stop the program that listens there, or choose another {flag}"
    else:
        problem = f"cannot listen on {host}:{port} ({error.strerror}); choose another --host or {flag}"
    print(f"server: {problem}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
