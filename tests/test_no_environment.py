"""Without the packages, as in a terminal in which .venv is not active, each script says so in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import DEADLINE_S, REPOSITORY_DIR

SCRIPTS = {
    "data/make_data.py": [],
    "torchserve/train_model.py": [],
    "torchserve/grpc_client.py": [],
    "torchserve/serve.py": [],
    "tfserving/export_model.py": [],
    "tfserving/client.py": [],
    "tfserving/local/server.py": ["--port=0", "--rest_api_port={port}", "--model_base_path=models/my_model"],
    "bentoml/train_and_save.py": [],
    "onnx/server.py": [],
    "onnx/convert_to_onnx.py": [],
    "onnx/optimize.py": [],
    "onnx/onnx_inference.py": [],
    "gateway/gateway.py": ["--state", "{folder}/state", "serve"],
    "gateway/shadow.py": [],
    "monitoring/ask.py": ["versions"],
    "monitoring/collect.py": [],
    "monitoring/drift_table.py": [],
    "monitoring/patients.py": [],
    "sealing/keys.py": [],
    "sealing/seal.py": [],
    "sealing/unseal.py": ["onnx", "--to", "{folder}/models"],
    "kubernetes/check.py": [],
    "kubernetes/size.py": [],
    **{f"benchmarks/{path.name}": [] for path in sorted((REPOSITORY_DIR / "benchmarks").glob("*.py"))},
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_without_its_packages_ends_with_one_line(script, tmp_path):
    from machine.free_ports import find_free_ports

    folder = Path("tfserving") if script == "tfserving/local/server.py" else Path(script).parent
    words = {"folder": tmp_path, "port": find_free_ports(["rest"])["rest"]}
    options = [option.format(**words) for option in SCRIPTS[script]]
    # -S: no site-packages. A haproxy that is not found would be the first thing that the gateway misses.
    done = subprocess.run(
        [sys.executable, "-S", REPOSITORY_DIR / script, *options],
        cwd=REPOSITORY_DIR / folder,
        env={**os.environ, "GATEWAY_HAPROXY": "true"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    name = "local server" if script.startswith("tfserving/local") else Path(script).stem
    activate = "source .venv/bin/activate" if folder.name == "benchmarks" else "source ../.venv/bin/activate"
    assert line.startswith(f"{name}: ")
    assert line.endswith(f"run `{activate}` first")
    assert done.stdout == ""
