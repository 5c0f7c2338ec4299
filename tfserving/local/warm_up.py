"""Replay the warm-up requests of a SavedModel, so that no client waits for the slow first calls.

They are in assets.extra/tf_serving_warmup_requests, a TFRecord of PredictionLog messages (TensorFlow Serving's
saved_model_warmup.md). Only the kind SessionRunLog is refused, as in TensorFlow Serving.
"""

from pathlib import Path

import examples
from quiet_tensorflow import tf
from servables import DEFAULT_SIGNATURE, Servable, ServingError, read_tensors
from tensorflow_serving.apis import prediction_log_pb2

MAX_RECORDS = 1000  # TensorFlow Serving refuses more


def warm_up(servable: Servable, folder: Path) -> None:
    """Replay the requests of the version in `folder`. ServingError if one fails."""
    path = folder / "assets.extra" / "tf_serving_warmup_requests"
    if not path.exists():
        return
    for i, record in enumerate(tf.compat.v1.io.tf_record_iterator(str(path))):
        if i >= MAX_RECORDS:
            raise ServingError("INVALID_ARGUMENT", f"more than {MAX_RECORDS} warm-up records: {path}")
        replay(servable, prediction_log_pb2.PredictionLog.FromString(record), f"record {i}: {path}")


def replay(servable: Servable, log: prediction_log_pb2.PredictionLog, place: str) -> None:
    """Answer one recorded request, ignoring the model and version that it names. ServingError if that fails."""
    match log.WhichOneof("log_type"):
        case "predict_log":
            request = log.predict_log.request
            servable.predict(read_tensors(request.inputs), request.model_spec.signature_name, request.output_filter)
        case "classify_log":
            request = log.classify_log.request
            examples.classify(servable, request.model_spec.signature_name or DEFAULT_SIGNATURE, request.input)
        case "regress_log":
            request = log.regress_log.request
            examples.regress(servable, request.model_spec.signature_name or DEFAULT_SIGNATURE, request.input)
        case "multi_inference_log":
            examples.multi_inference(lambda _: servable, log.multi_inference_log.request)
        case other:
            raise ServingError("UNIMPLEMENTED", f"Unsupported log_type for warmup: {other}; {place}")
