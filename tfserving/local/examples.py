"""Classify, Regress and MultiInference: tf.Examples in, labelled scores or one value each out.

These are TensorFlow Serving's older verbs (its prediction_service.proto). They work on signatures whose inputs and
outputs have the names that tf.compat.v1.saved_model.classification_signature_def and regression_signature_def write;
the signature parses the serialized examples itself.
"""

import numpy as np
from json_replies import format_float, write_text
from json_requests import decode_base64, invalid, is_base64, json_type, parse, quote, to_bytes
from servables import DEFAULT_SIGNATURE, Servable, ServingError, Signature
from tensorflow.core.example import example_pb2
from tensorflow_serving.apis import classification_pb2, inference_pb2, input_pb2, regression_pb2

CLASSIFY = "tensorflow/serving/classify"
REGRESS = "tensorflow/serving/regress"


def classify(servable: Servable, signature_name: str, examples) -> classification_pb2.ClassificationResult:
    """Return labels and scores of every example of an Input message. Raises ServingError."""
    signature = _choose(servable, signature_name, CLASSIFY, "classification")
    outputs, count = _run(signature, examples)
    classes, scores = outputs.get("classes"), outputs.get("scores")
    if classes is None and scores is None:
        raise ServingError(
            "FAILED_PRECONDITION",
            'Expected classification signature outputs to contain at least one of "classes" or "scores".',
        )
    for name, array, kind in (("classes", classes, "O"), ("scores", scores, "f")):
        if array is not None and array.ndim != 2:
            raise invalid(f"Expected Tensor shape: [batch_size num_classes] but got {_shape(array)}")
        if array is not None and (array.dtype.kind != kind or (kind == "f" and array.dtype != np.float32)):
            raise invalid(f"Expected {name} Tensor of {'DT_STRING' if kind == 'O' else 'DT_FLOAT'}.")
        if array is not None and len(array) != count:
            raise invalid(f"Expected {name} output batch size of {count}. Got: {len(array)}")
    if classes is not None and scores is not None and classes.shape[1] != scores.shape[1]:
        raise invalid(
            f"Tensors class and score should match in dim_size(1). Got {classes.shape[1]} vs. {scores.shape[1]}"
        )
    result = classification_pb2.ClassificationResult()
    for i in range(count):
        row = result.classifications.add()
        for k in range((scores if classes is None else classes).shape[1]):
            label = "" if classes is None else classes[i, k].decode("utf-8", "replace")
            row.classes.add(label=label, score=0.0 if scores is None else scores[i, k])
    return result


def regress(servable: Servable, signature_name: str, examples) -> regression_pb2.RegressionResult:
    """Return one value for every example of an Input message. Raises ServingError."""
    signature = _choose(servable, signature_name, REGRESS, "regression")
    outputs, count = _run(signature, examples)
    values = outputs.get("outputs")
    if values is None:
        raise ServingError("FAILED_PRECONDITION", "No regression outputs found in SignatureDef.")
    if not (values.ndim == 1 or (values.ndim == 2 and values.shape[1] == 1)):
        raise invalid(
            f"Expected output Tensor shape to be either [batch_size] or [batch_size, 1] but got {_shape(values)}"
        )
    if len(values) != count:
        raise invalid(f"Input batch size did not match output batch size. Expected: {count} Got: {len(values)}")
    if values.dtype != np.float32:
        raise invalid("Expected output Tensor of DT_FLOAT.")
    result = regression_pb2.RegressionResult()
    for value in values.ravel().tolist():
        result.regressions.add(value=value)
    return result


def multi_inference(find, request) -> inference_pb2.MultiInferenceResponse:
    """Answer every task of a MultiInferenceRequest on the same examples. Raises ServingError.

    `find` returns the servable that a ModelSpec asks for.
    """
    response = inference_pb2.MultiInferenceResponse()
    names = {task.model_spec.name for task in request.tasks}
    if not request.tasks:
        raise invalid("Inference request must have at least one task.")
    if len(names) > 1:
        raise invalid("All ModelSpecs in a MultiInferenceRequest must access the same model name.")
    seen = set()
    for task in request.tasks:
        spec = task.model_spec
        signature_name = spec.signature_name or DEFAULT_SIGNATURE
        if signature_name in seen:
            raise invalid(f"Duplicate evaluation of signature: {signature_name}")
        seen.add(signature_name)
        servable = find(spec)
        result = response.results.add()
        match task.method_name:
            case "tensorflow/serving/classify":
                result.classification_result.CopyFrom(classify(servable, signature_name, request.input))
            case "tensorflow/serving/regress":
                result.regression_result.CopyFrom(regress(servable, signature_name, request.input))
            case other:
                raise ServingError("UNIMPLEMENTED", f"Unsupported signature method_name: {other}")
        result.model_spec.name = servable.name
        result.model_spec.version.value = servable.version
        result.model_spec.signature_name = signature_name
    return response


def read_json(body: bytes, find_servable) -> tuple[Servable, str, input_pb2.Input]:
    """Return (servable, signature name, examples) of a classify or regress request's JSON. Raises ServingError.

    `{"signature_name": …, "context": {feature: value}, "examples": [{feature: value or list}, …]}`, as in
    TensorFlow Serving's api_rest.md; the type of a feature is that of its JSON values.
    """
    document = parse(body)
    if not isinstance(document, dict):
        raise invalid(f"JSON Value: {quote(document)} Is not object")
    name = document.get("signature_name", "")
    if not isinstance(name, str):
        raise invalid(f"JSON Value: {quote(document)} 'signature_name' key must be a string value.")
    servable = find_servable()
    if "examples" not in document:
        raise invalid(
            f"JSON Value: {quote(document)} When method is classify, key 'examples' is expected and was not found"
        )
    rows = document["examples"]
    if not isinstance(rows, list):
        raise invalid(f"JSON Value: {quote(document)} Expecting 'examples' value to be an list/array")
    if not rows:
        raise invalid(f"JSON Value: {quote(document)} 'examples' value is an empty array")
    examples = input_pb2.Input()
    if "context" in document:
        _fill(document["context"], examples.example_list_with_context.context)
        target = examples.example_list_with_context.examples
    else:
        target = examples.example_list.examples
    for row in rows:
        _fill(row, target.add())
    return servable, name, examples


def write_classifications(result: classification_pb2.ClassificationResult) -> bytes:
    """Return the reply to a REST classify: for each example a list of [label, score]."""
    rows = [
        ", ".join(f"[{write_text(c.label)}, {format_float(c.score)}]" for c in row.classes)
        for row in result.classifications
    ]
    return ('{\n    "results": [' + ", ".join(f"[{row}]" for row in rows) + "\n    ]\n}").encode()


def write_regressions(result: regression_pb2.RegressionResult) -> bytes:
    """Return the reply to a REST regress: a value for each example."""
    values = ", ".join(format_float(regression.value) for regression in result.regressions)
    return f'{{\n    "results": [{values}\n    ]\n}}'.encode()


def _choose(servable: Servable, signature_name: str, method: str, kind: str) -> Signature:
    signature_name = signature_name or DEFAULT_SIGNATURE
    if signature_name not in servable.signatures:
        raise invalid(f"No signature was found with the name: {signature_name}")
    found = servable.definitions[signature_name].method_name
    if servable.checks_method_names and found != method:
        raise invalid(f"Expected {kind} signature method_name to be {method}. Was: {found}")
    signature = servable.signatures[signature_name]
    if list(signature.inputs) != ["inputs"]:
        raise ServingError("FAILED_PRECONDITION", f"No {kind} inputs found in SignatureDef.")
    return signature


def _run(signature: Signature, examples: input_pb2.Input) -> tuple[dict[str, np.ndarray], int]:
    """Return the outputs by alias and the number of examples."""
    kind = examples.WhichOneof("kind")
    if kind is None:
        raise invalid("Input is empty.")
    rows = getattr(examples, kind).examples
    # Concatenated serialized messages are merged; if both have a feature, the later one, the example's, counts.
    common = examples.example_list_with_context.context.SerializeToString() if kind.endswith("context") else b""
    if not rows:
        raise invalid("Input is empty.")
    serialized = np.array([common + row.SerializeToString() for row in rows], dtype=object)
    return signature.run({"inputs": serialized}), len(rows)


def _fill(row, example: example_pb2.Example) -> None:
    """Fill an Example with the features of a JSON object: the type of a feature is that of its values."""
    if not isinstance(row, dict):
        raise invalid(f"Example must be JSON object but got JSON {json_type(row)}")
    for name, value in row.items():
        try:
            feature = example.features.feature[name]
        except UnicodeEncodeError:
            raise invalid(f"Feature: {name} has a name that is not UTF-8") from None
        for item in value if isinstance(value, list) else [value]:
            kind, data = _read_value(name, item)
            known = feature.WhichOneof("kind")
            if known not in (None, f"{kind}_list"):
                raise invalid(
                    f"Unexpected element type in feature: {name} expecting type: {known.removesuffix('_list')}"
                )
            getattr(feature, f"{kind}_list").value.append(data)


def _read_value(name: str, item) -> tuple[str, bytes | int | float]:
    """Return the kind and the value of a feature."""
    if isinstance(item, str):
        return "bytes", to_bytes(item)
    if is_base64(item):
        return "bytes", decode_base64(item)
    if isinstance(item, (dict, list)) or item is None:
        raise invalid(f"Feature: {name} has element with unexpected JSON type: {json_type(item)}")
    if isinstance(item, int) and item < 2**64:  # true and false are 1 and 0
        if item >= 2**63:
            raise invalid(f"Feature: {name} has uint64 element. Only int64 is supported.")
        if item >= -(2**63):
            return "int64", int(item)
    return "float", float(np.float32(item))  # cast as C++ does


def _shape(array: np.ndarray) -> str:
    return f"[{','.join(map(str, array.shape))}]"
