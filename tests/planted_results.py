"""Results whose truth is known: servers with planted rates, percentiles, memory and starts."""

from dataclasses import dataclass, field

import numpy as np

from figures.result_file import SCHEMA_VERSION, Window, encode_window

ROUNDS = 8
OBJECTIVE_P99_S = 0.05
CONNECTIONS = (1, 16, 64)


@dataclass
class Planted:
    """One server. `sweep` maps an offered rate to its p99 in s, None where the server does not keep up."""

    kind: str = "native"
    sweep: dict[float, float | None] = field(default_factory=dict)
    p50_s: float = 0.001  # at one connection
    flat_out: float = 1000.0  # requests/s at 64 connections
    noise: float = 0.02  # of the rounds' rates
    memory_mb: float = 100.0
    start_s: float = 1.0
    cpu_s: float = 0.0005  # a request
    requests: int = 500  # of each round of the sweep
    protocol: str = "REST"
    variant: str = ""
    server_us_per_row: float | None = None  # at 1,024 rows a request


def make_result(servers: dict[str, Planted], seed: int = 0) -> dict:
    """Return a result file's content in which the servers are as planted."""
    random = np.random.default_rng(seed)
    endpoints, windows = {}, []
    for name, planted in servers.items():
        endpoints[name] = {
            "kind": planted.kind, "protocol": planted.protocol, "command": f"serve {name}", "settings": {},
            "variant": planted.variant,
            "starts": [{"listens_s": planted.start_s / 2, "ready_s": planted.start_s}],
            "max_abs_difference": {} if planted.kind == "floor" else {"1": 1e-7, "2": 1e-7},
        }  # fmt: skip
        for number in range(1, ROUNDS + 1):
            for connections in CONNECTIONS:
                slowest = 1 / planted.p50_s
                rate = slowest + (planted.flat_out - slowest) * (connections - 1) / (CONNECTIONS[-1] - 1)
                rate *= random.normal(1, planted.noise)
                latencies_s = np.full(200, connections / rate)
                windows.append(_window(name, planted, number, latencies_s, connections=connections, rate=rate))
            if planted.server_us_per_row:
                latencies_s = np.full(200, planted.server_us_per_row * 1024 / 1e6)
                windows.append(_window(name, planted, number, latencies_s, rows=1024, rate=1 / latencies_s[0]))
            for offered, p99_s in planted.sweep.items():
                count = planted.requests
                latencies_s = np.full(count, 0.001)
                latencies_s[: count // 40 + 1] = p99_s or 0.5
                answered = offered if p99_s else 0.7 * offered
                windows.append(_window(name, planted, number, latencies_s, rate=answered, offered=offered))
    return {
        "schema_version": SCHEMA_VERSION,
        "complete": True,
        "environment": {
            "utc": "2026-01-31T12:00:00+00:00", "command": "python benchmark_all.py", "git_commit": "abc1234",
            "git_dirty": False, "cpu": "A Processor", "cores": 2, "memory_bytes": 8 << 30, "governor": "performance",
            "load_average_1min": 0.1, "system": "Linux", "python": "3.11.7", "packages": {"onnx": "1.0"},
        },
        "settings": {
            "profile": "quick", "version": "1", "connections": list(CONNECTIONS), "precision": 0.1,
            "open_connections": 64, "rows_per_request": [1, 1024], "rounds": ROUNDS, "seconds": 1.0,
            "warmup_seconds": 0.1, "objective_p99_s": OBJECTIVE_P99_S, "server_cpus": [0], "client_cpus": [1],
        },
        "endpoints": endpoints,
        "windows": windows,
    }  # fmt: skip


def _window(name, planted, number, latencies_s, connections=1, rows=1, rate=1.0, offered=0.0) -> dict:
    window = Window(
        connections, elapsed_s=len(latencies_s) / rate, latencies_s=latencies_s, offered_rate=offered,
        client_cpu_s=0.01, request_bytes=150 * rows, reply_bytes=50 * rows,
        lateness_s=np.full(20, 1e-5) if offered else np.empty(0),
    )  # fmt: skip
    return encode_window(
        window, endpoint=name, load="open" if offered else "closed", round=number, rows_per_request=rows,
        nominal_rate=offered, server_cpu_s=planted.cpu_s * len(latencies_s),
        server_rss_bytes=int(planted.memory_mb * 1e6), foreign_share=0.0, disturbed_share=0.0,
    )  # fmt: skip
