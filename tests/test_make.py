"""The make targets: documented, repeatable, and ended by one Ctrl-C."""

import os
import re
import shutil
import signal
import subprocess
import time

import numpy as np
import psutil
import pytest
from conftest import REPOSITORY_DIR, refuse_taken_ports
from endpoint import load_endpoints
from reference import TOLERANCE, load_expected, load_test_rows
from server_process import ServerError, ask

MAKEFILE = (REPOSITORY_DIR / "Makefile").read_text()
TARGETS = re.findall(r"^([a-z-]+):[^#=]*## ", MAKEFILE, re.MULTILINE)
FRAMEWORKS = ("torchserve", "tfserving", "bentoml", "onnx")
READY_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 20.0


def make(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(["make", *arguments], cwd=REPOSITORY_DIR, capture_output=True, text=True, **options)


def test_help_is_the_default_and_lists_every_target():
    phony = set(re.search(r"^\.PHONY: (.*?)\n\n", MAKEFILE, re.MULTILINE | re.DOTALL)[1].replace("\\\n", "").split())
    assert set(TARGETS) == phony
    assert make().stdout == make("help").stdout
    for target in TARGETS:
        assert f"  make {target} " in make("help").stdout


def test_every_target_that_a_student_needs_stands_in_a_readme():
    readmes = "\n".join(
        path.read_text() for path in [REPOSITORY_DIR / "README.md", *REPOSITORY_DIR.glob("*/README.md")]
    )
    for target in TARGETS:
        if target not in ("readme", "latency", "load-test", "compare", "report", "cross-check"):
            assert f"make {target}" in readmes, f"make {target} stands in no README"


def test_setup_and_training_do_nothing_the_second_time():
    done = make("--dry-run", "train", check=True)
    commands = [line for line in done.stdout.splitlines() if not line.startswith("make")]
    assert not commands, "make train has run just before the tests, and wants to do again: " + "\n".join(commands)


def test_setup_is_done_again_when_the_requirements_change(tmp_path):
    for name in ("Makefile", "requirements.in", "requirements.txt"):
        shutil.copy2(REPOSITORY_DIR / name, tmp_path / name)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "requirements.txt").touch()
    unchanged = subprocess.run(["make", "-n", "setup"], cwd=tmp_path, capture_output=True, text=True, check=True)
    later = time.time() + 10
    os.utime(tmp_path / "requirements.txt", (later, later))
    changed = subprocess.run(["make", "-n", "setup"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "uv pip install" not in unchanged.stdout
    assert "uv pip install" in changed.stdout


def test_an_unsupported_python_is_refused_in_one_line(tmp_path):
    for name in ("Makefile", "requirements.in", "requirements.txt"):
        shutil.copy2(REPOSITORY_DIR / name, tmp_path / name)
    old = tmp_path / "old_python"
    old.write_text(
        "#!/bin/sh\nexec python3 -c \"import sys; sys.version_info = (3, 10, 1); sys.argv = ['-c']; exec('''$2''')\"\n"
    )
    old.chmod(0o755)
    done = subprocess.run(["make", "setup", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "Python 3.10: 3.11 to 3.13 is needed" in done.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_make_serves_in_the_foreground_and_one_ctrl_c_ends_all_of_it(name, tmp_path):
    refuse_taken_ports()
    endpoint = load_endpoints()[name]()
    rows, _ = load_test_rows()
    log_path = tmp_path / "log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            ["make", name], cwd=REPOSITORY_DIR, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
    family = []
    try:
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while True:
            assert process.poll() is None, log_path.read_text()
            assert time.monotonic() < deadline_s, log_path.read_text()
            try:
                answers = {version: ask(endpoint, rows, version) for version in endpoint.versions}
                break
            except (OSError, ServerError):
                time.sleep(0.1)
        for version, answer in answers.items():
            np.testing.assert_allclose(answer, load_expected(version), rtol=0, atol=TOLERANCE)
        family = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        process.wait(STOP_TIMEOUT_S)
        _, left = psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)
        assert not left, f"Ctrl-C left {left}\n{log_path.read_text()}"
        assert "Traceback" not in log_path.read_text()
    finally:
        for one in [*family, psutil.Process(process.pid)] if process.poll() is None else family:
            if one.is_running():
                one.kill()


def test_clean_removes_what_was_made_and_keeps_what_was_measured(tmp_path):
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY_DIR, capture_output=True, text=True, check=True,
    )  # fmt: skip
    kept = [name for name in listing.stdout.splitlines() if (REPOSITORY_DIR / name).is_file()]
    for name in kept:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY_DIR / name, tmp_path / name)
    made = [
        "torchserve/model.pth", "torchserve/models/2.0/model.pth", "torchserve/model_store/model_v2.mar",
        "torchserve/keys/8080.json",
        "tfserving/models/my_model/2/saved_model.pb", "bentoml/store/models/my_model/latest",
        "onnx/models/my_model/2/model.onnx", "onnx/model.onnx", "benchmarks/__pycache__/endpoint.pyc",
    ]  # fmt: skip
    measured = "benchmarks/results/20260101T000000Z.json"
    for name in [*made, measured]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*kept, measured}
