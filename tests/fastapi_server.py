"""The server that most tutorials write, FastAPI and pydantic, to compare onnx/server.py with: one run a request.

python fastapi_server.py PORT
"""

import os
import sys
from pathlib import Path

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime as ort
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

MODEL_PATH = Path(__file__).resolve().parent.parent / "onnx" / "models" / "my_model" / "1" / "model.onnx"


class PredictRequest(BaseModel):
    data: list[tuple[float, float, float, float, float]]


class PredictReply(BaseModel):
    predictions: list[list[float]]


options = ort.SessionOptions()
options.intra_op_num_threads = 1
session = ort.InferenceSession(MODEL_PATH, options, ["CPUExecutionProvider"])
app = FastAPI()


@app.post("/predict/1")
async def predict(request: PredictRequest) -> PredictReply:
    return PredictReply(predictions=session.run(None, {"input": np.array(request.data, np.float32)})[0].tolist())


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), loop="uvloop", http="httptools", access_log=False, log_level="warning")
