"""Command line, progress (a spinner on a terminal, a line elsewhere) and clean end on Ctrl-C of a long script."""

import argparse
import atexit
import os
import shutil
import signal
import sys
from pathlib import Path

try:
    from rich.console import Console
except ModuleNotFoundError as error:
    script = Path(sys.argv[0]).stem
    sys.exit(f"{script}: {error.name} is not installed in this Python; run `source ../.venv/bin/activate` first")

console = Console(highlight=False)
spinner = console.status("")
STOPS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and what kill, timeout and a container's engine send
unfinished: list[Path] = []  # folders that they remove


def read_output_dir(description: str) -> Path:
    """Return the folder to write to, the only option of these scripts."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = Path(__file__).resolve().parent
    parser.add_argument("--output-dir", type=Path, default=folder, help="where to write (default: this folder)")
    return parser.parse_args().output_dir


def show(text: str) -> None:
    """Show the next step."""
    if console.is_terminal and not console.is_dumb_terminal:
        spinner.update(text)
        spinner.start()
    else:
        print(text, flush=True)


def end_on_interrupt(script: str) -> None:
    """Make a stop signal end this process with one line and exit code 1, and remove unfinished folders.

    No exception is raised: scikit-learn's `fit` treats a KeyboardInterrupt as the end of the training, and returns a
    half-trained model.
    """
    atexit.register(spinner.stop)

    def end(*_) -> None:
        finish_uninterrupted()
        spinner.stop()
        for folder in unfinished:
            shutil.rmtree(folder, ignore_errors=True)
        print(f"{script}: interrupted; nothing was written", file=sys.stderr, flush=True)
        os._exit(1)

    for number in STOPS:
        signal.signal(number, end)


def finish_uninterrupted() -> None:
    """Ignore stop signals from now on: the rest takes milliseconds, and half of it would be useless."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
