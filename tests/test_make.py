"""The make targets: documented, repeatable, and ended by one Ctrl-C."""

import contextlib
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from client.ask import ask
from conftest import FRAMEWORKS, REPOSITORY_DIR, refuse_taken_ports
from endpoints.base import ServerError, load_endpoints
from endpoints.reference import TOLERANCE, load_expected, load_test_rows
from helpers import run, wait_until
from terminal import Terminal

MAKEFILE = (REPOSITORY_DIR / "Makefile").read_text()
TARGETS = re.findall(r"^([a-z0-9-]+):[^#=]*## ", MAKEFILE, re.MULTILINE)


def make(
    *arguments: str | Path,
    cwd: Path = REPOSITORY_DIR,
    check: bool = True,
    environment: dict[str, str | None] | None = None,
) -> subprocess.CompletedProcess:
    as_typed = {"MAKEFLAGS": None, "MAKELEVEL": None}  # `make test` sets them for what it runs
    return run("make", *arguments, cwd=cwd, env=as_typed | (environment or {}), check=check)


def test_help_is_the_default_and_lists_every_target():
    phony = set(re.search(r"^\.PHONY: (.*?)\n\n", MAKEFILE, re.MULTILINE | re.DOTALL)[1].replace("\\\n", "").split())
    assert set(TARGETS) == phony
    listed = make("help").stdout
    assert make().stdout == listed
    assert max(map(len, listed.splitlines())) <= 80
    for target in TARGETS:
        assert f"  make {target} " in listed


def test_every_target_that_a_student_needs_stands_in_a_readme():
    pages = [*REPOSITORY_DIR.glob("*.md"), *REPOSITORY_DIR.glob("[a-z]*/*.md")]
    readmes = "\n".join(page.read_text() for page in pages)
    for target in TARGETS:
        if target not in ("readme", "latency", "load-test", "compare", "report", "cross-check"):
            assert f"make {target}" in readmes, f"make {target} stands in no page"


def test_setup_and_training_do_nothing_the_second_time():
    done = make("--dry-run", "train")
    commands = [line for line in done.stdout.splitlines() if not line.startswith("make")]
    assert not commands, "make train has run just before the tests, and wants to do again: " + "\n".join(commands)


def test_setup_is_done_again_when_the_requirements_change(tmp_path):
    for name in ("Makefile", "requirements.in", "requirements.txt"):
        shutil.copy2(REPOSITORY_DIR / name, tmp_path / name)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "requirements.txt").touch()
    unchanged = make("--dry-run", "setup", cwd=tmp_path)
    later = time.time() + 10
    os.utime(tmp_path / "requirements.txt", (later, later))
    changed = make("--dry-run", "setup", cwd=tmp_path)
    assert "uv pip install" not in unchanged.stdout
    assert "uv pip install" in changed.stdout


FAKE_PYTHON = """#!/bin/sh
[ "$1 $2" = "-m venv" ] || exit 0
mkdir -p .venv/bin
printf '#!/bin/sh\\nexit 0\\n' > .venv/bin/python
printf '#!/bin/sh\\necho "$*" >> asked\\n[ "$2" != compile ] || exit $INDEX_IS_OUT_OF_REACH\\n' > .venv/bin/uv
printf '#!/bin/sh\\n' > .venv/bin/java
[ -z "$HAS_GPU" ] || cp .venv/bin/java .venv/bin/nvidia-smi
chmod +x .venv/bin/*
"""


@pytest.mark.parametrize(
    ("environment", "flag"),
    [({}, " --torch-backend=cpu"), ({"INDEX_IS_OUT_OF_REACH": "2"}, ""), ({"HAS_GPU": "1"}, ""),
     ({"PIP_FIND_LINKS": "/wheels"}, "")],
)  # fmt: skip
def test_setup_leaves_cuda_out_where_there_is_no_gpu_and_the_index_without_it_is_in_reach(tmp_path, environment, flag):
    for name in ("Makefile", "requirements.in", "requirements.txt"):
        shutil.copy2(REPOSITORY_DIR / name, tmp_path / name)
    (tmp_path / "python").write_text(FAKE_PYTHON)
    (tmp_path / "python").chmod(0o755)
    usual = {"INDEX_IS_OUT_OF_REACH": "0", "HAS_GPU": None, "PIP_FIND_LINKS": None, "UV_FIND_LINKS": None}
    done = make("setup", f"PYTHON={tmp_path / 'python'}", cwd=tmp_path, environment=usual | environment)
    installs = [line for line in (tmp_path / "asked").read_text().splitlines() if line.startswith("pip install")]
    assert installs == [f"pip install --system-certs{flag} --python .venv/bin/python -r requirements.txt"]
    assert ("without CUDA" in done.stdout) == bool(flag)


def test_an_unsupported_python_is_refused_in_one_line(tmp_path):
    for name in ("Makefile", "requirements.in", "requirements.txt"):
        shutil.copy2(REPOSITORY_DIR / name, tmp_path / name)
    old = tmp_path / "old_python"
    old.write_text(
        "#!/bin/sh\nexec python3 -c \"import sys; sys.version_info = (3, 10, 1); sys.argv = ['-c']; exec('''$2''')\"\n"
    )
    old.chmod(0o755)
    done = make("setup", f"PYTHON={old}", cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert "Python 3.10: 3.11 to 3.13 is needed" in done.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize("name", [*FRAMEWORKS, "gateway"])
def test_make_serves_with_the_command_that_the_folders_readme_shows(name):
    recipe = make("--dry-run", "--old-file", "train", name).stdout.splitlines()[-1]
    folder, command = re.fullmatch(r"cd (\S+) && exec (.*)", recipe).groups()
    assert folder == name
    servers = re.findall(r"^```bash server\n(.*?)^```", (REPOSITORY_DIR / name / "README.md").read_text(), re.M | re.S)
    assert any(command in server for server in servers), f"{command} stands in no server block of {name}/README.md"


@pytest.mark.readmes
@pytest.mark.parametrize("name", ["onnx"])  # the READMEs start and stop the others with the recipes' own commands
def test_make_serves_in_the_foreground_and_one_ctrl_c_ends_all_of_it(name, tmp_path):
    refuse_taken_ports(name)
    endpoint = load_endpoints()[name]()
    rows, _ = load_test_rows()
    terminal = Terminal(str(tmp_path), REPOSITORY_DIR, {"PATH": os.environ["PATH"], "HOME": str(tmp_path)})
    try:
        start = len(terminal.screen)
        terminal.press(f"make {name}\n".encode())

        def answer_all() -> dict | None:
            assert not terminal.has_prompted_since(start), terminal.shown_since(start)
            with contextlib.suppress(OSError, ServerError):
                return {version: ask(endpoint, rows, version) for version in endpoint.versions}

        answers = wait_until(answer_all, lambda: terminal.shown_since(start))
        for version, answer in answers.items():
            np.testing.assert_allclose(answer, load_expected(version), rtol=0, atol=TOLERANCE)
        terminal.interrupt(start)
        terminal.wait_until_empty("Ctrl-C")
        assert "Traceback" not in terminal.shown_since(start)
    finally:
        terminal.close()


def test_clean_removes_what_was_made_and_keeps_what_was_measured(tmp_path):
    listing = run("git", "ls-files", "--cached", "--others", "--exclude-standard", check=True)
    kept = [name for name in listing.stdout.splitlines() if (REPOSITORY_DIR / name).is_file()]
    for name in kept:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY_DIR / name, tmp_path / name)
    made = [
        "torchserve/model.pth", "torchserve/models/2.0/model.pth", "torchserve/model_store/model_v2.mar",
        "torchserve/keys/8080.json",
        "tfserving/models/my_model/2/saved_model.pb", "bentoml/store/models/my_model/latest",
        "onnx/models/my_model/2/model.onnx", "onnx/model.onnx", "benchmarks/endpoints/__pycache__/base.pyc",
    ]  # fmt: skip
    measured = "benchmarks/results/20260101T000000Z.json"
    for name in [*made, measured]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    make("clean", cwd=tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*kept, measured}
