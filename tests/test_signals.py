"""Signals end what they should, at any moment."""

import re
import signal
from pathlib import Path

import pytest

from helpers import REPOSITORY_DIR, run, run_python

ENDS_WITH = "import sys; sys.path.insert(0, 'benchmarks'); from machine.signals import end_with_parent\n"


def test_a_child_lives_with_its_parent():
    done = run_python("-c", ENDS_WITH + "import os; end_with_parent(os.getppid()); print('lives')")
    assert (done.returncode, done.stdout) == (0, "lives\n")


def test_a_child_whose_parent_has_ended_before_it_could_say_so_ends_at_once():
    done = run_python("-c", ENDS_WITH + "end_with_parent(0); print('lives')")
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "")


@pytest.mark.parametrize("parent", ["os.getppid()", "0"])
def test_a_handler_of_the_parents_does_not_take_the_signal_for_a_child_that_runs_no_program_yet(parent):
    """Python runs a handler later, and a program that starts meanwhile forgets it: the child would live for ever."""
    handler = "import os, signal; signal.signal(signal.SIGTERM, lambda *_: None)\n"
    kill = "os.kill(os.getpid(), signal.SIGTERM); print('lives')"
    done = run_python("-c", ENDS_WITH + handler + f"end_with_parent({parent}); {kill}")
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "")


def test_whoever_ends_with_its_parent_takes_the_signal_as_a_program_does():
    """The same in each place that asks the kernel for it before a child's program runs."""
    listing = run("git", "ls-files", "*.py", check=True).stdout
    names = [name for name in listing.splitlines() if not name.startswith("tests/")]
    asking = {name for name in names if "prctl(PR_SET_PDEATHSIG" in (REPOSITORY_DIR / name).read_text()}
    inside_a_worker = {"bentoml/guard.py"}  # whose own handler is the one to run
    assert len(asking - inside_a_worker) == 5
    for name in asking - inside_a_worker:
        text = (REPOSITORY_DIR / name).read_text()
        assert re.search(r"SIGTERM, signal\.SIG_DFL\)[^\n]*\n[^\n]*prctl\(PR_SET_PDEATHSIG", text), name


def test_no_signal_handler_takes_a_lock():
    """Event.set in a handler waits for ever if the signal comes while the main thread is inside Event.wait."""
    listing = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py", check=True).stdout
    for name in listing.splitlines():
        path: Path = REPOSITORY_DIR / name
        text = path.read_text() if path.is_file() and not name.startswith("tests/") else ""
        assert not re.search(r"\bsignal\.signal\([^\n]*\.(set|put|acquire|release|notify)\b", text), name
