"""Sealed models in containers, on a real engine: opened in a volume in memory, served, tampered with."""

import json
import os
import shutil
import stat
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from client.ask import ask
from endpoints.base import load_endpoints
from endpoints.reference import TOLERANCE, load_expected, load_test_rows
from engine import find_compose
from helpers import REPOSITORY_DIR, call_main, load_together, run, wait_until
from test_containers import needs_compose

SEALING_DIR = REPOSITORY_DIR / "sealing"
release, keys, seal = load_together(SEALING_DIR, "release", "keys", "seal")
SERVERS = tuple(release.PLACES)
FILES = ("--file", "docker-compose.yml", "--file", "sealing/docker-compose.yml")
USER = 10001  # of the images


@needs_compose
def test_what_opens_models_has_no_network_and_a_server_can_only_read_them():
    done = run(find_compose(), *FILES, "config", "--format", "json", check=True)
    config = json.loads(done.stdout)
    for server in SERVERS:
        service = config["services"][f"unseal-{server}"]
        assert service["network_mode"] == "none" and service["read_only"] and service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"] and int(service["mem_limit"]) > 0
        assert {volume["target"] for volume in service["volumes"] if not volume.get("read_only")} == {
            "/srv/opened",
            "/srv/state",
        }
        (opened,) = [volume for volume in config["services"][server]["volumes"] if volume["type"] == "volume"]
        assert opened["read_only"] and opened["volume"]["nocopy"]
        assert config["volumes"][opened["source"]]["driver_opts"]["type"] == "tmpfs"
        assert config["services"][server]["depends_on"][f"unseal-{server}"]["condition"] == "service_healthy"


@pytest.fixture(scope="session")
def built(built_engine):
    """The engine with the images of all four servers, and with that of unseal.py."""
    built_engine.run("docker", "compose", *FILES, "build", "unseal-onnx", timeout_s=1200)
    return built_engine


def copy_marked(server: str, folder: Path, mark: str) -> Path:
    """Return a copy of a server's models in whose version 2 the mark lies, which no other copy of them has."""
    models = shutil.copytree(REPOSITORY_DIR / release.PLACES[server][0], folder / "models")
    place = models / release.find_place(server, "my_model", "2")
    if place.is_dir():
        (place / "mark.txt").write_text(mark)
    else:
        with zipfile.ZipFile(place, "a") as archive:
            archive.writestr("mark.txt", mark)
    return models


@pytest.mark.containers
@pytest.mark.parametrize("server", SERVERS)
def test_sealed_models_are_opened_in_memory_served_and_kept_when_a_file_is_changed(built, server, tmp_path):
    """The image holds models, too; what is served are those of the volume, as the mark in their folder shows."""
    home, mark = tmp_path / "home", os.urandom(16).hex()
    models = copy_marked(server, tmp_path, mark)
    home.mkdir()
    shutil.copy(SEALING_DIR / "policy.toml", home)
    assert call_main(keys, "first", "signing", server, "--home", home).returncode == 0
    assert call_main(seal, server, "--from", models, "--home", home).returncode == 0
    shutil.rmtree(models)
    for folder in (tmp_path, *tmp_path.parents):
        if Path(tempfile.gettempdir()) in folder.parents:
            folder.chmod(0o755)
    for path in (home / "keys/identities").rglob("*"):
        os.chown(path, USER, USER)
    endpoint = load_endpoints()[server].on_free_ports()
    variables = {"COMPOSE_PROJECT_NAME": "sealed", "SEALING_HOME": str(home)}
    variables |= {f"{server.upper()}_PORT": str(endpoint.ports["rest"])}
    if "grpc" in endpoint.ports:
        variables[f"{server.upper()}_GRPC_PORT"] = str(endpoint.ports["grpc"])
    rows, _ = load_test_rows()
    path = next(iter(sorted((home / f"sealed/{server}/my_model/2").rglob("*.age"))))
    whole = path.read_bytes()
    opener = f"unseal-{server}"

    def compose(*arguments: str) -> str:
        return built.run("docker", "compose", *FILES, *arguments, timeout_s=1200, **variables).stdout

    def read_log() -> str:
        return compose("logs", "--no-color", opener)

    def difference(version: str) -> float:
        return float(np.abs(ask(endpoint, rows, version) - load_expected(version)).max())

    config = json.loads(compose("config", "--format", "json"))
    (target,) = [one["target"] for one in config["services"][server]["volumes"] if one["type"] == "volume"]
    try:
        compose("up", "--detach", "--wait", server)
        assert max(difference("1"), difference("2")) <= TOLERANCE
        assert compose("exec", "-T", server, "grep", "-rl", mark, target).startswith(target), "the mark is served"
        mounts = compose("exec", "-T", server, "cat", "/proc/mounts")
        (mounted,) = [line.split() for line in mounts.splitlines() if line.split()[1] == target]
        assert mounted[2] == "tmpfs" and "ro" in mounted[3].split(",")
        assert find_on_disk(mark.encode(), built.folder) == []

        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        wait_until(lambda: f"{server}/my_model/2: refused: " in read_log(), read_log)
        assert difference("2") <= TOLERANCE
        compose("restart", opener)
        wait_until(lambda: read_log().count(f"{server}/my_model/1: accepted: serial 1") == 2, read_log)
        if server == "onnx":  # sees at once that version 2 is gone
            wait_until(lambda: "my_model version 2 is gone" in compose("logs", server), read_log)
        assert difference("1") <= TOLERANCE
    finally:
        compose("down", "--volumes")


def find_on_disk(needle: bytes, folder: Path) -> list[Path]:
    """Return the files below the engine's folder that hold the needle, but for what is mounted there in memory."""
    device = folder.stat().st_dev
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if Path(parent, name).lstat().st_dev == device]
        for path in (Path(parent, name) for name in names):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_dev == device and status.st_size < 1 << 20:
                found += [path] if needle in path.read_bytes() else []
    return found
