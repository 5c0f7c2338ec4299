"""The rows to send and the answers to expect, read from data/."""

import csv
from pathlib import Path

import numpy as np

DATA_DIR = Path(__file__).resolve().parent.parent.parent / "data"
TOLERANCE = 1e-5  # the parity contract: |p - expected| on every row, for every server and version


def load_test_rows() -> tuple[list[list[float]], list[int]]:
    """Return the raw features of test.csv, n rows of 5, and the n labels (0 malignant, 1 benign)."""
    with (DATA_DIR / "test.csv").open(newline="") as file:
        lines = list(csv.reader(file))[1:]
    return [[float(value) for value in line[:-1]] for line in lines], [int(line[-1]) for line in lines]


def load_expected(version: str) -> np.ndarray:
    """Return the reference probabilities (n, 2) of `version`, row by row those of test.csv."""
    with (DATA_DIR / "expected.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return np.array([[float(row[f"v{version}_malignant"]), float(row[f"v{version}_benign"])] for row in rows])
