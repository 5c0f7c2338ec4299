r"""Serve the ONNX model with NVIDIA Triton, over the Open Inference Protocol.

    ../../.venv-peers/triton/bin/python serve_triton.py \
        [--port 8041] [--metrics-port 8042] [--grpc-port 8043]

Run it in benchmarks/peers/. The wheel nvidia-pytriton brings the binary
tritonserver and its Python backend, and no backend for ONNX, so
triton_repository/my_model/model.py runs ONNX Runtime. This process becomes
tritonserver. Ctrl-C stops it.
"""

import argparse
import contextlib
import os
import sys
import sysconfig
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PACKAGES = Path(sysconfig.get_path("purelib"))
TRITON = PACKAGES / "pytriton" / "tritonserver"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8041, help="REST port (default: 8041)")
    parser.add_argument("--metrics-port", type=int, default=8042, help="port of the metrics (default: 8042)")
    parser.add_argument("--grpc-port", type=int, help="port of gRPC (default: none)")
    arguments = parser.parse_args()

    # The backend runs models in its stub, a program that embeds one version of Python; the wheel brings several.
    stub = TRITON / "python_backend_stubs" / f"3.{sys.version_info.minor}" / "triton_python_backend_stub"
    if not stub.exists():
        sys.exit(f"serve_triton: no stub for Python 3.{sys.version_info.minor} in {stub.parent.parent}")
    with contextlib.suppress(FileExistsError):
        (TRITON / "backends" / "python" / stub.name).symlink_to(stub)
    # The stub reads no PYTHONPATH. It takes the packages of the first python3 on PATH, and modules of this folder.
    os.chdir(FOLDER)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath))),
        "LD_LIBRARY_PATH": sysconfig.get_config_var("LIBDIR"),  # of libpython
    }
    command = [
        str(TRITON / "bin" / "tritonserver"),
        f"--model-repository={FOLDER / 'triton_repository'}",
        f"--backend-directory={TRITON / 'backends'}",
        "--http-address=127.0.0.1",
        f"--http-port={arguments.port}",
        f"--metrics-port={arguments.metrics_port}",
        *(["--allow-grpc=false"] if arguments.grpc_port is None else [f"--grpc-port={arguments.grpc_port}"]),
        "--grpc-address=127.0.0.1",
        "--allow-gpu-metrics=false",
        "--exit-timeout-secs=15",
    ]
    os.execve(command[0], command, environment)


if __name__ == "__main__":
    main()
