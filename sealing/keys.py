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
    for kind in arguments.kinds or KINDS:
        pair, folders, endings = make_identity(), (f"identities/{kind}", f"recipients/{kind}"), (".txt", ".txt")
        if kind == "signing":
            pair, folders, endings = make_signing_key(), ("signing", "trusted"), (".pem", ".pub")
        try:
            for content, folder, ending, mode in zip(pair, folders, endings, (0o600, 0o644), strict=True):
                path = arguments.home / "keys" / folder / f"{arguments.name}{ending}"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch(mode, exist_ok=False)
                path.write_bytes(content)
                print(f"wrote {path}")
        except FileExistsError:
            print(f"{path} is there already")
        except OSError as error:
            sys.exit(f"keys: {error.filename}: {error.strerror}; choose another name, or another folder with --home")


if __name__ == "__main__":
    main()
