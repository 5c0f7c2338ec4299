"""Run load_test.py under Locust in a separate process, and leave none of its processes behind.

Importing locust patches sockets and select for gevent; a program that measures by itself must not do so.
"""

import contextlib
import functools
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from machine.signals import deferred_interrupts, end_with_parent

LOCUST_FILE = Path(__file__).resolve().parent.parent / "load_test.py"
STOP_TIMEOUT_S = 15.0  # the users finish their requests, then Locust prints


def run_locust(arguments: list[str], **popen: Any) -> int:
    """Run Locust until it ends and return its exit code; on Ctrl-C let it and its workers end cleanly."""
    process = None
    try:
        with deferred_interrupts():
            process = subprocess.Popen(
                [sys.executable, "-m", "locust", "-f", str(LOCUST_FILE), *arguments],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches only us, and Locust through us, once
                preexec_fn=functools.partial(end_with_parent, os.getpid()),
                **popen,
            )
        return process.wait()
    finally:
        if process is not None:
            with deferred_interrupts():
                _stop(process)


def _stop(process: subprocess.Popen[Any]) -> None:
    if process.poll() is None:
        process.terminate()  # what Ctrl-C would do, but never in the middle of a user's request
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its own session: the group holds only Locust and its workers
    process.wait()
