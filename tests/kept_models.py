"""Keep the toy SavedModels from one run of the tests to the next: writing them takes 12 s of CPU.

They are written again when anything that they are made of has changed. Two workers may ask for them at once: each
writes a folder of its own, and the first to finish gives it its name.
"""

import hashlib
import importlib.metadata
import shutil
import tempfile
from pathlib import Path

from helpers import REPOSITORY_DIR, TESTS_DIR, run_python

SCRIPT = TESTS_DIR / "toy_saved_models.py"
LOCAL_SERVER_DIR = REPOSITORY_DIR / "tfserving" / "local"  # the script imports files of it
PACKAGES = ("tensorflow", "keras", "numpy")
WRITING = "writing-"  # how the names of unfinished folders begin


def hash_sources(script: Path) -> str:
    """Return a hash of the script, of the local server's files and of the versions of the packages that they use."""
    digest = hashlib.sha256()
    for path in (script, *sorted(LOCAL_SERVER_DIR.glob("*.py"))):
        digest.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    for package in PACKAGES:
        digest.update(f"{package} {importlib.metadata.version(package)}\n".encode())
    return digest.hexdigest()


def find_or_make_models(kept_dir: Path, script: Path = SCRIPT) -> Path:
    """Return the folder in `kept_dir` that `python <script> <folder>` has filled; run it if there is none yet.

    Folders of older sources are removed then.
    """
    made = kept_dir / hash_sources(script)
    if made.is_dir():
        return made
    with tempfile.TemporaryDirectory(prefix=WRITING, dir=kept_dir) as folder:
        written = Path(folder, made.name)
        written.mkdir()
        run_python(script, written, check=True)
        try:
            written.rename(made)
        except OSError:
            if not made.is_dir():  # else another worker was faster
                raise
    for path in kept_dir.iterdir():
        if path != made and not path.name.startswith(WRITING):
            shutil.rmtree(path, ignore_errors=True)
    return made
