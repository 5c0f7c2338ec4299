"""The facts about a machine and a checkout that every result file carries."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

REPOSITORY_DIR = Path(__file__).resolve().parent.parent.parent


def describe_environment(packages: Iterable[str]) -> dict[str, Any]:
    """Return the facts; of `packages` the versions of those that are installed.

    CPU, cores, memory, kernel, Python, package versions, load average, git commit, command and UTC time.
    """
    return {
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "git_commit": _git("rev-parse", "--short", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain")),
        **describe_machine(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or "not reported",
        "load_average_1min": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: version for name in sorted(packages) if (version := _version(name))},
    }


def describe_machine() -> dict[str, Any]:
    """Return the facts that distinguish machines: CPU model, usable cores, memory."""
    return {
        "cpu": _cpu_model(),
        "cores": len(usable_cpus()),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def usable_cpus() -> list[int]:
    """The numbers of the processors this process may run on; of all if the system does not report it."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def split_cpus() -> tuple[set[int] | None, set[int] | None]:
    """Return (the servers' core, the client's core), or (None, None) if there are not two.

    Two hardware threads of one physical core slow each other, so the client's is of another core.
    """
    cpus = usable_cpus()
    siblings = _parse_cpu_list(_read(f"/sys/devices/system/cpu/cpu{cpus[0]}/topology/thread_siblings_list"))
    others = [cpu for cpu in cpus[1:] if cpu not in siblings]
    if not others or not hasattr(os, "sched_setaffinity"):
        return None, None
    return {cpus[0]}, {others[0]}


def _parse_cpu_list(text: str) -> set[int]:
    """Return the numbers in Linux's list form: "0,4-6" is {0, 4, 5, 6}."""
    cpus = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        cpus |= set(range(int(first), int(last or first) + 1))
    return cpus


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _cpu_model() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(
            ["git", *arguments], cwd=REPOSITORY_DIR, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
