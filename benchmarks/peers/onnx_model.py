"""The model that every peer serves: onnx/models/my_model/<version>/model.onnx, in ONNX Runtime with one thread."""

import os
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # else ONNX Runtime writes to ~/.cache and reports to Microsoft
import onnxruntime as ort

MODEL_DIR = Path(__file__).resolve().parents[2] / "onnx" / "models" / "my_model"
VERSIONS = ("1", "2")


class OnnxModel:
    """One version of the model; FileNotFoundError if it is not exported."""

    def __init__(self, version: str):
        path = MODEL_DIR / version / "model.onnx"
        if not path.exists():
            raise FileNotFoundError(f"{path}: not found; make train")
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def predict(self, rows: Any) -> np.ndarray:
        """Return the probabilities, (n, 2) float32, of `rows`, (n, 5) numbers."""
        return self.session.run(["output"], {"input": np.asarray(rows, dtype=np.float32)})[0]
