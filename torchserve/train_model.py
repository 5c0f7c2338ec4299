"""Train both versions of the classifier and write their state dicts.

    python train_model.py

Reads recipe.json, initial_weights.json, train.csv and test.csv of ../data.
Writes models/1.0/model.pth, models/2.0/model.pth, and model.pth, a copy of
version 1.0, which the archiver's command in README.md reads.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

try:
    from rich.console import Console
except ModuleNotFoundError as error:
    sys.exit(f"train_model: {error.name} is not installed in this Python; run `source ../.venv/bin/activate` first")

if TYPE_CHECKING:  # the functions import PyTorch: that takes seconds, too long for a mistyped option
    import torch
    from model import Classifier

FOLDER = Path(__file__).resolve().parent


def read_table(path: Path) -> list[list[float]]:
    """Return the rows of a CSV file, each five raw features and the label, 0 malignant or 1 benign."""
    with path.open(newline="") as file:
        return [[float(value) for value in line] for line in list(csv.reader(file))[1:]]


def split_labels(table: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the raw features (n, 5) and the labels (n,) of a table (n, 6), in float64."""
    import torch

    rows = torch.tensor(table, dtype=torch.float64)
    return rows[:, :-1], rows[:, -1]


def make_untrained(rows: torch.Tensor, initial_weights: list[dict]) -> Classifier:
    """Return a float64 classifier with the shared initial weights and the standardisation of `rows` (n, 5)."""
    import torch
    from model import Classifier
    from torch import nn

    classifier = Classifier().double()
    linear_layers = [layer for layer in classifier.layers if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        classifier.mean.copy_(rows.mean(dim=0))
        classifier.scale.copy_(rows.std(dim=0, correction=0))
        for layer, initial in zip(linear_layers, initial_weights, strict=True):
            layer.weight.copy_(
                torch.tensor(initial["weights"], dtype=torch.float64).T
            )  # the file has (inputs, outputs)
            layer.bias.copy_(torch.tensor(initial["bias"], dtype=torch.float64))
    return classifier


def train(classifier: Classifier, rows: torch.Tensor, labels: torch.Tensor, recipe: dict, epochs: int) -> None:
    """Train `classifier` in place on all `rows` (n, 5) and `labels` (n,) at once, one step an epoch."""
    import torch
    from torch import nn

    optimizer = torch.optim.SGD(classifier.parameters(), lr=recipe["learning_rate"], momentum=recipe["momentum"])
    loss_function = nn.BCEWithLogitsLoss()
    for _ in range(epochs):
        optimizer.zero_grad()
        loss_function(classifier.logits(rows), labels).backward()
        optimizer.step()


def evaluate(classifier: Classifier, rows: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Return accuracy and mean log loss of the probabilities that `classifier` gives for `rows` (n, 5)."""
    import torch
    from torch import nn

    with torch.inference_mode():
        probabilities = classifier(rows)  # (n, 2)
    accuracy = (probabilities.argmax(dim=1) == labels).double().mean().item()
    return accuracy, nn.functional.nll_loss(probabilities.log(), labels.long()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=FOLDER.parent / "data", help="data folder (default: ../data)")
    parser.add_argument("--output-dir", type=Path, default=FOLDER, help="folder to write to (default: this one)")
    arguments = parser.parse_args()

    try:
        recipe = json.loads((arguments.data_dir / "recipe.json").read_text())
        initial_weights = json.loads((arguments.data_dir / "initial_weights.json").read_text())
        train_table = read_table(arguments.data_dir / "train.csv")
        test_table = read_table(arguments.data_dir / "test.csv")
    except FileNotFoundError as error:
        sys.exit(f"train_model: {error.filename} not found; copy the data folder next to this one or give --data-dir")

    models_dir = arguments.output_dir / "models"
    with Console(stderr=True).status("importing PyTorch") as status:
        import torch

        train_rows, train_labels = split_labels(train_table)
        test_rows, test_labels = split_labels(test_table)
        for version, settings in recipe["versions"].items():
            status.update(f"training version {version}.0")
            classifier = make_untrained(train_rows, initial_weights)
            train(classifier, train_rows, train_labels, recipe, settings["epochs"])
            classifier.float()  # trained in float64, served in float32
            accuracy, log_loss = evaluate(classifier, test_rows.float(), test_labels)
            path = models_dir / f"{version}.0" / "model.pth"
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(classifier.state_dict(), path)
            status.stop()  # otherwise the spinner would overwrite the line
            print(f"version {version}.0: test accuracy {accuracy:.4f}, log loss {log_loss:.4f}", flush=True)
            status.start()
        shutil.copyfile(models_dir / "1.0" / "model.pth", arguments.output_dir / "model.pth")
    print(f"wrote models/1.0/model.pth, models/2.0/model.pth and model.pth (version 1.0) to {arguments.output_dir}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("train_model: interrupted; run it again before archive.py")
