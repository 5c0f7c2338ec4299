#!/usr/bin/env python
"""Serve SavedModels as tensorflow_model_server does, where it is not installed.

    python local/server.py --rest_api_port=8501 --model_name=my_model \\
        --model_base_path=$PWD/models/my_model

It takes tensorflow_model_server's flags and serves its REST and gRPC. It
writes nothing, listens on 127.0.0.1 only, and ends on Ctrl-C. New version
folders are served within a second. Not built: TFLite, the profiler, TLS.
"""

import argparse
import asyncio
import contextlib
import gc
import importlib.metadata
import os
import signal
import socket
import stat
import sys
from pathlib import Path

HOST = "127.0.0.1"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Read when TensorFlow is imported. oneDNN's kernels cost a small graph 22 µs a run, TensorFlow's own 12; with 1,024
# rows they are equal. Set it to 1 yourself for large matrices.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
MAX_CONNECTIONS = 512  # over REST; beyond them 503, so that no client waits long
GRACE_S = 5.0  # for open requests when the server is told to stop
# Flags of tensorflow_model_server 2.21 that the local server does not implement: refused, not ignored.
UNSUPPORTED = (
    "enable_grpc_healthcheck_service enable_per_model_batching_parameters enable_profiler "
    "enable_serialization_as_string enable_signature_method_name_check flush_filesystem_caches "
    "force_allow_any_version_labels_for_unavailable_models grpc_max_threads mixed_precision num_load_threads "
    "num_tflite_interpreters_per_pool num_tflite_pools num_unload_threads per_process_gpu_memory_fraction "
    "platform_config_file prefer_tflite_model remove_unused_fields_from_bundle_metagraph "
    "rest_api_enable_cors_support skip_initialize_tpu ssl_config_file tensorflow_inter_op_parallelism "
    "tensorflow_intra_op_parallelism tensorflow_session_config_file tensorflow_session_parallelism "
    "thread_pool_factory_config_file use_alts_credentials xla_cpu_compilation_enabled"
).split()


def parse_bool(text: str) -> bool:
    if text.lower() in ("true", "1"):
        return True
    if text.lower() in ("false", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def parse_channel_arguments(text: str) -> list[tuple[str, int | str]]:
    """Return the options in "key=value,key=value", integer values as int."""
    options = []
    for argument in filter(None, text.split(",")):
        key, equals, value = argument.partition("=")
        if not (key and equals):
            raise argparse.ArgumentTypeError(f"{argument!r} is not key=value")
        options.append((key, int(value) if value.removeprefix("-").isdecimal() else value))
    return options


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )

    def add(name: str, default, text: str, kind: type = int, shown: str = "") -> None:
        said = f"{text} (default: {shown or default})"
        parser.add_argument(f"--{name}", type=kind, default=default, metavar="VALUE", help=said)

    def add_switch(name: str, default: bool, text: str) -> None:
        said = str(default).lower()
        parser.add_argument(
            f"--{name}", type=parse_bool, nargs="?", const=True, default=default, metavar="BOOL",
            help=f"{text} (default: {said})",
        )  # fmt: skip

    add("port", 8500, "gRPC port, 0 for none")
    add("grpc_socket_path", "", "a Unix socket for gRPC in addition to the port", str, "none")
    add("grpc_channel_arguments", [], "gRPC's own options, key=value,key=value", parse_channel_arguments, "none")
    add("rest_api_port", 0, "REST port, 0 for none")
    threads = 4 * (os.cpu_count() or 1)
    add("rest_api_num_threads", threads, "threads for large REST requests and slow graphs")
    add("rest_api_timeout_in_ms", 30_000, "the longest that a REST request may take on one of them, 0 for no limit")
    add("model_name", "default", "the model's name", str)
    add("model_base_path", None, "the folder that holds the version folders", str, "none")
    add("model_config_file", None, "a models.config instead of the two above", Path, "none")
    add("model_config_file_poll_wait_seconds", 0, "how often that file is read again, 0 for never", float)
    add_switch("allow_version_labels_for_unavailable_models", False, "accept labels in the config at the start")
    add("file_system_poll_wait_seconds", 1, "how often the base paths are searched for versions, 0 for never", float)
    add("max_num_load_retries", 5, "how often a version that failed to load is tried again")
    add("load_retry_interval_micros", 60_000_000, "time between two attempts, if no file has changed before")
    add("saved_model_tags", "serve", "tags of the graph to load, separated by commas", str)
    add_switch("enable_signature_method_name_check", False, "classify and regress refuse signatures of another verb")
    add_switch("enable_model_warmup", True, "replay assets.extra/tf_serving_warmup_requests at load")
    add("num_request_iterations_for_warmup", 1, "how often each of them is replayed")
    add_switch("enable_batching", False, "let concurrent requests share a run of the graph")
    add("batching_parameters_file", None, "parameters of batching, see batching.config", Path, "none")
    add("monitoring_config_file", None, "serve Prometheus metrics, see monitoring.config", Path, "none")
    parser.add_argument("--version", action="store_true", help="print the version of TensorFlow and end")

    parser.error = lambda message: parser.exit(2, f"local server: {message}; see --help\n")
    arguments, unknown = parser.parse_known_args()
    if unknown:
        name = unknown[0].removeprefix("--").partition("=")[0]
        if name in UNSUPPORTED:
            parser.error(f"--{name} is a flag of tensorflow_model_server that the local server does not have")
        parser.error(f"unknown argument: {unknown[0]}")
    if arguments.version:
        print(f"local server\nTensorFlow Library: {importlib.metadata.version('tensorflow')}")
        sys.exit(0)
    if not (arguments.model_config_file or arguments.model_base_path):
        parser.error("give --model_base_path or --model_config_file")
    if not (arguments.port or arguments.grpc_socket_path or arguments.rest_api_port):
        parser.error("give --port, --grpc_socket_path or --rest_api_port")
    if arguments.batching_parameters_file and not arguments.enable_batching:
        parser.error("--batching_parameters_file is set without setting --enable_batching to true")
    if arguments.port and arguments.port == arguments.rest_api_port:
        parser.error("--port and --rest_api_port cannot be the same")
    if arguments.rest_api_num_threads < 1:
        parser.error("--rest_api_num_threads must be positive")
    if arguments.monitoring_config_file and not arguments.rest_api_port:
        parser.error("--monitoring_config_file needs --rest_api_port: the metrics are served there")
    return arguments


def free_socket_path(path: Path) -> None:
    """Remove an existing Unix socket: as with gRPC, a new server takes the path over. Exits if it is a file."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return
    if not stat.S_ISSOCK(mode):
        sys.exit(f"local server: {path} (--grpc_socket_path) is a file; choose another path")
    path.unlink()


def bind(flag: str, port: int) -> socket.socket:
    """Return a socket bound to `port`, not yet listening. Exits if the port is taken."""
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((HOST, port))
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        sys.exit(f"local server: {HOST}:{port} (--{flag}): {reason}; choose another port or stop what uses it")
    return bound


def read_if_there(path: Path | None) -> bytes | None:
    """Return the file's content, None if there is no file."""
    try:
        return path.read_bytes() if path else None
    except OSError:
        return None


def read_models(arguments: argparse.Namespace) -> list:
    """Return one ModelConfig per model. Exits if the config is wrong or no model has a version."""
    from model_config import ConfigError, choose_versions, read_config, single_model_config

    if arguments.model_config_file:
        try:
            config = read_config(arguments.model_config_file, arguments.allow_version_labels_for_unavailable_models)
        except ConfigError as error:
            sys.exit(f"local server: {error}")
    else:
        config = single_model_config(arguments.model_name, arguments.model_base_path)
    models = list(config.model_config_list.config)
    for model in models:
        with contextlib.suppress(OSError):
            if choose_versions(model):
                return models
    sys.exit(f"local server: no version folder in {models[0].base_path}; run python export_model.py")


def read_batching(arguments: argparse.Namespace):
    """Return the parameters of batching, None if it is off. Exits if the file is wrong."""
    from batching import BatchingError, BatchingParameters, read_parameters

    if not arguments.enable_batching:
        return None
    try:
        path = arguments.batching_parameters_file
        return read_parameters(path) if path else BatchingParameters()
    except BatchingError as error:
        sys.exit(f"local server: {error}")


def read_metrics(arguments: argparse.Namespace) -> str | None:
    """Return the URL path for the metrics, None if they are off. Exits if the file is wrong."""
    from metrics import MonitoringError, read_metrics_path

    if not arguments.monitoring_config_file:
        return None
    try:
        return read_metrics_path(arguments.monitoring_config_file)
    except MonitoringError as error:
        sys.exit(f"local server: {error}")


def load_library(models: list, batching, arguments: argparse.Namespace):
    """Load all models. A version that fails is reported on stderr; exits if every one fails."""
    from servables import Library, LoadSettings
    from warm_up import warm_up

    settings = LoadSettings(
        batching=batching,
        tags=tuple(arguments.saved_model_tags.split(",")),
        warm_up=warm_up,
        checks_method_names=arguments.enable_signature_method_name_check,
        warm_up_iterations=arguments.num_request_iterations_for_warmup if arguments.enable_model_warmup else 0,
        max_retries=arguments.max_num_load_retries,
        retry_interval_s=arguments.load_retry_interval_micros / 1e6,
    )
    library = Library(settings)
    library.configs = models
    for change in library.poll():
        if "not loaded" in change:
            print(f"local server: {change}", file=sys.stderr)
    if not any(model.servables for model in library.models.values()):
        sys.exit("local server: no version could be loaded; run python export_model.py")
    return library


async def watch_folders(library, interval_s: float) -> None:
    """Load new versions and retire removed ones until cancelled."""
    told = ""
    while True:
        await asyncio.sleep(interval_s)
        try:
            changes = await asyncio.to_thread(library.poll)
        except Exception as error:  # noqa: BLE001 - whatever is there, the next look follows
            changes = [] if told == repr(error) else [f"the versions cannot be looked at: {error!r}"]
            told = repr(error)
        for change in changes:
            print(f"local server: {change}", file=sys.stderr, flush=True)


async def watch_config(library, path: Path, taken: bytes | None, interval_s: float) -> None:
    """Apply the config file whenever it differs from `taken`, until cancelled. A wrong one is reported once.

    One that names a missing version is tried again each time until the version is there.
    """
    from model_config import ConfigError, read_config
    from servables import ServingError

    def reload() -> tuple[bool, list[str]]:
        """Return whether this content needs no further attempt, and the lines to print."""
        try:
            return True, library.reload(list(read_config(path, allow_labels=True).model_config_list.config))
        except ConfigError as error:
            return True, [str(error)]
        except ServingError as error:
            return False, [f"{path} not applied: {error.message}"]

    tried, is_done, told = taken, True, []
    while True:
        await asyncio.sleep(interval_s)
        with contextlib.suppress(OSError):  # it is being replaced
            content = await asyncio.to_thread(path.read_bytes)
            if content == tried and is_done:
                continue
            news = [] if content == tried else [f"{path} has changed"]
            tried = content
            is_done, changes = await asyncio.to_thread(reload)
            news += changes if news or changes != told else []
            told = changes
            for change in news:
                print(f"local server: {change}", file=sys.stderr, flush=True)


async def serve(
    library,
    arguments: argparse.Namespace,
    rest_socket: socket.socket | None,
    metrics_path: str | None,
    config: bytes | None,
) -> None:
    """Serve until one of STOP_SIGNALS comes. `config` is the config file as it was when `library` was loaded."""
    import uvicorn
    from connections import Server
    from grpc_api import start_server
    from metrics import Metrics
    from rest_api import RestApi

    class RestServer(Server):
        def capture_signals(self):
            return contextlib.nullcontext()  # signals are handled here, for both protocols

        async def startup(self, sockets=None):
            await super().startup(sockets)
            rest_listens.set()

    stop, rest_listens = asyncio.Event(), asyncio.Event()
    for number in STOP_SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, stop.set)

    metrics = Metrics() if metrics_path else None
    addresses = [f"{HOST}:{arguments.port}"] if arguments.port else []
    addresses += [f"unix:{arguments.grpc_socket_path}"] if arguments.grpc_socket_path else []
    async with asyncio.TaskGroup() as tasks:
        grpc_server = rest_server = None
        if addresses:
            grpc_server = await start_server(library, addresses, arguments.grpc_channel_arguments, metrics)
            addresses = [f"{address} (gRPC)" for address in addresses]
        if rest_socket:
            settings = uvicorn.Config(
                RestApi(
                    library,
                    arguments.rest_api_timeout_in_ms / 1000 if arguments.rest_api_timeout_in_ms > 0 else None,
                    arguments.rest_api_num_threads,
                    metrics,
                    metrics_path,
                ),
                http="httptools",
                ws="none",
                lifespan="off",
                access_log=False,
                log_level="error",
                limit_concurrency=MAX_CONNECTIONS,
                server_header=False,
                date_header=False,
                timeout_keep_alive=75,  # uvicorn's 5 s would close connections that clients still use
                timeout_graceful_shutdown=int(GRACE_S),
            )
            rest_server = RestServer(settings)
            tasks.create_task(rest_server.serve([rest_socket]))
            await rest_listens.wait()
            addresses.append(f"http://{HOST}:{arguments.rest_api_port} (REST)")

        served = ", ".join(
            f"{model.name} version{'s' if len(model.servables) > 1 else ''} "
            + " and ".join(map(str, sorted(model.servables)))
            for model in library.models.values()
            if model.servables
        )
        print(f"local server: {served} ready at {' and '.join(reversed(addresses))}", flush=True)
        watchers = []
        if arguments.file_system_poll_wait_seconds > 0:
            watchers.append(tasks.create_task(watch_folders(library, arguments.file_system_poll_wait_seconds)))
        if arguments.model_config_file and arguments.model_config_file_poll_wait_seconds > 0:
            interval_s = arguments.model_config_file_poll_wait_seconds
            watchers.append(tasks.create_task(watch_config(library, arguments.model_config_file, config, interval_s)))
        await stop.wait()
        for watcher in watchers:
            watcher.cancel()
        if rest_server:
            rest_server.should_exit = True
        if grpc_server:
            await grpc_server.stop(GRACE_S)
    # TensorFlow's threads can outlive an orderly interpreter shutdown by seconds; nothing is left to write. Before the
    # loop is closed, because a second signal would find no handler then.
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    arguments = parse_arguments()
    for number in STOP_SIGNALS:
        # Until serve() handles them. SystemExit would be lost now and then: in a destructor, or within an import.
        signal.signal(number, lambda *_: os._exit(0))

    # The ports first: importing TensorFlow takes seconds, too long for the error of a taken port.
    rest_socket = bind("rest_api_port", arguments.rest_api_port) if arguments.rest_api_port else None
    if arguments.port:
        bind("port", arguments.port).close()  # gRPC binds by itself
    if arguments.grpc_socket_path:
        free_socket_path(Path(arguments.grpc_socket_path))
    metrics_path = read_metrics(arguments)
    config = read_if_there(arguments.model_config_file)  # read before it is parsed, so that a later change is noticed
    library = load_library(read_models(arguments), read_batching(arguments), arguments)
    gc.collect()
    gc.freeze()  # loaded models stay: the garbage collector need not walk them again
    import uvloop

    try:
        uvloop.run(serve(library, arguments, rest_socket, metrics_path, config))
    except* RuntimeError as group:
        sys.exit(f"local server: {group.exceptions[0]}")


if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as error:
        sys.exit(f"local server: {error.name} is not installed; run `source ../.venv/bin/activate` first")
