"""Train the classifier in PyTorch and in scikit-learn, and convert both to ONNX.

    python convert_to_onnx.py

Each model is trained in both versions of ../data/recipe.json, converted, and
compared with its source model and with ../data/expected.csv; nothing is written
unless all of them agree. Writes

    models/my_model/<version>/model.onnx          from PyTorch
    models/my_model_sklearn/<version>/model.onnx  from scikit-learn
    model.onnx                                    the newest PyTorch version
"""

import csv
import json
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

import progress

if __name__ == "__main__":  # here, because the imports take seconds
    progress.read_output_dir(__doc__)  # --help and a wrong flag do not need them
    progress.end_on_interrupt("convert_to_onnx")
    progress.show("loading PyTorch, scikit-learn and ONNX Runtime")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # else ONNX Runtime writes to ~/.cache and reports to Microsoft

import numpy as np
import onnx
import onnx.utils
import onnxruntime as ort
import torch
from skl2onnx import convert_sklearn
from skl2onnx.common.data_types import FloatTensorType, Int64TensorType
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

FOLDER = Path(__file__).resolve().parent
DATA_DIR = FOLDER.parent / "data"
OPSET = 20  # the default of torch 2.13; skl2onnx 1.20 supports up to 22 and writes the lowest that suffices
SOURCE_TOLERANCE = 1e-6  # |p - p of the source model|: the source computes in float64, ONNX in float32
EXPECTED_TOLERANCE = 1e-5  # |p - p of ../data/expected.csv|


class Classifier(torch.nn.Module):
    """Raw features (n, 5) to probabilities (n, 2); the standardisation is part of the model."""

    def __init__(self, mean: np.ndarray, scale: np.ndarray, initial_layers: list[dict]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("scale", torch.tensor(scale))
        layers: list[torch.nn.Module] = []
        for initial in initial_layers:
            weights = torch.tensor(initial["weights"], dtype=torch.float64).T.contiguous()  # (outputs, inputs)
            linear = torch.nn.Linear(weights.shape[1], weights.shape[0], dtype=torch.float64)
            linear.load_state_dict({"weight": weights, "bias": torch.tensor(initial["bias"], dtype=torch.float64)})
            layers += [linear, torch.nn.ReLU()]
        self.layers = torch.nn.Sequential(*layers[:-1])  # no ReLU after the logit

    def logit(self, rows: torch.Tensor) -> torch.Tensor:
        return self.layers((rows - self.mean) / self.scale)  # (n, 1)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        logit = self.logit(rows)
        # sigmoid(-z), not 1 - sigmoid(z): the subtraction loses the small probabilities in float32.
        return torch.cat([torch.sigmoid(-logit), torch.sigmoid(logit)], dim=1)  # (n, 2) malignant, benign


def read_rows(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the raw features (n, 5) and the labels (n,), 0 malignant or 1 benign."""
    table = np.loadtxt(path, delimiter=",", skiprows=1)
    return table[:, :-1], table[:, -1]


def read_expected(path: Path, version: str) -> np.ndarray:
    """Return the reference probabilities (n, 2) of the test rows."""
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    return np.array([[float(line[f"v{version}_malignant"]), float(line[f"v{version}_benign"])] for line in lines])


def train_pytorch(rows: np.ndarray, labels: np.ndarray, initial_layers: list[dict], recipe: dict, epochs: int):
    """Return a Classifier (float64) after `epochs` steps of momentum gradient descent over all rows."""
    model = Classifier(rows.mean(axis=0), rows.std(axis=0), initial_layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe["learning_rate"], momentum=recipe["momentum"])
    inputs, targets = torch.tensor(rows), torch.tensor(labels)[:, None]
    for _ in range(epochs):
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(model.logit(inputs), targets).backward()
        optimizer.step()
    return model.eval()


def train_sklearn(
    rows: np.ndarray, labels: np.ndarray, initial_layers: list[dict], recipe: dict, epochs: int
) -> Pipeline:
    """Return a scikit-learn Pipeline (StandardScaler, MLPClassifier) with the training of `train_pytorch`."""
    network = MLPClassifier(
        recipe["hidden_units"],
        solver="sgd",
        learning_rate_init=recipe["learning_rate"],
        momentum=recipe["momentum"],
        nesterovs_momentum=False,
        alpha=0,
        batch_size=len(rows),
        max_iter=epochs,
        tol=0,
        n_iter_no_change=epochs,
        shuffle=False,
        warm_start=True,
    )
    pipeline = make_pipeline(StandardScaler(), network)
    inputs = pipeline[0].fit_transform(rows)
    # scikit-learn has no argument for initial weights: create them with a throw-away step, replace them, then fit.
    network.partial_fit(inputs, labels, classes=[0, 1])
    network.coefs_ = [np.array(initial["weights"]) for initial in initial_layers]
    network.intercepts_ = [np.array(initial["bias"]) for initial in initial_layers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the recipe fixes the number of epochs
        network.fit(inputs, labels)
    return pipeline


def convert_pytorch_to_onnx(model: torch.nn.Module) -> onnx.ModelProto:
    """Return `model` as an ONNX graph with input `input` (batch, 5) and output `output` (batch, 2), float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch warns about its own code
        program = torch.onnx.export(
            model.float(),
            (torch.zeros(2, 5),),
            input_names=["input"],
            output_names=["output"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
    return program.model_proto


def convert_sklearn_to_onnx(pipeline: Pipeline) -> onnx.ModelProto:
    """Return `pipeline` as an ONNX graph with the input and output of the model from PyTorch."""
    converted = convert_sklearn(
        pipeline,
        name="my_model",  # otherwise a random one, and no two conversions are equal
        initial_types=[("input", FloatTensorType([None, 5]))],
        final_types=[("label", Int64TensorType([None])), ("output", FloatTensorType([None, 2]))],
        options={id(pipeline): {"zipmap": False}},  # probabilities as one array, not a list of dictionaries
        target_opset=OPSET,
    )
    # A classifier's first output is the label; keep only the nodes that lead to the probabilities.
    return onnx.utils.Extractor(converted).extract_model(["input"], ["output"])


def describe(model: onnx.ModelProto, recipe: dict, version: str, source: str) -> None:
    """Replace the exporters' metadata with metadata for the users of the file.

    torch stores a stack trace with this machine's paths at every node, and the shapes of all intermediate results,
    which make quantize_dynamic fail later (ShapeInferenceError: inferred shape and existing shape differ).
    """
    graph = model.graph
    for annotated in [graph, *graph.node, *graph.input, *graph.output, *graph.initializer]:
        del annotated.metadata_props[:]
    del graph.value_info[:]
    facts = {
        "model_name": recipe["model_name"],
        "version": version,
        "source": source,
        "features": json.dumps(recipe["features"]),
        "classes": json.dumps(recipe["classes"]),
    }
    onnx.helper.set_model_props(model, facts)


def run_onnx(model: onnx.ModelProto, rows: np.ndarray) -> np.ndarray:
    """Return the probabilities (n, 2) that ONNX Runtime computes."""
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["output"], {"input": rows.astype(np.float32)})[0]


def write_atomically(path: Path, content: bytes) -> None:
    """Write the whole file or nothing: a server that loads it at this moment never sees half a model."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".writing-", suffix=".onnx", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(content)
            file.close()
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def main() -> int:
    output_dir = progress.read_output_dir(__doc__)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is not installed

    missing = [name for name in ("recipe.json", "initial_weights.json", "train.csv") if not (DATA_DIR / name).exists()]
    if missing:
        print(f"convert_to_onnx: {DATA_DIR / missing[0]} not found: run python make_data.py there", file=sys.stderr)
        return 1
    recipe = json.loads((DATA_DIR / "recipe.json").read_text())
    initial_layers = json.loads((DATA_DIR / "initial_weights.json").read_text())
    train_rows, train_labels = read_rows(DATA_DIR / "train.csv")
    test_rows, test_labels = read_rows(DATA_DIR / "test.csv")

    name = recipe["model_name"]
    progress.show(f"training {len(recipe['versions'])} versions in PyTorch and in scikit-learn, and converting them")
    print(f"max |Δp| over the {len(test_rows)} test rows: to the source model, and to expected.csv")
    print(f"{'source':<13} {'version':<8} {'accuracy':<9} {'log loss':<9} {'|Δp| source':<12} |Δp| expected")
    files: dict[Path, bytes] = {}
    for version, settings in recipe["versions"].items():
        training = (train_rows, train_labels, initial_layers, recipe, settings["epochs"])
        network = train_pytorch(*training)
        pipeline = train_sklearn(*training)
        with torch.no_grad():
            network_probabilities = network(torch.tensor(test_rows)).numpy()
        expected = read_expected(DATA_DIR / "expected.csv", version)
        for source, model_name, model, source_probabilities in (
            ("PyTorch", name, convert_pytorch_to_onnx(network), network_probabilities),
            ("scikit-learn", f"{name}_sklearn", convert_sklearn_to_onnx(pipeline), pipeline.predict_proba(test_rows)),
        ):
            describe(model, recipe, version, source)
            onnx.checker.check_model(model, full_check=True)
            probabilities = run_onnx(model, test_rows)
            benign = probabilities[:, 1].astype(np.float64)
            accuracy = np.mean((benign > 0.5) == test_labels)
            log_loss = -np.mean(np.log(np.where(test_labels == 1, benign, probabilities[:, 0])))
            from_source = np.abs(probabilities - source_probabilities).max()
            from_expected = np.abs(probabilities - expected).max()
            print(
                f"{source:<13} {version:<8} {accuracy:<9.4f} {log_loss:<9.4f} {from_source:<12.1e} {from_expected:.1e}",
                flush=True,
            )
            if not (from_source <= SOURCE_TOLERANCE and from_expected <= EXPECTED_TOLERANCE):
                print(
                    f"convert_to_onnx: {source} version {version}: the ONNX model answers differently (allowed: "
                    f"{SOURCE_TOLERANCE:.0e} from its source, {EXPECTED_TOLERANCE:.0e} from expected.csv); "
                    "nothing was written",
                    file=sys.stderr,
                )
                return 1
            files[output_dir / "models" / model_name / version / "model.onnx"] = model.SerializeToString()

    progress.finish_uninterrupted()
    newest = max(recipe["versions"], key=int)
    files[output_dir / "model.onnx"] = files[output_dir / "models" / name / newest / "model.onnx"]
    for path, content in files.items():
        write_atomically(path, content)
    print(f"wrote {len(files)} models to {output_dir}; model.onnx is {name} version {newest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
