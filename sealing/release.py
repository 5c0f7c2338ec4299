"""Shared by seal.py and unseal.py: the release note, the places of versions, and the exchange of folders."""

import ctypes
import importlib.abc
import importlib.machinery
import importlib.util
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path


class Postponed(importlib.abc.MetaPathFinder):
    """Finds modules that Python loads when something in them is used, and not when they are imported.

    Only keys sign and verify here. What model-signing imports for sigstore's online service, an HTTP client and much
    more, would double the time that unseal.py takes to start.
    """

    NAMES = ("model_signing._signing.sign_sigstore", "model_signing._signing.sign_certificate")

    def find_spec(self, name, path, target=None):
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name in self.NAMES else None
        if spec and spec.loader:
            spec.loader = importlib.util.LazyLoader(spec.loader)
        return spec


sys.meta_path.insert(0, postponed := Postponed())
try:
    from model_signing import hashing, signing, verifying
finally:
    sys.meta_path.remove(postponed)

FOLDER = Path(__file__).resolve().parent
NOTE, SIGNATURE, SUFFIX = "release.json", "model.sig", ".age"
# Where each server's folder keeps its models, and a version in it. unseal.py arranges its folder in the same way.
PLACES = {
    "torchserve": ("torchserve/model_store", "model_v{version}.mar"),
    "tfserving": ("tfserving/models", "{model}/{version}"),
    "bentoml": ("bentoml/store", "models/{model}/v{version}.0.0"),
    "onnx": ("onnx/models", "{model}/{version}"),
}
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@dataclass(frozen=True)
class Release:
    """The note that is signed with a version's files. Without it, one version could replace another."""

    server: str
    model: str
    version: str
    serial: int  # grows with every sealed version of any server
    created: str  # UTC time, for people: no decision uses it
    files: dict[str, str]  # SHA-256 of each file's plaintext, by its path in the version

    @property
    def name(self) -> str:
        """Its place below sealed/, and its name in state.json and policy.toml."""
        return f"{self.server}/{self.model}/{self.version}"


def find_place(server: str, model: str, version: str) -> Path:
    """Return where the server looks for a version in its folder; raise ValueError for an invalid name."""
    pattern = PLACES[server][1]
    if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*/[1-9][0-9]{0,17}", f"{model}/{version}", re.ASCII):
        raise ValueError("no name of a model and number of a version")
    if "{model}" not in pattern and model != "my_model":
        raise ValueError(f"{server}'s archives are those of my_model")
    return Path(pattern.format(model=model, version=version))


def strict_hashing() -> hashing.Config:
    """Return the settings for signing and verifying all files; the defaults skip .git/, .github/ and .gitignore."""
    return hashing.Config().set_ignored_paths(paths=[], ignore_git_paths=False)


def sign(folder: Path, signature: Path, key: Path) -> None:
    """Write the signature of all files in a folder, outside of it, with a private key in PEM."""
    signer = signing.Config().use_elliptic_key_signer(private_key=key)
    signer.set_hashing_config(strict_hashing()).sign(folder, signature)


def verify(folder: Path, signature: Path, key: Path) -> None:
    """Return if the public key in PEM has signed exactly these files; else raise any exception."""
    verifier = verifying.Config().use_elliptic_key_verifier(public_key=key)
    verifier.set_hashing_config(strict_hashing()).verify(folder, signature)


def put(source: Path, target: Path) -> None:
    """Move a file or folder to `target` in one atomic step, also if there is one already.

    A folder that was there is at `source` afterwards. Both must be on one file system.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.is_dir():
        source.replace(target)
    elif ctypes.CDLL(None, use_errno=True).renameat2(
        AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), RENAME_EXCHANGE
    ):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(target))
