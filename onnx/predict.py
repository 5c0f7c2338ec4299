"""POST /predict: rows in, one prediction for each out; a shorter form than the Open Inference Protocol."""

import msgspec
from batching import Job
from http_messages import JSON, Refusal, Request
from models import Model
from open_inference import not_finite
from tensors import Float32, decode_json, encode


class PredictCodec:
    """Reads and writes the requests to one model of rows: {"data": [[k numbers], ...]} to {"predictions": [...]}."""

    def __init__(self, model: Model):
        self.model = model
        # Typed decoding refuses values that NumPy would silently accept (true, "1.5"), and reports their place.
        row = tuple[(Float32,) * model.features]
        body = msgspec.defstruct("PredictRequest", [("data", list[row])], forbid_unknown_fields=True)
        self.decode = msgspec.json.Decoder(body).decode

    def read(self, request: Request) -> Job:
        """Return the job of the rows; Refusal if the body does not hold rows of this model."""
        try:
            rows = self.decode(request.body).data
        except msgspec.ValidationError:
            self.explain(request.body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            decode_json(self.decode, request.body)  # raises the reason
        if not rows:
            raise Refusal(400, "rows are empty: send at least one")
        return Job(rows, len(rows), len(rows) * self.model.features, True)

    def explain(self, body: bytes) -> None:
        """Raise Refusal for JSON that is not rows, with the name of the wrong feature."""
        try:
            decode_json(self.decode, body)
        except Refusal as refusal:
            message = self.model.name_place(str(refusal))
            if message == str(refusal):  # the fault is outside the rows
                message += f'; send {{"data": [[{self.model.features} numbers], ...]}}'
            raise Refusal(400, message) from None

    def write(self, _: None, answer: list[list[float]]) -> tuple[bytes, bytes, bytes]:
        """Return body, content type and further lines of the reply's head."""
        body = encode({"predictions": answer})
        if b"null" in body:  # msgspec writes NaN and infinity as null
            raise Refusal(400, not_finite(answer).partition(";")[0])
        return body, JSON, b""
