"""Ports for servers that are about to start: nobody else finds them in between."""

import socket

import pytest

from helpers import run_python
from machine.free_ports import find_free_ports, read_free_ports

IMPORT = "import sys; sys.path.insert(0, 'benchmarks'); from machine.free_ports import find_free_ports"


def test_a_port_that_was_found_is_not_found_again_here_or_elsewhere_and_a_server_may_have_it(monkeypatch):
    found = find_free_ports([str(number) for number in range(20)])
    assert len(set(found.values()) & set(read_free_ports())) == 20
    for port in found.values():
        monkeypatch.setenv("FREE_PORTS", f"{port}-{port}")
        with pytest.raises(OSError, match="1 free ports are needed"):
            find_free_ports(["rest"])
        with socket.create_server(("127.0.0.1", port)), socket.create_connection(("127.0.0.1", port)):
            pass
    other = run_python("-c", f"{IMPORT}; find_free_ports(['rest'])")
    assert other.returncode == 1
    assert "1 free ports are needed" in other.stderr


def test_a_port_on_which_somebody_listens_is_not_free(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("FREE_PORTS", "{0}-{0}".format(server.getsockname()[1]))
        with pytest.raises(OSError, match="there are 0"):
            find_free_ports(["rest"])
