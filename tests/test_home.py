"""Nothing is left in the home folder of who runs a script or a server of this repository (onnx's are in test_onnx.py).

Libraries put settings, caches and numbers of the machine there, and some report about it.
"""

import os
import shutil
import sys
from pathlib import Path

import pytest

from helpers import REPOSITORY_DIR, run, skip_without_haproxy, start
from toy_split import ToySplit

GONE = ("BENTOML_DO_NOT_TRACK", "KERAS_HOME", "MPLCONFIGDIR", "ORT_DISABLE_TELEMETRY")  # what could hide a fault


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """Return an empty home folder, which is that of all that the test starts."""
    folder = tmp_path / "home"
    folder.mkdir()
    for name in (*GONE, *(name for name in os.environ if name.startswith("XDG_"))):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(folder))
    return folder


def list_all(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*")]


SERVERS = "torchserve torchserve-tuned tfserving tfserving-tuned bentoml bentoml-tuned onnx null".split()


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVERS)
def test_a_server_leaves_the_home_folder_empty(home, name):
    with start(name):  # and one right prediction
        pass
    assert list_all(home) == []


SCRIPTS = {
    "data/make_data.py": [],
    "torchserve/train_model.py": [],
    "torchserve/archive.py": [],
    "tfserving/export_model.py": [],
    "bentoml/train_and_save.py": [],
}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_leaves_the_home_folder_empty(home, tmp_path, script):
    folder, name = script.split("/")
    for each in (folder, "data"):
        shutil.copytree(
            REPOSITORY_DIR / each, tmp_path / each, ignore=shutil.ignore_patterns("store"), dirs_exist_ok=True
        )
    bentoml = {"BENTOML_HOME": str(tmp_path / "store"), "BENTOML_DO_NOT_TRACK": "True"}  # as its README says
    run(sys.executable, name, cwd=tmp_path / folder, env=bentoml if folder == "bentoml" else None, check=True)
    assert list_all(home) == []


@pytest.mark.slow
def test_the_ab_test_and_its_plot_leave_the_home_folder_empty(home, tmp_path):
    with ToySplit() as split:
        options = ["--url", split.url, "--api-key", "k", "--share", "50", "--users", "40", "--looks", "1"]
        run(sys.executable, "benchmarks/ab_test.py", *options, "--output", tmp_path / "ab.json", check=True)
    assert (tmp_path / "ab.png").exists()
    assert list_all(home) == []


@pytest.mark.slow
def test_a_report_leaves_the_home_folder_empty(home, tmp_path):
    shutil.copy(REPOSITORY_DIR / "benchmarks" / "results" / "sample.json", tmp_path)
    run(sys.executable, "benchmarks/report.py", tmp_path / "sample.json", check=True)
    assert (tmp_path / "sample" / "report.html").exists()
    assert list_all(home) == []


@pytest.mark.slow
def test_the_shadow_leaves_the_home_folder_empty(home, tmp_path):
    skip_without_haproxy()
    options = ["--server", "onnx", "--seconds", "0.5", "--output", tmp_path / "shadow.json"]
    run(sys.executable, "gateway/shadow.py", *options, check=True)
    assert list_all(home) == []


def test_a_key_of_the_gateway_leaves_the_home_folder_empty(home, tmp_path):
    run(sys.executable, "gateway/gateway.py", "--state", tmp_path / "state", "keys", "add", "alice", check=True)
    assert list_all(home) == []
