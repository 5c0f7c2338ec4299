"""data/ is deterministic, and what it expects agrees with an independent training."""

import csv
import json

import numpy as np
import pytest

from endpoints.reference import load_expected, load_test_rows
from helpers import REPOSITORY_DIR, call_main, load_script

DATA_DIR = REPOSITORY_DIR / "data"
RECIPE = json.loads((DATA_DIR / "recipe.json").read_text())


def read_split(name: str) -> tuple[np.ndarray, np.ndarray]:
    with (DATA_DIR / name).open(newline="") as file:
        values = np.array(list(csv.reader(file))[1:], dtype=float)
    return values[:, :5], values[:, 5].astype(int)


@pytest.fixture(scope="module")
def one_thread():
    """Let matrix products run in one thread: for matrices this small, and on a busy machine, more only wait."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        yield


def test_making_the_data_again_changes_no_byte(tmp_path, one_thread):
    done = call_main(load_script(DATA_DIR / "make_data.py"), "--output-dir", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(made) == ["expected.csv", "initial_weights.json", "recipe.json", "test.csv", "train.csv"]
    for name, content in made.items():
        assert content == (DATA_DIR / name).read_bytes(), f"{name} differs"


def test_the_split_holds_every_row_of_the_data_set_once():
    from sklearn.datasets import load_breast_cancer

    dataset = load_breast_cancer()
    columns = [list(dataset.feature_names).index(feature) for feature in RECIPE["features"]]
    original = sorted(map(tuple, np.column_stack([dataset.data[:, columns], dataset.target]).tolist()))
    parts = [np.column_stack(read_split(name)) for name in ("train.csv", "test.csv")]
    assert sorted(map(tuple, np.concatenate(parts).tolist())) == original
    assert [len(part) for part in parts] == [455, 114]


@pytest.mark.parametrize("version", ["1", "2"])
def test_scikit_learn_trained_by_the_recipe_gives_the_expected_probabilities(version, one_thread):
    from sklearn.neural_network import MLPClassifier
    from sklearn.preprocessing import StandardScaler

    inputs, labels = read_split("train.csv")
    scaler = StandardScaler().fit(inputs)
    layers = json.loads((DATA_DIR / "initial_weights.json").read_text())
    model = MLPClassifier(
        RECIPE["hidden_units"], solver="sgd", learning_rate_init=RECIPE["learning_rate"], momentum=RECIPE["momentum"],
        nesterovs_momentum=False, alpha=0, batch_size=len(inputs), tol=0, warm_start=True, shuffle=False,
        n_iter_no_change=10_000, max_iter=RECIPE["versions"][version]["epochs"],
    )  # fmt: skip
    model.partial_fit(scaler.transform(inputs), labels, classes=[0, 1])
    model.coefs_ = [np.array(layer["weights"]) for layer in layers]
    model.intercepts_ = [np.array(layer["bias"]) for layer in layers]
    model.fit(scaler.transform(inputs), labels)
    rows, _ = load_test_rows()
    answer = model.predict_proba(scaler.transform(np.array(rows)))
    np.testing.assert_allclose(answer, load_expected(version), rtol=0, atol=1e-9)


def test_the_two_versions_answer_measurably_differently():
    assert np.abs(load_expected("1") - load_expected("2")).max() > 0.1


def test_expected_probabilities_of_a_row_sum_to_one():
    for version in ("1", "2"):
        np.testing.assert_allclose(load_expected(version).sum(axis=1), 1, rtol=0, atol=2e-10)
