"""The networks whose crossover is looked for: the one that is served, and wider ones with random weights."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FEATURES = 5
OURS = "ours"
WIDE = {"5-512²": (512, 512), "5-2048²": (2048, 2048), "5-4096³": (4096, 4096, 4096)}
OPSET = 17
INPUT_SIZE = 10  # about how large the inputs are; the first weights are so much smaller


def load_network(name: str, model_path: Path) -> bytes:
    """Return the network as an ONNX file's content; ValueError for an unknown name, OSError if ours is missing."""
    if name == OURS:
        return model_path.read_bytes()
    if name not in WIDE:
        raise ValueError(f"{name}: no such network; there are {OURS}, {', '.join(WIDE)}")
    return make_wide_network(WIDE[name])


def make_wide_network(sizes: tuple[int, ...], seed: int = 0) -> bytes:
    """Return a network of FEATURES inputs, ReLU layers of `sizes` and one sigmoid output, with He's random weights."""
    random = np.random.default_rng(seed)
    nodes, weights = [], []
    name, width = "input", FEATURES
    for layer, size in enumerate((*sizes, 1)):
        matrix = (
            random.standard_normal((width, size)) * np.sqrt(2 / width) / (INPUT_SIZE if layer == 0 else 1)
        ).astype(np.float32)
        bias = np.zeros(size, np.float32)
        weights += [numpy_helper.from_array(matrix, f"w{layer}"), numpy_helper.from_array(bias, f"b{layer}")]
        nodes.append(helper.make_node("Gemm", [name, f"w{layer}", f"b{layer}"], [f"z{layer}"]))
        is_last = layer == len(sizes)
        name = "output" if is_last else f"a{layer}"
        nodes.append(helper.make_node("Sigmoid" if is_last else "Relu", [f"z{layer}"], [name]))
        width = size
    graph = helper.make_graph(
        nodes, "wide",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["rows", FEATURES])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["rows", 1])],
        weights,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = 8
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content
