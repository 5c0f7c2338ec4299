"""Serve both saved versions of the classifier over HTTP, as a BentoML service.

    bentoml serve service:svc

Answers POST http://127.0.0.1:3000/predict. Run python train_and_save.py first.
"""

import bentoml
import numpy as np
from pydantic import BaseModel

class Classifier:
    v1 = bentoml.models.BentoModel("my_model:v1.0.0")
    v2 = bentoml.models.BentoModel("my_model:v2.0.0")

    def __init__(self):
        self.m = bentoml.sklearn.load_model(self.v1)

    @bentoml.api
    async def predict(self, features: list[float]) -> dict:
        p = self.m.predict_proba([features])[0]
        return {"prediction": int(p.argmax()), "probability": p.tolist()}

svc = bentoml.service(name="my_model_service", http={"host": "127.0.0.1"})(Classifier)
