"""Small ONNX models of every kind, made in memory, each with what it answers by NumPy."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

DATATYPES = {"bool": "BOOL", "float16": "FP16", "float32": "FP32", "float64": "FP64", "object": "BYTES"} | {
    f"{sign}int{bits}": f"{'U' if sign else ''}INT{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}
Arrays = dict[str, np.ndarray]
Shape = list[int | str | None] | None  # a name or None where the size may differ; None for a tensor without a rank


@dataclass
class Toy:
    """A model, what it takes, and what it answers."""

    model: bytes
    inputs: dict[str, tuple[str, list]]  # NumPy's type, and the sizes: a name where it may differ
    answer: Callable[..., Arrays]  # by the inputs' names

    def make_inputs(self, random: np.random.Generator, most: int = 6) -> Arrays:
        """Return values for every input; sizes of one name are equal."""
        sizes: dict[str, int] = {}
        arrays = {}
        for name, (kind, shape) in self.inputs.items():
            shape = [
                size if isinstance(size, int) else sizes.setdefault(size, int(random.integers(1, most + 1)))
                for size in shape
            ]
            arrays[name] = make_values(random, np.dtype(kind), shape)
        return arrays


def make_values(random: np.random.Generator, kind: np.dtype, shape: list[int]) -> np.ndarray:
    """Return random values of a type."""
    if kind.kind == "O":
        words = ["", "a", "Zürich", "two words", "x" * 300, '"\\\n']
        return np.array(
            [words[i] + str(i) for i in random.integers(0, len(words), np.prod(shape, dtype=int))], object
        ).reshape(shape)
    if kind.kind == "b":
        return random.random(shape) < 0.5
    if kind.kind in "iu":
        bounds = np.iinfo(kind)
        return random.integers(bounds.min, bounds.max, shape, kind, endpoint=True)
    return random.normal(size=shape).astype(kind)


def make_model(
    nodes: list, inputs: list, outputs: list, initializers: list = (), properties: dict | None = None
) -> bytes:
    """Return a model of these nodes; inputs and outputs are value infos."""
    from onnx import helper

    graph = helper.make_graph(nodes, "toy", inputs, outputs, list(initializers))
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    if properties:
        helper.set_model_props(model, properties)
    return model.SerializeToString()


def tensor(name: str, kind: str | int, shape: Shape):
    """Return the value info of a tensor of NumPy's or of ONNX's type."""
    from onnx import helper

    number = kind if isinstance(kind, int) else helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    return helper.make_tensor_value_info(name, number, shape)


def make_unary(operator: str, kind: str | int, shape: Shape = ("n", "m"), **attributes) -> bytes:
    """Return a model of one operator, x to y, of one type and shape."""
    from onnx import helper

    shape = None if shape is None else list(shape)
    node = helper.make_node(operator, ["x"], ["y"], **attributes)
    return make_model([node], [tensor("x", kind, shape)], [tensor("y", kind, shape)])


def make_rows(kind: str, features: int = 5, properties: dict | None = None) -> bytes:
    """Return a model of rows: `same`, or one whose answers are not one for each row, whatever the others are.

    `choosy` leaves out rows that begin with 100 or more: made-up inputs do not show it.
    """
    from onnx import helper, numpy_helper

    mean = helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0], keepdims=1)
    most = helper.make_node("ReduceMax", ["x"], ["most"], axes=[0], keepdims=1)
    nodes = {
        "same": [helper.make_node("Identity", ["x"], ["y"])],
        "averaged": [helper.make_node("ReduceMean", ["x"], ["y"], axes=[0], keepdims=1)],
        "centred": [mean, helper.make_node("Sub", ["x", "mean"], ["y"])],
        "peaked": [most, helper.make_node("Sub", ["x", "most"], ["y"])],
        "choosy": [
            helper.make_node("Slice", ["x", "zero", "one", "one"], ["first"]),
            helper.make_node("Less", ["first", "bound"], ["small"]),
            helper.make_node("Reshape", ["small", "all"], ["flat"]),
            helper.make_node("Compress", ["x", "flat"], ["y"], axis=0),
        ],
    }[kind]
    constants = {"zero": np.array([0]), "one": np.array([1]), "all": np.array([-1]), "bound": np.float32(100)}
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    return make_model(
        nodes,
        [tensor("x", "f4", ["n", features])],
        [tensor("y", "f4", ["n", features])],
        constants if kind == "choosy" else [],
        properties,
    )


def make_two_inputs() -> bytes:
    """Return a model of a and b to sum and difference."""
    from onnx import helper

    nodes = [helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Sub", ["a", "b"], ["difference"])]
    inputs, outputs = ("a", "b"), ("sum", "difference")
    return make_model(nodes, *([tensor(name, "f4", ["n", 3]) for name in names] for names in (inputs, outputs)))


def make_constant() -> bytes:
    """Return a model without inputs."""
    from onnx import helper, numpy_helper

    node = helper.make_node("Constant", [], ["y"], value=numpy_helper.from_array(np.arange(3, dtype=np.int64)))
    return make_model([node], [], [tensor("y", "i8", [3])])


COEFFICIENTS = np.array([[1.0, -1.0], [-2.0, 0.5], [0.25, 3.0]], np.float32)
INTERCEPTS = np.array([0.5, 0.0, -1.0], np.float32)
INT_LABELS, STRING_LABELS = [30, -1, 7], ["virginica", "", "Größe"]


def make_classifier(labels: list) -> bytes:
    """Return a classifier as skl2onnx makes them: two features to label and list of {label: probability}."""
    from onnx import TensorProto, helper

    is_text = isinstance(labels[0], str)
    named = {"classlabels_strings" if is_text else "classlabels_ints": labels}
    zipped = {"classlabels_strings" if is_text else "classlabels_int64s": labels}
    kind = TensorProto.STRING if is_text else TensorProto.INT64
    nodes = [
        helper.make_node(
            "LinearClassifier", ["x"], ["label", "scores"], domain="ai.onnx.ml",
            coefficients=COEFFICIENTS.ravel().tolist(), intercepts=INTERCEPTS.tolist(), post_transform="SOFTMAX",
            **named,
        ),
        helper.make_node("ZipMap", ["scores"], ["probabilities"], domain="ai.onnx.ml", **zipped),
    ]  # fmt: skip
    row = helper.make_map_type_proto(kind, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    outputs = [
        tensor("label", kind, ["n"]),
        helper.make_value_info("probabilities", helper.make_sequence_type_proto(row)),
    ]
    return make_model(nodes, [tensor("x", "f4", ["n", 2])], outputs)


def classify(labels: list, x: np.ndarray) -> Arrays:
    """Return what a classifier answers; the columns are the labels in sorted order."""
    scores = x.astype(np.float64) @ COEFFICIENTS.T + INTERCEPTS
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    probabilities = (powers / powers.sum(axis=1, keepdims=True))[:, np.argsort(np.array(labels, object))]
    chosen = [labels[place] for place in scores.argmax(axis=1)]
    kind = object if isinstance(labels[0], str) else np.int64
    return {"label": np.array(chosen, kind), "probabilities": probabilities.astype(np.float32)}


def make_external(location: str = "model.onnx.data", size: int = 5) -> bytes:
    """Return a model of rows that adds weights; they lie in the file `location`, as `size` float32."""
    from onnx import TensorProto, helper

    weights = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[size], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": "0", "length": str(4 * size)}.items():
        weights.external_data.add(key=key, value=value)
    node = helper.make_node("Add", ["x", "w"], ["y"])
    sizes = ["n", size]
    return make_model([node], [tensor("x", "f4", sizes)], [tensor("y", "f4", sizes)], [weights])


def make_looped() -> bytes:
    """Return a model that takes as long as its input says: count to count, one by one."""
    from onnx import TensorProto, helper, numpy_helper

    one = numpy_helper.from_array(np.array(1, np.int64), "one")
    body = helper.make_graph(
        [helper.make_node("Identity", ["going"], ["goes"]), helper.make_node("Add", ["before", "one"], ["after"])],
        "body",
        [tensor("i", "i8", []), tensor("going", TensorProto.BOOL, []), tensor("before", "i8", [])],
        [tensor("goes", TensorProto.BOOL, []), tensor("after", "i8", [])],
    )
    zero = numpy_helper.from_array(np.array(0, np.int64), "zero")
    node = helper.make_node("Loop", ["count", "", "zero"], ["counted"], body=body)
    return make_model([node], [tensor("count", "i8", [])], [tensor("counted", "i8", [])], [one, zero])


def make_endless() -> bytes:
    """Return a model of rows whose loop never ends."""
    from onnx import TensorProto, helper, numpy_helper

    body = helper.make_graph(
        [helper.make_node("Identity", ["going"], ["goes"]), helper.make_node("Neg", ["before"], ["after"])],
        "body",
        [tensor("i", "i8", []), tensor("going", TensorProto.BOOL, []), tensor("before", "f4", ["n", 5])],
        [tensor("goes", TensorProto.BOOL, []), tensor("after", "f4", ["n", 5])],
    )
    yes = numpy_helper.from_array(np.array(True), "yes")
    node = helper.make_node("Loop", ["", "yes", "x"], ["y"], body=body)
    return make_model([node], [tensor("x", "f4", ["n", 5])], [tensor("y", "f4", ["n", 5])], [yes])


def make_chain(width: int = 1024, length: int = 24) -> bytes:
    """Return a model that takes a row through `length` products with one matrix, which is 1; 24 take some 50 ms."""
    from onnx import helper, numpy_helper

    nodes = [
        helper.make_node("EyeLike", ["zeros"], ["matrix"]),
        *(helper.make_node("MatMul", [f"x{i}" if i else "wide", "matrix"], [f"x{i + 1}"]) for i in range(length)),
        helper.make_node("ReduceMean", [f"x{length}"], ["y"], axes=[0], keepdims=1),
        helper.make_node("Expand", ["x", "shape"], ["wide"]),
    ]
    nodes = [nodes[0], nodes[-1], *nodes[1:-1]]
    constants = [
        numpy_helper.from_array(np.zeros((width, width), np.float32), "zeros"),
        numpy_helper.from_array(np.array([64, width], np.int64), "shape"),
    ]
    return make_model(nodes, [tensor("x", "f4", [1, width])], [tensor("y", "f4", [1, width])], constants)


def make_unservable() -> dict[str, tuple[bytes, str]]:
    """Return models that no tensor of the protocol can say, and what is told of each."""
    from onnx import TensorProto, helper

    def name(kind: str) -> str:
        return f"'x' is {kind}"

    floats = helper.make_tensor_type_proto(TensorProto.FLOAT, ["n"])
    sequence = helper.make_sequence_type_proto(floats)
    sequences = make_model(
        [helper.make_node("SequenceLength", ["x"], ["y"])],
        [helper.make_value_info("x", sequence)],
        [tensor("y", "i8", [])],
    )
    optional = make_model(
        [helper.make_node("OptionalHasElement", ["x"], ["y"])],
        [helper.make_value_info("x", helper.make_optional_type_proto(floats))],
        [tensor("y", "?", [])],
    )
    words = helper.make_map_type_proto(TensorProto.STRING, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    mapped = make_model(
        [helper.make_node("DictVectorizer", ["x"], ["y"], domain="ai.onnx.ml", string_vocabulary=["a", "b"])],
        [helper.make_value_info("x", words)],
        [tensor("y", "f4", [None, 2])],
    )
    return {
        "bfloat16": (make_unary("Identity", TensorProto.BFLOAT16), name("tensor(bfloat16)")),
        "sequence": (sequences, name("seq(tensor(float))")),
        "optional": (optional, name("optional(tensor(float))")),
        "map": (mapped, name("map(string,tensor(float))")),
    }


def make_toys() -> dict[str, Toy]:
    """Return models of all kinds, by name."""
    from onnx import helper

    def same(x: np.ndarray) -> Arrays:
        return {"y": x}

    def negative(x: np.ndarray) -> Arrays:
        return {"y": -x}

    toys = {
        f"same_{datatype.lower()}": Toy(make_unary("Identity", kind), {"x": (kind, ["n", "m"])}, same)
        for kind, datatype in DATATYPES.items()
    }
    add = make_model(
        [helper.make_node("Mul", ["a", "b"], ["y"])],
        [tensor("a", "f8", ["n", 1]), tensor("b", "f8", [1, "m"])],
        [tensor("y", "f8", ["n", "m"])],
    )
    total = make_model(
        [helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)],
        [tensor("x", "f4", ["n", "m"])],
        [tensor("y", "f4", [])],
    )
    pool = make_model(
        [helper.make_node("GlobalAveragePool", ["x"], ["y"])],
        [tensor("x", "f4", ["n", 3, "h", "w"])],
        [tensor("y", "f4", ["n", 3, 1, 1])],
    )
    return toys | {
        "rows": Toy(make_rows("same", 3), {"x": ("f4", ["n", 3])}, same),
        "negative": Toy(make_unary("Neg", "f4", ["n", 4]), {"x": ("f4", ["n", 4])}, negative),
        "scalar": Toy(make_unary("Neg", "f4", []), {"x": ("f4", [])}, negative),
        "any_rank": Toy(make_unary("Neg", "f4", None), {"x": ("f4", ["n", 2, "m"])}, negative),
        "fixed": Toy(make_unary("Identity", "i4", [2, 3]), {"x": ("i4", [2, 3])}, same),
        "words": Toy(make_unary("Identity", "O", ["n"]), {"x": ("O", ["n"])}, same),
        "two": Toy(
            make_two_inputs(),
            {"a": ("f4", ["n", 3]), "b": ("f4", ["n", 3])},
            lambda a, b: {"sum": a + b, "difference": a - b},
        ),
        "outer": Toy(add, {"a": ("f8", ["n", 1]), "b": ("f8", [1, "m"])}, lambda a, b: {"y": a * b}),
        "constant": Toy(make_constant(), {}, lambda: {"y": np.arange(3)}),
        "total": Toy(total, {"x": ("f4", ["n", "m"])}, lambda x: {"y": x.sum()}),
        "pool": Toy(pool, {"x": ("f4", ["n", 3, "h", "w"])}, lambda x: {"y": x.mean((2, 3), keepdims=True)}),
        "labels": Toy(make_classifier(INT_LABELS), {"x": ("f4", ["n", 2])}, lambda x: classify(INT_LABELS, x)),
        "names": Toy(make_classifier(STRING_LABELS), {"x": ("f4", ["n", 2])}, lambda x: classify(STRING_LABELS, x)),
        **{
            kind: Toy(make_rows(kind), {"x": ("f4", ["n", 5])}, answer)
            for kind, answer in {
                "averaged": lambda x: {"y": x.mean(0, keepdims=True)},
                "centred": lambda x: {"y": x - x.mean(0)},
                "peaked": lambda x: {"y": x - x.max(0)},
                "choosy": lambda x: {"y": x[x[:, 0] < 100]},
            }.items()
        },
    }
