"""The gateway as the A/B test and the canary use it: through its own commands, and its certificate."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from endpoints.base import REPOSITORY_DIR
from machine.signals import deferred_interrupts

GATEWAY_DIR = REPOSITORY_DIR / "gateway"
MODEL = "my_model"
KEY_RATE = 1_000_000  # requests per second that a key made here may send: users are not to be throttled
TIMEOUT_S = 20.0


class GatewayError(RuntimeError):
    """The gateway could not be asked; the message is one line."""


def gateway_url() -> str:
    """The gateway's address: GATEWAY_BIND, or the usual one."""
    return f"https://{os.environ.get('GATEWAY_BIND') or '127.0.0.1:8443'}"


def find_certificate() -> Path | None:
    """The certificate that the gateway made for itself; None if there is none."""
    path = Path(os.environ.get("GATEWAY_STATE") or GATEWAY_DIR / "state") / "tls.pem"
    return path if path.exists() else None


def call_gateway(*arguments: str) -> str:
    """Run one gateway command and return what it printed; GatewayError if it fails.

    Ctrl-C waits for its end: an abandoned command could change the split after a rollback.
    """
    command = [sys.executable, str(GATEWAY_DIR / "gateway.py"), *arguments]
    try:
        with deferred_interrupts():
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, start_new_session=True)
    except subprocess.TimeoutExpired:
        raise GatewayError(f"gateway {' '.join(arguments)}: not done in {TIMEOUT_S:.0f} s") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise GatewayError(lines[-1] if lines else f"gateway {' '.join(arguments)}: exit code {done.returncode}")
    return done.stdout


def read_versions(server: str) -> dict[str, dict[str, Any]]:
    """Return the gateway's status of each version of `server`; GatewayError if it does not serve it."""
    status = json.loads(call_gateway("status", "--json"))
    if not status["running"]:
        raise GatewayError("the gateway does not run: make gateway, in another terminal")
    if server not in status["servers"]:
        raise GatewayError(
            f"{server} is not behind the gateway, which has {', '.join(status['servers'])}: "
            f"python gateway/gateway.py serve --servers {server}"
        )
    versions: dict[str, dict[str, Any]] = status["servers"][server]
    return versions


def read_share(server: str) -> float:
    """Return version 2's share of the users of `server`."""
    return float(read_versions(server)["2"]["share"]) / 100


def count_replicas(server: str) -> int:
    """Return how many replicas of version 2 are up."""
    return sum(seen["state"].startswith("UP") for seen in read_versions(server)["2"]["replicas"].values())


@contextlib.contextmanager
def lent_key() -> Iterator[str]:
    """An API key that the gateway knows only inside the block."""
    owner = f"benchmark-{os.getpid()}"
    try:
        yield call_gateway("keys", "add", owner, "--rate", str(KEY_RATE)).strip()
    finally:
        with deferred_interrupts():
            if f"{owner}:" in call_gateway("keys", "list").split():  # not if adding it failed
                call_gateway("keys", "revoke", owner)
