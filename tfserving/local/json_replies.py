"""Write arrays as the JSON of a predict reply, byte for byte as TensorFlow Serving does."""

import base64
import json
import math

import numpy as np
from quiet_tensorflow import tf
from servables import ServingError, type_name

ESCAPES = {code: f"\\u{code:04X}" for code in range(32)}
ESCAPES |= {ord(character): f"\\{letter}" for character, letter in zip('"\\\b\f\n\r\t', '"\\bfnrt', strict=True)}


def format_float(value: float, dtype: type = np.float32) -> str:
    """Return `value` in six digits if they suffice to read the same float again, else in nine (double: 17)."""
    if value != value:
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    text = f"{value:.6g}"
    # What rounds to a float32 is at most 2^-24 of its value away (7e-46 near zero); most values fail this cheap test.
    if abs(float(text) - value) > 6e-8 * abs(value) + 7.1e-46 or dtype(text) != dtype(value):
        text = f"{value:.9g}" if dtype is np.float32 else f"{value:.17g}"
    return text if "." in text or "e" in text else f"{text}.0"


def write_text(text: str) -> str:
    """Return a string as RapidJSON writes it."""
    return f'"{text.translate(ESCAPES)}"'


def _format_values(alias: str, array: np.ndarray) -> list[str]:
    """Return every value of `array` as JSON, in order."""
    values = array.ravel().tolist()
    match array.dtype.kind:
        case "f":
            dtype = np.float64 if array.dtype == np.float64 else np.float32
            return [format_float(value, dtype) for value in values]
        case "i" | "u":
            return [str(value) for value in values]
        case "b":
            return ["true" if value else "false" for value in values]
        case "O" if alias.endswith("_bytes"):
            return [json.dumps({"b64": base64.b64encode(value).decode()}) for value in values]
        case "O":
            return [write_text(value.decode("utf-8", "replace")) for value in values]
    kind = type_name(tf.dtypes.as_dtype(array.dtype).as_datatype_enum)
    raise ServingError("INVALID_ARGUMENT", f"Failed to write JSON value for tensor type: {kind}")


def _nest(texts: list[str], shape: tuple[int, ...], indent: str | None) -> str:
    """Join `texts` into nested arrays, on one line if `indent` is None, else one value a line."""
    if not shape:
        return texts[0]
    if not shape[0]:
        return "[]"
    size = len(texts) // shape[0]
    inner = None if indent is None else f"{indent}    "
    items = [_nest(texts[i * size : (i + 1) * size], shape[1:], inner) for i in range(shape[0])]
    if indent is None:
        return f"[{', '.join(items)}]"
    lines = f",\n{inner}".join(items)
    return f"[\n{inner}{lines}\n{indent}]"


def check_outputs(outputs: dict[str, np.ndarray]) -> None:
    if not outputs:
        raise ServingError("INVALID_ARGUMENT", "Cannot convert empty tensor map to JSON")


def write_rows(outputs: dict[str, np.ndarray]) -> bytes:
    """Return the reply to `instances`, laid out as by TensorFlow Serving. A single output drops its name."""
    rows = None
    texts = {}
    check_outputs(outputs)
    for alias, array in outputs.items():
        if not array.ndim:
            raise ServingError("INVALID_ARGUMENT", f"Tensor name: {alias} has no shape information ")
        if not len(array):
            raise ServingError("INVALID_ARGUMENT", f"Tensor name: {alias} has invalid batch size: 0")
        if rows not in (None, len(array)):
            raise ServingError(
                "INVALID_ARGUMENT", f"Tensor name: {alias} has inconsistent batch size: {len(array)} expecting: {rows}"
            )
        rows = len(array)
        values = _format_values(alias, array)
        size = len(values) // rows
        texts[alias] = [_nest(values[i * size : (i + 1) * size], array.shape[1:], None) for i in range(rows)]
    if len(texts) == 1:
        predictions = ", ".join(*texts.values())
    else:
        objects = [",\n".join(f'            "{alias}": {texts[alias][i]}' for alias in texts) for i in range(rows)]
        predictions = ",".join(f"\n        {{\n{text}\n        }}" for text in objects)
    return f'{{\n    "predictions": [{predictions}\n    ]\n}}'.encode()


def write_columns(outputs: dict[str, np.ndarray]) -> bytes:
    """Return the reply to `inputs`: whole tensors. A single output drops its name."""
    check_outputs(outputs)
    texts = {alias: _format_values(alias, array) for alias, array in outputs.items()}
    if len(texts) == 1:
        ((alias, values),) = texts.items()
        value = _nest(values, outputs[alias].shape, "    ")
    else:
        members = [f'        "{alias}": {_nest(texts[alias], outputs[alias].shape, " " * 8)}' for alias in texts]
        value = "{\n" + ",\n".join(members) + "\n    }"
    return f'{{\n    "outputs": {value}\n}}'.encode()


def write_error(message: str) -> bytes:
    """Return the body of an error reply."""
    return f'{{\n    "error": {write_text(message)}\n}}'.encode("utf-8", "replace")
