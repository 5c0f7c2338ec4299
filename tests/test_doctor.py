"""doctor.py: what it says of curl, HAProxy and the ports that the READMEs use."""

import re

import pytest

from conftest import FRAMEWORKS, REPOSITORY_DIR
from helpers import load_script

doctor = load_script(REPOSITORY_DIR / "doctor.py")
COMMANDS = re.compile(r"^```bash[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PORT = re.compile(r"(?:localhost:|127\.0\.0\.1:|--port[ =]|\bport in )(\d{4,5}(?: \d{4,5})*)")


@pytest.mark.parametrize(
    ("version", "verdict"),
    [("7.88.1", "ok"), ("7.68.0", "ok"), ("7.52.0-DEV", "ok"), ("7.29.0", "warn"), (None, "note")],
)
def test_curl_is_found_and_an_old_one_is_named(monkeypatch, version, verdict):
    printed = version and f"curl {version} (x86_64-pc-linux-gnu) libcurl/{version}"
    monkeypatch.setattr(doctor, "output_of", lambda *command: printed)
    monkeypatch.setattr(doctor.shutil, "which", lambda program, path=None: None)
    assert doctor.check_curl()[0] == verdict


def test_haproxy_is_found_or_its_installation_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "output_of", lambda *command: "HAProxy version 2.6.12-1+deb12u2 2023/12/16")
    monkeypatch.setenv("GATEWAY_HAPROXY", "/usr/sbin/haproxy")
    assert doctor.check_haproxy() == ("ok", "2.6.12: gateway uses /usr/sbin/haproxy")
    monkeypatch.delenv("GATEWAY_HAPROXY")
    monkeypatch.setattr(doctor, "VENV_DIR", tmp_path)
    monkeypatch.setattr(doctor.shutil, "which", lambda program, path=None: None)
    verdict, text = doctor.check_haproxy()
    assert verdict == "note"
    assert "make setup" in text


def test_the_pages_ask_nothing_of_curl_that_an_older_one_lacks():
    text = "\n".join(path.read_text() for path in [*REPOSITORY_DIR.glob("*.md"), *REPOSITORY_DIR.glob("*/*.md")])
    commands = "\n".join(COMMANDS.findall(text))
    newer = {
        "%header{": (7, 83),
        "--fail-with-body": (7, 76),
        "--retry-all-errors": (7, 71),
        "--retry-connrefused": (7, 52),
    }
    assert [option for option, since in newer.items() if since > doctor.LEAST_CURL and option in commands] == []


@pytest.mark.parametrize("folder", [*FRAMEWORKS, "gateway"])
def test_it_looks_at_every_port_of_a_folders_pages(folder):
    pages = [path.read_text() for path in (REPOSITORY_DIR / folder).glob("*.md")]
    text = "\n".join(COMMANDS.findall("\n".join(pages)))
    named = {int(port) for ports in PORT.findall(text) for port in ports.split()}
    assert named
    assert named <= set(doctor.PORTS[folder])


def test_a_taken_port_is_named(monkeypatch):
    monkeypatch.setattr(doctor, "is_taken", lambda port: port == 3002)
    verdict, text = doctor.check_ports("bentoml")
    assert verdict == "warn"
    assert text.startswith("3002 in use")
    assert doctor.check_ports("gateway")[0] == "ok"
