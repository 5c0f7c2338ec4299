"""Train the classifier in scikit-learn, twice, and save both versions for BentoML.

    python train_and_save.py

Reads train.csv, test.csv, recipe.json and initial_weights.json from ../data.
Writes the tags my_model:v1.0.0 and my_model:v2.0.0 (which becomes
my_model:latest) to BentoML's model store: the folder in the environment
variable BENTOML_HOME, or ~/bentoml. An existing tag is replaced.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import logging
import sys
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

try:
    import numpy as np
    from rich.console import Console
except ModuleNotFoundError as error:
    sys.exit(f"train_and_save: {error.name} is not installed in this Python; run `source ../.venv/bin/activate` first")

if TYPE_CHECKING:  # the functions import it: that takes seconds, too long for the error of a mistyped option
    from sklearn.pipeline import Pipeline

DATA_DIR = Path(__file__).resolve().parent.parent / "data"
SCIKIT_LEARN_SEED = 0  # only for weights that are overwritten, and the order of rows in a batch of all rows


def load_rows(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the raw features (n, 5) and the labels (n,), 0 malignant or 1 benign."""
    with path.open(newline="") as file:
        lines = list(csv.reader(file))[1:]
    return np.array([line[:-1] for line in lines], dtype=float), np.array([line[-1] for line in lines], dtype=int)


def train(rows: np.ndarray, labels: np.ndarray, recipe: dict, layers: list[dict], epochs: int) -> Pipeline:
    """Return standardisation and network, fitted to raw `rows` (n, 5), from the initial weights in `layers`.

    scikit-learn has no argument for initial weights. One `partial_fit` makes the arrays, which are then
    overwritten; with `warm_start`, `fit` continues from there, with zero momentum.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler()  # mean and population standard deviation, as in the recipe
    network = MLPClassifier(
        hidden_layer_sizes=recipe["hidden_units"],
        solver="sgd",
        learning_rate_init=recipe["learning_rate"],
        momentum=recipe["momentum"],
        nesterovs_momentum=False,
        alpha=0,  # no weight decay
        batch_size=len(rows),
        max_iter=epochs,
        tol=0,
        n_iter_no_change=epochs,  # no early stop: the recipe counts epochs
        warm_start=True,
        random_state=SCIKIT_LEARN_SEED,
    )
    standardised = scaler.fit_transform(rows)  # (n, 5)
    network.partial_fit(standardised, labels, classes=[0, 1])
    network.coefs_ = [np.array(layer["weights"]) for layer in layers]  # (5, 64), (64, 32), (32, 1)
    network.intercepts_ = [np.array(layer["bias"]) for layer in layers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the recipe ends before convergence deliberately
        # On Ctrl-C `fit` only warns, and returns a half-trained network.
        warnings.filterwarnings("error", "Training interrupted by user")
        try:
            network.fit(standardised, labels)
        except UserWarning:
            raise KeyboardInterrupt from None
    return Pipeline([("standardise", scaler), ("network", network)])


def save(tag: str, model: Pipeline, metadata: dict) -> None:
    """Save `model` as `tag` in the model store, replacing an older one."""
    import bentoml

    with contextlib.suppress(bentoml.exceptions.NotFound):
        bentoml.models.delete(tag)
    bentoml.sklearn.save_model(
        tag,
        model,
        signatures={"predict_proba": {"batchable": True, "batch_dim": 0}},
        labels={"framework": "sklearn", "task": "classification"},
        metadata=metadata,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=DATA_DIR, help="data folder (default: ../data)")
    data_dir = parser.parse_args().data_dir
    try:
        recipe = json.loads((data_dir / "recipe.json").read_text())
        layers = json.loads((data_dir / "initial_weights.json").read_text())
        train_rows, train_labels = load_rows(data_dir / "train.csv")
        test_rows, test_labels = load_rows(data_dir / "test.csv")
    except FileNotFoundError as error:
        sys.exit(f"{error.filename} not found: run python make_data.py in the folder data")

    tags = []
    with Console(stderr=True).status("importing scikit-learn") as status:
        from sklearn.metrics import accuracy_score, log_loss

        logging.getLogger("bentoml").setLevel(logging.WARNING)
        for version, settings in recipe["versions"].items():
            status.update(f"training version {version}")
            model = train(train_rows, train_labels, recipe, layers, settings["epochs"])
            probabilities = model.predict_proba(test_rows)  # (n, 2)
            accuracy = accuracy_score(test_labels, probabilities.argmax(axis=1))
            loss = log_loss(test_labels, probabilities)
            status.stop()  # otherwise the spinner would overwrite the line
            print(f"version {version}: test accuracy {accuracy:.4f}, log loss {loss:.4f}", flush=True)
            status.start()
            tags.append(f"{recipe['model_name']}:v{version}.0.0")
            status.update(f"saving {tags[-1]}")
            save(
                tags[-1],
                model,
                metadata={
                    "test_accuracy": round(float(accuracy), 4),
                    "test_log_loss": round(float(loss), 4),
                    "test_rows": len(test_labels),
                    "epochs": settings["epochs"],
                    "trained_on": datetime.now(UTC).date().isoformat(),
                },
            )
    print(f"saved {' and '.join(tags)} to the model store; the last is {recipe['model_name']}:latest")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("train_and_save: interrupted; run it again before you serve")
