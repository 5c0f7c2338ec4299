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
import contextlib
import os
import re
import sys
from pathlib import Path

from release import FOLDER, PLACES, make_identity, make_signing_key

KINDS = ("signing", *PLACES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="first", help="name of the new keys (default: first)")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"{', '.join(KINDS)} (default: all)")
    parser.add_argument("--home", type=Path, default=FOLDER, help="folder that contains keys (default: this one)")
    arguments = parser.parse_args()
    if unknown := set(arguments.kinds) - set(KINDS):
        parser.error(f"{min(unknown)} is none of {', '.join(KINDS)}")
    if not re.fullmatch(r"\w[\w.-]*", name := arguments.name):
        parser.error(f"{name!r} is no name; use letters and digits")
    for kind in arguments.kinds or KINDS:
        pair, places = make_identity(), (f"identities/{kind}/{name}.txt", f"recipients/{kind}/{name}.txt")
        if kind == "signing":
            pair, places = make_signing_key(), (f"signing/{name}.pem", f"trusted/{name}.pub")
        paths = [arguments.home / "keys" / place for place in places]
        if there := [path for path in paths if os.path.lexists(path)]:  # half of a pair, too: the other would not fit
            print(f"{there[0]} is there already")
            continue
        with contextlib.ExitStack() as undo:  # a full disk or Ctrl-C leaves no half of a pair
            for path, content, mode in zip(paths, pair, (0o600, 0o644), strict=True):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch(mode, exist_ok=False)
                undo.callback(path.unlink)
                path.write_bytes(content)
            undo.pop_all()
        print("".join(f"wrote {path}\n" for path in paths), end="")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("keys: interrupted; keys written before are complete")
    except OSError as error:
        sys.exit(f"keys: {error.filename}: {error.strerror}; choose another name, or another folder with --home")
