"""The help text of every script is whole in a terminal of 80 columns."""

import re

import pytest

from conftest import REPOSITORY_DIR
from helpers import call_main, load_together, run, run_python

COLUMNS = 80
SUBCOMMANDS = {
    "gateway/gateway.py": [
        *("serve", "set", "promote", "rollback", "status", "keys", "servers", "reload"),
        *("keys add", "keys list", "keys revoke"),
    ]
}


def list_commands() -> list[tuple[str, str]]:
    """Return every script that has a command line and runs in this environment, with "" and with each subcommand."""
    paths = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py", check=True).stdout.splitlines()
    scripts = [
        path
        for path in paths
        if not path.startswith(("benchmarks/peers/", "tests/"))
        and (REPOSITORY_DIR / path).is_file()
        and "if __name__ ==" in (REPOSITORY_DIR / path).read_text()
        and re.search(r"ArgumentParser\(|read_output_dir\(", (REPOSITORY_DIR / path).read_text())
    ]
    return [(script, words) for script in scripts for words in ["", *SUBCOMMANDS.get(script, [])]]


@pytest.mark.parametrize(("script", "words"), list_commands())
def test_the_help_text_is_whole_at_80_columns(script, words):
    path = REPOSITORY_DIR / script
    # Locust has gevent patch the process; the others tell it before they import what takes seconds.
    if script in ("benchmarks/load_test.py", "onnx/convert_to_onnx.py", "onnx/optimize.py"):
        done = run_python(path, "--help", env={"COLUMNS": str(COLUMNS)})
    else:
        (module,) = load_together(path.parent, path.stem)
        done = call_main(module, *words.split(), "--help", columns=COLUMNS)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0].startswith("usage: ")
    assert [line for line in lines if len(line) > COLUMNS] == []


def test_the_commands_are_found():
    scripts = {script for script, _ in list_commands()}
    assert (
        SUBCOMMANDS.keys() | {"onnx/server.py", "doctor.py", "tfserving/local/server.py", "benchmarks/benchmark_all.py"}
        <= scripts
    )
