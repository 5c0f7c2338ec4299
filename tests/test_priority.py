"""A measured server goes before other programs if the system allows it, with all that it starts."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from helpers import wait_until
from machine.priority import HIGHEST, lift_priority, lifted_priority
from servers.process import ServerProcess
from toy_endpoint import Toy


def may_lift() -> bool:
    with lifted_priority() as is_lifted:
        return is_lifted


def read_autogroup(pid: int | str) -> str:
    path = Path(f"/proc/{pid}/autogroup")
    return path.read_text().split()[-1] if path.exists() else str(HIGHEST)


def test_this_process_gets_the_highest_priority_or_is_told_that_it_may_not():
    usual = os.getpriority(os.PRIO_PROCESS, 0), read_autogroup("self")
    with lifted_priority() as is_lifted:
        inside = os.getpriority(os.PRIO_PROCESS, 0), read_autogroup("self")
        assert inside == ((HIGHEST, str(HIGHEST)) if is_lifted else usual)
    assert (os.getpriority(os.PRIO_PROCESS, 0), read_autogroup("self")) == usual


def test_a_process_that_is_gone_is_no_error():
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    assert not lift_priority(done.pid)


@pytest.mark.parametrize("goes_first", [True, False])
def test_a_server_and_its_child_in_another_session_go_first(monkeypatch, goes_first):
    monkeypatch.setenv("TOY_MANNER", "deaf")  # it has a child in a session of its own
    monkeypatch.setattr("servers.process.STOP_TIMEOUT_S", 0.5)
    allowed = may_lift()
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    with ServerProcess(Toy.on_free_ports(), goes_first=goes_first) as server:
        wait_until(lambda: len(server.processes()) == 2, "the toy started no child")
        sessions = {os.getsid(process.pid) for process in server.processes()}
        priorities = {psutil.Process(process.pid).nice() for process in server.processes()}
        groups = {read_autogroup(process.pid) for process in server.processes()}
    assert len(sessions) == 2
    assert priorities == {HIGHEST if goes_first and allowed else usual}
    assert (groups == {str(HIGHEST)}) or not (goes_first and allowed)
