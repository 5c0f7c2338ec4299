"""Import TensorFlow without its start-up noise: `from quiet_tensorflow import tf`.

TensorFlow's C++ code writes to file descriptor 2 while it is being imported (no CUDA driver, oneDNN is on),
whatever the log level. Everything here runs on the CPU, so none of it is news. Set CUDA_VISIBLE_DEVICES
yourself to give it a GPU. Keras looks for scikit-learn and Matplotlib, which nothing here needs: a third of the time
that the import takes. The same file is in tfserving/ and tfserving/local/.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("KERAS_HOME", os.devnull)  # else Keras writes its settings, which nothing here reads, to ~/.keras


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Send file descriptor 2 to nowhere inside the block; Python's own exceptions still reach the caller."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextlib.contextmanager
def not_installed(*names: str) -> Iterator[None]:
    """Let an import of these packages fail inside the block, as if they were not there; what is loaded stays."""
    hidden = set(names) - sys.modules.keys()
    sys.modules.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


try:
    with silent_stderr(), not_installed("sklearn", "matplotlib"):
        import tensorflow as tf
except ModuleNotFoundError as error:
    sys.exit(f"{error.name} is not installed in this Python; run `source ../.venv/bin/activate` first")

tf.get_logger().setLevel("ERROR")  # Python's side: deprecation notes
