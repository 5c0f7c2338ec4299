"""The facts about a machine and a checkout that every result file carries."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

REPOSITORY_DIR = Path(__file__).resolve().parent.parent
PACKAGES = [
    "torch", "torchserve", "tensorflow", "bentoml", "scikit-learn", "onnx", "onnxruntime-gpu", "onnxruntime",
    "uvicorn", "uvloop", "httptools", "msgspec", "numpy",
]  # fmt: skip


def describe_environment() -> dict:
    """Return CPU, cores, memory, kernel, Python, package versions, load average, git commit, command and UTC time."""
    return {
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "git_commit": _git("rev-parse", "--short", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain")),
        "cpu": _cpu_model(),
        "cores": len(usable_cpus()),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or "not reported",
        "load_average_1min": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def usable_cpus() -> list[int]:
    """The processors this process may run on; a list of that many zeros' numbers where the system cannot say."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def split_cpus() -> tuple[set[int] | None, set[int] | None]:
    """Return (the servers' cores, the client's core): one core each, or (None, None) where there are not two."""
    cpus = usable_cpus()
    if len(cpus) < 2 or not hasattr(os, "sched_setaffinity"):
        return None, None
    return {cpus[0]}, {cpus[1]}


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
