#!/usr/bin/env python
"""Serve SavedModels as tensorflow_model_server does, where that program is not to be had.

    python local_server.py --rest_api_port=8501 --model_name=my_model --model_base_path=$PWD/models/my_model

It takes tensorflow_model_server's own flags and speaks its REST and gRPC. It writes nothing, listens on
127.0.0.1 only, and ends on Ctrl-C. New version folders are served within a second.
Not built: metrics, unix sockets.
"""

import argparse
import asyncio
import contextlib
import gc
import os
import signal
import socket
import sys
from pathlib import Path

HOST = "127.0.0.1"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_S = 2.0  # what running requests get when the server is told to stop


def parse_bool(text: str) -> bool:
    if text.lower() in ("true", "1"):
        return True
    if text.lower() in ("false", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--port", type=int, default=8500, help="gRPC port, 0 for none (default: 8500)")
    parser.add_argument("--rest_api_port", type=int, default=0, help="REST port, 0 for none (default: 0)")
    parser.add_argument("--model_name", default="default", help="the model's name (default: default)")
    parser.add_argument("--model_base_path", help="the folder that holds the version folders (default: none)")
    parser.add_argument(
        "--model_config_file",
        type=Path,
        help="a models.config; --model_name and --model_base_path are then ignored (default: none)",
    )
    parser.add_argument(
        "--allow_version_labels_for_unavailable_models",
        type=parse_bool,
        nargs="?",
        const=True,
        default=False,
        help="accept labels in the config at the start (default: false)",
    )
    parser.add_argument(
        "--rest_api_timeout_in_ms",
        type=int,
        default=30_000,
        help="the longest that a large REST request may take (default: 30000)",
    )
    parser.add_argument(
        "--file_system_poll_wait_seconds",
        type=int,
        default=1,
        help="how often the base paths are searched for new and removed versions, 0 for never (default: 1)",
    )
    parser.add_argument(
        "--enable_batching",
        type=parse_bool,
        nargs="?",
        const=True,
        default=False,
        help="let concurrent requests share a run of the graph (default: false)",
    )
    parser.add_argument(
        "--batching_parameters_file", type=Path, help="how they share it, see batching.config (default: none)"
    )
    parser.error = lambda message: parser.exit(2, f"local server: {message}; see --help\n")
    arguments = parser.parse_args()
    if not (arguments.model_config_file or arguments.model_base_path):
        parser.error("give --model_base_path or --model_config_file")
    if not (arguments.port or arguments.rest_api_port):
        parser.error("give --port or --rest_api_port")
    if arguments.batching_parameters_file and not arguments.enable_batching:
        parser.error("--batching_parameters_file is set without setting --enable_batching to true")
    if arguments.port == arguments.rest_api_port:
        parser.error("--port and --rest_api_port cannot be the same")
    return arguments


def bind(flag: str, port: int) -> socket.socket:
    """Return a socket bound to `port`, not yet listening. Exits where the port is taken."""
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((HOST, port))
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        sys.exit(f"local server: {HOST}:{port} (--{flag}): {reason}; choose another port or stop what uses it")
    return bound


def read_models(arguments: argparse.Namespace) -> list:
    """Return one ModelConfig per model. Exits where the config is wrong or there is no version of any model."""
    from model_config import ConfigError, choose_versions, read_config, single_model_config

    if arguments.model_config_file:
        try:
            config = read_config(arguments.model_config_file, arguments.allow_version_labels_for_unavailable_models)
        except ConfigError as error:
            sys.exit(f"local server: {error}")
    else:
        config = single_model_config(arguments.model_name, arguments.model_base_path)
    models = list(config.model_config_list.config)
    if not any(choose_versions(model) for model in models):
        sys.exit(f"local server: no version folder in {models[0].base_path}; run python export_model.py")
    return models


def read_batching(arguments: argparse.Namespace):
    """Return the parameters of batching, None where it is off. Exits where the file is wrong."""
    from batching import BatchingError, BatchingParameters, read_parameters

    if not arguments.enable_batching:
        return None
    try:
        path = arguments.batching_parameters_file
        return read_parameters(path) if path else BatchingParameters()
    except BatchingError as error:
        sys.exit(f"local server: {error}")


def load_library(models: list, batching):
    """Load all models. A version that fails is told on stderr; exits where every one fails."""
    from servables import Library

    library = Library(batching)
    library.configs = models
    for change in library.poll():
        if "not loaded" in change:
            print(f"local server: {change}", file=sys.stderr)
    if not any(model.servables for model in library.models.values()):
        sys.exit("local server: no version could be loaded; run python export_model.py")
    return library


async def watch_folders(library, interval_s: float) -> None:
    """Load new versions and retire removed ones, for ever."""
    while True:
        await asyncio.sleep(interval_s)
        for change in await asyncio.to_thread(library.poll):
            print(f"local server: {change}", file=sys.stderr, flush=True)


async def serve(library, arguments: argparse.Namespace, rest_socket: socket.socket | None) -> None:
    """Serve until one of STOP_SIGNALS comes."""
    import uvicorn
    from grpc_api import start_server
    from rest_api import RestApi

    class RestServer(uvicorn.Server):
        def capture_signals(self):
            return contextlib.nullcontext()  # signals are handled here, for both protocols

        async def startup(self, sockets=None):
            await super().startup(sockets)
            rest_listens.set()

    stop, rest_listens = asyncio.Event(), asyncio.Event()
    for number in STOP_SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, stop.set)

    addresses = []
    async with asyncio.TaskGroup() as tasks:
        grpc_server = rest_server = None
        if arguments.port:
            address = f"{HOST}:{arguments.port}"
            grpc_server = await start_server(library, address)
            addresses.append(f"{address} (gRPC)")
        if rest_socket:
            config = uvicorn.Config(
                RestApi(library, arguments.rest_api_timeout_in_ms / 1000),
                http="httptools",
                ws="none",
                lifespan="off",
                access_log=False,
                log_level="warning",
                server_header=False,
                date_header=False,
                timeout_keep_alive=75,  # uvicorn's 5 s would close connections that a client thinks are open
                timeout_graceful_shutdown=int(GRACE_S),
            )
            rest_server = RestServer(config)
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
        watcher = None
        if arguments.file_system_poll_wait_seconds > 0:
            watcher = tasks.create_task(watch_folders(library, arguments.file_system_poll_wait_seconds))
        await stop.wait()
        if watcher:
            watcher.cancel()
        if rest_server:
            rest_server.should_exit = True
        if grpc_server:
            await grpc_server.stop(GRACE_S)
    print("local server: stopped", flush=True)


def main() -> None:
    arguments = parse_arguments()
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: sys.exit(0))  # until serve() handles them

    # The ports first: importing TensorFlow takes seconds, and a taken port should not cost them.
    rest_socket = bind("rest_api_port", arguments.rest_api_port) if arguments.rest_api_port else None
    if arguments.port:
        bind("port", arguments.port).close()  # gRPC binds by itself
    library = load_library(read_models(arguments), read_batching(arguments))
    gc.collect()
    gc.freeze()  # what is loaded stays loaded: the garbage collector need not walk it again
    import uvloop

    try:
        uvloop.run(serve(library, arguments, rest_socket))
    except* RuntimeError as group:
        sys.exit(f"local server: {group.exceptions[0]}")
    # TensorFlow's threads can outlive an orderly interpreter shutdown by seconds; nothing is left to write.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
