"""benchmarks/ opens with its commands; the rooms behind them import one way, downwards, and no command."""

import ast
from pathlib import Path

import pytest

from helpers import REPOSITORY_DIR

BENCHMARKS_DIR = REPOSITORY_DIR / "benchmarks"
# By floor: a room imports rooms of lower floors only. The order is that of benchmarks/REFERENCE.md.
FLOORS = {
    **{"machine": 1, "figures": 1},
    **{"endpoints": 2, "planning": 2, "accelerator": 2},
    **{"client": 3, "drawing": 3},
    **{"servers": 4, "rollout": 4},
}
COMMANDS = {path.stem for path in BENCHMARKS_DIR.glob("*.py")}


def list_modules(room: str) -> list[Path]:
    return sorted((BENCHMARKS_DIR / room).glob("*.py"))


def list_imports(path: Path) -> set[str]:
    """The modules that a file imports, with their dots."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_the_door_holds_commands_and_rooms_only():
    entries = {path.name for path in BENCHMARKS_DIR.iterdir()} - {"__pycache__"}
    pages = {"README.md", "REFERENCE.md", "RESULTS.md"}
    assert entries == {f"{name}.py" for name in COMMANDS} | {*FLOORS, "peers", "results"} | pages
    assert len(COMMANDS) <= 16
    for name in COMMANDS:
        text = (BENCHMARKS_DIR / f"{name}.py").read_text()
        assert '__name__ == "__main__"' in text, f"{name}.py is no command"
        assert f"python {name}.py" in ast.get_docstring(ast.parse(text)), f"{name}.py does not tell how it is run"


@pytest.mark.parametrize("room", FLOORS)
def test_a_room_imports_only_rooms_below_it_and_no_command(room):
    assert (BENCHMARKS_DIR / room / "__init__.py").read_text() == ""
    for path in list_modules(room):
        for name in list_imports(path):
            top = name.partition(".")[0]
            assert top not in COMMANDS, f"{room}/{path.name} imports the command {top}"
            assert top == room or FLOORS.get(top, 0) < FLOORS[room], f"{room}/{path.name} imports {name}"


def test_no_command_imports_another():
    for name in COMMANDS:
        assert not list_imports(BENCHMARKS_DIR / f"{name}.py") & COMMANDS, name


def test_the_modules_of_a_room_import_each_other_in_no_circle():
    for room in FLOORS:
        below = {
            path.stem: {n.partition(".")[2] for n in list_imports(path) if n.startswith(f"{room}.")}
            for path in list_modules(room)
        }
        while below:
            ready = {stem for stem, needs in below.items() if not needs & below.keys()}
            assert ready, f"{room}: {sorted(below)} import each other in a circle"
            below = {stem: needs for stem, needs in below.items() if stem not in ready}
