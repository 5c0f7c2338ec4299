"""Pack both trained versions into model archives, for serving them side by side.

    python archive.py

Runs torch-model-archiver on models/1.0/model.pth and models/2.0/model.pth, as
the command in README.md does on model.pth, and writes model_store/model_v1.mar
and model_store/model_v2.mar. Both manifests name the model "my_model", so
TorchServe takes them for versions 1.0 and 2.0 of one model.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
MODEL_NAME = "my_model"
ARCHIVES = {"1.0": "model_v1.mar", "2.0": "model_v2.mar"}


def archive(version: str, archive_path: Path) -> None:
    """Pack `version` into `archive_path`; SystemExit with one line if that fails."""
    state_dict_path = FOLDER / "models" / version / "model.pth"
    if not state_dict_path.is_file():
        sys.exit(f"archive: {state_dict_path} not found; run python train_model.py")
    archiver = Path(sys.executable).parent / "torch-model-archiver"
    if not archiver.is_file():
        sys.exit(f"archive: {archiver} not found; run `source ../.venv/bin/activate` first")
    # The archiver names the file after the model and collects its parts in $TMPDIR/my_model, which it empties
    # first. A temporary folder protects both places, and the last step moves the finished file into place.
    with tempfile.TemporaryDirectory(dir=archive_path.parent, prefix=".archive-") as scratch:
        command = [str(archiver), "--model-name", MODEL_NAME, "--version", version]
        command += ["--model-file", "model.py", "--serialized-file", str(state_dict_path)]
        command += ["--handler", "handlers/custom_handler.py", "--export-path", scratch]
        result = subprocess.run(
            command, cwd=FOLDER, env={**os.environ, "TMPDIR": scratch}, capture_output=True, text=True, check=False
        )
        if result.returncode != 0:
            last_line = (result.stderr.strip().splitlines() or ["it printed nothing"])[-1]
            sys.exit(f"archive: torch-model-archiver failed for version {version}: {last_line}")
        (Path(scratch) / f"{MODEL_NAME}.mar").replace(archive_path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    model_store = FOLDER / "model_store"
    model_store.mkdir(exist_ok=True)
    for version, name in ARCHIVES.items():
        archive(version, model_store / name)
        print(f"version {version}: model_store/{name}")
    print(f"wrote {len(ARCHIVES)} archives to {model_store}")


if __name__ == "__main__":
    main()
