"""Schemathesis reads what a server's OpenAPI page promises and makes requests that keep to it, and some that do not."""

import subprocess
import sys
from pathlib import Path

import pytest

# What a JSON schema cannot say: that the numbers fill the shape; that a row has a finite answer.
ONNX_EXCEPTIONS = "positive_data_acceptance"
# BentoML 1.4.39 describes an error's "detail" as a string and sends a list, and calls every body optional.
BENTOML_EXCEPTIONS = "response_schema_conformance,positive_data_acceptance"


@pytest.mark.parametrize(
    ("name", "path", "exceptions"),
    [("onnx", "/openapi.json", ONNX_EXCEPTIONS), ("bentoml", "/docs.json", BENTOML_EXCEPTIONS)],
)
def test_no_request_that_schemathesis_makes_breaks_a_promise_of_the_openapi_page(
    request, tmp_path, name, path, exceptions
):
    server = request.getfixturevalue(f"{name}_server")
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        "run",
        f"http://127.0.0.1:{server.endpoint.port}{path}",
        "--phases=examples,coverage,fuzzing",
        "--max-examples=10",
        "--seed=1",
        "--generation-database=none",
        f"--exclude-checks={exceptions}",
        "--no-color",
    ]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout[-5000:] + ended.stderr[-2000:]
    tested = int(ended.stdout.split("Tested:")[1].split()[0])
    assert tested >= 7, ended.stdout[-5000:]
