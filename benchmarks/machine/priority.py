"""Put what is measured before other programs, if the system allows it: then they disturb it less."""

import contextlib
import os
from pathlib import Path

HIGHEST = -20  # a nice value; it weighs 87 times as much as 0 (sched_prio_to_weight in Linux's kernel/sched/core.c)


def lift_priority(pid: int = 0) -> bool:
    """Give a process, 0 for this one, and what it starts from now on the highest priority; return whether that went.

    It needs root or CAP_SYS_NICE. Linux shares the cores between sessions first (autogroups, sched(7)), so the
    session's priority is lifted as well; a child that begins a session of its own needs its own call.
    """
    return _set_priority(pid, HIGHEST)


def restore_priority(usual: int = 0) -> None:
    """Give this process and its session a priority again, for what goes on in it after the measurement."""
    _set_priority(0, usual)


def _set_priority(pid: int, value: int) -> bool:
    try:
        os.setpriority(os.PRIO_PROCESS, pid, value)
    except (OSError, AttributeError):
        return False
    with contextlib.suppress(OSError):  # a kernel without autogroups has no such file
        Path(f"/proc/{pid or 'self'}/autogroup").write_text(str(value))
    return True
