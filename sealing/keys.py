"""Make keys: one to sign, and for each server one to decrypt its models.

    python keys.py                   all keys, named "first"
    python keys.py second signing    another signing key
    python keys.py second onnx       another identity of the ONNX server

Writes in keys/, and leaves existing files as they are:
  signing/NAME.pem             signs; stays where models are released
  trusted/NAME.pub             verifies, for unseal.py
  recipients/SERVER/NAME.txt   encrypts, for seal.py, in age's format
  identities/SERVER/NAME.txt   decrypts; stays on the serving machine
To withdraw a key, remove its file.
"""

import argparse
import os
import sys
from pathlib import Path

try:
    from cryptography.hazmat.primitives import serialization as pem
    from cryptography.hazmat.primitives.asymmetric import ec
    from pyrage import x25519

    from release import FOLDER, PLACES
except ModuleNotFoundError as error:
    sys.exit(f"keys: {error.name} is not installed in this Python; run `source ../.venv/bin/activate` first")


def make_signing_key() -> tuple[bytes, bytes]:
    """Return a new private key and its public key, in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption())
    return private, key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="first", help="name of the new keys (default: first)")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"signing, {', '.join(PLACES)} (default: all)")
    parser.add_argument("--home", type=Path, default=FOLDER, help="folder that contains keys (default: this one)")
    arguments = parser.parse_args()
    for kind in arguments.kinds or ["signing", *PLACES]:
        if kind not in ("signing", *PLACES):
            parser.error(f"{kind} is none of signing, {', '.join(PLACES)}")
        identity = x25519.Identity.generate()
        secret, public = f"{identity}\n".encode(), f"{identity.to_public()}\n".encode()
        paths = f"identities/{kind}/{arguments.name}.txt", f"recipients/{kind}/{arguments.name}.txt"
        if kind == "signing":
            secret, public = make_signing_key()
            paths = f"signing/{arguments.name}.pem", f"trusted/{arguments.name}.pub"
        try:
            for name, text, mode in zip(paths, (secret, public), (0o600, 0o644), strict=True):
                path = arguments.home / "keys" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                    file.write(text)
                print(f"wrote {path}")
        except FileExistsError:
            print(f"{path} is there already")
        except OSError as error:
            sys.exit(f"keys: {error.filename}: {error.strerror}; choose another name, or another folder with --home")


if __name__ == "__main__":
    main()
