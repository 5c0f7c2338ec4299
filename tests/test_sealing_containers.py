"""Sealed models in containers, on a real engine: opened in a volume in memory, served, tampered with."""

import json
import os
import shutil
import stat
import tempfile
from pathlib import Path

import numpy as np
import pytest

from client.ask import ask
from endpoints.base import load_endpoints
from endpoints.reference import TOLERANCE, load_expected, load_test_rows
from engine import Engine, build_settings, find_compose, find_obstacle, make_base
from helpers import REPOSITORY_DIR, call_main, load_together, run, wait_until
from test_containers import FORBIDDEN, needs_compose

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


@pytest.fixture(scope="module")
def engine():
    if obstacle := find_obstacle():
        pytest.skip(f"no engine can be started here: {obstacle}")
    try:
        with Engine() as engine:
            make_base(engine)
            yield engine
    except RuntimeError as error:
        if not FORBIDDEN.search(str(error)):
            raise
        pytest.skip(f"this machine lets no engine start: {error}")


@pytest.mark.containers
def test_a_sealed_model_is_opened_in_memory_served_and_kept_when_its_file_is_changed(engine, tmp_path):
    """The image holds models, too; what is served are those of the volume, as the mark in their folder shows."""
    home, models, mark = tmp_path / "home", tmp_path / "models", os.urandom(16).hex()
    shutil.copytree(REPOSITORY_DIR / "onnx/models", models)
    (models / "my_model/2/mark.txt").write_text(mark)
    home.mkdir()
    shutil.copy(SEALING_DIR / "policy.toml", home)
    assert call_main(keys, "first", "signing", "onnx", "--home", home).returncode == 0
    assert call_main(seal, "onnx", "--from", models, "--home", home).returncode == 0
    (models / "my_model/2/mark.txt").unlink()
    for folder in (tmp_path, *tmp_path.parents):
        if Path(tempfile.gettempdir()) in folder.parents:
            folder.chmod(0o755)
    for path in (home / "keys/identities").rglob("*"):
        os.chown(path, USER, USER)
    endpoint = load_endpoints()["onnx"].on_free_ports()
    variables = {
        "SEALING_HOME": str(home),
        "ONNX_PORT": str(endpoint.ports["rest"]),
        "ONNX_GRPC_PORT": str(endpoint.ports["grpc"]),
    }
    rows, _ = load_test_rows()
    path = home / "sealed/onnx/my_model/2/model.onnx.age"
    whole = path.read_bytes()

    def compose(*arguments: str):
        return engine.run("docker", "compose", *FILES, *arguments, timeout_s=1200, **variables)

    def read_log() -> str:
        return compose("logs", "--no-color", "unseal-onnx").stdout

    with build_settings(tmp_path) as settings:
        variables |= settings
        compose("build", "onnx", "unseal-onnx")
    try:
        compose("up", "--detach", "--wait", "onnx")
        for version in ("1", "2"):
            assert np.abs(ask(endpoint, rows, version) - load_expected(version)).max() <= TOLERANCE
        held = compose("exec", "-T", "onnx", "cat", "/srv/models/my_model/2/mark.txt").stdout
        assert held == mark
        mounts = compose("exec", "-T", "onnx", "cat", "/proc/mounts").stdout
        (mounted,) = [line.split() for line in mounts.splitlines() if line.split()[1] == "/srv/models"]
        assert mounted[2] == "tmpfs" and "ro" in mounted[3].split(",")
        assert find_on_disk(mark.encode(), engine.folder) == []

        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        wait_until(lambda: "onnx/my_model/2: refused: " in read_log(), read_log)
        assert np.abs(ask(endpoint, rows, "2") - load_expected("2")).max() <= TOLERANCE
        compose("restart", "unseal-onnx")
        wait_until(lambda: read_log().count("onnx/my_model/1: serial 1 is let in") == 2, read_log)
        wait_until(lambda: "my_model version 2 is gone" in compose("logs", "onnx").stdout, read_log)
        assert np.abs(ask(endpoint, rows, "1") - load_expected("1")).max() <= TOLERANCE
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
