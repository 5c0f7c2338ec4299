"""Write the SavedModels that the tests of TensorFlow Serving's local server serve, and what becomes of a damaged one.

    python toy_saved_models.py <folder>

All that these tests need of TensorFlow itself, in one process: importing it takes seconds. kept_models.py keeps the
folder, so nothing in it may depend on where it lies.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tfserving" / "local"))

from model_config import single_model_config  # noqa: E402
from quiet_tensorflow import tf  # noqa: E402
from servables import Library, LoadSettings  # noqa: E402
from tensorflow_serving.apis import prediction_log_pb2  # noqa: E402

keras, v1 = tf.keras, tf.compat.v1


class Toys(tf.Module):
    """Two inputs of rank 1 and 2, two outputs; strings and bytes; integers; an output without rows."""

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, "x"), tf.TensorSpec([None, 2], tf.float64, "y")])
    def mixed(self, x, y):
        return {"a": x + 1, "b": y * 2}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "text")])
    def texts(self, text):
        return {"upper": tf.strings.upper(text), "raw_bytes": text}

    @tf.function(input_signature=[tf.TensorSpec([None, None], tf.int64, "n")])
    def integers(self, n):
        return {"sum": tf.reduce_sum(n, axis=1), "even": tf.reduce_all(n % 2 == 0, axis=1)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, "x")])
    def named(self, x):
        return {"model": tf.constant("v1"), "y": 2 * x}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, "x")])
    def whole(self, x):
        return {"mean": tf.reduce_mean(x)}


class Gated(tf.Module):
    """Doubles x, and numbers its runs. A run writes the file run-<number>, then waits until there is a file `open`.

    Both lie in the folder that the model's asset names, which whoever serves the model writes.
    """

    def __init__(self, path: Path):
        self.path = tf.saved_model.Asset(str(path))
        index = tf.lookup.TextFileIndex
        lines = tf.lookup.TextFileInitializer(self.path, tf.int64, index.LINE_NUMBER, tf.string, index.WHOLE_LINE)
        self.table = tf.lookup.StaticHashTable(lines, "")
        self.runs = tf.Variable(0, dtype=tf.int64)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, "x")])
    def double(self, x):
        tf.debugging.assert_less(x, 1e6)
        run = self.runs.assign_add(1)
        folder = self.table.lookup(tf.constant(0, tf.int64))
        tf.io.write_file(tf.strings.join([folder, "/run-", tf.strings.as_string(run)]), "")

        def is_closed(looks):
            # The name hangs on the loop's counter by nothing, else the optimizer would look only once.
            name = tf.strings.join([folder, "/open", tf.strings.substr(tf.strings.as_string(looks), 0, 0)])
            return tf.equal(tf.size(tf.io.matching_files(name)), 0)

        [looks] = tf.while_loop(is_closed, lambda looks: looks + 1, [tf.constant(0)])
        # What is no output would not be computed.
        return {"y": 2 * x, "run": tf.fill(tf.shape(x), run), "looks": tf.fill(tf.shape(x), looks)}


class Words(tf.Module):
    """A file of words as an asset, and the table that is filled from it when the model is loaded."""

    def __init__(self, path: Path):
        self.path = tf.saved_model.Asset(str(path))
        index = tf.lookup.TextFileIndex
        lines = tf.lookup.TextFileInitializer(self.path, tf.string, index.WHOLE_LINE, tf.int64, index.LINE_NUMBER)
        self.table = tf.lookup.StaticHashTable(lines, -1)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "word")])
    def number(self, word):
        return {"number": self.table.lookup(word)}


def save(module: tf.Module, target: Path, **signatures) -> None:
    tf.saved_model.save(module, str(target), signatures)


def save_with_asset(module_class: type[tf.Module], verb: str, text: str, target: Path) -> None:
    """Write a model that reads a file with this text, <name of the model>.txt, when it is loaded."""
    path = target.with_suffix(".txt")
    path.write_text(text)
    module = module_class(path)
    save(module, target / "1", serving_default=getattr(module, verb))
    path.unlink()  # the SavedModel has its own copy


def save_half_plus_two(target: Path) -> None:
    """Write a model in TensorFlow 1's way: a session, variables by name, signatures made by hand."""
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [None], "x")
        half = v1.get_variable("half", initializer=0.5)
        y = x * half + 2
        session.run(v1.global_variables_initializer())
        v1.saved_model.simple_save(session, str(target / "123"), {"x": x}, {"y": y})


def save_defaults(target: Path) -> None:
    """Write a model with an input that has a default value."""
    with tf.Graph().as_default(), v1.Session() as session:
        x, offset = v1.placeholder(tf.float32, [None], "x"), v1.placeholder(tf.float32, [], "offset")
        signature = v1.saved_model.predict_signature_def({"x": x, "offset": offset}, {"y": x + offset})
        signature.defaults["offset"].CopyFrom(tf.make_tensor_proto(2.0))
        builder = v1.saved_model.Builder(str(target / "1"))
        builder.add_meta_graph_and_variables(session, ["serve"], {"serving_default": signature})
        builder.save()


def save_verbs(target: Path) -> None:
    """Write a model of the older verbs: signatures that take serialized tf.Examples."""
    with tf.Graph().as_default(), v1.Session() as session:
        serialized = v1.placeholder(tf.string, [None], "serialized")
        one = tf.io.FixedLenFeature([1], tf.float32, default_value=[0.0])
        parsed = v1.io.parse_example(serialized, {"x": one, "bias": one})
        score = parsed["x"] + parsed["bias"]
        classes = tf.tile([["yes", "no"]], [tf.shape(score)[0], 1])
        scores = tf.concat([score, 1 - score], 1)
        signatures = {
            "serving_default": v1.saved_model.classification_signature_def(serialized, classes, scores),
            "value": v1.saved_model.regression_signature_def(serialized, score),
        }
        builder = v1.saved_model.Builder(str(target / "1"))
        builder.add_meta_graph_and_variables(session, ["serve"], signatures)
        builder.save()
        write_warm_up(target / "1")
        # The same as TensorFlow 2 writes it: every signature is one to predict with.
        for signature in signatures.values():
            signature.method_name = "tensorflow/serving/predict"
        builder = v1.saved_model.Builder(str(target.with_name("verbs_of_2") / "1"))
        builder.add_meta_graph_and_variables(session, ["serve"], signatures)
        builder.save()


def write_warm_up(folder: Path) -> None:
    """Record a request of each older verb."""
    classify, regress, both = (prediction_log_pb2.PredictionLog() for _ in range(3))
    requests = classify.classify_log.request, regress.regress_log.request, both.multi_inference_log.request
    for request in requests:
        request.input.example_list.examples.add().features.feature["x"].float_list.value.append(0.5)
    requests[1].model_spec.signature_name = "value"
    requests[2].tasks.add(method_name="tensorflow/serving/classify")
    requests[2].tasks.add(method_name="tensorflow/serving/regress").model_spec.signature_name = "value"
    path = folder / "assets.extra" / "tf_serving_warmup_requests"
    path.parent.mkdir()
    with tf.io.TFRecordWriter(str(path)) as writer:
        for log in (classify, regress, both):
            writer.write(log.SerializeToString())


def save_keras(target: Path) -> None:
    """Write a network by Keras's own export, with the answer that the network gives here."""
    keras.utils.set_random_seed(1)
    network = keras.Sequential([keras.Input((3,), name="x"), keras.layers.Dense(2)])
    network.export(str(target / "1"), verbose=False)
    target.with_suffix(".json").write_text(json.dumps(network(tf.constant([[1.0, 2.0, 3.0]])).numpy().tolist()))


def try_damaged(folder: Path, polls: int, settings: LoadSettings) -> list[list]:
    """Poll a damaged version; return after each poll how often it was tried, its state and its error's code.

    Before the last poll its file is another.
    """
    (folder / "1").mkdir(parents=True)
    library = Library(settings)
    library.configs = list(single_model_config("m", str(folder)).model_config_list.config)
    seen = []
    for poll in range(polls):
        if poll in (0, polls - 1):
            (folder / "1" / "saved_model.pb").write_bytes(b"no graph" * (poll + 1))
        changes = library.poll()
        status = library.models["m"].statuses[1]
        seen.append([len(changes), status.state, status.error_code])
    return seen


def main() -> None:
    target = Path(sys.argv[1])
    toys = Toys()
    signatures = {"serving_default": toys.mixed, "texts": toys.texts, "integers": toys.integers, "whole": toys.whole}
    save(toys, target / "toys" / "007", named=toys.named, **signatures)
    save_with_asset(Gated, "double", "/nowhere\n", target / "gated")
    save_with_asset(Words, "number", "benign\nmalignant\n", target / "words")
    save_half_plus_two(target / "half_plus_two")
    save_verbs(target / "verbs")
    save_defaults(target / "defaults")
    save_keras(target / "keras3")
    tried = {
        "at once": try_damaged(target / "at_once", 5, LoadSettings(max_retries=2, retry_interval_s=-1)),
        "later": try_damaged(target / "later", 3, LoadSettings(retry_interval_s=1e9)),
    }
    (target / "tried.json").write_text(json.dumps(tried))
    print("written")


if __name__ == "__main__":
    main()
