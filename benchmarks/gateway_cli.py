"""The gateway as the A/B test and the canary use it: through its own commands, and the files that it makes."""

import json
import subprocess
import sys
from pathlib import Path

from endpoint import REPOSITORY_DIR

GATEWAY_DIR = REPOSITORY_DIR / "gateway"
GATEWAY_URL = "https://127.0.0.1:8443"
TIMEOUT_S = 20.0


class GatewayError(RuntimeError):
    """The gateway could not be asked; the message is one line."""


def call_gateway(*arguments: str) -> str:
    """Run one gateway command and return what it printed; GatewayError where it fails."""
    command = [sys.executable, str(GATEWAY_DIR / "gateway.py"), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise GatewayError(f"gateway {' '.join(arguments)}: no answer in {TIMEOUT_S:.0f} s") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise GatewayError(lines[-1] if lines else f"gateway {' '.join(arguments)}: exit code {done.returncode}")
    return done.stdout


def read_share(server: str) -> float:
    """Return version 2's share of the users of `server`, as the gateway is set."""
    return json.loads(call_gateway("status", "--json"))[server]["v2"] / 100


def read_api_key() -> str:
    return ""


def read_certificate() -> Path | None:
    return None
