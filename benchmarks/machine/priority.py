"""Give the measured programs priority over others, if the system allows it, so that these disturb them less."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

HIGHEST = -20  # a nice value; it weighs 87 times as much as 0 (sched_prio_to_weight in Linux's kernel/sched/core.c)


@contextlib.contextmanager
def lifted_priority() -> Iterator[bool]:
    """Give this process and its children the highest priority inside the block; yield whether that succeeded."""
    usual, usual_of_session = os.getpriority(os.PRIO_PROCESS, 0), read_session_priority()
    is_lifted = lift_priority()
    try:
        yield is_lifted
    finally:
        if is_lifted:
            _set_priority(0, usual, usual_of_session)


def lift_priority(pid: int = 0) -> bool:
    """Give a process, 0 for this one, and its later children the highest priority; return whether that succeeded.

    It needs root or CAP_SYS_NICE. Linux shares the cores between sessions first (autogroups, sched(7)), so the
    session's priority is lifted as well; a child that begins a new session needs its own call.
    """
    return _set_priority(pid, HIGHEST, HIGHEST)


def read_session_priority(pid: int = 0) -> int | None:
    """Return the nice value of a process's session, 0 for this one; None if it has none: "/autogroup-12 nice 0"."""
    try:  # a kernel without autogroups has no such file, a container's may be empty
        found = re.search(r"nice (-?\d+)", _session_path(pid).read_text())
    except OSError:
        return None
    return int(found[1]) if found else None


def _set_priority(pid: int, value: int, value_of_session: int | None) -> bool:
    try:
        os.setpriority(os.PRIO_PROCESS, pid, value)
    except (OSError, AttributeError):
        return False
    if value_of_session is not None and read_session_priority(pid) is not None:
        with contextlib.suppress(OSError):
            _session_path(pid).write_text(str(value_of_session))
    return True


def _session_path(pid: int) -> Path:
    return Path(f"/proc/{pid or 'self'}/autogroup")
