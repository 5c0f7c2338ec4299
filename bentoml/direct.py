"""Answer /predict before BentoML does, with one call of the model for requests that arrive together."""

import asyncio
import gc
import json

import numpy as np
from bodies import JsonOnly
from pydantic_core import from_json
from service import MONITOR, VERSIONS, check_features, check_version, load_models, log_predictions
from sklearn.pipeline import Pipeline
from threadpoolctl import threadpool_limits

CONTENT_TYPE = (b"content-type", b"application/json")
MAX_BATCH_ROWS = 1024


class Batcher:
    """Rows of requests that arrive in the same turns of the event loop share one call of the model.

    scikit-learn needs 0.2 ms to check its input and walk through its pipeline, for one row as for a hundred. The first
    request schedules a flush one turn later; the others have joined by then. No request waits for a clock.
    """

    def __init__(self, model: Pipeline):
        self.model = model
        self.waiting: list[tuple[list, asyncio.Future]] = []

    def add(self, rows: list[list[float]]) -> asyncio.Future:
        """Return a future of the probabilities (n, 2) of checked `rows`."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        if not self.waiting:
            loop.call_soon(loop.call_soon, self.flush)
        self.waiting.append((rows, future))
        return future

    def flush(self) -> None:
        """Compute the waiting requests, about MAX_BATCH_ROWS rows at once."""
        while self.waiting:
            batch, count = [], 0
            while self.waiting and count < MAX_BATCH_ROWS:
                batch.append(self.waiting.pop(0))
                count += len(batch[-1][0])
            try:
                answers = self.model.predict_proba(np.array([row for rows, _ in batch for row in rows], np.float64))
            except Exception as error:  # noqa: BLE001 - it becomes each request's error, which BentoML reports
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            start = 0
            for rows, future in batch:
                if not future.done():  # done means cancelled: its client has left
                    future.set_result(answers[start : start + len(rows)])
                start += len(rows)


class DirectPredict(JsonOnly):
    """Answers correct requests to /predict; all others go on to BentoML, which words the refusals."""

    def __init__(self, app):
        super().__init__(app)
        gc.collect()
        gc.freeze()  # the 170,000 objects of imported packages stay, and a collection that walks them takes 0.1 s
        self.batchers = {version: Batcher(model) for version, model in load_models().items()}
        # BLAS starts a thread for each core, and those of two workers compete (REFERENCE.md, "More cores").
        threadpool_limits(limits=1)

    async def answer(self, scope: dict, body: bytes, send) -> bool:
        if scope["path"] != "/predict":
            return False
        try:
            request = from_json(body)
            if not {"features"} <= request.keys() <= {"features", "version"}:
                return False
            features = check_features(request["features"])
            version = check_version(request.get("version", VERSIONS[-1]))
        except (ValueError, AttributeError):  # not JSON, not an object, or a refused value
            return False
        one_row = not isinstance(features[0], list)
        probabilities = await self.batchers[version].add([features] if one_row else features)
        predictions = probabilities.argmax(axis=1).tolist()
        if MONITOR:
            log_predictions(np.array([features] if one_row else features), version, probabilities)
        reply = {
            "version": version,
            "prediction": predictions[0] if one_row else predictions,
            "probability": probabilities[0].tolist() if one_row else probabilities.tolist(),
        }
        encoded = json.dumps(reply, separators=(",", ":")).encode()
        headers = [CONTENT_TYPE, (b"content-length", b"%d" % len(encoded))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": encoded})
        return True
