"""How much of the machine other programs used while something was measured."""

import time
from collections.abc import Callable

import psutil


class MachineLoad:
    """Watches the machine inside a `with` block; afterwards `foreign_share` says what other programs took.

    `foreign_share` is the share, 0 to 1, of the CPU time of `cpus` that neither this process nor the
    server used: all processes' user, nice and system time plus what the hypervisor gave to other machines
    (steal), as the system counts it, less this process's CPU time and the growth of `server_cpu_s()`, the
    CPU seconds that the server's process tree has used so far. Interrupts are not counted: the loopback
    device's are the load's own. `cpus` None means all cores; give the cores that client and server are
    pinned to, because on a machine with many a busy neighbour of theirs is a small share of the whole.

    The system counts in steps of 1/100 s, so a block of t seconds on n cores is known to about
    0.02 / (n * t); shorter than 0.2 s it says little.
    """

    def __init__(self, server_cpu_s: Callable[[], float], cpus: set[int] | None = None):
        self.server_cpu_s = server_cpu_s
        self.cpus = cpus
        self.foreign_share = float("nan")

    def __enter__(self) -> "MachineLoad":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to watch."""
        self._before = self._read()

    def stop(self) -> float:
        """Return foreign_share since the start."""
        used_s, offered_s = (now - then for now, then in zip(self._read(), self._before, strict=True))
        self.foreign_share = min(max(used_s / offered_s, 0.0), 1.0) if offered_s > 0 else float("nan")
        return self.foreign_share

    def _read(self) -> tuple[float, float]:
        """Return (CPU seconds that others used so far, CPU seconds that the cores had to give so far)."""
        times = psutil.cpu_times(percpu=True)
        chosen = [times[cpu] for cpu in sorted(self.cpus) if cpu < len(times)] if self.cpus else times
        busy_s = sum(cpu.user + cpu.system + getattr(cpu, "nice", 0.0) + getattr(cpu, "steal", 0.0) for cpu in chosen)
        return busy_s - time.process_time() - self.server_cpu_s(), time.perf_counter() * len(chosen)
