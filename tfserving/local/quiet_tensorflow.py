"""Import TensorFlow without its start-up messages: `from quiet_tensorflow import tf`.

While it is imported, TensorFlow's C++ code writes to file descriptor 2 (no CUDA driver, oneDNN is on) at every log
level. Everything here runs on the CPU, so these messages are of no use; set CUDA_VISIBLE_DEVICES to give it a GPU.
Keras imports scikit-learn and Matplotlib if they are installed, a third of the import's time, and nothing here needs
them. tfserving/ and tfserving/local/ hold the same file.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("KERAS_HOME", os.devnull)  # otherwise Keras writes unused settings to ~/.keras


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Discard output to file descriptor 2 inside the block; Python's exceptions still reach the caller."""
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
    """Make imports of these packages fail inside the block, as if not installed; loaded ones stay loaded."""
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

tf.get_logger().setLevel("ERROR")  # messages from Python: deprecations
