"""The pools behind the gateway: which replicas serve which version of which server, and HAProxy's words for them."""

import json
import re
from dataclasses import dataclass, field

VERSIONS = ("1", "2")
ADDRESS = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:]+\]):(\d{1,5})(?:\*(\d{1,3}))?")


class PoolError(Exception):
    """The pools cannot be made; the message is one line that says what to do."""


@dataclass(frozen=True)
class Server:
    """What the gateway must know of a server: how to see that a replica is ready, and which gRPC it speaks."""

    name: str
    path: str  # of a prediction that names no version
    body: str  # one row, in JSON: the health check is a real prediction
    content_type: str = "application/json"
    grpc_service: str | None = None  # "/package.Service/"
    metrics: str = "/metrics"  # its path on the REST port, or ":8082/metrics" with its own usual port before it


@dataclass
class Replica:
    """One server process with one version. `count` above 1: that many addresses of one DNS name."""

    host: str
    port: int
    grpc_port: int | None = None
    count: int = 1
    pid: int | None = None  # of one that the gateway started
    metrics_port: int | None = None  # where it is neither the REST port nor the usual one


@dataclass
class Pool:
    """The replicas of one server that serve one version."""

    server: Server
    version: str
    replicas: list[Replica] = field(default_factory=list)


def parse_addresses(text: str) -> list[tuple[str, int, int]]:
    """Return (host, port, count) of "host:port, host:port*count"; PoolError where it is something else."""
    addresses = []
    for part in filter(None, re.split(r"[,\s]+", text)):
        found = ADDRESS.fullmatch(part)
        if not found or not 1 <= int(found[2]) <= 65535 or found[3] == "0":
            raise PoolError(f"{part!r} is no address; write host:port, or host:port*4 for up to four of one DNS name")
        addresses.append((found[1], int(found[2]), int(found[3] or 1)))
    return addresses


def pools_from_environment(server: Server, environment: dict[str, str]) -> list[Pool] | None:
    """Return the pools of GATEWAY_<SERVER>_V1, _V2, _V1_GRPC and _V2_GRPC; None where neither is set."""
    prefix = f"GATEWAY_{server.name.upper()}_V"
    if not any(environment.get(f"{prefix}{version}") for version in VERSIONS):
        return None
    pools = []
    for version in VERSIONS:
        name = f"{prefix}{version}"
        addresses = parse_addresses(environment.get(name, ""))
        grpc = parse_addresses(environment.get(f"{name}_GRPC", ""))
        if grpc and [(host, count) for host, _, count in grpc] != [(host, count) for host, _, count in addresses]:
            raise PoolError(f"{name}_GRPC names other hosts than {name}; give the same ones, in the same order")
        grpc_ports = [port for _, port, _ in grpc] or [None] * len(addresses)
        replicas = [Replica(h, p, g, c) for (h, p, c), g in zip(addresses, grpc_ports, strict=True)]
        pools.append(Pool(server, version, replicas))
    return pools


def render(pools: list[Pool]) -> str:
    """Return backends.cfg: for every pool a backend for REST and, where it speaks gRPC, one for that.

    A canary's backend holds the replicas of version 1 as backup: HAProxy takes them when no other is left, also
    in the middle of a request's retries.
    """
    lines = ["# Written by gateway.py at every start: the replicas. What happens to a request stands in haproxy.cfg."]
    if any(replica.count > 1 for pool in pools for replica in pool.replicas):
        lines += ["", "resolvers dns", "    parse-resolv-conf", "    hold valid 2s", "    resolve_retries 3"]
    by_version = {(pool.server.name, pool.version): pool for pool in pools}
    for pool in pools:
        stable = by_version[pool.server.name, "1"] if pool.version == "2" else None
        for kind in ("", "-grpc") if pool.server.grpc_service else ("",):
            lines += ["", f"backend {pool.server.name}-v{pool.version}{kind}", *check_lines(pool.server)]
            for source, backup in ((pool, ""), (stable, " backup")):
                for number, replica in enumerate(source.replicas if source else (), 1):
                    if kind and replica.grpc_port is None:
                        continue  # an address for REST alone was given
                    lines.append(server_line(replica, f"v{source.version}-{number}", bool(kind)) + backup)
            if stable:
                lines.append("    option allbackups")
    return "\n".join(lines) + "\n"


def describe_targets(pools: list[Pool]) -> list[dict]:
    """Return what Prometheus reads of the replicas (file_sd): where each answers, and what it is.

    A replica has one version, so the version is the target's: of the servers' own metrics few name it.
    """
    targets = []
    for pool in pools:
        port, _, path = pool.server.metrics.partition("/")
        for number, replica in enumerate(pool.replicas, 1):
            own_port = replica.metrics_port or port.strip(":") or replica.port
            labels = {"server": pool.server.name, "version": pool.version, "replica": f"v{pool.version}-{number}"}
            targets.append(
                {"targets": [f"{replica.host}:{own_port}"], "labels": {**labels, "__metrics_path__": f"/{path}"}}
            )
    return targets


def check_lines(server: Server) -> list[str]:
    """HAProxy's words for: ready is what answers one row."""
    body = server.body.replace("\\", "\\\\").replace("'", "\\'")
    return [
        "    option httpchk",
        f"    http-check send meth POST uri {server.path} ver HTTP/1.1 hdr Host gateway "
        f"hdr Content-Type {server.content_type} body '{body}'",
        "    http-check expect status 200",
    ]


def server_line(replica: Replica, name: str, grpc: bool) -> str:
    port = replica.grpc_port if grpc else replica.port
    words = [f"{replica.host}:{port}"]
    if grpc:
        words.append(f"proto h2 check-proto h1 port {replica.port}")
    # One refused connection takes a replica out at once, two answered checks bring it back.
    words.append("check inter 500ms fastinter 250ms downinter 500ms fall 3 rise 2")
    words.append("observe layer4 error-limit 1 on-error mark-down")
    if replica.count > 1:
        return f"    server-template {name}- {replica.count} {' '.join(words)} resolvers dns init-addr none"
    return f"    server {name} {' '.join(words)}"


def describe_servers() -> dict[str, Server]:
    """Return what the gateway must know of every server, by name: from the benchmarks' Endpoint classes."""
    from endpoints.base import load_endpoints

    classes = [c for c in load_endpoints().values() if c.has_model and c.variant in ("", "default")]
    servers = {}
    for rest in (c for c in classes if c.protocol == "REST"):
        request = rest().request([[13.82, 24.49, 0.1162, 0.1357, 0.2275]], None)
        services = [c().path(None) for c in classes if c.protocol == "gRPC" and c.folder == rest.folder]
        service = services[0].rpartition("/")[0] + "/" if services else None
        port = "" if rest.metrics_port == "rest" else f":{rest.default_ports[rest.metrics_port]}"
        servers[rest.name] = Server(
            rest.name, request.path, request.body.decode(), request.content_type, service, port + rest.metrics_path
        )
    return servers


def read_servers(text: str) -> dict[str, Server]:
    """Return what `describe_servers` returned where servers.json was written."""
    return {name: Server(**facts) for name, facts in json.loads(text).items()}
