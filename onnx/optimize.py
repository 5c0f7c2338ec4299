"""Optimise and quantize model.onnx, and show what each step costs and gains.

    python optimize.py

Reads model.onnx (run convert_to_onnx.py first) and writes next to it:

    model_basic.onnx, model_extended.onnx, model_all.onnx
        the graph as ONNX Runtime rewrites it, per level
    model_quantized.onnx
        int8 weights, activations quantized in each run
    model_quantized_static.onnx
        int8 weights and activations, calibrated on train.csv

and prints one table. Its last two rows are a network of random weights, large
enough for int8 to pay.
"""

import logging
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import progress

if __name__ == "__main__":  # here, because the imports take seconds
    progress.read_output_dir(__doc__)  # --help and a wrong flag do not need them
    progress.end_on_interrupt("optimize")
    progress.show("loading ONNX Runtime")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # else ONNX Runtime writes to ~/.cache and reports to Microsoft

import numpy as np
import onnx
import onnxruntime as ort
from onnx_inference import ModelError, ONNXPredictor
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static

FOLDER = Path(__file__).resolve().parent
DATA_DIR = FOLDER.parent / "data"

QUANTIZED_TOLERANCE = 0.1  # largest |p - p of the float model| allowed for a quantized model on test.csv
QUANTIZED_ACCURACY_LOSS = 0.02  # and the largest loss of accuracy
LEVELS = {
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
WIDE_UNITS = 2048
REPEATS = 7  # timings of each variant and batch; the median is printed
TIMING_S = 0.05  # length of one timing


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    name: str  # file name, or a description of the network
    size_bytes: int
    latency_1_s: float  # median, one row
    latency_1024_s: float  # median, 1,024 rows
    accuracy: float | None  # on test.csv; None if the network was not trained
    difference: float  # max |Δp| from the float model of its kind, over test.csv


class TrainingRows(CalibrationDataReader):
    """Gives quantize_static the rows of train.csv, from which it takes the range of every tensor.

    Never the test rows: they would tune the model to the data that judge it.
    """

    def __init__(self, rows: np.ndarray):
        self.batches = iter(np.array_split(rows.astype(np.float32), 8))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"input": batch}


def read_rows(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the raw features (n, 5) and the labels (n,), 0 malignant or 1 benign."""
    table = np.loadtxt(path, delimiter=",", skiprows=1)
    return table[:, :-1], table[:, -1]


def optimize_graph(source: Path, target: Path, level: ort.GraphOptimizationLevel) -> None:
    """Write `source` as optimised by ONNX Runtime at `level`, so that loading need not optimise it again."""
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 3  # it warns that level "all" suits only this kind of machine; the README has it
    ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def make_wide_network(path: Path) -> None:
    """Write an untrained network of 5, 2048, 2048 and 1 units, 17 MB: large enough for matrix products to dominate."""
    generator = np.random.default_rng(0)
    sizes = [5, WIDE_UNITS, WIDE_UNITS, 1]
    nodes, initializers, name = [], [], "input"
    for i, (inputs, outputs) in enumerate(zip(sizes, sizes[1:], strict=False)):
        spread = np.sqrt(2 / inputs) / (25 if i == 0 else 1)  # the raw features reach about 25
        weights = generator.normal(0, spread, (inputs, outputs)).astype(np.float32)
        initializers.append(onnx.numpy_helper.from_array(weights, f"weights{i}"))
        nodes.append(onnx.helper.make_node("MatMul", [name, f"weights{i}"], [f"product{i}"]))
        name = f"activation{i}"
        nodes.append(onnx.helper.make_node("Relu" if i < 2 else "Sigmoid", [f"product{i}"], [name]))
    nodes.append(onnx.helper.make_node("Neg", ["product2"], ["negative"]))
    nodes.append(onnx.helper.make_node("Sigmoid", ["negative"], ["complement"]))
    nodes.append(onnx.helper.make_node("Concat", ["complement", name], ["output"], axis=1))
    graph = onnx.helper.make_graph(
        nodes,
        "wide",
        [onnx.helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, ["batch", 5])],
        [onnx.helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, ["batch", 2])],
        initializers,
    )
    opsets = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


def median_latencies_s(predictors: dict[str, ONNXPredictor], array: np.ndarray) -> dict[str, float]:
    """Return the median time of one run of `array` (n, 5) for every predictor, of REPEATS timings of TIMING_S each.

    The predictors take turns, so that a busy moment of the machine affects all of them equally.
    """
    calls = {}
    for name, predictor in predictors.items():
        predictor.run(array)
        start = time.perf_counter()
        predictor.run(array)
        calls[name] = max(1, int(TIMING_S / (time.perf_counter() - start)))
    latencies_s: dict[str, list[float]] = {name: [] for name in predictors}
    for _ in range(REPEATS):
        for name, predictor in predictors.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                predictor.run(array)
            latencies_s[name].append((time.perf_counter() - start) / calls[name])
    return {name: float(np.median(values)) for name, values in latencies_s.items()}


def make_variants(source: Path, folder: Path) -> dict[str, Path]:
    """Write every optimised and quantized variant of `source` to `folder`; return the paths by file name."""
    train_rows, _ = read_rows(DATA_DIR / "train.csv")
    for name, level in LEVELS.items():
        optimize_graph(source, folder / f"model_{name}.onnx", level)
    quantize_dynamic(source, folder / "model_quantized.onnx", weight_type=QuantType.QInt8)
    quantize_static(
        source,
        folder / "model_quantized_static.onnx",
        TrainingRows(train_rows),
        weight_type=QuantType.QInt8,
        per_channel=True,  # a scale per unit, not per layer
        # 7 bits of 8: processors without VNNI add two products in 16 bits, and full weights overflow them.
        reduce_range=True,
        op_types_to_quantize=["Gemm", "Relu"],  # the layers; standardisation and sigmoid stay float
    )
    names = [*(f"model_{name}.onnx" for name in LEVELS), "model_quantized.onnx", "model_quantized_static.onnx"]
    return {name: folder / name for name in names}


def compare(paths: dict[str, Path], labelled: bool) -> list[Result]:
    """Return one result per model, each compared with the first, a float model; without accuracy if not `labelled`."""
    rows, labels = read_rows(DATA_DIR / "test.csv")
    predictors = {name: ONNXPredictor(path, "cpu") for name, path in paths.items()}
    probabilities = {name: predictor.predict(rows) for name, predictor in predictors.items()}
    reference = next(iter(probabilities.values()))
    many = np.resize(rows, (1024, rows.shape[1])).astype(np.float32)
    latencies_1_s = median_latencies_s(predictors, many[:1])
    latencies_1024_s = median_latencies_s(predictors, many)
    return [
        Result(
            name,
            path.stat().st_size,
            latencies_1_s[name],
            latencies_1024_s[name],
            float(np.mean(probabilities[name].argmax(axis=1) == labels)) if labelled else None,
            float(np.abs(probabilities[name] - reference).max()),
        )
        for name, path in paths.items()
    ]


def print_table(results: list[Result]) -> None:
    print(f"{'variant':<27} {'bytes':>10} {'1 row, µs':>9} {'1024 rows, µs':>13} {'accuracy':>8} {'max |Δp|':>8}")
    for result in results:
        accuracy = "-" if result.accuracy is None else f"{result.accuracy:.4f}"
        print(
            f"{result.name:<27} {result.size_bytes:>10,} {result.latency_1_s * 1e6:>9.1f} "
            f"{result.latency_1024_s * 1e6:>13.0f} {accuracy:>8} {result.difference:>8.1e}"
        )


def main() -> int:
    output_dir = progress.read_output_dir(__doc__)
    source = FOLDER / "model.onnx"
    try:
        ONNXPredictor(source, "cpu")
    except ModelError as error:
        print(f"optimize: {error}", file=sys.stderr)
        return 1
    logging.getLogger().setLevel(logging.ERROR)  # quantize_* recommend pre-processing that this model does not need

    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".writing-", suffix=".onnx") as folder:
        progress.unfinished.append(Path(folder))
        progress.show(f"optimising and quantising {source.name}, and a larger network")
        variants = make_variants(source, Path(folder))
        wide, wide_int8 = Path(folder) / "wide.onnx", Path(folder) / "wide_int8.onnx"
        make_wide_network(wide)
        quantize_dynamic(wide, wide_int8, weight_type=QuantType.QInt8)
        wide_paths = {"random 5-2048-2048-1, float": wide, "random 5-2048-2048-1, int8": wide_int8}
        progress.show(f"timing {1 + len(variants) + len(wide_paths)} models")
        results = compare({source.name: source, **variants}, labelled=True)
        print_table(results + compare(wide_paths, labelled=False))

        for result in results:
            lost = results[0].accuracy - result.accuracy
            if result.difference > QUANTIZED_TOLERANCE or lost > QUANTIZED_ACCURACY_LOSS:
                print(
                    f"optimize: {result.name} differs too much from {source.name}: allowed: {QUANTIZED_TOLERANCE} in a "
                    f"probability and {QUANTIZED_ACCURACY_LOSS} in accuracy; nothing was written",
                    file=sys.stderr,
                )
                return 1
        progress.finish_uninterrupted()
        for name, path in variants.items():
            path.replace(output_dir / name)
    print(f"wrote {len(variants)} models to {output_dir}; one thread, medians of {REPEATS} timings")
    return 0


if __name__ == "__main__":
    sys.exit(main())
