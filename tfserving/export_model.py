"""Train the classifier with Keras and export versions 1 and 2 as SavedModels.

    python export_model.py

Reads ../data. Writes models/my_model/1 and models/my_model/2, each with its
graph, its weights and five warm-up requests. Running it again writes the same
bytes, except fingerprint.pb, which holds a random id.
"""

import argparse
import csv
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

STOPS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and what kill, timeout and a container's engine send
unfinished: list[Path] = []  # folders that they remove
terminal = os.dup(2)  # quiet_tensorflow silences the original while TensorFlow is imported


def end_at_once(*_) -> None:
    """End on a stop signal with one line at any moment; TensorFlow would show its call stack."""
    handle_stops(signal.SIG_IGN)
    for folder in unfinished:
        shutil.rmtree(folder, ignore_errors=True)
    line = b"export_model: interrupted; an unfinished version is as it was before\n"
    os.write(terminal, (b"\r\033[K" if os.isatty(terminal) else b"") + line)
    os._exit(1)


def handle_stops(handler: signal.Handlers | Callable[..., None]) -> None:
    for number in STOPS:
        signal.signal(number, handler)


if __name__ == "__main__":
    handle_stops(end_at_once)  # here, because the imports take seconds

try:
    import numpy as np
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
except ModuleNotFoundError as error:
    sys.exit(f"export_model: {error.name} is not installed in this Python; run `source ../.venv/bin/activate` first")

# The functions import TensorFlow where they use it: that takes seconds, too long for the error of a mistyped option.

HERE = Path(__file__).resolve().parent
DATA_DIR = HERE.parent / "data"
MODELS_DIR = HERE / "models"
WARM_UP_BATCH_SIZES = (1, 2, 8, 32, 114)  # the first call with a new shape is slow, so warm-up makes it before traffic


def load_rows(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the raw features (n, 5) and the labels (n,), 0 malignant or 1 benign."""
    with path.open(newline="") as file:
        rows = np.array(list(csv.reader(file))[1:], dtype=np.float64)
    return rows[:, :-1], rows[:, -1]


def build_network(recipe: dict, dtype: str):
    """Return the Keras network without standardisation and sigmoid: standardised features (n, 5) → logits (n, 1)."""
    from quiet_tensorflow import tf

    layers = [tf.keras.Input((len(recipe["features"]),), dtype=dtype)]
    layers += [tf.keras.layers.Dense(units, activation="relu", dtype=dtype) for units in recipe["hidden_units"]]
    return tf.keras.Sequential([*layers, tf.keras.layers.Dense(1, dtype=dtype)])


def train(
    recipe: dict,
    initial_weights: list,
    inputs: np.ndarray,
    labels: np.ndarray,
    epochs: int,
    report_epoch: Callable[[], None] = lambda: None,
):
    """Return the network trained in float64 on all rows at once, from the shared initial weights.

    `inputs` (n, 5) are standardised, `labels` (n,). The loss takes logits, because Keras clips
    probabilities at 1e-7, which would make the result differ from the other frameworks'.
    """
    from quiet_tensorflow import tf

    network = build_network(recipe, "float64")
    network.set_weights([np.array(layer[key]) for layer in initial_weights for key in ("weights", "bias")])
    network.compile(
        optimizer=tf.keras.optimizers.SGD(recipe["learning_rate"], momentum=recipe["momentum"]),
        loss=tf.keras.losses.BinaryCrossentropy(from_logits=True),
    )
    after_epoch = tf.keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: report_epoch())
    network.fit(
        inputs,
        labels[:, None],
        batch_size=len(inputs),
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=[after_epoch],
    )
    return network


def write_warm_up(path: Path, model_name: str, rows: np.ndarray) -> None:
    """Write PredictionLog records; the server replays them before it reports that the version is available."""
    from quiet_tensorflow import tf
    from tensorflow_serving.apis import predict_pb2, prediction_log_pb2

    path.parent.mkdir()
    with tf.io.TFRecordWriter(str(path)) as writer:
        for size in WARM_UP_BATCH_SIZES:
            request = predict_pb2.PredictRequest()
            request.model_spec.name = model_name
            batch = np.resize(rows, (size, rows.shape[1]))
            request.inputs["features"].CopyFrom(tf.make_tensor_proto(batch, tf.float32))
            log = prediction_log_pb2.PredictionLog(predict_log=prediction_log_pb2.PredictLog(request=request))
            writer.write(log.SerializeToString())


def export(network, recipe: dict, mean: np.ndarray, scale: np.ndarray, rows: np.ndarray, target: Path) -> None:
    """Write `target`, a SavedModel in float32 that takes raw features, in one step.

    A server polls the folder above `target` and must never see half a version. So the files are written
    under a name that is not a number, which every server ignores, and the finished folder is renamed.
    """
    from quiet_tensorflow import tf

    served = build_network(recipe, "float32")
    served.set_weights(network.get_weights())
    features = len(recipe["features"])

    @tf.function(input_signature=[tf.TensorSpec((None, features), tf.float32, name="features")])
    def serve(raw):
        # The server does not compare a request with the signature's shape, and (n, 1) would broadcast.
        raw = tf.ensure_shape(raw, (None, features))
        logits = served((raw - mean.astype(np.float32)) / scale.astype(np.float32))  # (n, 1)
        return {"probabilities": tf.concat([tf.sigmoid(-logits), tf.sigmoid(logits)], axis=1)}  # (n, 2)

    module = tf.Module()
    module.weights = [variable.value for variable in served.variables]  # only what `module` holds is written

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"writing-{target.name}-", dir=target.parent) as folder:
        unfinished.append(Path(folder))
        finished = Path(folder) / target.name
        tf.saved_model.save(module, str(finished), signatures={"serving_default": serve})
        write_warm_up(finished / "assets.extra" / "tf_serving_warmup_requests", recipe["model_name"], rows)
        handler = signal.getsignal(signal.SIGINT)
        handle_stops(signal.SIG_IGN)  # between the two renames there is no version
        if target.exists():
            target.rename(Path(folder) / "replaced")
        finished.rename(target)
        unfinished.remove(Path(folder))
        handle_stops(handler)


def show_progress(line: str) -> Progress:
    """Return a bar to draw on stderr; print `line` instead if that is not a terminal."""
    if not Console(stderr=True).is_interactive:
        print(line, file=sys.stderr, flush=True)
        return Progress(disable=True)
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    console = Console(file=os.fdopen(os.dup(terminal), "w"))
    return Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=DATA_DIR, help="data folder (default: ../data)")
    parser.add_argument("--models-dir", type=Path, default=MODELS_DIR, help="folder to write to (default: models)")
    arguments = parser.parse_args()

    try:
        recipe = json.loads((arguments.data_dir / "recipe.json").read_text())
        initial_weights = json.loads((arguments.data_dir / "initial_weights.json").read_text())
        train_rows, train_labels = load_rows(arguments.data_dir / "train.csv")
        test_rows, test_labels = load_rows(arguments.data_dir / "test.csv")
    except FileNotFoundError as error:
        sys.exit(f"training data not found: {error.filename}; run python make_data.py in data")

    versions = recipe["versions"]
    mean, scale = train_rows.mean(axis=0), train_rows.std(axis=0)
    model_dir = arguments.models_dir / recipe["model_name"]
    results = []
    with show_progress(f"training versions {' and '.join(versions)}, about 20 s") as progress:
        step = progress.add_task("importing TensorFlow", total=None)
        from quiet_tensorflow import tf

        for version, settings in versions.items():
            progress.reset(step, description=f"training version {version}", total=settings["epochs"])
            network = train(
                recipe,
                initial_weights,
                (train_rows - mean) / scale,
                train_labels,
                settings["epochs"],
                lambda: progress.advance(step),
            )
            progress.update(step, description=f"exporting version {version}")
            export(network, recipe, mean, scale, train_rows, model_dir / version)

            exported = tf.saved_model.load(str(model_dir / version)).signatures["serving_default"]
            probabilities = exported(features=tf.constant(test_rows, tf.float32))["probabilities"].numpy()
            accuracy = np.mean(probabilities.argmax(axis=1) == test_labels)
            log_loss = -np.mean(np.log(probabilities[np.arange(len(test_labels)), test_labels.astype(int)]))
            results.append(f"version {version}: test accuracy {accuracy:.4f}, log loss {log_loss:.4f}")
    print("\n".join(results))
    print(f"wrote versions {' and '.join(versions)} to {model_dir}")


if __name__ == "__main__":
    main()
