"""Signals end what they should, at any moment."""

import re
import signal
from pathlib import Path

from helpers import REPOSITORY_DIR, run, run_python

ENDS_WITH = "import sys; sys.path.insert(0, 'benchmarks'); from machine.signals import end_with_parent\n"


def test_a_child_lives_with_its_parent():
    done = run_python("-c", ENDS_WITH + "import os; end_with_parent(os.getppid()); print('lives')")
    assert (done.returncode, done.stdout) == (0, "lives\n")


def test_a_child_whose_parent_has_ended_before_it_could_say_so_ends_at_once():
    done = run_python("-c", ENDS_WITH + "end_with_parent(0); print('lives')")
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "")


def test_no_signal_handler_takes_a_lock():
    """Event.set in a handler waits for ever if the signal comes while the main thread is inside Event.wait."""
    listing = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py", check=True).stdout
    for name in listing.splitlines():
        path: Path = REPOSITORY_DIR / name
        text = path.read_text() if path.is_file() and not name.startswith("tests/") else ""
        assert not re.search(r"\bsignal\.signal\([^\n]*\.(set|put|acquire|release|notify)\b", text), name
