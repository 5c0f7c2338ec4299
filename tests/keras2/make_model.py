"""Write a SavedModel as Keras 2 did, which most models in the field were written with.

    pip install tf-keras==2.21.0 && python make_model.py

Writes 1/ beside it, which is committed: tf-keras is in nobody's environment. tests/test_tfserving_local_server.py
serves it and compares with expected.json.
"""

import json
import os
from pathlib import Path

os.environ["TF_USE_LEGACY_KERAS"] = "1"

import tensorflow as tf
import tf_keras

HERE = Path(__file__).resolve().parent
ROWS = [[1.0, 2.0, 3.0], [-1.0, 0.5, 0.0]]


def main() -> None:
    tf_keras.utils.set_random_seed(1)
    network = tf_keras.Sequential(
        [
            tf_keras.layers.Dense(4, activation="relu", input_shape=(3,)),
            tf_keras.layers.BatchNormalization(),
            tf_keras.layers.Dense(2, activation="softmax"),
        ]
    )
    network.compile(optimizer="adam", loss="categorical_crossentropy")
    network.fit(tf.random.normal((64, 3)), tf.one_hot(tf.zeros(64, tf.int32), 2), epochs=2, verbose=0)
    network.save(HERE / "1", save_format="tf")
    expected = {"rows": ROWS, "probabilities": network(tf.constant(ROWS)).numpy().tolist()}
    (HERE / "expected.json").write_text(json.dumps(expected) + "\n")
    print(f"wrote {HERE / '1'} and expected.json")


if __name__ == "__main__":
    main()
