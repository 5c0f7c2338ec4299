"""Models that others made: ONNX's own backend tests, with inputs, and what ONNX Runtime itself answers to them."""

import contextlib
import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# A few of each kind of operator and type, for `make test`: importing a module makes its cases.
SAMPLE_MODULES = """abs add and argmax argmin batchnorm bitshift cast ceil clip compress concat constant constantofshape
conv cumsum dropout einsum equal expand eyelike flatten gather gemm greater identity if isnan layernormalization
logsoftmax loop lstm matmul max maxpool mean mod nonzero not onehot or pad pow qlinearmatmul quantizelinear range
reducesum reshape resize scatternd shape size slice softmax split squeeze stringnormalizer string_concat string_split
tfidfvectorizer tile topk transpose unique where xor""".split()
DATA_KINDS = ("simple", "pytorch-converted", "pytorch-operator", "light")


@dataclass
class Case:
    """A model that ONNX Runtime runs, its inputs by name, and its outputs, in order."""

    name: str
    model: bytes
    inputs: dict[str, np.ndarray]
    outputs: list[np.ndarray]


def list_node_modules() -> list[str]:
    import onnx.backend.test.case.node as node

    return [module.name for module in pkgutil.iter_modules(node.__path__)]


def read_node_cases(modules: Iterable[str]) -> Iterator[tuple[str, bytes, list[np.ndarray]]]:
    """Return the cases of these modules of onnx.backend.test.case.node: name, model and inputs."""
    from onnx.backend.test.case import node

    seen = len(node._NodeTestCases)
    for module in modules:
        with contextlib.suppress(ModuleNotFoundError):  # another release of onnx
            importlib.import_module(f"onnx.backend.test.case.node.{module}")
    for case in node._NodeTestCases[0 if seen else seen :]:
        yield case.name, case.model.SerializeToString(), list(case.data_sets[0][0])


def read_data_cases(kind: str, most: int | None) -> Iterator[tuple[str, bytes, list[np.ndarray]]]:
    """Return the cases that lie in the package's folder."""
    import onnx.backend.test
    from onnx import TensorProto, numpy_helper

    folder = Path(onnx.backend.test.__file__).parent / "data" / kind
    for path in sorted(folder.glob("*/model.onnx"))[:most]:
        inputs = []
        for file in sorted((path.parent / "test_data_set_0").glob("input_*.pb")):
            tensor = TensorProto()
            tensor.ParseFromString(file.read_bytes())
            inputs.append(numpy_helper.to_array(tensor))
        yield path.parent.name, path.read_bytes(), inputs


def has_only_tensors(session) -> bool:
    """Whether the protocol has a word for every input and output."""
    nodes = [*session.get_inputs(), *session.get_outputs()]
    return all(node.type.startswith("tensor(") and node.type != "tensor(bfloat16)" for node in nodes)


def collect(modules: Iterable[str], most: int | None = None) -> list[Case]:
    """Return the cases of tensors that ONNX Runtime runs twice to the same; `most` of each kind of file."""
    import onnxruntime as ort

    ort.set_default_logger_severity(4)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    cases = []
    sources = [read_node_cases(modules), *(read_data_cases(kind, most) for kind in DATA_KINDS)]
    for name, model, given in (each for source in sources for each in source):
        try:
            session = ort.InferenceSession(model, options, ["CPUExecutionProvider"])
            if not has_only_tensors(session) or len(session.get_inputs()) != len(given):
                continue
            inputs = {node.name: np.asarray(array) for node, array in zip(session.get_inputs(), given, strict=True)}
            inputs = {key: array.astype(object) if array.dtype.kind in "SU" else array for key, array in inputs.items()}
            first, again = session.run(None, inputs), session.run(None, inputs)
        except Exception:  # noqa: BLE001, S112 - ONNX Runtime does not run it: nothing to serve
            continue
        if all(same(a, b) for a, b in zip(first, again, strict=True)):  # else it draws random numbers
            cases.append(Case(name, model, inputs, first))
    return cases


def same(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-5) -> bool:
    """Whether two arrays are equal, numbers but for rounding."""
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        return False
    if a.dtype.kind == "f":
        return np.allclose(a, b, tolerance, tolerance, equal_nan=True)
    return [str(value) for value in a.ravel()] == [str(value) for value in b.ravel()]


def has_json_numbers(arrays: Iterable[np.ndarray]) -> bool:
    """Whether JSON can say all of it."""
    return all(array.dtype.kind != "f" or np.isfinite(array).all() for array in map(np.asarray, arrays))
