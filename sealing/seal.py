"""Encrypt and sign trained models, each version in its own folder.

    python seal.py               all versions of all servers
    python seal.py onnx          all versions of one server
    python seal.py onnx 2        one version

Reads the models from the server's folder, or --from, and keys/. Writes
sealed/SERVER/my_model/VERSION/: each file as <file>.age, encrypted for the keys
in keys/recipients/SERVER; release.json, the note that names the version; and
model.sig, the signature of all these. A version that was sealed before is
replaced in one step. The newest key in keys/signing signs; keys/serial counts
the releases. The models that were read stay as they are.
"""

import argparse
import fcntl
import hashlib
import json
import re
import sys
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from release import FOLDER, NOTE, PLACES, SIGNATURE, SUFFIX, Release, find_place, put, pyrage, sign

Recipient = pyrage.x25519.Recipient


def find_versions(source: Path, server: str, model: str, version: str) -> dict[str, Path]:
    """Return where the versions are that match a pattern; raise ValueError for a name that unseal.py would refuse.

    A backup next to them, such as 2.old, is none of them: each lies exactly where the server looks for it.
    """
    find_place(server, model, "1")
    pattern = PLACES[server][1].format(model=model, version=version)
    found = [(match[0], place) for place in source.glob(pattern) if (match := re.search("[1-9][0-9]*", place.name))]
    versions = {number: place for number, place in found if place == source / find_place(server, model, number)}
    if not versions:
        sys.exit(f"seal: {source / pattern} not found; train the model first (make train)")
    return versions


def read_files(place: Path) -> dict[str, bytes]:
    """Return the contents of a version by path: of the files in its folder, or of its only file."""
    paths = [path for path in sorted([place, *place.rglob("*")]) if path.is_symlink() or not path.is_dir()]
    if strange := [path for path in paths if path.is_symlink() or not path.is_file()]:
        sys.exit(f"seal: {strange[0]} is no regular file; put one in its place")
    if not paths:
        sys.exit(f"seal: {place} is empty; train the model first (make train)")
    base = place if place.is_dir() else place.parent
    return {path.relative_to(base).as_posix(): path.read_bytes() for path in paths}


def read_recipient(path: Path) -> Recipient:
    """Return the recipient in a file; raise ValueError if there is none."""
    try:
        return Recipient.from_str(path.read_text().strip())
    except pyrage.RecipientError as error:
        raise ValueError(f"{path}: {error}") from None


def count(path: Path) -> int:
    """Increment the counter in a file, in one step, and return it."""
    text = path.read_text().strip() if path.exists() else "0"
    if not text.isdecimal():
        raise ValueError(f"{path} holds no number; write one into it that is higher than any in state.json")
    path.with_suffix(".new").write_text(f"{int(text) + 1}\n")
    path.with_suffix(".new").replace(path)
    return int(text) + 1


def seal(release: Release, contents: dict[str, bytes], recipients: list[Recipient], key: Path, to: Path) -> str:
    """Write a version's folder and move it to `to` in one step; return the digest of its note."""
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".sealing-", dir=to.parent) as scratch:
        folder, signature = Path(scratch, "version"), Path(scratch, SIGNATURE)
        for path, content in contents.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / f"{path}{SUFFIX}").write_bytes(pyrage.encrypt(content, recipients))
        note = json.dumps(asdict(release), indent=2) + "\n"
        (folder / NOTE).write_text(note)
        sign(folder, signature, key)
        signature.rename(folder / SIGNATURE)
        put(folder, to)
    return hashlib.sha256(note.encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", nargs="?", choices=PLACES, help="whose models (default: all servers')")
    parser.add_argument("version", nargs="?", default="*", help="version number (default: all)")
    parser.add_argument("--model", default="my_model", help="name of the model (default: my_model)")
    parser.add_argument("--from", dest="source", type=Path, help="folder of the models (default: the server's own)")
    parser.add_argument("--home", type=Path, default=FOLDER, help="folder of keys and sealed (default: this one)")
    arguments = parser.parse_args()
    keys = arguments.home / "keys"
    signers = sorted(keys.glob("signing/*.p*"), key=lambda path: path.stat().st_mtime_ns)  # .pem or .pkcs11
    for server in [arguments.server] if arguments.server else PLACES:
        recipients = [read_recipient(path) for path in sorted(keys.glob(f"recipients/{server}/*.txt"))]
        if not signers or not recipients:
            sys.exit(f"seal: no signing key or no recipient for {server} in {keys}; run python keys.py")
        source = arguments.source or FOLDER.parent / PLACES[server][0]
        versions = find_versions(source, server, arguments.model, arguments.version)
        with (keys / "serial.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until all are in place, so that another's older serial cannot follow
            for version, place in sorted(versions.items()):
                contents = read_files(place)
                files = {path: hashlib.sha256(content).hexdigest() for path, content in contents.items()}
                now = datetime.now(UTC).isoformat(timespec="seconds")
                release = Release(server, arguments.model, version, count(keys / "serial"), now, files)
                digest = seal(release, contents, recipients, signers[-1], arguments.home / "sealed" / release.name)
                line = f"{release.name}: serial {release.serial}, signed by {signers[-1].stem}, digest {digest}"
                print(line, flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("seal: interrupted; versions sealed before are complete")
    except (OSError, ValueError) as error:
        sys.exit(f"seal: {error}")
