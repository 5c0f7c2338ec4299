"""BentoML with the two saved versions of the scikit-learn pipeline."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from endpoints.base import REPOSITORY_DIR, Endpoint


class BentomlEndpoint(Endpoint):
    name = "bentoml"
    kind = "native"
    folder = REPOSITORY_DIR / "bentoml"
    default_ports = {"rest": 3000}
    versions = {"1": "v1.0.0", "2": "v2.0.0"}
    rows_key = "features"
    packages = ("bentoml", "scikit-learn", "numpy")
    variant = "default"
    service = "service:svc"
    config = "default.yaml"
    settings = {"workers": "1 (default)", "batching": "off", "access log": "on (default)", "tracing": "on (default)"}
    image_settings: dict[str, str] | None = settings

    def command(self) -> list[str]:
        command = ["bentoml", "serve", self.service]
        if self.ports != self.default_ports:
            command += ["--port", str(self.ports["rest"])]
        return command

    def environment(self) -> dict[str, str]:
        return {
            "BENTOML_HOME": str(self.folder / "store"),
            "BENTOML_DO_NOT_TRACK": "True",
            "BENTOML_CONFIG": str(self.folder / self.config),
            "ONLY_VERSION": self.native_version(self.only_version) if self.only_version else "",
        }

    def environment_in(self, folder: Path) -> dict[str, str]:
        """A separate store with the same models: BentoML counts in files below BENTOML_HOME, which every start
        removes, so that servers that share it lose and mix their counts.
        """
        home = folder / "store"
        home.mkdir()
        (home / "models").symlink_to(self.folder / "store" / "models")
        return {"BENTOML_HOME": str(home)}

    def path(self, version: str | None) -> str:
        return "/predict"

    def body(self, rows: list[Any], version: str | None) -> bytes:
        named = {"version": self.native_version(version)} if version else {}
        return json.dumps({self.rows_key: rows, **named}).encode()

    def decode(self, reply: bytes) -> np.ndarray:
        probabilities = np.array(json.loads(reply)["probability"])
        if probabilities.ndim != 2:
            raise ValueError(f"{self.name}: no list of rows in {reply[:200]!r}")
        return probabilities


class TunedBentomlEndpoint(BentomlEndpoint):
    name = "bentoml-tuned"
    variant = "tuned"
    service = "tuned_service:svc"
    config = "tuned.yaml"
    settings = {"workers": "1", "batching": "by event-loop turn", "access log": "off", "tracing": "off"}
    image_settings = None
