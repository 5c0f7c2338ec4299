"""Shared by keys.py, seal.py and unseal.py: the release note, the places of versions, keys and signatures.

model-signing signs and verifies; pyrage encrypts and decrypts in age's format.
"""

import ctypes
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

# Only keys sign and verify here. What model-signing imports for its other methods, an HTTP client and much more, would
# double the time that unseal.py takes to start, so an empty module takes its place.
for method in ("sign_sigstore", "sign_certificate"):
    sys.modules.setdefault(f"model_signing._signing.{method}", ModuleType(method))
try:
    import pyrage
    from cryptography.hazmat.primitives import serialization as pem
    from cryptography.hazmat.primitives.asymmetric import ec
    from model_signing import hashing, signing, verifying
except ModuleNotFoundError as error:
    missing = f"{error.name} is not installed in this Python; run `source ../.venv/bin/activate` first"
    sys.exit(f"{Path(sys.argv[0]).stem}: {missing}")
except KeyboardInterrupt:
    sys.exit(f"{Path(sys.argv[0]).stem}: interrupted")

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


def make_signing_key() -> tuple[bytes, bytes]:
    """Return a new private key and its public key, in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption())
    return private, key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)


def make_identity() -> tuple[bytes, bytes]:
    """Return a new identity, which decrypts, and its recipient, which encrypts, in age's format."""
    identity = pyrage.x25519.Identity.generate()
    return f"{identity}\n".encode(), f"{identity.to_public()}\n".encode()


def strict_hashing() -> hashing.Config:
    """Return the settings for signing and verifying all files; the defaults skip .git/, .github/ and .gitignore."""
    return hashing.Config().set_ignored_paths(paths=[], ignore_git_paths=False)


def sign(folder: Path, signature: Path, key: Path) -> None:
    """Write the signature of all files in a folder, outside of it; raise ValueError if the key cannot be used.

    `key` is a private key in PEM, or a file *.pkcs11 with the URI (RFC 7512) of one in a hardware token.
    """
    signer = signing.Config().set_hashing_config(strict_hashing())
    try:
        if key.suffix == ".pkcs11":
            signer.use_pkcs11_signer(pkcs11_uri=key.read_text().strip())
        else:
            signer.use_elliptic_key_signer(private_key=key)
    except Exception as error:  # noqa: BLE001 - the token's library raises exceptions of its own
        raise ValueError(f"{key}: {str(error) or 'no such library, token or key'}") from None
    signer.sign(folder, signature)


def verify(folder: Path, signature: Path, key: Path) -> None:
    """Return if the public key in PEM has signed exactly these files; else raise any exception."""
    verifier = verifying.Config().use_elliptic_key_verifier(public_key=key)
    verifier.set_hashing_config(strict_hashing()).verify(folder, signature)
