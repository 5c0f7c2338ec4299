"""The repository's shape: no folder hides a package, the named files are there, folders share no code."""

import ast
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from conftest import REPOSITORY_DIR
from helpers import run

FRAMEWORK_FOLDERS = ("torchserve", "tfserving", "bentoml", "onnx")
SITE_PACKAGES = [path for path in sys.path if "site-packages" in path]
PACKAGES = ("bentoml", "onnx", "tensorflow_serving", "torch", "ts")
NAMED_BY_THE_EXERCISE = """
torchserve/models torchserve/model_store torchserve/handlers/custom_handler.py torchserve/config.properties
torchserve/Dockerfile torchserve/train_model.py torchserve/model.py torchserve/README.md
tfserving/models/my_model tfserving/client.py tfserving/export_model.py tfserving/docker-compose.yml tfserving/README.md
bentoml/service.py bentoml/train_and_save.py bentoml/bentofile.yaml bentoml/README.md
onnx/convert_to_onnx.py onnx/onnx_inference.py onnx/optimize.py onnx/README.md
benchmarks/benchmark_all.py benchmarks/load_test.py benchmarks/latency_test.py benchmarks/results benchmarks/README.md
tests docker-compose.yml Makefile requirements.txt README.md
""".split()


def tracked_files() -> list[str]:
    return run("git", "ls-files", "--cached", "--others", "--exclude-standard", check=True).stdout.splitlines()


def imported_modules(path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def test_every_file_that_the_exercise_names_is_in_a_fresh_clone():
    tracked = tracked_files()
    missing = [
        name
        for name in NAMED_BY_THE_EXERCISE
        if not any(path == name or path.startswith(f"{name}/") for path in tracked)
    ]
    assert not missing


@pytest.mark.parametrize(
    "folder", [".", "benchmarks", "gateway", "monitoring", "sealing", "tests", *FRAMEWORK_FOLDERS, "tfserving/local"]
)
def test_no_folder_hides_a_package_from_a_script_that_starts_in_it(folder):
    # As for a script, the folder is searched first; a folder without an __init__.py hides no package.
    search = [str(REPOSITORY_DIR / folder), *SITE_PACKAGES]
    for package in PACKAGES:
        found = PathFinder.find_spec(package, search)
        assert "site-packages" in found.origin, f"{package} is {found.origin} for a script in {folder}/"


@pytest.mark.parametrize("folder", FRAMEWORK_FOLDERS)
def test_a_framework_folder_imports_nothing_of_the_other_folders(folder):
    own = {path.stem for path in (REPOSITORY_DIR / folder).rglob("*.py")}
    others = {
        path.stem
        for other in (*FRAMEWORK_FOLDERS, "benchmarks", "tests", "data")
        if other != folder
        for path in (REPOSITORY_DIR / other).rglob("*.py")
    } | {path.parent.name for path in (REPOSITORY_DIR / "benchmarks").glob("*/__init__.py")}
    assert not (REPOSITORY_DIR / folder / "__init__.py").exists()
    for path in (REPOSITORY_DIR / folder).rglob("*.py"):
        foreign = imported_modules(path) & (others - own)
        assert not foreign, f"{path.relative_to(REPOSITORY_DIR)} imports {foreign}"


def test_tensorflow_servings_folder_shows_its_lesson_and_the_local_server_lies_behind_it():
    lesson = {path.stem: path for path in (REPOSITORY_DIR / "tfserving").glob("*.py")}
    local_server = {path.stem: path for path in (REPOSITORY_DIR / "tfserving" / "local").glob("*.py")}
    assert lesson.keys() == {"export_model", "client", "serve", "quiet_tensorflow"}
    assert lesson.keys() & local_server.keys() == {"quiet_tensorflow"}
    assert lesson["quiet_tensorflow"].read_bytes() == local_server["quiet_tensorflow"].read_bytes()
    for own, other in ((lesson, local_server), (local_server, lesson)):
        for path in own.values():
            assert not imported_modules(path) & (other.keys() - own.keys()), path


def test_no_script_has_the_name_of_a_package():
    paths = [Path(name) for name in tracked_files() if name.endswith(".py")]
    rooms = {path.parent.name for path in paths if path.name == "__init__.py"}
    stems = {path.stem for path in paths} - {"__init__"} | rooms
    assert not stems & sys.stdlib_module_names
    assert not [stem for stem in stems if PathFinder.find_spec(stem, SITE_PACKAGES)]
