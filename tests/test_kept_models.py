"""The toy SavedModels are written once, and again when what they are made of has changed."""

import importlib.metadata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import kept_models
from kept_models import find_or_make_models

# Stands in for toy_saved_models.py: writes one file, and a line into `runs` for each time that it was run.
SCRIPT = """\
import pathlib, sys
with pathlib.Path(__file__).with_name("runs").open("a") as runs:
    print("run", file=runs)
pathlib.Path(sys.argv[1], "model").write_text("first")
"""


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def kept_dir(tmp_path) -> Path:
    folder = tmp_path / "kept"
    folder.mkdir()
    return folder


def count_runs(script: Path) -> int:
    return len(script.with_name("runs").read_text().splitlines())


def test_the_second_run_of_the_tests_finds_what_the_first_has_written(kept_dir, script):
    folders = [find_or_make_models(kept_dir, script) for _ in range(2)]
    assert folders[0] == folders[1]
    assert (folders[0] / "model").read_text() == "first"
    assert count_runs(script) == 1


def test_a_changed_script_is_run_and_what_the_old_one_wrote_is_removed(kept_dir, script):
    find_or_make_models(kept_dir, script)
    script.write_text(SCRIPT.replace("first", "second"))
    folder = find_or_make_models(kept_dir, script)
    assert (folder / "model").read_text() == "second"
    assert list(kept_dir.iterdir()) == [folder]


def test_another_local_server_and_another_tensorflow_have_other_models(script, tmp_path, monkeypatch):
    hashes = [kept_models.hash_sources(script)]
    monkeypatch.setattr(kept_models, "LOCAL_SERVER_DIR", tmp_path / "local")
    hashes.append(kept_models.hash_sources(script))
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"{version(name)}.{name == 'tensorflow'}")
    hashes.append(kept_models.hash_sources(script))
    assert len(set(hashes)) == 3


def test_a_script_that_fails_leaves_nothing(kept_dir, script):
    script.write_text(f"{SCRIPT}sys.exit('no models')\n")
    with pytest.raises(AssertionError, match="no models"):
        find_or_make_models(kept_dir, script)
    assert list(kept_dir.iterdir()) == []


def test_two_workers_at_once_both_get_the_models(kept_dir, script):
    # Each waits until both have begun.
    script.write_text(f"{SCRIPT}while pathlib.Path(__file__).with_name('runs').read_text().count('run') < 2: pass\n")
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: find_or_make_models(kept_dir, script), range(2)))
    assert folders[0] == folders[1]
    assert list(kept_dir.iterdir()) == [folders[0]]
    assert (folders[0] / "model").read_text() == "first"
