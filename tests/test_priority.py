"""A measured server goes before other programs if the system allows it, with all that it starts."""

import os
import subprocess
import sys

import psutil
import pytest

from helpers import wait_until
from machine.priority import HIGHEST, lift_priority, lifted_priority, read_session_priority
from servers.process import ServerProcess
from toy_endpoint import Toy


def may_lift() -> bool:
    with lifted_priority() as is_lifted:
        return is_lifted


def read_priorities() -> tuple[int, int | None]:
    return os.getpriority(os.PRIO_PROCESS, 0), read_session_priority()


def test_this_process_gets_the_highest_priority_or_is_told_that_it_may_not():
    usual = read_priorities()
    highest = HIGHEST, None if usual[1] is None else HIGHEST
    with lifted_priority() as is_lifted:
        assert read_priorities() == (highest if is_lifted else usual)
    assert read_priorities() == usual


@pytest.mark.parametrize("text", [None, ""])
def test_a_system_that_knows_no_sessions_priority_is_left_alone(monkeypatch, tmp_path, text):
    path = tmp_path / "autogroup"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr("machine.priority._session_path", lambda pid: path)
    assert read_session_priority() is None
    with lifted_priority():
        pass
    assert (path.read_text() if path.exists() else None) == text


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
        of_sessions = {read_session_priority(process.pid) for process in server.processes()}
    assert len(sessions) == 2
    assert priorities == {HIGHEST if goes_first and allowed else usual}
    assert of_sessions in ({HIGHEST}, {None}) or not (goes_first and allowed)


def test_what_a_server_starts_goes_first_while_its_first_answer_is_awaited(monkeypatch):
    """BentoML's worker has a session of its own: asked too early, it stayed behind for the 30 s of that request."""
    monkeypatch.setenv("TOY_MANNER", "deaf")
    monkeypatch.setattr("servers.process.STOP_TIMEOUT_S", 0.5)
    if not may_lift():
        pytest.skip("needs root or CAP_SYS_NICE, to give processes a higher priority")
    server = ServerProcess(Toy.on_free_ports(), goes_first=True)

    def ask(*_: object) -> str:
        children = psutil.Process(server.pid).children
        wait_until(lambda: {child.nice() for child in children(recursive=True)} == {HIGHEST}, "the child stays behind")
        return ""

    monkeypatch.setattr("servers.process.find_problem", ask)
    with server:
        pass
