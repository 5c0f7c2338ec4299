"""Render a folder with kustomize, and return the manifests as Python objects."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parent
TIMEOUT_S = 60.0
Manifest = dict[str, Any]


class ManifestError(RuntimeError):
    """Manifests cannot be rendered or checked; the message is one line that says what to do."""


def find_kubectl() -> str:
    """Return the path of kubectl, preferably this environment's; raise ManifestError if there is none."""
    own = Path(sys.executable).parent / "kubectl"
    kubectl = str(own) if own.exists() else shutil.which("kubectl")
    if not kubectl:
        raise ManifestError("no kubectl: run make setup, or install kubectl 1.34 or newer")
    return kubectl


def kustomize(folder: str) -> str:
    """Return the output of `kubectl kustomize` for `folder`, relative to this one; raise ManifestError if it fails."""
    command = [find_kubectl(), "kustomize", str(FOLDER / folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    if done.returncode != 0:
        raise ManifestError(f"kubernetes/{folder}: {(done.stderr.strip().splitlines() or ['kustomize failed'])[-1]}")
    return done.stdout


def render(folder: str) -> list[Manifest]:
    """Return the manifests of `folder`, relative to this one."""
    return [manifest for manifest in yaml.safe_load_all(kustomize(folder)) if manifest]
