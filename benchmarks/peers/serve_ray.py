r"""Serve the ONNX model with Ray Serve.

    ../../.venv-peers/ray/bin/python serve_ray.py \
        [--port 8048] [--replica-port 8049] [--metrics-port 8050]
        [--stats-port 8051]

Run it in benchmarks/peers/. POST /predict/<version> {"data": [[5 numbers],
...]} -> {"predictions": [[2 numbers], ...]}. Starts a Ray cluster of one node,
without dashboard, in a folder of /tmp that it removes. Ctrl-C stops it.

It is set up according to Ray's guide to high throughput: HAProxy takes the requests,
where by default a proxy in Python does, and Serve's switches for small requests
are on. HAProxy's metrics and statistics listen on every interface, for which it
has no option.
"""

import argparse
import os
import secrets
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

os.environ.update(
    RAY_USAGE_STATS_ENABLED="0",  # no usage reports
    RAY_AUTH_MODE="token",  # else anyone on this machine may run code in the cluster
    RAY_AUTH_TOKEN=secrets.token_hex(32),  # else Ray writes one to ~/.ray
    RAY_worker_niceness="0",  # else replicas wait for all other programs: Ray gives them 15
    RAY_SERVE_THROUGHPUT_OPTIMIZED="1",
    RAY_SERVE_ENABLE_HA_PROXY="1",
    RAY_SERVE_HAPROXY_NBTHREAD="1",
    RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S="60",  # by default 5, and on one busy core each try is given up in the end
)
import ray
from onnx_model import VERSIONS, OnnxModel
from ray import serve
from starlette.requests import Request


@serve.deployment(num_replicas=1, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 1})
class Predictor:
    """Both versions of the model, in one replica."""

    def __init__(self) -> None:
        self.models = {version: OnnxModel(version) for version in VERSIONS}

    async def __call__(self, request: Request) -> dict[str, Any]:
        model = self.models[request.url.path.rpartition("/")[2]]
        rows = (await request.json())["data"]
        return {"predictions": model.predict(rows).tolist()}


def place_haproxy(arguments: argparse.Namespace, folder: Path) -> None:
    """Give Ray the ports and files of HAProxy in environment variables; by default all clusters have the same."""
    os.environ.update(
        RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT=str(arguments.replica_port),
        RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT=str(arguments.replica_port + 8),  # one whose start fails keeps its port
        RAY_SERVE_HAPROXY_METRICS_PORT=str(arguments.metrics_port),
        RAY_SERVE_HAPROXY_STATS_PORT=str(arguments.stats_port),
        RAY_SERVE_HAPROXY_CONFIG_FILE_LOC=str(folder / "haproxy.cfg"),
        RAY_SERVE_HAPROXY_SOCKET_PATH=str(folder / "admin.sock"),
        RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH=str(folder / "metrics.sock"),
        RAY_SERVE_HAPROXY_SERVER_STATE_BASE=str(folder),
        RAY_SERVE_HAPROXY_SERVER_STATE_FILE=str(folder / "server-state"),
    )


def serve_until_interrupted(port: int, folder: Path) -> None:
    """Start the cluster and the replica, and wait; KeyboardInterrupt on SIGINT and SIGTERM."""
    ray.init(
        address="local",
        num_cpus=1,
        num_gpus=0,
        object_store_memory=100 * 2**20,  # requests this small do not pass through it
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        _temp_dir=str(folder),
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # after ray.init, which sets its own
    logging = {"enable_access_log": False, "log_level": "WARNING"}
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config=logging)
    serve.run(Predictor.bind(), route_prefix="/predict", logging_config=logging)
    print(f"serving on http://127.0.0.1:{port}, Ctrl-C to stop", flush=True)
    signal.pause()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default, meaning in (
        ("--port", 8048, "HAProxy's port"),
        ("--replica-port", 8049, "port of the replica behind it"),
        ("--metrics-port", 8050, "port of HAProxy's metrics"),
        ("--stats-port", 8051, "port of HAProxy's statistics"),
    ):
        parser.add_argument(option, type=int, default=default, help=f"{meaning} (default: {default})")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    try:
        place_haproxy(arguments, folder)
        serve_until_interrupted(arguments.port, folder)
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
