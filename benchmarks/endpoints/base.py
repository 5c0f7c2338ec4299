"""The benchmark's view of a server: how to start it, how to ask it, how to read its answer.

Every server is one file `endpoint_<name>.py` in this folder with one subclass of `Endpoint`.
`load_endpoints()` finds the files; adding a server is one new file and no edit elsewhere.
"""

import importlib
import json
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from machine.free_ports import find_free_ports

ENDPOINTS_DIR = Path(__file__).resolve().parent
BENCHMARKS_DIR = ENDPOINTS_DIR.parent
REPOSITORY_DIR = BENCHMARKS_DIR.parent
LOOPBACK = "127.0.0.1"
ADDRESS = re.compile(r"http://(?P<host>[A-Za-z0-9.-]+)(?::(?P<port>\d{1,5}))?(?P<prefix>(?:/[A-Za-z0-9._~-]+)*)/?")

KINDS = {
    "native": "the framework's own server",
    "docker": "the server in its image: the framework's own, or the one of the framework's folder",
    "local": "this repository's own server: the framework has none, or it cannot be installed",
    "cluster": "whatever answers at an address: one server or many, their machines and the network between",
    "floor": "no model: the cost of the harness and of HTTP alone",
    "peer": "a server of others with the ONNX model of onnx/, for comparison only; make peers installs it",
}


class ServerError(RuntimeError):
    """A server could not be started, or answered wrongly; the message is one line that states the remedy."""


@dataclass(frozen=True)
class Request:
    """One request, ready to send. For REST the client adds Host and Content-Length, for gRPC the framing."""

    path: str  # for gRPC "/service/method"
    body: bytes  # for gRPC the serialized message
    method: str = "POST"
    content_type: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)  # others that it needs, such as a token; for gRPC metadata


class Endpoint:
    """One server. A subclass states the facts below and overrides what differs.

    Versions are named "1" and "2" here, as in data/recipe.json; `versions` maps them to the
    names that the server itself uses. `rows` are always raw features, (n, 5).
    """

    name: str  # the row's name in every table and the word for --endpoints
    kind: str  # one of KINDS
    folder: Path  # where `command` runs: the framework's folder
    variant: str = ""  # "default" or "tuned", if a server is measured with both of its configuration files
    protocol: str = "REST"  # or "gRPC": the protocol of the timed requests; a server with both is two endpoints
    default_ports: dict[str, int]  # by role; "rest" or "grpc", after the protocol, is the one that is timed
    versions: dict[str, str] = {"1": "1", "2": "2"}
    rows_key: str  # the key of the rows in the JSON body
    metrics_port: str = "rest"  # the role of the port where Prometheus asks
    metrics_path: str = "/metrics"
    settings: dict[str, str] = {}  # threads, workers, batching: printed with the row
    image_settings: dict[str, str] | None = None  # as settings, of the folder's image; None: it starts another set-up
    packages: tuple[str, ...] = ()  # whose versions the result file records
    start_timeout_s: float = 90.0
    has_model: bool = True  # False: answers a constant; no parity to verify
    how_to_install: str = "make setup"
    host: str = LOOPBACK  # that is asked
    prefix: str = ""  # of its paths, if a gateway in front tells servers apart by it: "/onnx"

    def __init__(self, ports: dict[str, int] | None = None, only_version: str | None = None):
        """`ports` overrides `default_ports` by role; `only_version` starts a server that has no other version."""
        unknown = set(ports or {}) - set(self.default_ports)
        if unknown:
            raise ValueError(f"{self.name}: no port called {sorted(unknown)}; it has {sorted(self.default_ports)}")
        self.ports = {**self.default_ports, **(ports or {})}
        self.only_version = only_version
        self.extra_options: list[str] = []  # added to the command by whoever measures a setting

    @classmethod
    def on_free_ports(cls, **options: Any) -> Self:
        """Make one on free ports, with the options of the constructor."""
        return cls(find_free_ports(list(cls.default_ports)), **options)

    @classmethod
    def at(cls, address: str) -> Self:
        """Make one that is asked at `address`, http://host[:port][/prefix]; ServerError if it is not written so."""
        found = ADDRESS.fullmatch(address)
        if not found or not 1 <= int(found["port"] or 80) <= 65535:
            raise ServerError(
                f"{cls.name}: {address!r} is no address; write http://host:port or http://host:port/prefix"
            )
        if found["prefix"] and cls.protocol == "gRPC":
            raise ServerError(f"{cls.name}: gRPC has no paths to put {found['prefix']} before; write http://host:port")
        endpoint = cls()
        endpoint.ports[endpoint.timed_port] = int(found["port"] or 80)
        endpoint.host, endpoint.prefix = found["host"], found["prefix"]
        return endpoint

    def find_address(self) -> str:
        """The host's IPv4 address; ServerError if it has none."""
        try:
            return socket.gethostbyname(self.host)
        except OSError as error:
            raise ServerError(f"{self.name}: {self.host}: {error.strerror}") from None

    @classmethod
    def is_installed(cls) -> bool:
        """Whether its packages are there; all but the peers' come with this repository's environment."""
        return True

    @property
    def timed_port(self) -> str:
        """The role of the port that is timed."""
        return self.protocol.lower()

    @property
    def port(self) -> int:
        """The port that is timed."""
        return self.ports[self.timed_port]

    def command(self) -> list[str]:
        """The command of the folder's README; port options are added only if they differ from the default."""
        raise NotImplementedError

    def full_command(self) -> list[str]:
        """The command with the options of this measurement."""
        return [*self.command(), *self.extra_options]

    def environment(self) -> dict[str, str]:
        """Environment variables that the command needs besides the caller's."""
        return {}

    def environment_in(self, folder: Path) -> dict[str, str]:
        """Further variables, for a server that keeps files: `folder` is its own and goes when it stops."""
        return {}

    def native_version(self, version: str) -> str:
        """The server's own name of `version`; an unknown one stays as it is, so that tests can ask for it."""
        return self.versions.get(version, version)

    def path(self, version: str | None) -> str:
        """The URL path, or the gRPC method, that predicts with `version`; None names none: the server's default."""
        raise NotImplementedError

    def body(self, rows: list[Any], version: str | None) -> bytes:
        """The JSON body for `rows`, a nested list; not checked here, so that tests can send bad ones."""
        return json.dumps({self.rows_key: rows}).encode()

    def request(self, rows: list[Any], version: str | None) -> Request:
        """The request that predicts `rows` with `version`, or names no version if that is None."""
        return Request(self.path(version), self.body(rows, version))

    def full_request(self, rows: list[Any], version: str | None) -> Request:
        """The request with the prefix of this measurement."""
        request = self.request(rows, version)
        return replace(request, path=self.prefix + request.path)

    def decode(self, reply: bytes) -> np.ndarray:
        """The probabilities (n, 2), [P(malignant), P(benign)], in a reply's body; ValueError if there are none.

        For gRPC the body is the serialized message.
        """
        raise NotImplementedError

    def kind_from_log(self, log: str) -> str:
        """The row's kind, for a server whose launcher logs which server it chose."""
        return self.kind


def decode_predictions(reply: bytes) -> np.ndarray:
    """The probabilities (n, 2) in a reply of the form {"predictions": [[p0, p1], ...]}; ValueError if it is another."""
    try:
        predictions = np.array(json.loads(reply)["predictions"], dtype=float)
    except (KeyError, TypeError) as error:
        raise ValueError(f"no predictions in {reply[:200]!r}") from error
    if predictions.ndim != 2 or predictions.shape[1] != 2:
        raise ValueError(f"predictions have shape {predictions.shape}, expected (n, 2)")
    return predictions


def load_endpoints(with_peers: bool = False) -> dict[str, type[Endpoint]]:
    """Import every endpoint_*.py in this folder; return the classes by name, the floor first, then by name.

    Peers, which are measured for comparison only, are left out unless `with_peers`.
    """
    classes: dict[str, type[Endpoint]] = {}
    for path in sorted(ENDPOINTS_DIR.glob("endpoint_*.py")):
        module = importlib.import_module(f"{__package__}.{path.stem}")
        found = [
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, Endpoint) and value.__module__ == module.__name__
        ]
        for endpoint_class in found:
            if endpoint_class.name in classes:
                raise ValueError(f"{path.name}: the name {endpoint_class.name!r} is taken by another endpoint file")
            classes[endpoint_class.name] = endpoint_class
        if not found:
            raise ValueError(f"{path.name}: defines no subclass of Endpoint")
    chosen = [(name, value) for name, value in classes.items() if with_peers or value.kind != "peer"]
    return dict(sorted(chosen, key=lambda item: (item[1].kind != "floor", item[0])))


def describe_choices(names: Iterable[str], default: str = "onnx") -> str:
    """The help text of an option that names servers; argparse itself would print them as one word."""
    return f"of {', '.join(names)} (default: {default})"
