"""Write the classifier as files: data split, recipe, initial weights, answers.

    python make_data.py

Writes train.csv, test.csv, recipe.json, initial_weights.json and expected.csv
into this folder. Running it again changes no byte. The four framework folders
read these files and share nothing else. Every framework's own training is
compared with the training below, in plain NumPy float64.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

try:
    import numpy as np
    from sklearn.datasets import load_breast_cancer
    from sklearn.model_selection import train_test_split
except ModuleNotFoundError as error:
    sys.exit(f"make_data: {error.name} is not installed in this Python; run `source ../.venv/bin/activate` first")

DATA_DIR = Path(__file__).resolve().parent

FEATURES = ["mean radius", "mean texture", "mean smoothness", "mean concavity", "mean symmetry"]
CLASSES = ["malignant", "benign"]  # labels 0 and 1, as in scikit-learn
TEST_SHARE = 0.2
SPLIT_SEED = 0
WEIGHT_SEED = 0
EXPECTED_DECIMALS = 10  # hides the last bits, in which BLAS builds differ; the contract is 1e-5

RECIPE = {
    "model_name": "my_model",
    "features": FEATURES,
    "classes": CLASSES,
    "label": "target",
    "hidden_units": [64, 32],
    "optimizer": "full-batch gradient descent with momentum",
    "learning_rate": 0.05,
    "momentum": 0.9,
    "versions": {"1": {"epochs": 10}, "2": {"epochs": 150}},
}


def load_rows() -> tuple[np.ndarray, np.ndarray]:
    """Return the five features (569, 5), raw, and the labels (569,), 0 malignant or 1 benign."""
    dataset = load_breast_cancer()
    columns = [list(dataset.feature_names).index(feature) for feature in FEATURES]
    return dataset.data[:, columns], dataset.target


def draw_initial_weights() -> list[tuple[np.ndarray, np.ndarray]]:
    """Draw (weights (inputs, outputs), bias (outputs,)) per layer, uniform after Glorot and Bengio (2010)."""
    generator = np.random.default_rng(WEIGHT_SEED)
    sizes = [len(FEATURES), *RECIPE["hidden_units"], 1]
    layers = []
    for inputs, outputs in zip(sizes, sizes[1:], strict=False):
        limit = np.sqrt(6 / (inputs + outputs))
        layers.append((generator.uniform(-limit, limit, (inputs, outputs)), np.zeros(outputs)))
    return layers


def forward(layers: list, inputs: np.ndarray) -> list[np.ndarray]:
    """Return every layer's activations, the inputs first and P(benign) (n, 1) last."""
    activations = [inputs]
    for weights, bias in layers[:-1]:
        activations.append(np.maximum(activations[-1] @ weights + bias, 0))
    weights, bias = layers[-1]
    activations.append(1 / (1 + np.exp(-(activations[-1] @ weights + bias))))
    return activations


def train(layers: list, inputs: np.ndarray, labels: np.ndarray, epochs: int) -> list:
    """Minimise the mean binary cross-entropy from `layers`; return the trained layers.

    One step an epoch over all rows: velocity = momentum * velocity - learning_rate * gradient,
    then parameter += velocity. `inputs` (n, 5) are standardised, `labels` (n,).
    """
    layers = [(weights.copy(), bias.copy()) for weights, bias in layers]
    velocities = [(np.zeros_like(weights), np.zeros_like(bias)) for weights, bias in layers]
    for _ in range(epochs):
        activations = forward(layers, inputs)
        delta = (activations[-1] - labels[:, None]) / len(labels)  # dloss/dlogit, (n, 1)
        gradients = [None] * len(layers)
        for i in reversed(range(len(layers))):
            gradients[i] = (activations[i].T @ delta, delta.sum(axis=0))
            if i > 0:
                delta = (delta @ layers[i][0].T) * (activations[i] > 0)
        for i in range(len(layers)):
            velocities[i] = tuple(
                RECIPE["momentum"] * velocity - RECIPE["learning_rate"] * gradient
                for velocity, gradient in zip(velocities[i], gradients[i], strict=True)
            )
            layers[i] = tuple(
                parameter + velocity for parameter, velocity in zip(layers[i], velocities[i], strict=True)
            )
    return layers


def write_csv(path: Path, header: list[str], rows: list) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def write_initial_weights(path: Path, layers: list) -> None:
    """Write each matrix row on a line, so that a diff shows where two files differ."""
    blocks = []
    for weights, bias in layers:
        rows = ",\n    ".join(json.dumps(row) for row in weights.tolist())
        blocks.append(f'  {{"weights": [\n    {rows}],\n   "bias": {json.dumps(bias.tolist())}}}')
    path.write_text("[\n" + ",\n".join(blocks) + "\n]\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=DATA_DIR, help="where to write (default: this folder)")
    output_dir = parser.parse_args().output_dir

    rows, labels = load_rows()
    train_index, test_index = train_test_split(
        np.arange(len(labels)), test_size=TEST_SHARE, random_state=SPLIT_SEED, stratify=labels
    )
    for name, index in (("train.csv", train_index), ("test.csv", test_index)):
        lines = [[*row, label] for row, label in zip(rows[index].tolist(), labels[index].tolist(), strict=True)]
        write_csv(output_dir / name, [*FEATURES, RECIPE["label"]], lines)
    (output_dir / "recipe.json").write_text(json.dumps(RECIPE, indent=2) + "\n")
    initial_layers = draw_initial_weights()
    write_initial_weights(output_dir / "initial_weights.json", initial_layers)

    mean, scale = rows[train_index].mean(axis=0), rows[train_index].std(axis=0)
    header, columns = [], []
    for version, settings in RECIPE["versions"].items():
        layers = train(initial_layers, (rows[train_index] - mean) / scale, labels[train_index], settings["epochs"])
        benign = forward(layers, (rows[test_index] - mean) / scale)[-1][:, 0]  # (n,)
        header += [f"v{version}_{name}" for name in CLASSES]
        columns += [1 - benign, benign]
        test_labels = labels[test_index]
        accuracy = np.mean((benign > 0.5) == test_labels)
        log_loss = -np.mean(np.log(np.where(test_labels == 1, benign, 1 - benign)))
        print(f"version {version}: test accuracy {accuracy:.4f}, log loss {log_loss:.4f}")
    expected = [[f"{p:.{EXPECTED_DECIMALS}f}" for p in row] for row in np.column_stack(columns)]
    write_csv(output_dir / "expected.csv", header, expected)
    print(f"always answering the larger class: test accuracy {max(np.mean(test_labels), 1 - np.mean(test_labels)):.4f}")
    print(f"wrote {len(train_index)} training rows and {len(test_index)} test rows to {output_dir}")


if __name__ == "__main__":
    main()
