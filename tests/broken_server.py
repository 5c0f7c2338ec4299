"""The local TF server with a fault planted in it: what writes columns and what classifies meets what it never expects.

python broken_server.py <flags of tfserving/local/server.py>
"""

import runpy
import sys
from pathlib import Path

LOCAL = Path(__file__).resolve().parent.parent / "tfserving" / "local"
sys.path.insert(0, str(LOCAL))

import examples  # noqa: E402
import json_replies  # noqa: E402


def fail(*_: object) -> None:
    raise AttributeError(f"no such thing in {LOCAL}")


json_replies.write_columns = examples.classify = fail
runpy.run_path(str(LOCAL / "server.py"), run_name="__main__")
