"""How much CPU time a process used, and how much of the machine other programs took while something was measured."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

SCHEDSTAT_PATH = Path("/proc/thread-self/schedstat")  # ns on a core, ns waiting for one, times on one


def process_cpu_s(pid: int) -> float:
    """Return the CPU seconds, user and system, that a process has used so far; ProcessLookupError if it is gone.

    On Linux from the process's own CPU clock, in nanoseconds; elsewhere, and in /proc, they come in steps
    of 1/100 s, too coarse for a window of 0.1 s. The number of the clock is MAKE_PROCESS_CPUCLOCK(pid,
    CPUCLOCK_SCHED) of the kernel's include/linux/posix-timers.h, which clock_getcpuclockid(3) returns.
    """
    if sys.platform == "linux":
        try:
            return time.clock_gettime((~pid << 3) | 2)
        except OSError:
            raise ProcessLookupError(f"no process {pid}") from None
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        raise ProcessLookupError(f"no process {pid}") from None
    return float(times.user + times.system)


class MachineLoad:
    """Watches the machine inside a `with` block; afterwards three shares show how far others disturbed it.

    `foreign_share` is the share of the CPU time of `cpus` that neither this process nor the server used:
    all processes' user, nice and system time plus what the hypervisor gave to other machines (steal), as
    the system counts it, less this process's CPU time and the growth of `server_cpu_s()`, the CPU seconds
    that the server's process tree has used so far. Interrupts are not counted: the loopback device's are the
    load's own. `cpus` None means all cores; give the cores that client and server are pinned to, because on
    a machine with many a busy neighbour of theirs is a small share of the whole. The system counts in steps
    of 1/100 s, so a block of t seconds on n cores is known to about 0.02 / (n * t), and may come out below 0;
    the mean of many blocks is known better.

    `stolen_share` is the part of it that the hypervisor gave to other machines: also a program that goes before
    all others of its machine has to wait for that.

    `waiting_share` is the share of the time in which this thread was ready to run and had to wait for its
    core, to the nanosecond; 0 if the system does not report it.
    """

    def __init__(self, server_cpu_s: Callable[[], float], cpus: set[int] | None = None):
        self.server_cpu_s = server_cpu_s
        self.cpus = cpus
        self.foreign_share = self.stolen_share = self.waiting_share = float("nan")

    def __enter__(self) -> "MachineLoad":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to watch."""
        self._before = self._read()

    def stop(self) -> float:
        """Return foreign_share since the start."""
        before, now = self._before, self._read()
        used_s, stolen_s, offered_s, waited_s, elapsed_s = (b - a for a, b in zip(before, now, strict=True))
        self.foreign_share = min(used_s / offered_s, 1.0) if offered_s > 0 else float("nan")
        self.stolen_share = min(stolen_s / offered_s, 1.0) if offered_s > 0 else float("nan")
        self.waiting_share = waited_s / elapsed_s if elapsed_s > 0 else float("nan")
        return self.foreign_share

    def _read(self) -> tuple[float, float, float, float, float]:
        """Return sums of seconds: used by others, stolen, offered by the cores, waited by this thread, passed."""
        times = psutil.cpu_times(percpu=True)
        chosen = [times[cpu] for cpu in sorted(self.cpus) if cpu < len(times)] if self.cpus else times
        stolen_s = sum(getattr(cpu, "steal", 0.0) for cpu in chosen)
        busy_s = stolen_s + sum(cpu.user + cpu.system + getattr(cpu, "nice", 0.0) for cpu in chosen)
        now_s = time.perf_counter()
        used_s = busy_s - time.process_time() - self.server_cpu_s()
        return used_s, stolen_s, now_s * len(chosen), _waited_s(), now_s


def _waited_s() -> float:
    try:
        return int(SCHEDSTAT_PATH.read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0
