"""A server for the tests in all four servers' forms: P(benign) is a hundredth of the row's first number.

    python toy_predictors.py VERSION REST_PORT [GRPC_PORT]

Version 2 takes the second number. The body {"fail": 500} is answered with that status; {"wait": 0.2} waits, and
{"length": 9000} is answered with so many bytes.
Over gRPC it speaks TensorFlow Serving's Predict and TorchServe's Predictions; a first number above 100 is INTERNAL.
"""

import asyncio
import json
import sys
from pathlib import Path

import uvicorn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

VERSION, REST_PORT = sys.argv[1], int(sys.argv[2])
GRPC_PORT = int(sys.argv[3]) if len(sys.argv) > 3 else None


def answer(row: list[float]) -> list[float]:
    benign = row[int(VERSION) - 1] / 100
    return [1 - benign, benign]


async def app(scope, receive, send) -> None:
    if scope["type"] != "http":
        return
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    status, reply = (200, 1) if scope["path"] == "/metrics" else respond(scope["path"], body)
    if isinstance(reply, dict) and "wait" in reply:
        await asyncio.sleep(reply["wait"])
    content = b"toy 1\n" if scope["path"] == "/metrics" else json.dumps(reply).encode()
    if isinstance(reply, dict):
        content = content.ljust(reply.get("length", 0))
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def respond(path: str, body: bytes) -> tuple[int, object]:
    try:
        asked = json.loads(body)
        if "fail" in asked:
            return asked["fail"], {"error": "as asked"}
        if "inputs" in asked:
            [tensor] = asked["inputs"]
            n, k = tensor["shape"]
            answers = [answer(tensor["data"][i * k : i * k + k]) for i in range(n)]
            data = [number for pair in answers for number in pair]
            output = {"name": "probabilities", "datatype": "FP32", "shape": [n, 2], "data": data}
            return 200, {"outputs": [output]}
        rows = next(asked[key] for key in ("data", "features", "instances") if key in asked)
        answers = [answer(row) for row in rows]
    except (ValueError, KeyError, TypeError, IndexError, StopIteration, AttributeError):
        return 400, {"error": "no rows"}
    extra = {key: asked[key] for key in ("wait", "length") if key in asked}
    if path.startswith("/predictions/"):
        return 200, answers
    if "features" in asked:
        return 200, {"version": VERSION, "prediction": [], "probability": answers, **extra}
    return 200, {"predictions": answers, **extra}


async def serve_grpc():
    """Return the server, which ends when nobody holds it."""
    import grpc
    import numpy as np

    from endpoints import predict_messages
    from endpoints.endpoint_torchserve import _messages

    async def predict(request: bytes, context) -> bytes:
        messages = predict_messages.import_messages()
        tensor = messages.PredictRequest.FromString(request).inputs["features"]
        rows = np.frombuffer(tensor.tensor_content, "<f4").reshape(-1, 5).tolist()
        if rows[0][0] > 100:
            await context.abort(grpc.StatusCode.INTERNAL, "as asked")
        reply = messages.PredictResponse()
        output = reply.outputs["probabilities"]
        output.dtype = 1
        for size in (len(rows), 2):
            output.tensor_shape.dim.add(size=size)
        output.float_val.extend(number for row in rows for number in answer(row))
        return reply.SerializeToString()

    async def predictions(request: bytes, context) -> bytes:
        found = _messages()["PredictionsRequest"].FromString(request)
        rows = json.loads(next(field.value for field in found.input if field.key == "data"))
        return _messages()["PredictionResponse"](
            prediction=json.dumps([answer(row) for row in rows]).encode()
        ).SerializeToString()

    def handle(service: str, **methods):
        handlers = {name: grpc.unary_unary_rpc_method_handler(method) for name, method in methods.items()}
        return grpc.method_handlers_generic_handler(service, handlers)

    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        (
            handle("tensorflow.serving.PredictionService", Predict=predict),
            handle("org.pytorch.serve.grpc.inference.InferenceAPIsService", Predictions=predictions),
        )
    )
    server.add_insecure_port(f"127.0.0.1:{GRPC_PORT}")
    await server.start()
    return server


async def main() -> None:
    if GRPC_PORT:
        server = await serve_grpc()  # noqa: F841
    config = uvicorn.Config(app, port=REST_PORT, log_level="error", access_log=False, loop="asyncio", http="httptools")
    await uvicorn.Server(config).serve()


if __name__ == "__main__":
    asyncio.run(main())
