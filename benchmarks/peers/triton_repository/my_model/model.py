"""The model for Triton's Python backend; 1/model.py and 2/model.py are links to this file.

Triton runs it in processes of the backend, one for each version, in benchmarks/peers/, where onnx_model.py is.
"""

from typing import Any

import numpy as np
import triton_python_backend_utils as backend
from onnx_model import OnnxModel


class TritonPythonModel:
    """The class that the backend looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        self.model = OnnxModel(args["model_version"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer the requests that Triton has batched, in one run."""
        rows = [backend.get_input_tensor_by_name(request, "input").as_numpy() for request in requests]
        if len(rows) == 1:
            probabilities = [self.model.predict(rows[0])]
        else:
            ends = np.cumsum([len(part) for part in rows])
            probabilities = np.split(self.model.predict(np.concatenate(rows)), ends[:-1])
        return [backend.InferenceResponse([backend.Tensor("output", part)]) for part in probabilities]
