"""The OpenAPI description of server.py (GET /openapi.json) and a page that shows it (GET /docs), without network."""

import json
from html import escape

from tensors import FLOAT32_END

VERSION = "1.0"
ROW = [13.82, 24.49, 0.1162, 0.1357, 0.2275]
NUMBER = {"type": "number", "exclusiveMinimum": -FLOAT32_END, "exclusiveMaximum": FLOAT32_END}


def describe(
    models: dict[str, dict], defaults: dict[str, str], model_name: str, max_body_bytes: int, has_metrics: bool
) -> dict:
    """Return the OpenAPI 3.1 description of what is served now.

    `models` holds a Model by name and version, `defaults` the default version by name; `model_name` is the one
    behind /predict.
    """
    error = {
        "type": "object",
        "required": ["error"],
        "properties": {"error": {"type": "string", "description": "what is wrong, where, and what to do"}},
    }
    refusals = {
        "400": "the body does not fit this path",
        "408": "the body did not arrive in time",
        "413": f"the body is larger than {max_body_bytes} bytes",
        "415": "the content type is not application/json",
        "503": "more connections than this server takes: try again",
    }

    def operation(
        summary: str, request: dict | None, reply: dict, codes: tuple[str, ...] = (), body_required: bool = True
    ) -> dict:
        responses = {"200": {"description": "the answer", "content": {"application/json": {"schema": reply}}}}
        for code in codes:
            schema = {"application/json": {"schema": error}}
            responses[code] = {"description": refusals[code]} | ({"content": schema} if code != "503" else {})
        described = {"summary": summary, "responses": responses}
        if request is not None:
            described["requestBody"] = {"required": body_required, "content": {"application/json": request}}
        return described

    anything = {"type": "object"}
    paths = {
        "/v2": {"get": operation("The server's name, version and extensions", None, anything)},
        "/v2/health/live": {"get": operation("Whether the server answers", None, anything)},
        "/v2/health/ready": {"get": operation("Whether it has a model to serve", None, anything, ("503",))},
        "/v2/repository/index": {
            "post": operation(
                "Every version in the repository, and why one is not served",
                {
                    "schema": {"type": "object", "properties": {"ready": {"type": "boolean"}}},
                    "example": {"ready": True},
                },
                {"type": "array", "items": anything},
                tuple(refusals),
                body_required=False,
            )
        },
    }
    posts = tuple(refusals)
    for version, model in models.get(model_name, {}).items():
        if not model.is_rows:
            continue
        schema = {
            "type": "object",
            "required": ["data"],
            "additionalProperties": False,
            "properties": {"data": _rows_schema(model)},
        }
        reply = {
            "type": "object",
            "required": ["predictions"],
            "properties": {"predictions": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}},
        }
        row = model.make_up(next(iter(model.inputs.values())), 1).tolist()
        request = {"schema": schema, "example": {"data": [ROW] if model.features == len(ROW) else row}}
        paths[f"/predict/{version}"] = {
            "post": operation(f"The prediction of each row, by version {version}", request, reply, posts)
        }
        if version == defaults[model_name]:
            summary = f"The prediction of each row, by the default version, now {version}"
            paths["/predict"] = {"post": operation(summary, request, reply, posts)}
    for name, versions in models.items():
        for version, model in versions.items():
            path = f"/v2/models/{name}/versions/{version}"
            request = {"schema": _infer_schema(model), "example": {"inputs": _example_inputs(model)}}
            paths[path] = {"get": operation("Inputs, outputs and versions", None, anything)}
            paths[f"{path}/ready"] = {"get": operation("Whether this version is loaded", None, anything)}
            summary = f"Open Inference Protocol: {_name_tensors(model)}"
            paths[f"{path}/infer"] = {"post": operation(summary, request, anything, posts)}
            if has_metrics:
                paths[f"{path}/stats"] = {"get": operation("How often and how fast it has answered", None, anything)}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "ONNX Runtime server",
            "version": VERSION,
            "description": "Without /versions/<version> a path of /v2/models/<name> means the default version.",
        },
        "paths": paths,
    }


def render_page(description: dict) -> bytes:
    """Return /docs: every path with its summary and, for a POST, a body to try."""
    rows = []
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            content = operation.get("requestBody", {}).get("content", {})
            example = next((value["example"] for value in content.values()), None)
            body = "" if example is None else f"<pre>{escape(json.dumps(example))}</pre>"
            rows.append(
                f"<dt><code>{method.upper()} {escape(path)}</code></dt><dd>{escape(operation['summary'])}{body}"
            )
    title = escape(description["info"]["title"])
    return (
        f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        "<style>body{font:1rem/1.5 sans-serif;max-width:50rem;margin:2rem auto;padding:0 1rem}"
        "pre{overflow-x:auto;background:#8882;padding:.5rem}dd{margin:0 0 1rem}:root{color-scheme:light dark}</style>"
        f"<h1>{title}</h1><p>{escape(description['info']['description'])} Machines read "
        f'<a href="/openapi.json">openapi.json</a>.</p><dl>{"".join(rows)}</dl></html>'
    ).encode()


def _name_tensors(model) -> str:
    tensors = ", ".join(f"{each.name} {each.datatype.name} {list(each.shape)}" for each in model.inputs.values())
    return tensors or "no input"


def _example_inputs(model) -> list[dict]:
    """Return example inputs, ready to send."""
    if model.features == len(ROW):
        return [{"name": model.input_name, "shape": [1, len(ROW)], "datatype": "FP32", "data": ROW}]
    made_up = {tensor: model.make_up(tensor, 1) for tensor in model.inputs.values()}
    return [
        {**tensor.describe(), "shape": list(array.shape), "data": array.ravel()[:50].tolist()}
        for tensor, array in made_up.items()
    ]


def _rows_schema(model) -> dict:
    names = ", ".join(model.feature_names)
    row = {"type": "array", "items": NUMBER, "minItems": model.features, "maxItems": model.features}
    return {"type": "array", "items": row, "minItems": 1, "description": f"rows of {names}"}


def _element_schema(tensor) -> dict:
    kind = tensor.datatype.numpy.kind
    if kind in "iu":
        bits = 8 * tensor.datatype.numpy.itemsize
        signed = kind == "i"
        least = -(2 ** (bits - 1)) if signed else 0
        return {"type": "integer", "minimum": least, "maximum": 2 ** (bits - 1 if signed else bits) - 1}
    if kind == "f":
        return NUMBER if tensor.datatype.name == "FP32" else {"type": "number"}
    return {"type": "boolean" if kind == "b" else "string"}


def _tensor_schema(model, tensor, parameters: dict) -> dict:
    sizes = [{"type": "integer", "minimum": 0} if size == -1 else {"const": size} for size in tensor.shape]
    count = {"minItems": len(sizes), "maxItems": len(sizes)} if tensor.has_rank else {}
    flat = {"type": "array", "items": _element_schema(tensor)}
    return {
        "type": "object",
        "required": ["name", "shape", "datatype", "data"],
        "properties": {
            "name": {"const": tensor.name},
            "shape": {"type": "array", **({"prefixItems": sizes} if sizes else {}), **count},
            "datatype": {"const": tensor.datatype.name},
            "data": {
                "anyOf": [flat, _rows_schema(model) if model.is_rows else {"type": "array"}],
                "description": "as many values as the shape has, flat or nested",
            },
            "parameters": parameters,
        },
    }


def _infer_schema(model) -> dict:
    parameters = {"type": ["object", "null"], "description": "those of the binary tensor extension; others are ignored"}
    tensors = [_tensor_schema(model, tensor, parameters) for tensor in model.inputs.values()]
    output = {
        "type": "object",
        "required": ["name"],
        "properties": {"name": {"enum": list(model.outputs)}, "parameters": parameters},
    }
    inputs = {"type": "array", "minItems": len(tensors), "maxItems": len(tensors)}
    return {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "inputs": inputs | ({"items": tensors[0] if len(tensors) == 1 else {"anyOf": tensors}} if tensors else {}),
            "outputs": {"type": ["array", "null"], "items": output},
            "id": {"type": ["string", "null"]},
            "parameters": parameters,
        },
    }
