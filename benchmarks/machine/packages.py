"""Imported first by each command: if a package is missing, one line says what to do; none writes to the home folder."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

_usual = sys.excepthook


def _is_installed() -> bool:
    """Whether this is the Python of `make setup`: what is missing in it is a mistake, with its traceback."""
    return find_spec("numpy") is not None and find_spec("rich") is not None


def explain(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print what an exception that nobody caught means, in one line if one of our packages is missing."""
    if isinstance(error, ModuleNotFoundError) and error.name and not _is_installed():
        script = Path(sys.argv[0]).stem
        package = error.name.partition(".")[0]
        line = f"{script}: {package} is not installed in this Python; run `source .venv/bin/activate` first"
        print(line, file=sys.stderr)
    else:
        _usual(kind, error, traceback)


sys.excepthook = explain
# Matplotlib keeps a list of the machine's fonts.
os.environ.setdefault("MPLCONFIGDIR", str(Path(__file__).resolve().parent.parent / "results" / ".matplotlib"))
