"""The pools behind the gateway: the replicas of each version of each server, and their HAProxy configuration."""

import json
import re
from dataclasses import dataclass, field

VERSIONS = ("1", "2")
ADDRESS = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:]+\]):(\d{1,5})(?:\*(\d{1,3}))?")


class PoolError(Exception):
    """The pools cannot be made; the message is one line with the remedy."""


@dataclass(frozen=True)
class Server:
    """The gateway's facts about a server: its health check and its gRPC service."""

    name: str
    path: str  # of a prediction without a version
    body: str  # one row, in JSON: the health check is a real prediction
    content_type: str = "application/json"
    grpc_service: str | None = None  # "/package.Service/"
    metrics: str = "/metrics"  # its path on the REST port, or with a separate port, as in ":8082/metrics"


@dataclass
class Replica:
    """One server process with one version. `count` above 1: that many addresses of one DNS name."""

    host: str
    port: int
    grpc_port: int | None = None
    count: int = 1
    pid: int | None = None  # if the gateway started it
    metrics_port: int | None = None  # if it is neither the REST port nor the usual one


@dataclass
class Pool:
    """The replicas of one server that serve one version."""

    server: Server
    version: str
    replicas: list[Replica] = field(default_factory=list)


def parse_addresses(text: str) -> list[tuple[str, int, int]]:
    """Return (host, port, count) of "host:port, host:port*count"; PoolError for anything else."""
    addresses = []
    for part in filter(None, re.split(r"[,\s]+", text)):
        found = ADDRESS.fullmatch(part)
        if not found or not 1 <= int(found[2]) <= 65535 or found[3] == "0":
            raise PoolError(f"{part!r} is no address; write host:port, or host:port*4 for up to four of one DNS name")
        addresses.append((found[1], int(found[2]), int(found[3] or 1)))
    return addresses


def pools_from_environment(server: Server, environment: dict[str, str]) -> list[Pool] | None:
    """Return the pools of GATEWAY_<SERVER>_V1, _V2, _V1_GRPC and _V2_GRPC; None if neither is set."""
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
    """Return backends.cfg: for every pool a backend for REST and, if it has gRPC, one for that.

    Version 2's backend holds the replicas of version 1 as backup: HAProxy uses them when no other is left, also
    during a request's retries.
    """
    lines = ["# Written by gateway.py at every start: the replicas. haproxy.cfg decides what happens to a request."]
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
                        continue  # only an address for REST was given
                    lines.append(server_line(replica, f"v{source.version}-{number}", bool(kind)) + backup)
            if stable:
                lines.append("    option allbackups")
    return "\n".join(lines) + "\n"


def describe_targets(pools: list[Pool]) -> list[dict]:
    """Return Prometheus' targets (file_sd): address and labels of each replica.

    A replica has one version, so the version is a label of the target; few of the servers' own metrics have it.
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
    """Return HAProxy's health check: a replica is ready when it answers one row."""
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
    """Return the facts about every server, by name, from the benchmarks' Endpoint classes."""
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
    """Return the facts in the text of servers.json, as `describe_servers` returned them."""
    return {name: Server(**facts) for name, facts in json.loads(text).items()}
