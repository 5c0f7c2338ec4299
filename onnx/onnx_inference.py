"""Predict in process with ONNX Runtime: the test rows of ../data, and one by hand.

    python onnx_inference.py [model.onnx] [--device auto|cpu|cuda]

Prints which execution provider ran. Writes nothing.
"""

import argparse
import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # else ONNX Runtime writes to ~/.cache and reports to Microsoft
try:
    import numpy as np
    import onnxruntime as ort
    from onnxruntime.capi import onnxruntime_pybind11_state as ort_state
except ModuleNotFoundError as error:
    sys.exit(f"onnx_inference: {error.name} is not installed in this Python; run `source ../.venv/bin/activate` first")

FOLDER = Path(__file__).resolve().parent
DATA_DIR = FOLDER.parent / "data"

# TF32, the provider's default on newer GPUs, keeps 10 bits of a number: too few for answers within 1e-5.
CUDA = ("CUDAExecutionProvider", {"use_tf32": "0"})
PROVIDERS = {  # in order of preference
    "cpu": ["CPUExecutionProvider"],
    "cuda": [CUDA, "CPUExecutionProvider"],
    "auto": [CUDA, "CPUExecutionProvider"],
}
# ONNX Runtime's exceptions have no common base class but Exception.
LOAD_ERRORS = (
    ort_state.EPFail,
    ort_state.Fail,
    ort_state.InvalidArgument,
    ort_state.InvalidGraph,
    ort_state.InvalidProtobuf,
    ort_state.NotImplemented,
    ort_state.RuntimeException,
)
LOG_FATAL = 4  # without CUDA, ONNX Runtime prints pages about it; get_providers() is enough
CUDA_NEEDS = 'it needs an NVIDIA driver, and CUDA and cuDNN (pip install "onnxruntime-gpu[cuda,cudnn]")'


class ModelError(RuntimeError):
    """A model could not be loaded; the message is one line."""


class DeviceError(ModelError):
    """The requested device cannot be used, whatever the model."""


def open_session(
    model: Path | bytes, device: str, intra_op_threads: int, allow_spinning: bool, external: Mapping[str, bytes] = {}
) -> ort.InferenceSession:
    """Return a session with the best of the device's providers that loads `model`, a file or its content.

    `external` holds the model's files of weights, by the names that the model uses. Raises one of LOAD_ERRORS for a
    bad file, and DeviceError if CUDA is requested and does not load.
    """
    options = ort.SessionOptions()
    if external:
        sizes = [len(content) for content in external.values()]
        options.add_external_initializers_from_files_in_memory(list(external), list(external.values()), sizes)
    options.intra_op_num_threads = intra_op_threads
    options.inter_op_num_threads = 1  # the graph is a chain: no two operators can run at once
    if not allow_spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = LOG_FATAL
    ort.set_default_logger_severity(LOG_FATAL)
    session = None
    if device != "cpu" and "CUDAExecutionProvider" in ort.get_available_providers():
        with contextlib.redirect_stdout(io.StringIO()):  # it prints each missing library
            ort.preload_dlls()  # CUDA and cuDNN from Python packages are not on the loader's path
        with contextlib.suppress(*LOAD_ERRORS):  # no driver, no GPU; a bad file fails again below
            session = ort.InferenceSession(model, options, PROVIDERS[device], enable_fallback=0)
    if session is None:
        session = ort.InferenceSession(model, options, PROVIDERS["cpu"], enable_fallback=0)
    # Without this check a missing CUDA library means a silent answer from the CPU.
    if device == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        raise DeviceError(f"CUDA was requested but cannot be loaded; {CUDA_NEEDS}, or use --device cpu")
    return session


def shorten(error: Exception) -> str:
    """Return ONNX Runtime's message in one line, without its own file and line numbers."""
    first = str(error).strip().partition("\n")[0]
    first = re.sub(r"\S*/onnxruntime/\S+ (?:\S+ )?", "", first)
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", first)


class ONNXPredictor:
    """One loaded model: raw features (n, 5) in, [P(malignant), P(benign)] (n, 2) out.

    `device` is "auto" (CUDA if it loads, else the CPU), "cpu", or "cuda" (ModelError if it does not load).
    `intra_op_threads` is the number of threads inside one operator; 0 lets ONNX Runtime take one per core. For a
    model this small more than one only adds waiting. `allow_spinning` lets them wait for work in a loop, which takes
    their cores. Afterwards `providers` holds the providers in use.
    """

    def __init__(
        self, model_path: str | Path, device: str = "auto", intra_op_threads: int = 1, allow_spinning: bool = True
    ):
        self.path = Path(model_path)
        if not self.path.is_file():
            raise ModelError(f"{self.path} not found: run python convert_to_onnx.py")
        try:
            self.session = open_session(self.path, device, intra_op_threads, allow_spinning)
            self.input = self.session.get_inputs()[0]
            self.output = self.session.get_outputs()[0]
            for tensor in (self.input, self.output):
                if tensor.type != "tensor(float)" or len(tensor.shape) != 2 or not isinstance(tensor.shape[1], int):
                    wrong = f"is {tensor.type} {tensor.shape}, expected tensor(float) of (batch, columns)"
                    raise ModelError(f"{self.path}: {tensor.name!r} {wrong}; run python convert_to_onnx.py")
            self.run(np.ones((1, self.input.shape[1]), np.float32))  # allocates, and shows that it also runs
        except LOAD_ERRORS as error:
            reason = f"{self.path} cannot be loaded ({shorten(error)})"
            raise ModelError(f"{reason}; run python convert_to_onnx.py") from None
        self.providers = self.session.get_providers()
        self.features = self.input.shape[1]
        noted = self.session.get_modelmeta().custom_metadata_map.get("features")
        self.feature_names = json.loads(noted) if noted else [f"feature {i}" for i in range(self.features)]

    def predict(self, rows) -> np.ndarray:
        """Return the probabilities (n, 2) of `rows` (n, 5), an array or nested list; ValueError on bad rows."""
        return self.run(self.check(rows))

    def check(self, rows) -> np.ndarray:
        """Return `rows` as float32 (n, 5); ValueError if NumPy cannot make that of them."""
        try:
            array = np.asarray(rows)
        except ValueError:
            raise ValueError(f"rows differ in length; each has {self.features} features") from None
        if array.dtype.kind not in "iuf":
            raise ValueError(f"rows hold a value that is not a number (NumPy reads them as {array.dtype})")
        if array.shape[:1] == (0,):
            raise ValueError("rows are empty: send at least one")
        if array.ndim != 2 or array.shape[1] != self.features:
            raise ValueError(f"rows have shape {array.shape}, expected (n, {self.features})")
        with np.errstate(over="ignore"):  # reported below, with its place
            array = array.astype(np.float32)
        if not np.isfinite(array).all():
            row, feature = np.argwhere(~np.isfinite(array))[0]
            raise ValueError(f"row {row}, {self.feature_names[feature]}: not a finite number in float32")
        return array

    def run(self, array: np.ndarray) -> np.ndarray:
        """Return the model's output for a checked float32 array; about 10 µs for one row."""
        return self.session.run([self.output.name], {self.input.name: array})[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", type=Path, nargs="?", default=FOLDER / "model.onnx", help="ONNX file (default: model.onnx)"
    )
    parser.add_argument("--device", choices=list(PROVIDERS), default="auto", help="where to compute (default: auto)")
    arguments = parser.parse_args()
    try:
        predictor = ONNXPredictor(arguments.model, arguments.device)
    except ModelError as error:
        print(f"onnx_inference: {error}", file=sys.stderr)
        return 1

    table = np.loadtxt(DATA_DIR / "test.csv", delimiter=",", skiprows=1)
    rows, labels = table[:, :-1], table[:, -1]
    probabilities = predictor.predict(rows)  # (n, 2)
    print("first test rows, [P(malignant), P(benign)] and the label (0 malignant, 1 benign):")
    for probability, label in list(zip(probabilities, labels, strict=True))[:3]:
        print(f"  {np.array2string(probability, precision=4, suppress_small=True)}  label {label:.0f}")
    accuracy = np.mean(probabilities.argmax(axis=1) == labels)
    print(f"test accuracy: {accuracy:.4f}")
    print(f"Prediction: {predictor.predict([[1.0, 2.0, 3.0, 4.0, 5.0]])}")
    print(f"predicted {len(rows) + 1} rows with {predictor.providers[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
